// What the reader chose, and the request that follows from it.

import { read, write } from "./store.js";

const NUMBERS = ["temperature", "topP", "maxTokens"];

export function settings() {
  return { system: "", temperature: null, topP: null, maxTokens: null, thinking: "", model: "",
    ...read("settings", {}) };
}

export function change(name, value) {
  write("settings", { ...settings(), [name]: value });
}

/** The request for the turns so far. What is left empty is left out: the server's default counts. */
export function requestBody(turns) {
  const chosen = settings();
  const body = {
    messages: messagesOf(turns, chosen.system),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (chosen.model) body.model = chosen.model;
  if (chosen.temperature !== null) body.temperature = chosen.temperature;
  if (chosen.topP !== null) body.top_p = chosen.topP;
  if (chosen.maxTokens !== null) body.max_tokens = chosen.maxTokens;
  if (chosen.thinking) body.thinking = { type: chosen.thinking };
  return body;
}

function messagesOf(turns, system) {
  const messages = turns
    .filter((turn) => turn.content !== "")
    .map((turn) => ({ role: turn.role, content: turn.content }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  return messages;
}

/** Fill the fields of `form`, each named as its setting, and keep what is entered. */
export function bindFields(form) {
  const chosen = settings();
  for (const [name, value] of Object.entries(chosen)) {
    const field = form.elements[name];
    if (!field) continue;
    field.value = value ?? "";
    field.addEventListener("input", () => {
      if (!NUMBERS.includes(name)) {
        change(name, field.value);
      } else if (field.validity.valid) {
        change(name, field.value === "" ? null : field.valueAsNumber);
      }
    });
  }
}
