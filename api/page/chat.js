// Conversations: sending, streaming, stopping, and the list of them.

import { streamChat } from "./api.js";
import { requestBody, settings } from "./settings.js";
import * as store from "./store.js";
import { AnswerView, userTurn } from "./turns.js";
import { say } from "./words.js";

const KEEP_MS = 1_000;
const STICKS_WITHIN = 48; // pixels from the end at which the view follows what is added

/** A request that is being answered, and what is measured of it. Times are in milliseconds. */
class Run {
  controller = new AbortController();
  firstToken = null;
  lastToken = null;
  firstThought = null;

  constructor(turn) {
    this.turn = turn;
  }

  secondsOfThought() {
    return this.firstThought === null ? 0 : (performance.now() - this.firstThought) / 1000;
  }

  take(chunk) {
    if (chunk.usage) this.turn.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
    const content = choice.delta?.content ?? "";
    const now = performance.now();
    if (thought || content) {
      this.firstToken ??= now;
      this.lastToken = now;
    }
    if (thought) this.firstThought ??= now;
    if (content && this.turn.content === "") this.endThought();
    this.turn.thought += thought;
    this.turn.content += content;
    if (choice.finish_reason) this.turn.finish = choice.finish_reason;
  }

  endThought() {
    if (this.firstThought !== null) this.turn.thoughtSeconds ??= this.secondsOfThought();
  }

  /** Tokens after the first, over the time since the first. */
  measure() {
    this.endThought();
    const tokens = (this.turn.usage?.completion_tokens ?? 0) - 1;
    const seconds = (this.lastToken - this.firstToken) / 1000;
    if (tokens > 0 && seconds > 0) this.turn.speed = tokens / seconds;
  }
}

export class Chat {
  #runs = new Map(); // id of a conversation -> its Run
  #views = []; // of the current conversation's answers
  #frame = 0;
  #lastKept = 0;

