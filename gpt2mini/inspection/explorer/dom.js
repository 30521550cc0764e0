// Small helpers to build elements, write numbers, and move the focus by the arrow keys.

const SVG = "http://www.w3.org/2000/svg"; // the name of the format, not an address that is loaded

export function at(id) {
  return document.getElementById(id);
}

/** A new element with a text (or null) and attributes, at the end of its parent (or nowhere). */
export function make(tag, text = null, parent = null, attributes = {}) {
  return filled(document.createElement(tag), text, parent, attributes);
}

/** The same for a part of an SVG drawing. */
export function svg(tag, text = null, parent = null, attributes = {}) {
  return filled(document.createElementNS(SVG, tag), text, parent, attributes);
}

function filled(element, text, parent, attributes) {
  if (text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
}

/** A button that does something when it is pressed. */
export function button(text, parent, act, attributes = {}) {
  const element = make("button", text, parent, { type: "button", ...attributes });
  element.addEventListener("click", act);
  return element;
}

export function clear(element) {
  element.replaceChildren();
  return element;
}

/** Children of a parent, as many as `count`: missing ones are made, extra ones removed. Elements
 * that stay keep the focus. */
export function children(parent, count, makeChild) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(makeChild(parent.children.length));
  return [...parent.children];
}

// ---- numbers as text

export function percent(p) {
  if (p > 0 && p < 0.0001) return "<0.01\u00a0%";
  return (100 * p).toFixed(p < 0.1 ? 2 : 1) + "\u00a0%";
}

/** Up to three significant digits, without an exponent where that is readable; with a true minus
 * sign. */
export function number(x) {
  const size = Math.abs(x);
  const text = size === 0 ? "0" : size < 0.001 || size >= 1e5 ? size.toExponential(1)
    : size < 1 ? size.toFixed(3) : size < 10 ? size.toFixed(2) : size.toFixed(1);
  return (x < 0 ? "\u2212" : "") + text;
}

/** A change of a probability in percentage points, with its sign. */
export function change(difference) {
  const text = (100 * Math.abs(difference)).toFixed(Math.abs(difference) < 0.1 ? 2 : 1);
  return (difference < 0 ? "\u2212" : "+") + text;
}

// ---- colors of numbers, for canvases; those of the page are in style.css

let colors = {};
for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
  if (typeof matchMedia === "function") {
    matchMedia(query).addEventListener("change", () => { colors = {}; });
  }
}

/** The color [red, green, blue] of a style variable such as "--heat-full". */
export function color(name) {
  colors[name] ??= parseColor(getComputedStyle(document.documentElement).getPropertyValue(name));
  return colors[name];
}

function parseColor(text) {
  const digits = text.trim().slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}

/** From the panel's color at 0 to `full` at 1, by the square root: small shares can be seen. */
export function heat(share, full = "--heat-full") {
  const mix = Math.sqrt(Math.min(1, Math.max(0, share)));
  const [none, all] = [color("--heat-none"), color(full)];
  return none.map((x, i) => Math.round(x + mix * (all[i] - x)));
}

// ---- the keyboard

/** One tab stop for a group: the arrow keys move the focus inside it, Home and End to its ends.
 * The item that can be reached by the tab key is the one with aria-checked, aria-selected or
 * aria-pressed "true", else the first. columns: a function that gives the columns of a grid. */
export function rovingGroup(container, selector, { columns = () => 0, onMove = null } = {}) {
  const items = () => [...container.querySelectorAll(selector)].filter((item) => !item.hidden);
  container.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const all = items(), from = all.indexOf(event.target.closest(selector)), width = columns();
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(width || 1), ArrowDown: width || 1 };
    const ends = { Home: 0, End: all.length - 1 };
    const to = event.key in ends ? ends[event.key] : from + step[event.key];
    if (from < 0 || Number.isNaN(to) || !all[to]) return;
    event.preventDefault();
    all.forEach((item, i) => item.setAttribute("tabindex", i === to ? 0 : -1));
    all[to].focus();
    if (onMove) onMove(to, all[to]);
  });
  return () => markTabStop(items());
}

/** Called after a group is drawn: which of its items the tab key reaches. */
function markTabStop(items) {
  const chosen = (item) => ["checked", "selected", "pressed"].some(
    (kind) => item.getAttribute("aria-" + kind) === "true");
  const focused = items.indexOf(document.activeElement);
  const stop = focused >= 0 ? focused : Math.max(0, items.findIndex(chosen));
  items.forEach((item, i) => item.setAttribute("tabindex", i === stop ? 0 : -1));
}

/** Read out by a screen reader. */
export function announce(text) {
  at("announcer").textContent = text;
}
