// Requests to the server that gave out this page, and the reading of its event streams.

import { read } from "./store.js";

/** An error that the server sent, or `status` 0 if it cannot be reached. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function address(path) {
  return new URL(path, document.baseURI);
}

export async function request(path, { body, signal, withKey = true } = {}) {
  const headers = {};
  const key = read("key", "");
  // Such a key cannot be put into a header, so no server can have made it.
  if (withKey && /[^\x21-\x7e]/.test(key)) throw new ApiError(401, "invalid_api_key", "");
  if (withKey && key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export async function requestJson(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "");
  }
}

async function errorOf(response) {
  try {
    const body = await response.json();
    const made = new ApiError(response.status, body.error.code, body.error.message);
    made.body = body;
    return made;
  } catch {
    return new ApiError(response.status, "unknown", `HTTP ${response.status}`);
  }
}

/**
 * Server-sent events from bytes that are split anywhere, in a character or between CR and LF too.
 * Comments and fields other than `data` mean nothing here.
 */
export class EventParser {
  #decoder = new TextDecoder();
  #line = "";
  #data = [];
  #afterReturn = false;

  /** The data of each event that these bytes complete. */
  feed(bytes) {
    const events = [];
    for (const part of this.#decoder.decode(bytes, { stream: true }).split(/(\r\n|\r|\n)/)) {
      if (part === "\n" && this.#afterReturn && this.#line === "") {
        this.#afterReturn = false;
        continue;
      }
      if (part === "\n" || part === "\r" || part === "\r\n") {
        this.#afterReturn = part === "\r";
        this.#endLine(events);
      } else if (part !== "") {
        this.#afterReturn = false;
        this.#line += part;
      }
    }
    return events;
  }

  #endLine(events) {
    const line = this.#line;
    this.#line = "";
    if (line === "") {
      if (this.#data.length > 0) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      this.#data.push(line.slice(5).replace(/^ /, ""));
    }
  }
}

/**
 * The chunks of a streamed chat answer. Throws `ApiError` for a refusal, for an error event, and
 * with the code `broken_stream` if the stream ends before its end.
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { body, signal });
  const reader = response.body.getReader();
  const parser = new EventParser();
  try {
    while (true) {
      let result;
      try {
        result = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "broken_stream", "");
      }
      if (result.done) throw new ApiError(0, "broken_stream", "");
      for (const data of parser.feed(result.value)) {
        if (data === "[DONE]") return;
        const chunk = parseChunk(data);
        if (chunk.error) throw new ApiError(200, chunk.error.code, chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseChunk(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(0, "broken_stream", "");
  }
}
