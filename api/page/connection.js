// Whether the server is there and ready: asked now and then while the page is seen, every second
// while it is not ready.

import { request } from "./api.js";

const READY_MS = 10_000;
const AWAY_MS = 1_000;

/** `onChange` gets {state: "ready" | "waiting" | "away", phase, percent} whenever it changes. */
export class Connection {
  #onChange;
  #timer = 0;
  #asking = null;
  status = { state: "unknown", phase: "", percent: null };

  constructor(onChange) {
    this.#onChange = onChange;
    document.addEventListener("visibilitychange", () => this.check());
    window.addEventListener("online", () => this.check());
  }

  /** Ask now. */
  async check() {
    clearTimeout(this.#timer);
    if (document.visibilityState !== "visible") return;
    this.#asking ??= this.#ask().finally(() => {
      this.#asking = null;
    });
    await this.#asking;
    clearTimeout(this.#timer);
    const delay = this.status.state === "ready" ? READY_MS : AWAY_MS;
    this.#timer = setTimeout(() => this.check(), delay);
  }

  async #ask() {
    let status = { state: "ready", phase: "", percent: null };
    try {
      await request("ready", { withKey: false, signal: AbortSignal.timeout(5_000) });
    } catch (error) {
      const body = error.body;
      status = body?.status
        ? { state: "waiting", phase: body.phase, percent: body.percent }
        : { state: "away", phase: "", percent: null };
    }
    const before = this.status;
    this.status = status;
    if (JSON.stringify(before) !== JSON.stringify(status)) this.#onChange(status);
  }
}
