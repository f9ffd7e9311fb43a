// What the page says, in English and Chinese. `{name}` in a text stands for a value.

import { read, write } from "./store.js";

const ENGLISH = {
  chat: "Chat",
  engine: "Engine",
  conversations: "Conversations",
  newConversation: "New conversation",
  untitled: "New conversation",
  deleteConversation: "Delete “{title}”",
  confirmDelete: "Delete “{title}”? It is kept nowhere else.",
  model: "Model",
  settings: "Settings",
  shortcuts: "Keyboard shortcuts",
  message: "Message",
  messagePlaceholder: "Write a message",
  send: "Send",
  stop: "Stop",
  regenerate: "Answer again",
  tryAgain: "Try again",
  copy: "Copy",
  copied: "Copied",
  you: "You",
  welcome: "What would you like to talk about?",
  welcomeNote: "The model runs on this machine. Conversations stay in this browser.",
  waiting: "Waiting for the first token…",
  thinking: "Thinking… {seconds} s",
  thought: "Thought for {seconds} s",
  thoughtPlain: "Thought",
  stopped: "Stopped",
  speed: "{speed} tokens/s",
  tokens: "{count} tokens",
  cached: "{cached} of {count} prompt tokens cached",
  endedLength: "Ended at the token limit",
  endedOther: "Ended: {reason}",
  emptyAnswer: "The answer is empty.",
  errorUnreachable: "The server cannot be reached. The message is kept; try again when it is back.",
  errorBroken: "The connection broke before the answer was complete.",
  errorKeyMissing: "This server needs an API key.",
  errorKeyWrong: "The API key is wrong, has expired or was revoked.",
  errorTooManyKeys: "Too many wrong keys were sent. Wait a minute, then try again.",
  errorBusy: "The server is busy. Try again in a moment.",
  errorLoading: "The model is not ready yet.",
  errorOther: "The server says: {message}",
  enterKey: "Enter key",
  serverAway: "The server does not answer. The page tries again every second.",
  serverWaiting: "The server is not ready: {phase}",
  serverBack: "The server is back.",
  notKept: "The browser refuses to keep more. Delete conversations to make room.",
  apiKey: "API key",
  apiKeyNote: "Kept in this browser, sent only to this server. To make one: fathom keys create NAME",
  showKey: "Show the key",
  systemPrompt: "System prompt",
  temperature: "Temperature",
  topP: "Top p",
  maxTokens: "Max tokens",
  samplingNote: "Left empty, the model's own value counts.",
  thinkingSwitch: "Thinking",
  byDefault: "Default",
  on: "On",
  off: "Off",
  language: "Language",
  theme: "Theme",
  system: "As the system",
  light: "Light",
  dark: "Dark",
  close: "Close",
  keySend: "send",
  keyNewline: "new line",
  keyStop: "stop the answer",
  keyFocus: "to the message box",
  keyNew: "new conversation",
  keyMove: "previous, next conversation",
  keyAgain: "answer again",
  keyTab: "chat or engine",
  keySettings: "settings",
  keyHelp: "this list",
  figuresNone: "This server offers no figures.",
  figuresAway: "No figures: the server does not answer.",
  running: "Running",
  queued: "Waiting",
  generation: "Tokens per second",
  generationNote: "the last two minutes",
  cacheHits: "Prompt cache hits",
  cacheHitsNote: "{cached} of {count} tokens",
  pages: "Pages of the cache",
  pagesUsed: "in use",
  pagesCached: "kept for reuse",
  pagesFree: "free",
  firstToken: "Time to first token",
  firstTokenNote: "median",
  uptime: "Up for",
  restarts: "engine restarts: {count}",
  requests: "Requests",
  requestsNone: "None is running.",
  request: "Request",
  key: "Key",
  prompt: "Prompt",
  answer: "Answer",
  time: "Time",
  outcomes: "Ended so far",
};

