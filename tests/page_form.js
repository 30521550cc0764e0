// What tests of the explorer's page measure in the browser: contrast, controls, what sticks out.
// Read as text by tests/test_explorer_form.py, which adds the call of one of these functions.

/** A short name of an element, to be read in a failed test. */
function nameOf(element) {
  const id = element.id ? "#" + element.id : "";
  const kind = element.getAttribute("class") ? "." + element.getAttribute("class") : "";
  const label = element.getAttribute("aria-label") ?? element.textContent.trim();
  const home = element.closest("section, header, aside, [id]")?.id ?? "";
  return `${home} ${element.tagName.toLowerCase()}${id}${kind} "${label.slice(0, 40)}"`;
}

function canBeSeen(element) {
  if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return false;
  const { width, height } = element.getBoundingClientRect();
  return width > 1 && height > 1 && !element.closest(".visually-hidden");
}

// ---- colors as [red, green, blue, opacity], 0 to 1

const parsed = new Map();
const brush = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

function parseColor(text) {
  if (!parsed.has(text)) {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = text;
    brush.fillRect(0, 0, 1, 1);
    parsed.set(text, [...brush.getImageData(0, 0, 1, 1).data].map((x) => x / 255));
  }
  return parsed.get(text);
}

/** A color painted on an opaque one. */
function over(above, below) {
  const opacity = above[3];
  return [0, 1, 2].map((i) => opacity * above[i] + (1 - opacity) * below[i]).concat(1);
}

function luminance(color) {
  const [r, g, b] = color.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

// ---- what lies behind a text

/** The color behind an element: backgrounds of it and of what contains it; shapes in a drawing. */
function backgroundOf(element, x, y) {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    if (at instanceof SVGElement) layers.push(...shapesUnder(at, x, y));
    const { backgroundColor, opacity } = getComputedStyle(at);
    const color = parseColor(backgroundColor);
    if (!(at instanceof SVGElement && !(at instanceof SVGSVGElement))) layers.push(color);
    if (color[3] === 1 && Number(opacity) === 1 && !(at instanceof SVGElement)) break;
  }
  const paper = parseColor(getComputedStyle(document.documentElement).backgroundColor);
  const page = over(paper, parseColor("Canvas"));
  return layers.reverse().reduce((below, above) => over(above, below), page);
}

/** Fills of the shapes that stand before an element of a drawing, at a point of the screen; the
 * uppermost first. Those of its ancestors' turns are found when the walk comes to them. */
function shapesUnder(element, x, y) {
  const fills = [];
  for (let at = element.previousElementSibling; at; at = at.previousElementSibling) {
    const shapes = [at, ...at.querySelectorAll("*")].reverse();
    for (const shape of shapes) {
      if (!(shape instanceof SVGGeometryElement) || !shape.checkVisibility()) continue;
      const { fill, fillOpacity, opacity } = getComputedStyle(shape);
      if (fill === "none" || fill.startsWith("url")) continue;
      const point = new DOMPoint(x, y).matrixTransform(shape.getScreenCTM().inverse());
      if (!shape.isPointInFill(point)) continue;
      const color = [...parseColor(fill)];
      color[3] *= fillOpacity * opacity;
      fills.push(color);
    }
  }
  return fills;
}

/** Opacity of an element as it is painted: of itself times of all that contain it. */
function opacityOf(element) {
  let opacity = 1;
  for (let at = element; at; at = at.parentElement) opacity *= getComputedStyle(at).opacity;
  return opacity;
}

/** [element, rectangle] of every text that can be seen; the value of a control is a text too. */
function texts() {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !canBeSeen(element)) continue;
    if (element.closest("option, script, style, title, desc")) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const [rectangle] = range.getClientRects();
    if (rectangle) found.push([element, rectangle]);
  }
  for (const control of document.querySelectorAll("select, textarea, input")) {
    const drawn = control.type === "range" || control.type === "checkbox";
    if (!drawn && canBeSeen(control)) found.push([control, control.getBoundingClientRect()]);
  }
  return found;
}

