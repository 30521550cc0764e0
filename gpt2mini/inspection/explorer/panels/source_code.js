// Lines of Python, with line numbers, lightly highlighted.

import { clear, make } from "../dom.js";

const PYTHON_KEYWORDS = "and as assert async await class def del elif else except False finally " +
  "for from global if import in is lambda None nonlocal not or pass raise return True try while " +
  "with yield";
const PYTHON_PIECES = new RegExp(
  `(?<string>"""[^]*?"""|'''[^]*?'''|"(?:\\\\.|[^"\\\\\\n])*"|'(?:\\\\.|[^'\\\\\\n])*')` +
  `|(?<comment>#[^\\n]*)|(?<keyword>\\b(?:${PYTHON_KEYWORDS.replaceAll(" ", "|")})\\b)`, "g");

/** The lines of Python code, each a list of {kind, text}; kind: string, comment, keyword or "". */
export function pythonLines(code) {
  const lines = [[]];
  const add = (kind, text) => text.split("\n").forEach((part, i) => {
    if (i > 0) lines.push([]);
    if (part) lines.at(-1).push({ kind, text: part });
  });
  let end = 0;
  for (const found of code.matchAll(PYTHON_PIECES)) {
    add("", code.slice(end, found.index));
    const [kind] = Object.entries(found.groups).find(([, text]) => text !== undefined);
    add(kind, found[0]);
    end = found.index + found[0].length;
  }
  add("", code.slice(end));
  return lines;
}

/** An element for the code of a part, with a caption: the file, its lines, which are marked. */
export function makeSource(parent) {
  const element = make("div", null, parent, { class: "source" });
  make("p", null, element, { class: "muted" });
  make("pre", null, element, { tabindex: 0, role: "region" });
  return element;
}

/** Show the code of a part. marked: indices of the lines that are marked, and scrolled to. */
export function drawSource(element, part, marked = []) {
  const [caption, pre] = element.children;
  if (pre.sourcePart !== part) {
    pre.sourcePart = part;
    drawSourceLines(clear(pre), part);
  }
  [...pre.children].forEach((line, i) => line.classList.toggle("marked", marked.includes(i)));
  const last = part.first_line + pre.children.length - 1;
  const place = part.first_line < last ? `lines ${part.first_line} to ${last}`
    : `line ${last}`;
  const numbers = marked.map((i) => part.first_line + i).join(", ");
  caption.textContent = `${part.file}, ${place}` + (numbers ? `; marked: ${numbers}` : "");
  pre.setAttribute("aria-label", `source code: ${part.file}, ${place}`);
  if (marked.length) {
    const first = pre.children[marked[0]];
    pre.scrollTop = first.offsetTop - pre.clientHeight / 4;
  }
}

function drawSourceLines(pre, part) {
  pythonLines(part.code).forEach((pieces, i) => {
    const line = make("span", null, pre, { class: "line", "data-number": part.first_line + i });
    for (const { kind, text } of pieces) make("span", text, line, kind ? { class: kind } : {});
    line.append("\n");
  });
}