const CHINESE = {
  chat: "对话",
  engine: "引擎",
  conversations: "对话列表",
  newConversation: "新对话",
  untitled: "新对话",
  deleteConversation: "删除“{title}”",
  confirmDelete: "删除“{title}”？它没有别的副本。",
  model: "模型",
  settings: "设置",
  shortcuts: "键盘快捷键",
  message: "消息",
  messagePlaceholder: "写一条消息",
  send: "发送",
  stop: "停止",
  regenerate: "重新回答",
  tryAgain: "重试",
  copy: "复制",
  copied: "已复制",
  you: "你",
  welcome: "想聊点什么？",
  welcomeNote: "模型在这台机器上运行，对话只保存在这个浏览器里。",
  waiting: "等待第一个词元…",
  thinking: "思考中… {seconds} 秒",
  thought: "思考了 {seconds} 秒",
  thoughtPlain: "思考过程",
  stopped: "已停止",
  speed: "{speed} 词元/秒",
  tokens: "{count} 个词元",
  cached: "提示 {count} 个词元，缓存命中 {cached} 个",
  endedLength: "已到词元上限",
  endedOther: "结束原因：{reason}",
  emptyAnswer: "回答是空的。",
  errorUnreachable: "连不上服务器。消息已保留，服务器恢复后可以重试。",
  errorBroken: "回答还没结束，连接就断了。",
  errorKeyMissing: "这个服务器需要 API 密钥。",
  errorKeyWrong: "API 密钥不对、已过期或已被吊销。",
  errorTooManyKeys: "发送了太多错误的密钥。请等一分钟再试。",
  errorBusy: "服务器正忙，请稍后再试。",
  errorLoading: "模型还没有准备好。",
  errorOther: "服务器说：{message}",
  enterKey: "输入密钥",
  serverAway: "服务器没有响应，页面每秒重试一次。",
  serverWaiting: "服务器还没有准备好：{phase}",
  serverBack: "服务器已恢复。",
  notKept: "浏览器存不下更多内容了，请删除一些对话。",
  apiKey: "API 密钥",
  apiKeyNote: "保存在这个浏览器里，只发给这个服务器。创建方法：fathom keys create NAME",
  showKey: "显示密钥",
  systemPrompt: "系统提示词",
  temperature: "温度",
  topP: "Top p",
  maxTokens: "最多词元数",
  samplingNote: "留空则用模型自己的值。",
  thinkingSwitch: "思考",
  byDefault: "默认",
  on: "开",
  off: "关",
  language: "语言",
  theme: "主题",
  system: "跟随系统",
  light: "浅色",
  dark: "深色",
  close: "关闭",
  keySend: "发送",
  keyNewline: "换行",
  keyStop: "停止回答",
  keyFocus: "到消息框",
  keyNew: "新对话",
  keyMove: "上一个、下一个对话",
  keyAgain: "重新回答",
  keyTab: "对话或引擎",
  keySettings: "设置",
  keyHelp: "这个列表",
  figuresNone: "这个服务器不提供数据。",
  figuresAway: "没有数据：服务器没有响应。",
  running: "运行中",
  queued: "等待中",
  generation: "每秒词元数",
  generationNote: "最近两分钟",
  cacheHits: "提示缓存命中",
  cacheHitsNote: "{count} 个词元中的 {cached} 个",
  pages: "缓存页",
  pagesUsed: "使用中",
  pagesCached: "留待复用",
  pagesFree: "空闲",
  firstToken: "首个词元用时",
  firstTokenNote: "中位数",
  uptime: "已运行",
  restarts: "引擎重启次数：{count}",
  requests: "请求",
  requestsNone: "没有正在运行的请求。",
  request: "请求",
  key: "密钥",
  prompt: "提示",
  answer: "回答",
  time: "时间",
  outcomes: "已结束",
};

export const LANGUAGES = { en: ENGLISH, zh: CHINESE };

let language = "en";

/** The chosen language, or the browser's if none was chosen. */
export function chooseLanguage() {
  const chosen = read("language", "");
  const wanted = chosen || navigator.language || "en";
  language = wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  return chosen;
}

export function setLanguage(name) {
  write("language", name);
  chooseLanguage();
}

/** A text in the reader's language. */
export function say(name, values = {}) {
  const text = LANGUAGES[language][name];
  return text.replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}

/** A number as the reader writes it. */
export function count(number, digits = 0) {
  return new Intl.NumberFormat(document.documentElement.lang, {
    maximumFractionDigits: digits,
    minimumFractionDigits: digits,
  }).format(number);
}

/** Put texts where the page's own elements ask for them by `data-say`, `data-label`, `data-hint`. */
export function sayAll(root = document) {
  for (const element of root.querySelectorAll("[data-say]")) {
    element.textContent = say(element.dataset.say);
  }
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = say(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-hint]")) {
    element.placeholder = say(element.dataset.hint);
  }
}
