// A model's text as elements: paragraphs, headings, lists, quotes, tables, fenced code, inline code
// and bold. Everything is made with createElement and textContent, so no text can become markup;
// links stay text. Every step is linear in the text, whatever a model repeats.

const MAX_LIST_DEPTH = 8;
const FENCE = /^(\s*)(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6}) (.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)]) (.*)$/;
const RULE = /^ {0,3}(?:(?:- ?){3,}|(?:\* ?){3,}|(?:_ ?){3,})$/;
const TABLE_RULE = /^[|:\- ]+$/;

/** Text that grows: only the blocks that changed are made anew. */
export class Rendering {
  #sources = [];

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && this.#sources[same] === sourceOf(blocks[same])) same += 1;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    for (const block of blocks.slice(same)) this.element.append(render(block));
    this.#sources = blocks.map(sourceOf);
  }
}

function sourceOf(block) {
  return `${block.kind}\n${block.lines.join("\n")}`;
}

/** The text cut into {kind, lines}; a fence that is still open is code up to the end. */
export function parseBlocks(text) {
  const lines = text.split("\n");
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    const line = lines[index];
    const fence = FENCE.exec(line);
    if (line.trim() === "") {
      index += 1;
    } else if (fence) {
      const end = endOfFence(lines, index + 1, fence[2]);
      blocks.push({ kind: "code", lines: lines.slice(index, end) });
      index = Math.min(end + 1, lines.length);
    } else if (HEADING.test(line) || RULE.test(line)) {
      blocks.push({ kind: HEADING.test(line) ? "heading" : "rule", lines: [line] });
      index += 1;
    } else {
      const kind = kindOf(lines, index);
      const end = endOfBlock(lines, index + 1, kind);
      blocks.push({ kind, lines: lines.slice(index, end) });
      index = end;
    }
  }
  return blocks;
}

function kindOf(lines, index) {
  if (ITEM.test(lines[index])) return "list";
  if (lines[index].trimStart().startsWith(">")) return "quote";
  const next = lines[index + 1] ?? "";
  const isTable = lines[index].includes("|") && next.includes("-") && TABLE_RULE.test(next);
  return isTable ? "table" : "paragraph";
}

function endOfFence(lines, start, mark) {
  for (let index = start; index < lines.length; index += 1) {
    const line = lines[index].trim();
    if (line.length >= mark.length && line === mark[0].repeat(line.length)) return index;
  }
  return lines.length;
}

function endOfBlock(lines, start, kind) {
  let index = start;
  while (index < lines.length) {
    const line = lines[index];
    if (FENCE.test(line) || HEADING.test(line)) break;
    if (line.trim() === "") {
      // A list goes on behind an empty line if another item or indented text follows.
      const next = lines[index + 1] ?? "";
      if (kind !== "list" || !(ITEM.test(next) || /^\s+\S/.test(next))) break;
    } else if (kind === "quote" ? !line.trimStart().startsWith(">") : startsOther(line, kind)) {
      break;
    }
    index += 1;
  }
  return index;
}

function startsOther(line, kind) {
  if (kind === "table") return !line.includes("|");
  if (RULE.test(line)) return true;
  return kind === "paragraph" && ITEM.test(line);
}

function render({ kind, lines }) {
  switch (kind) {
    case "code":
      return renderCode(lines);
    case "heading": {
      const [, marks, text] = HEADING.exec(lines[0]);
      // The page has headings of its own above these.
      return withInline(`h${Math.min(marks.length + 2, 6)}`, text.trim());
    }
    case "rule":
      return document.createElement("hr");
    case "list":
      return renderList(lines);
    case "quote":
      return withInline("blockquote", lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n"));
    case "table":
      return renderTable(lines);
    default:
      return withInline("p", lines.join("\n"));
  }
}

function renderCode(lines) {
  const [, indent, , language] = FENCE.exec(lines[0]);
  const code = document.createElement("code");
  code.textContent = lines
    .slice(1)
    .map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line))
    .join("\n");
  const block = document.createElement("pre");
  block.tabIndex = 0; // it scrolls, so keys must reach it
  const name = language.trim().split(/\s/)[0].slice(0, 30);
  if (name) block.dataset.language = name;
  block.append(code);
  return block;
}

function renderList(lines) {
  const root = document.createDocumentFragment();
  const open = []; // {indent, list, item}, the outermost first
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) {
      if (line.trim() !== "") appendInline(open.at(-1).item, `\n${line.trim()}`);
      continue;
    }
    const [, indent, mark, text] = match;
    while (open.length > 0 && indent.length < open.at(-1).indent) open.pop();
    const top = open.at(-1);
    const isDeeper = top && indent.length > top.indent + 1 && open.length < MAX_LIST_DEPTH;
    if (!top || isDeeper) {
      const list = document.createElement(/\d/.test(mark) ? "ol" : "ul");
      if (list.tagName === "OL") list.start = Number.parseInt(mark, 10);
      (top?.item ?? root).append(list);
      open.push({ indent: indent.length, list, item: null });
    }
    const item = withInline("li", text.trim());
    open.at(-1).item = item;
    open.at(-1).list.append(item);
  }
  const holder = document.createElement("div");
  holder.append(root);
  return holder;
}

function renderTable(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const table = document.createElement("table");
  lines.forEach((line, index) => {
    if (index === 1) return;
    const row = table.insertRow();
    for (const cell of cells(line)) row.append(withInline(index ? "td" : "th", cell.trim()));
  });
  const holder = document.createElement("div");
  holder.className = "table";
  holder.tabIndex = 0;
  holder.append(table);
  return holder;
}

function withInline(name, text) {
  const element = document.createElement(name);
  appendInline(element, text);
  return element;
}

/** Text with `code` and **bold**; a mark without its other half is text. */
export function appendInline(element, text) {
  const unclosed = new Set(); // marks that have no other half further on
  let plain = 0;
  let index = 0;
  while (index < text.length) {
    const mark = markAt(text, index);
    if (!mark) {
      index += 1;
      continue;
    }
    const from = index + mark.length;
    const end = unclosed.has(mark) ? -1 : closing(text, mark, from);
    if (end < 0) {
      unclosed.add(mark);
      index = from;
    } else {
      if (plain < index) element.append(text.slice(plain, index));
      element.append(marked(mark, text.slice(from, end)));
      index = plain = end + mark.length;
    }
  }
  if (plain < text.length) element.append(text.slice(plain));
}

function markAt(text, index) {
  if (text[index] === "`") {
    let end = index;
    while (text[end] === "`") end += 1;
    return text.slice(index, end);
  }
  const opens = text.startsWith("**", index) && /\S/.test(text[index + 2] ?? " ");
  return opens ? "**" : "";
}

/** Where the other half of a mark begins, or -1. Backticks close in a run of the same length. */
function closing(text, mark, from) {
  if (mark === "**") return text.indexOf(mark, from + 1);
  let index = text.indexOf(mark, from);
  while (index >= 0) {
    let end = index;
    while (text[end] === "`") end += 1;
    if (end - index === mark.length) return index;
    index = text.indexOf(mark, end);
  }
  return -1;
}

function marked(mark, text) {
  if (mark !== "**") {
    const code = document.createElement("code");
    code.textContent = text;
    return code;
  }
  const bold = document.createElement("strong");
  appendInline(bold, text);
  return bold;
}
