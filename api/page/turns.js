// One turn of a conversation as elements that follow its data.

import { Rendering } from "./markdown.js";
import { count, say } from "./words.js";

function make(name, className, parent) {
  const element = document.createElement(name);
  element.className = className;
  parent?.append(element);
  return element;
}

function button(word, parent, onClick) {
  const element = make("button", "quiet", parent);
  element.type = "button";
  element.textContent = say(word);
  element.addEventListener("click", () => onClick(element));
  return element;
}

/** What went wrong, in the reader's language where the page knows the error. */
export function errorText({ status, code, message }) {
  if (code === "broken_stream") return say("errorBroken");
  if (status === 0) return say("errorUnreachable");
  if (status === 401) return say(code === "missing_api_key" ? "errorKeyMissing" : "errorKeyWrong");
  if (code === "too_many_failed_keys") return say("errorTooManyKeys");
  if (status === 429) return say("errorBusy");
  if (code === "model_loading") return say("errorLoading");
  return say("errorOther", { message });
}

export function userTurn(turn) {
  const element = make("article", "turn user");
  make("h2", "hidden", element).textContent = say("you");
  make("div", "text", element).textContent = turn.content;
  return element;
}

/** An answer. `actions` are `again` and `copy`; `keep` is called when the thought is opened. */
export class AnswerView {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.element = make("article", "turn assistant");
    make("h2", "hidden", this.element).textContent = turn.model || "Fathom";
    this.details = make("details", "thought", this.element);
    this.details.open = Boolean(turn.open);
    this.details.addEventListener("toggle", () => {
      if (turn.open !== this.details.open) {
        turn.open = this.details.open;
        actions.keep();
      }
    });
    this.summary = make("summary", "", this.details);
    this.thought = document.createTextNode("");
    make("div", "text", this.details).append(this.thought);
    this.waiting = make("p", "waiting", this.element);
    this.rendering = new Rendering(make("div", "answer", this.element));
    this.error = make("p", "error", this.element);
    this.error.setAttribute("role", "alert");
    this.foot = make("footer", "facts", this.element);
  }

  /** Show what the turn holds now; `run` is its request while there is one. */
  update(run, isLast) {
    const { turn } = this;
    this.element.setAttribute("aria-busy", String(Boolean(run)));
    this.details.hidden = turn.thought === "";
    this.thought.appendData(turn.thought.slice(this.thought.length));
    this.summary.textContent = this.#thoughtTitle(run);
    this.details.classList.toggle("running", Boolean(run) && turn.content === "");
    this.waiting.hidden = !run || turn.thought !== "" || turn.content !== "";
    this.waiting.textContent = say("waiting");
    this.rendering.update(turn.content);
    const error = turn.error ?? (turn.unfinished && !run ? { code: "broken_stream" } : null);
    this.error.hidden = !error;
    this.error.textContent = error ? errorText(error) : "";
    this.foot.hidden = Boolean(run);
    if (!run) this.#updateFoot(isLast, Boolean(error));
  }

  #thoughtTitle(run) {
    const { turn } = this;
    if (run && turn.content === "") {
      return say("thinking", { seconds: Math.floor(run.secondsOfThought()) });
    }
    if (!(turn.thoughtSeconds >= 0.1)) return say("thoughtPlain");
    return say("thought", { seconds: count(turn.thoughtSeconds, turn.thoughtSeconds < 10 ? 1 : 0) });
  }

  #updateFoot(isLast, failed) {
    const { turn, foot } = this;
    foot.replaceChildren();
    for (const fact of this.#facts(failed)) make("span", "fact", foot).textContent = fact;
    const buttons = make("span", "buttons", foot);
    if (turn.content && navigator.clipboard) {
      button("copy", buttons, async (pressed) => {
        await navigator.clipboard.writeText(turn.content);
        pressed.textContent = say("copied");
      });
    }
    if (isLast) button(failed ? "tryAgain" : "regenerate", buttons, this.actions.again);
  }

  #facts(failed) {
    const { turn } = this;
    const facts = [];
    if (turn.stopped) facts.push(say("stopped"));
    if (turn.finish === "length") facts.push(say("endedLength"));
    else if (turn.finish && turn.finish !== "stop") {
      facts.push(say("endedOther", { reason: turn.finish }));
    } else if (!turn.content && !turn.stopped && !failed) facts.push(say("emptyAnswer"));
    if (turn.speed) facts.push(say("speed", { speed: count(turn.speed, turn.speed < 10 ? 1 : 0) }));
    if (turn.usage) {
      const { completion_tokens: tokens, prompt_tokens: prompt } = turn.usage;
      const cached = turn.usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(say("tokens", { count: count(tokens) }));
      facts.push(say("cached", { cached: count(cached), count: count(prompt) }));
    }
    return facts;
  }
}