  /** `elements` are list, turns, input, send, stop; `onError` is told what a request ended in. */
  constructor(elements, onError) {
    this.elements = elements;
    this.onError = onError;
    elements.input.addEventListener("input", () => this.#keepDraft());
    setInterval(() => this.#runs.size > 0 && this.#schedule(), 1_000);
    window.addEventListener("storage", () => this.#readAgain());
    const kept = store.readConversations();
    const id = store.read("current", "");
    const current = kept.find((conversation) => conversation.id === id);
    this.open(current ?? (id ? { ...store.newConversation(), id } : store.newConversation()));
  }

  get isRunning() {
    return this.#runs.has(this.current.id);
  }

  open(conversation) {
    this.current = this.#runs.get(conversation.id)?.conversation ?? conversation;
    store.write("current", conversation.id);
    this.elements.input.value = store.read(`draft.${conversation.id}`, "");
    fitHeight(this.elements.input);
    this.draw();
  }

  create() {
    if (this.current.turns.length > 0) this.open(store.newConversation());
    this.elements.input.focus();
  }

  /** Go to the next conversation in the list, or the one before it. */
  move(step) {
    const all = store.readConversations();
    const index = all.findIndex((conversation) => conversation.id === this.current.id);
    const next = all[index + step];
    if (next) this.open(next);
  }

  delete(conversation) {
    const title = store.titleOf(conversation);
    if (!window.confirm(say("confirmDelete", { title }))) return;
    this.#runs.get(conversation.id)?.controller.abort();
    this.#runs.delete(conversation.id);
    store.removeConversation(conversation.id);
    if (conversation.id === this.current.id) {
      this.open(store.readConversations()[0] ?? store.newConversation());
    }
    this.drawList();
    this.elements.input.focus();
  }

  send() {
    const { input } = this.elements;
    const content = input.value;
    if (content.trim() === "" || this.isRunning) return;
    this.current.turns.push({ role: "user", content });
    input.value = "";
    fitHeight(input);
    this.#answer();
    this.#keepDraft(); // only now that the message itself is kept
    this.#scrollToEnd();
  }

  stop() {
    this.#runs.get(this.current.id)?.controller.abort();
  }

  /** Drop the last answer and ask for another. */
  again() {
    if (this.isRunning || this.current.turns.length === 0) return;
    if (this.current.turns.at(-1).role === "assistant") this.current.turns.pop();
    if (this.current.turns.length > 0) this.#answer();
  }

  async #answer() {
    const conversation = this.current;
    const body = requestBody(conversation.turns);
    const turn = { role: "assistant", content: "", thought: "", model: settings().model };
    turn.unfinished = true;
    const run = new Run(turn);
    run.conversation = conversation;
    conversation.turns.push(turn);
    conversation.changed = Date.now();
    this.#runs.set(conversation.id, run);
    store.writeConversation(conversation);
    this.draw();
    try {
      for await (const chunk of streamChat(body, run.controller.signal)) {
        run.take(chunk);
        this.#schedule();
        this.#keepNowAndThen(run);
      }
    } catch (error) {
      if (run.controller.signal.aborted) {
        turn.stopped = true;
      } else {
        const { status = -1, code = "", message } = error;
        turn.error = { status, code, message };
        this.onError(turn.error);
      }
    }
    run.measure();
    delete turn.unfinished;
    if (this.#runs.get(conversation.id) !== run) return; // it was deleted
    this.#runs.delete(conversation.id);
    store.writeConversation(conversation);
    this.drawList();
    this.#update();
  }

  #keepNowAndThen(run) {
    if (performance.now() - this.#lastKept < KEEP_MS) return;
    this.#lastKept = performance.now();
    if (this.#runs.get(run.conversation.id) === run) store.writeConversation(run.conversation);
  }

  #keepDraft() {
    fitHeight(this.elements.input);
    const name = `draft.${this.current.id}`;
    if (this.elements.input.value) store.write(name, this.elements.input.value);
    else store.remove(name);
  }

  /** Another tab changed something. */
  #readAgain() {
    this.drawList();
    const kept = store.readConversations().find(({ id }) => id === this.current.id);
    if (!kept || this.isRunning) return;
    this.current = kept;
    this.#drawTurns();
  }

  draw() {
    this.drawList();
    this.#drawTurns();
    this.#scrollToEnd();
  }

  drawList() {
    const { list } = this.elements;
    const rows = store.readConversations().map((conversation) => this.#row(conversation));
    list.replaceChildren(...rows);
  }

  #row(conversation) {
    const title = store.titleOf(conversation) || say("untitled");
    const row = document.createElement("li");
    const open = document.createElement("button");
    open.type = "button";
    open.className = "open";
    open.textContent = title;
    if (conversation.id === this.current.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      this.open(conversation);
      list.dispatchEvent(new CustomEvent("chosen"));
    });
    const { list } = this.elements;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "delete";
    remove.textContent = "×";
    remove.setAttribute("aria-label", say("deleteConversation", { title }));
    remove.addEventListener("click", () => this.delete(conversation));
    row.append(open, remove);
    return row;
  }

  #drawTurns() {
    const { turns } = this.elements;
    this.#views = [];
    const elements = this.current.turns.map((turn) => {
      if (turn.role === "user") return userTurn(turn);
      const view = new AnswerView(turn, {
        again: () => {
          this.again();
          this.elements.input.focus(); // the button that had it is gone
        },
        keep: () => this.isRunning || store.writeConversation(this.current),
      });
      this.#views.push(view);
      return view.element;
    });
    turns.replaceChildren(...(elements.length > 0 ? elements : [welcome()]));
    this.#update();
  }

  #schedule() {
    this.#frame ||= requestAnimationFrame(() => this.#update());
  }

  #update() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { turns, send, stop } = this.elements;
    const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < STICKS_WITHIN;
    const run = this.#runs.get(this.current.id);
    const last = this.current.turns.at(-1);
    for (const view of this.#views) {
      if (view.turn === last || !view.drawn) {
        view.update(view.turn === run?.turn ? run : null, view.turn === last);
        view.drawn = true;
      }
    }
    stop.hidden = !run;
    send.hidden = Boolean(run);
    if (follows) this.#scrollToEnd();
  }

  #scrollToEnd() {
    this.elements.turns.scrollTop = this.elements.turns.scrollHeight;
  }
}

function welcome() {
  const element = document.createElement("div");
  element.className = "welcome";
  const title = document.createElement("h2");
  title.textContent = say("welcome");
  const note = document.createElement("p");
  note.textContent = say("welcomeNote");
  element.append(title, note);
  return element;
}

/** As high as its text, up to what the style allows. */
export function fitHeight(input) {
  input.style.height = "auto";
  if (input.value) input.style.height = `${input.scrollHeight + 2}px`;
}
