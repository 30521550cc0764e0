// The attention of one head in full: a row for each token that reads (query), a column for each
// that is read (key), with the tokens along both sides.

import { announce, children, make } from "../dom.js";
import { cellInWords, shownCell, tokenText } from "./cell.js";
import { paintTriangle, shades } from "./shades.js";
import { shortArithmetic } from "./short_arithmetic.js";

const SMALLEST_CELL = 9, LARGEST_CELL = 26; // pixels; a label has to fit beside a cell
const SCROLLED_CELL = 12; // where even the smallest do not fit: the picture is scrolled
const LABELS = 58; // pixels for the labels on each side
const MOST_WIDTH = 460; // of the whole picture without scrolling: it also has to fit in height

/** draw(kind): the weights "after" or "before" the interventions, or their "difference". */
export function largeHead(app, parent) {
  const parts = buildLarge(parent);
  let width = 0; // measured when it changes, for measuring takes time
  new ResizeObserver(([{ contentRect }]) => {
    width = contentRect.width;
    setSizes(app, parts.scroll, width);
  }).observe(parent);

  function draw(kind) {
    setSizes(app, parts.scroll, width);
    paintLarge(app, parts.canvas, kind);
    for (const labels of [parts.keys, parts.queries]) drawTokenLabels(app, labels);
    parts.cells.setAttribute("aria-label", `attention of head ${app.state.layer}.` +
      `${app.state.head}: arrow keys move over the weights, Enter chooses one`);
    drawShownCell(app, parts);
    scrollToCell(parts);
  }

  const hover = (cell) => {
    app.setHover(cell);
    drawShownCell(app, parts);
  };
  addCellPointer(app, parts.cells, hover);
  addCellKeys(app, parts.cells, (cell) => {
    hover(cell);
    scrollToCell(parts);
    announce(cellInWords(app, cell));
  });
  parts.cells.addEventListener("blur", () => hover(null));
  return { draw };
}

/** The labels stay in view while the cells are scrolled. */
function buildLarge(parent) {
  const scroll = make("div", null, parent, { class: "large-head" });
  const hidden = (tag, name, text = null) =>
    make(tag, text, scroll, { class: name, "aria-hidden": "true" });
  hidden("span", "large-corner", "reads \u2193 from \u2192");
  const keys = hidden("div", "large-keys"), queries = hidden("div", "large-queries");
  const cells = make("div", null, scroll, {
    class: "large-cells", tabindex: 0, role: "application", "aria-describedby": "large-head-said",
  });
  const canvas = make("canvas", null, cells, { "aria-hidden": "true" });
  const row = make("div", null, cells, { class: "row-outline" });
  const cell = make("div", null, cells, { class: "cell-outline" });
  const said = make("p", null, parent, { id: "large-head-said", class: "cell-said" });
  const drawMade = shortArithmetic(parent);
  return { scroll, keys, queries, cells, canvas, row, cell, said, drawMade };
}

function setSizes(app, scroll, width) {
  const { nTokens } = app.reading;
  scroll.style.setProperty("--cell", cellSize(width, nTokens) + "px");
  scroll.style.setProperty("--tokens", nTokens);
}

/** The outlines of the chosen query's row and of the shown cell, and how the cell is made. */
function drawShownCell(app, { row, cell, queries, keys, said, drawMade }) {
  const { query, key } = shownCell(app);
  placeOutline(row, app.token, 0, app.token + 1);
  placeOutline(cell, query, key, 1);
  markLabel(queries, query);
  markLabel(keys, key);
  said.textContent = cellInWords(app, { query, key }) + ".";
  drawMade(app, { query, key });
}

/** The largest cells with which the picture fits, within limits. */
function cellSize(width, nTokens) {
  const room = Math.min(width, MOST_WIDTH) - LABELS - 4;
  const fits = Math.floor(room / nTokens);
  return fits < SMALLEST_CELL ? SCROLLED_CELL : Math.min(LARGEST_CELL, fits);
}

function paintLarge(app, canvas, kind) {
  const { layer, head } = app.state, { reading, before } = app;
  const weight = {
    after: (query, key) => reading.attention(layer, head, query, key),
    before: (query, key) => before.attention(layer, head, query, key),
    difference: (query, key) => reading.attention(layer, head, query, key) -
      before.attention(layer, head, query, key),
  }[kind];
  const negative = shades("--heat-negative");
  paintTriangle(canvas, reading.nTokens, weight, shades("--heat-full"), { negative });
}

function drawTokenLabels(app, parent) {
  const labels = children(parent, app.reading.nTokens, () => make("span"));
  labels.forEach((element, t) => {
    const text = tokenText(app, t);
    if (element.textContent !== text) element.textContent = text;
  });
}

/** Put an outline around `width` cells of a row, from column `key`. */
function placeOutline(outline, query, key, width) {
  outline.style.setProperty("--query", query);
  outline.style.setProperty("--key", key);
  outline.style.setProperty("--width", width);
}

function markLabel(labels, t) {
  labels.querySelector(".label-shown")?.classList.remove("label-shown");
  labels.children[t]?.classList.add("label-shown");
}

/** hover(cell): called when the pointer enters another cell; null where none can be read. */
function addCellPointer(app, cells, hover) {
  const cellAt = (event) => {
    const { left, top, width } = cells.getBoundingClientRect();
    const size = width / app.reading.nTokens;
    const query = Math.floor((event.clientY - top) / size);
    const key = Math.floor((event.clientX - left) / size);
    const exists = query >= 0 && key >= 0 && query < app.reading.nTokens;
    return exists && key <= query ? { query, key } : null; // a later token cannot be read
  };
  const changeTo = (cell) => {
    if (cell?.query !== app.hover?.query || cell?.key !== app.hover?.key) hover(cell);
  };
  cells.addEventListener("pointermove", (event) => changeTo(cellAt(event)));
  cells.addEventListener("pointerleave", () => changeTo(null));
  cells.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) app.set({ token: cell.query, key: cell.key });
  });
}

/** move(cell): called when the arrow keys go to another cell. */
function addCellKeys(app, cells, move) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  cells.addEventListener("keydown", (event) => {
    const { query, key } = shownCell(app);
    const isChosen = event.key === "Enter" || event.key === " ";
    if (!isChosen && !(event.key in steps)) return;
    event.preventDefault();
    if (isChosen) app.set({ token: query, key });
    else move(movedCell({ query, key }, steps[event.key], app.reading.nTokens));
  });
}

/** The cell next to a cell, inside the triangle of keys that a query may read. */
export function movedCell({ query, key }, [down, right], nTokens) {
  const toQuery = Math.min(nTokens - 1, Math.max(0, query + down));
  return { query: toQuery, key: Math.min(toQuery, Math.max(0, key + right)) };
}

/** Scroll the picture alone, not the page, so that the shown cell can be seen. */
function scrollToCell({ scroll, cell }) {
  requestAnimationFrame(() => { // when the picture has its size
    const top = cell.offsetTop, left = cell.offsetLeft;
    const down = scroll.clientHeight - LABELS - 30, right = scroll.clientWidth - LABELS - 30;
    if (top < scroll.scrollTop || top > scroll.scrollTop + down) scroll.scrollTop = top - down / 2;
    if (left < scroll.scrollLeft || left > scroll.scrollLeft + right) {
      scroll.scrollLeft = left - right / 2;
    }
  });
}