/** Every text whose contrast to what lies behind it is too low: 4.5, for large text 3. */
function lowContrast() {
  const low = new Set();
  for (const [element, { left, top, width, height }] of texts()) {
    const style = getComputedStyle(element);
    const back = backgroundOf(element, left + width / 2, top + height / 2);
    const ink = [...parseColor(element instanceof SVGElement ? style.fill : style.color)];
    ink[3] *= opacityOf(element);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    const ratio = contrast(over(ink, back), back);
    if (ratio < least) low.add(`${ratio.toFixed(2)} ${nameOf(element)}`);
  }
  return [...low];
}

// ---- controls

const CONTROLS = "button, select, textarea, input, a[href], summary, [tabindex], [role=button], " +
  "[role=tab], [role=radio], [role=slider], [role=checkbox]";

/** Controls that can be seen and used; containers that only scroll are none. */
function controls() {
  return [...document.querySelectorAll(CONTROLS)].filter(
    (control) => canBeSeen(control) && !control.disabled);
}

/** What the keyboard's focus looks like: empty if it cannot be seen, or lies under something. */
function focusSeen() {
  const focused = document.activeElement;
  if (!focused || focused === document.body) return null;
  const { outlineStyle, outlineWidth, outlineColor } = getComputedStyle(focused);
  const box = focused.getBoundingClientRect();
  const [x, y] = [box.left + Math.min(box.width, 40) / 2, box.top + Math.min(box.height, 20) / 2];
  const uppermost = document.elementFromPoint(x, y);
  const back = backgroundOf(focused.parentElement, x, y);
  return {
    name: nameOf(focused),
    outlined: outlineStyle !== "none" && parseFloat(outlineWidth) >= 2
      && contrast(over(parseColor(outlineColor), back), back) >= 3,
    uncovered: uppermost !== null && (focused.contains(uppermost) || uppermost.contains(focused)),
  };
}

/** Controls that the tab key should stop at; of a group of radio buttons there are none here. */
function tabStops() {
  return controls().filter((control) => control.tabIndex >= 0);
}

/** Groups with one tab stop, each an array of its controls, in the page's order. */
function rovingGroups() {
  const groups = new Map();
  for (const control of controls().filter((one) => one.getAttribute("tabindex") === "-1")) {
    let group = control.parentElement;
    const isStop = (one) => one.getAttribute("tabindex") === "0" && canBeSeen(one) &&
      one.tagName === control.tagName;
    while (group && ![...group.querySelectorAll("[tabindex]")].some(isStop)) {
      group = group.parentElement;
    }
    const stop = [...(group ?? document).querySelectorAll("[tabindex]")].find(isStop);
    groups.set(stop, [...(groups.get(stop) ?? [stop]), control]);
  }
  return [...groups.values()];
}

/** Puts the focus on a group's tab stop; returns how many controls the group has. */
function focusGroup(i) {
  const group = rovingGroups()[i];
  group[0].focus();
  return group.length;
}

// ---- what sticks out

/** Elements that reach beyond the window's right edge and do not lie in a box that scrolls. */
function stickingOut() {
  const out = [];
  const scrolls = (element) => {
    for (let at = element; at && at !== document.body; at = at.parentElement) {
      if (getComputedStyle(at).overflowX !== "visible") return true;
    }
    return false;
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (!canBeSeen(element) || element.getBoundingClientRect().right <= innerWidth + 1) continue;
    if (!scrolls(element)) out.push(nameOf(element));
  }
  const page = document.scrollingElement;
  if (page.scrollWidth > innerWidth) out.push(`the page is ${page.scrollWidth} px wide`);
  return out;
}

/** Boxes that hide a part of what is in them, as paper cannot be scrolled. */
function cutOff() {
  return [...document.body.querySelectorAll("*")].filter((element) => {
    const { overflowX, overflowY } = getComputedStyle(element);
    const wide = overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1;
    const high = overflowY !== "visible" && element.scrollHeight > element.clientHeight + 1;
    return canBeSeen(element) && (wide || high) && element.clientWidth > 0;
  }).map(nameOf);
}
