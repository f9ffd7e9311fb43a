// What the browser keeps: settings, and each conversation under a key of its own, so that two tabs
// do not overwrite each other's. A browser that keeps nothing gets a store for as long as the tab.

const PREFIX = "fathom.";
const CONVERSATION = "conversation.";

const memory = new Map();
let onFull = () => {};

function storage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

/** Has `listener` called when the browser refuses to keep more. */
export function whenFull(listener) {
  onFull = listener;
}

export function read(name, otherwise = null) {
  if (memory.has(name)) return memory.get(name);
  try {
    const text = storage()?.getItem(PREFIX + name);
    return text === null || text === undefined ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function write(name, value) {
  try {
    storage().setItem(PREFIX + name, JSON.stringify(value));
    memory.delete(name);
  } catch {
    memory.set(name, value);
    onFull();
  }
}

/** A text as it is, for `theme.js`, which reads it without this module. */
export function writePlain(name, text) {
  try {
    storage().setItem(PREFIX + name, text);
  } catch {
    onFull();
  }
}

export function readPlain(name) {
  try {
    return storage()?.getItem(PREFIX + name) ?? null;
  } catch {
    return null;
  }
}

export function remove(name) {
  memory.delete(name);
  try {
    storage()?.removeItem(PREFIX + name);
  } catch {
    // It was never kept.
  }
}

/** A new conversation, not kept until something is in it. */
export function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, created: Date.now(), changed: Date.now(), turns: [] };
}

export function writeConversation(conversation) {
  write(CONVERSATION + conversation.id, conversation);
}

export function removeConversation(id) {
  remove(CONVERSATION + id);
  remove(`draft.${id}`);
}

/** All conversations, the latest first. What cannot be read is left alone. */
export function readConversations() {
  const names = new Set([...memory.keys()]);
  try {
    const kept = storage();
    for (let index = 0; index < (kept?.length ?? 0); index += 1) {
      const key = kept.key(index);
      if (key.startsWith(PREFIX)) names.add(key.slice(PREFIX.length));
    }
  } catch {
    // Only what this tab remembers.
  }
  return [...names]
    .filter((name) => name.startsWith(CONVERSATION))
    .map((name) => read(name))
    .filter((found) => found && Array.isArray(found.turns))
    .sort((first, second) => second.changed - first.changed);
}

/** The first words of a conversation. */
export function titleOf(conversation) {
  const first = conversation.turns.find((turn) => turn.role === "user");
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 60) : "";
}
