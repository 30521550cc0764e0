// All heads of the model as small pictures of their attention: a row for each block.

import { button, make, percent, rovingGroup } from "../dom.js";
import { isHeadOff } from "./cell.js";
import {
  CLEAR_SCORE, CLEAR_TIMES, HEAD_KINDS, kindOfHead, TIMES_EVEN,
} from "./head_kinds.js";
import { withPartOff, withPartOn } from "../patches.js";
import { paintTriangle, shades } from "./shades.js";

const MOST_PIXELS = 32; // a small picture is not larger: longer texts share pixels

export function smallHeads(app, parent) {
  const { n_layers: layers, n_heads: heads } = app.config ?? app.data.models[0].config;
  const grid = make("div", null, parent, {
    class: "small-heads", role: "radiogroup", "aria-label": "attention heads: choose one",
  });
  grid.style.setProperty("--heads", heads);
  const buttons = buildGrid(app, grid, layers, heads);
  const markTabStop = rovingGroup(grid, ".small-head", { columns: () => heads });
  grid.addEventListener("keydown", (event) => {
    const i = buttons.indexOf(event.target.closest(".small-head"));
    if (event.key === "o" && i >= 0) switchHead(app, Math.floor(i / heads), i % heads);
  });
  let painted = null; // what the pictures show: they are painted again only if that changes

  function draw() {
    const positive = shades("--heat-full");
    const shown = whatIsShown(app, positive);
    buttons.forEach((element, i) => {
      const layer = Math.floor(i / heads), head = i % heads;
      if (shown !== painted) paintSmall(app.reading, layer, head, element.firstChild, positive);
      drawState(app, element, layer, head);
    });
    painted = shown;
    markTabStop();
  }

  return { draw };
}

/** All that the pictures depend on. */
function whatIsShown({ state: { model, off, patch }, tokenIds }, positive) {
  return JSON.stringify([model, off, patch, tokenIds, positive[255]]);
}

/** The button of each head, block by block; beside them the numbers of blocks and heads. */
function buildGrid(app, grid, layers, heads) {
  const hidden = { "aria-hidden": "true", class: "small-heads-label" };
  make("span", "block", grid, hidden);
  for (let head = 0; head < heads; head++) make("span", head, grid, hidden);
  const buttons = [];
  for (let layer = 0; layer < layers; layer++) {
    make("span", layer, grid, hidden);
    for (let head = 0; head < heads; head++) {
      const choose = () => app.set({ layer, head, key: null });
      const element = button("", grid, choose, { class: "small-head", role: "radio" });
      make("canvas", null, element, { "aria-hidden": "true" });
      make("span", "", element, { class: "head-mark", "aria-hidden": "true" });
      buttons.push(element);
    }
  }
  return buttons;
}

/** What the letters in the small pictures mean. */
export function makeLegend(app, parent) {
  const legend = make("p", null, parent, { class: "muted legend" });
  for (const { letter, name } of Object.values(HEAD_KINDS)) {
    make("strong", letter, legend);
    legend.append(` ${name}, `);
  }
  legend.append(`if its score on random tokens is at least ${CLEAR_TIMES} times that of equal ` +
    `weights, or ${percent(CLEAR_SCORE)}; in small letters from ${TIMES_EVEN} times on. ` +
    "Point at a cell of the large picture to see its weight being made, below; click to " +
    "keep it. The arrow keys move over the cells, too. ");
  if (app.live) {
    make("kbd", "o", legend);
    legend.append(" switches a head off and on.");
  }
}

function paintSmall(reading, layer, head, canvas, positive) {
  const merged = Math.ceil(reading.nTokens / MOST_PIXELS);
  const weight = (query, key) => reading.attention(layer, head, query, key);
  paintTriangle(canvas, reading.nTokens, weight, positive, { merged });
}

function drawState(app, element, layer, head) {
  const off = isHeadOff(app.state, layer, head);
  const found = kindOfHead(app.data.models[app.state.model], layer, head);
  const kind = found ? `, ${kindInShort(found)} (${percent(found.score)})` : "";
  const said = `head ${layer}.${head}${kind}${off ? ", switched off" : ""}`;
  if (element.title !== said) {
    element.title = said;
    element.setAttribute("aria-label", said);
    element.lastChild.textContent = off ? "off" : found ? letterOf(found) : "";
    element.classList.toggle("head-off", off);
  }
  element.setAttribute("aria-checked", layer === app.state.layer && head === app.state.head);
}

function letterOf({ kind, clear }) {
  const { letter } = HEAD_KINDS[kind];
  return clear ? letter : letter.toLowerCase();
}

function kindInShort({ kind, clear }) {
  const { article, name } = HEAD_KINDS[kind];
  return clear ? name : `leans to ${article} ${name}`;
}

/** Switch one head off (its output becomes zero), or on again. */
export function switchHead(app, layer, head) {
  if (!app.live) return;
  const part = { kind: "head", layer, head, value: "zero" };
  const change = isHeadOff(app.state, layer, head) ? withPartOn : withPartOff;
  app.set({ off: change(app.state.off, part) });
}
