// The page as a whole: its parts, its keys, and what it says about the server.

import { requestJson } from "./api.js";
import { Chat } from "./chat.js";
import { Connection } from "./connection.js";
import { Figures } from "./figures.js";
import { bindFields, change, settings } from "./settings.js";
import * as store from "./store.js";
import { errorText } from "./turns.js";
import { chooseLanguage, count, say, sayAll, setLanguage } from "./words.js";

const BACK_MS = 4_000;
const NOTICES = ["connection", "key", "full", "back"]; // the first that is there is shown

const $ = (id) => document.getElementById(id);

const notices = new Map();

function setNotice(name, notice) {
  if (notice) notices.set(name, notice);
  else notices.delete(name);
  drawNotice();
}

function drawNotice() {
  const shown = notices.get(NOTICES.find((name) => notices.has(name)));
  $("notice").hidden = !shown;
  $("notice-text").textContent = shown ? shown.text() : "";
  $("notice-action").hidden = !shown?.action;
}

chooseLanguage();
store.whenFull(() => setNotice("full", { text: () => say("notKept") }));

const chat = new Chat(
  {
    list: $("conversations"),
    turns: $("turns"),
    input: $("message"),
    send: $("send"),
    stop: $("stop"),
  },
  onError,
);
const figures = new Figures($("figures"));
const connection = new Connection(onConnection);

function onError(error) {
  if (error.status === 401 || error.code === "too_many_failed_keys") noticeKey(error);
  if (error.status === 0 || error.status === 503) connection.check();
}

function noticeKey(error) {
  setNotice("key", { text: () => errorText(error), action: true });
}

let wasAway = false;

function onConnection(status) {
  if (status.state === "ready") {
    setNotice("connection", null);
    if (wasAway) {
      wasAway = false;
      setNotice("back", { text: () => say("serverBack") });
      setTimeout(() => setNotice("back", null), BACK_MS);
    }
    loadModels();
    figures.retry();
  } else if (status.state === "away") {
    wasAway = true;
    setNotice("connection", { text: () => say("serverAway") });
  } else {
    const percent = status.percent === null ? "" : ` (${count(status.percent)} %)`;
    const text = () => say("serverWaiting", { phase: `${status.phase}${percent}` });
    setNotice("connection", { text });
  }
}

async function loadModels() {
  try {
    const { data } = await requestJson("v1/models");
    const names = data.map((model) => model.id);
    const options = names.map((name) => new Option(name, name));
    $("model").replaceChildren(...options);
    if (!names.includes(settings().model)) change("model", names[0]);
    $("model").value = settings().model;
    setNotice("key", null);
  } catch (error) {
    onError(error);
  }
}

// Tabs

function showTab(name) {
  for (const tab of ["chat", "engine"]) {
    const isShown = tab === name;
    $(tab).hidden = !isShown;
    $(`tab-${tab}`).setAttribute("aria-selected", String(isShown));
    $(`tab-${tab}`).tabIndex = isShown ? 0 : -1;
  }
  $("toggle-list").hidden = name !== "chat";
  if (name === "engine") figures.show();
  else figures.hide();
}

function otherTab() {
  const name = $("engine").hidden ? "engine" : "chat";
  showTab(name);
  return $(`tab-${name}`);
}

for (const name of ["chat", "engine"]) {
  $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") otherTab().focus();
  });
}

// The conversation

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  chat.send();
});
$("message").addEventListener("keydown", (event) => {
  // While an input method composes, Enter takes its word.
  const composes = event.isComposing || event.keyCode === 229;
  if (event.key === "Enter" && !event.shiftKey && !composes) {
    event.preventDefault();
    chat.send();
  }
});
$("stop").addEventListener("click", () => {
  chat.stop();
  $("message").focus();
});
$("new").addEventListener("click", () => {
  setList(false);
  chat.create();
});
$("conversations").addEventListener("chosen", () => {
  setList(false);
  $("message").focus();
});
$("model").addEventListener("change", () => change("model", $("model").value));

function setList(isOpen) {
  $("chat").classList.toggle("list-open", isOpen);
  $("toggle-list").setAttribute("aria-expanded", String(isOpen));
}

$("toggle-list").addEventListener("click", () => {
  setList(!$("chat").classList.contains("list-open"));
});

// Settings

function openSettings() {
  if (!document.querySelector("dialog[open]")) $("settings").showModal();
}

function openShortcuts() {
  if (!document.querySelector("dialog[open]")) $("shortcuts").showModal();
}

$("open-settings").addEventListener("click", openSettings);
$("open-shortcuts").addEventListener("click", openShortcuts);
$("notice-action").addEventListener("click", () => {
  openSettings();
  $("key").focus();
});
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
$("fields").addEventListener("submit", (event) => {
  event.preventDefault();
  $("settings").close();
});
bindFields($("fields"));

let usedKey = store.read("key", "");
$("key").value = usedKey;

/** Ask again with a key that changed. */
function useKey() {
  if (store.read("key", "") === usedKey) return;
  usedKey = store.read("key", "");
  loadModels();
  figures.retry();
}

$("key").addEventListener("input", () => store.write("key", $("key").value.trim()));
$("key").addEventListener("change", useKey);
$("settings").addEventListener("close", useKey);
$("show-key").addEventListener("change", () => {
  $("key").type = $("show-key").checked ? "text" : "password";
});

$("language").value = store.read("language", "");
$("language").addEventListener("change", () => {
  setLanguage($("language").value);
  sayEverything();
});
$("theme").value = store.readPlain("theme") ?? "";
$("theme").addEventListener("change", () => {
  const theme = $("theme").value;
  store.writePlain("theme", theme);
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
});

function sayEverything() {
  sayAll();
  drawNotice();
  chat.draw();
  figures.draw();
}

// Keys

const SHORTCUTS = {
  KeyN: () => {
    showTab("chat");
    chat.create();
  },
  KeyR: () => chat.again(),
  KeyE: () => otherTab().focus(),
  Comma: openSettings,
  ArrowUp: () => chat.move(-1),
  ArrowDown: () => chat.move(1),
};

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const isTyping = event.target.matches("input, textarea, select");
  const shortcut = event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code];
  if (event.key === "Escape") {
    if (chat.isRunning) chat.stop();
    else setList(false);
  } else if (shortcut) {
    event.preventDefault();
    shortcut();
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    showTab("chat");
    $("message").focus();
  } else if (event.key === "?" && !isTyping) {
    openShortcuts();
  }
});

sayEverything();
showTab("chat");
connection.check();
$("message").focus();
