// The engine's live figures, asked for once a second while somebody looks.

import { requestJson } from "./api.js";
import { errorText } from "./turns.js";
import { count, say } from "./words.js";

const EVERY_MS = 1_000;
const MAX_SAMPLES = 120;
const SVG = "http://www.w3.org/2000/svg";

export class Figures {
  #samples = [];
  #timer = 0;
  #shown = false;
  #asking = false;
  #latest = null;
  #refused = null; // the error after which asking again is no use

  constructor(root) {
    this.root = root;
    document.addEventListener("visibilitychange", () => this.#poll());
  }

  show() {
    this.#shown = true;
    this.#poll();
  }

  hide() {
    this.#shown = false;
    clearTimeout(this.#timer);
  }

  /** Another key, or another server: ask again. */
  retry() {
    this.#refused = null;
    this.#poll();
  }

  /** In the reader's language, as it is now. */
  draw() {
    if (this.#refused) this.#drawNote(this.#noteOf(this.#refused));
    else if (this.#latest) this.#drawFigures(this.#latest);
  }

  async #poll() {
    clearTimeout(this.#timer);
    const isSeen = this.#shown && document.visibilityState === "visible";
    if (!isSeen || this.#asking || this.#refused) return;
    this.#asking = true;
    try {
      this.#latest = await requestJson("stats", { signal: AbortSignal.timeout(5_000) });
      this.#samples.push(Number(this.#latest.tokens_per_second) || 0);
      this.#samples.splice(0, this.#samples.length - MAX_SAMPLES);
      this.#drawFigures(this.#latest);
    } catch (error) {
      const status = error.status ?? 0;
      if ([401, 403, 404, 429].includes(status)) this.#refused = error;
      this.#drawNote(this.#noteOf(error));
    } finally {
      this.#asking = false;
    }
    if (this.#shown) this.#timer = setTimeout(() => this.#poll(), EVERY_MS);
  }

  #noteOf(error) {
    if (error.status === 404) return say("figuresNone");
    if (!error.status) return say("figuresAway");
    return errorText(error);
  }

  #drawNote(text) {
    const note = element("p", "note", text);
    this.root.replaceChildren(note);
  }

  #drawFigures(stats) {
    const hits = stats.prompt_tokens_total
      ? `${count((100 * stats.cached_tokens_total) / stats.prompt_tokens_total)} %`
      : "–";
    const ttft = stats.ttft_seconds_p50;
    const tiles = element("div", "tiles");
    tiles.append(
      tile("running", count(stats.num_running)),
      tile("queued", count(stats.num_waiting)),
      tile("cacheHits", hits, say("cacheHitsNote", {
        cached: count(stats.cached_tokens_total),
        count: count(stats.prompt_tokens_total),
      })),
      tile("firstToken", ttft === null || ttft === undefined ? "–" : seconds(ttft),
        say("firstTokenNote")),
    );
    const speed = element("section", "panel speed");
    speed.append(
      element("h2", "", say("generation")),
      element("p", "figure", count(stats.tokens_per_second, 1)),
      sparkline(this.#samples),
      element("p", "note", say("generationNote")),
    );
    this.root.replaceChildren(
      element("p", "note head", `${stats.model} · ${say("uptime")} ${duration(
        stats.uptime_seconds)} · ${say("restarts", { count: count(stats.restarts) })}`),
      tiles, speed, pagesPanel(stats), requestsPanel(stats),
    );
  }
}

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tile(word, value, note = "") {
  const made = element("section", "panel tile");
  made.append(element("h2", "", say(word)), element("p", "figure", value));
  if (note) made.append(element("p", "note", note));
  return made;
}

/** A line over the last samples, the latest at the right end. */
function sparkline(samples) {
  const highest = Math.max(1, ...samples);
  const first = MAX_SAMPLES - samples.length;
  const points = samples.map((value, index) => [first + index, 40 - (38 * value) / highest]);
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${MAX_SAMPLES - 1} 41`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("class", "sparkline");
  drawing.setAttribute("aria-hidden", "true");
  const line = points.map((point) => point.join(",")).join(" ");
  const area = document.createElementNS(SVG, "polygon");
  area.setAttribute("points", `${first},41 ${line} ${MAX_SAMPLES - 1},41`);
  const stroke = document.createElementNS(SVG, "polyline");
  stroke.setAttribute("points", line);
  drawing.append(area, stroke);
  return drawing;
}

/** Pages in use, pages that a later prompt may find again, and empty ones. */
export function shares({ num_pages: all, num_free_pages: free, num_cached_pages: published }) {
  const used = all - free;
  // Published pages may be in use as well, and then they count as used.
  const cached = Math.min(free, Math.max(0, published - used));
  return { used, cached, free: free - cached };
}

function pagesPanel(stats) {
  const panel = element("section", "panel pages");
  const bar = element("div", "bar");
  const legend = element("ul", "legend");
  const parts = shares(stats);
  const words = { used: "pagesUsed", cached: "pagesCached", free: "pagesFree" };
  for (const [name, word] of Object.entries(words)) {
    const share = element("span", name);
    share.style.flexGrow = String(parts[name]);
    bar.append(share);
    legend.append(element("li", name, `${count(parts[name])} ${say(word)}`));
  }
  bar.setAttribute("aria-hidden", "true");
  panel.append(element("h2", "", say("pages")), bar, legend);
  return panel;
}

function requestsPanel(stats) {
  const panel = element("section", "panel requests");
  panel.append(element("h2", "", say("requests")));
  if (stats.requests.length === 0) {
    panel.append(element("p", "note", say("requestsNone")));
  } else {
    const table = element("table", "");
    const head = table.createTHead().insertRow();
    for (const word of ["request", "key", "prompt", "answer", "time"]) {
      head.append(element("th", "", say(word)));
    }
    const body = table.createTBody();
    for (const request of stats.requests) {
      const row = body.insertRow();
      row.append(
        element("td", "id", request.id),
        element("td", "id", request.key_id ?? "–"),
        element("td", "", count(request.prompt_tokens)),
        element("td", "", count(request.completion_tokens)),
        element("td", "", seconds(request.seconds)),
      );
    }
    const holder = element("div", "table");
    holder.append(table);
    panel.append(holder);
  }
  const ended = Object.entries(stats.requests_total).map(
    ([outcome, number]) => `${outcome} ${count(number)}`,
  );
  if (ended.length > 0) {
    panel.append(element("p", "note", `${say("outcomes")}: ${ended.join(" · ")}`));
  }
  return panel;
}

function seconds(value) {
  return value < 1 ? `${count(1000 * value)} ms` : `${count(value, 1)} s`;
}

function duration(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 1) return `${Math.floor(value)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d`;
}
