// Ranking heads: the probability of the token that follows, without each head in turn. The model is
// whole but for that one head, whatever is switched off elsewhere in the page.

import { announce, button, change, children, clear, make, percent, svg } from "../dom.js";
import { wordBefore } from "./before_after.js";
import { isSamePart, withPartOff, withPartOn } from "../patches.js";

const HEADS_LISTED = 12;
const EFFECT_CELL = 10; // in the map's own unit

/** Returns a function that draws. The ranking is of one text, token and model; it goes when they
 * change. */
export function rankingPart(app, root) {
  const parts = buildRanking(root, start, () => { parts.canceled = true; });
  let ranking = null; // { subject, rows }
  let running = false;

  async function start() {
    const subject = subjectOf(app), words = wordsOf(app);
    running = true;
    parts.canceled = false;
    showRankingProgress(parts, 0, 1);
    parts.cancel.focus(); // the pressed button is hidden
    const rows = await app.source.rankHeads(app.before, app.token, app.target, (done, total) => {
      showRankingProgress(parts, done, total);
      return !parts.canceled && subjectOf(app) === subject;
    });
    running = false;
    if (rows) ranking = { subject, rows, words, note: app.source.note };
    if (rows) announce(saidOfRanking(ranking));
    const hadFocus = document.activeElement === parts.cancel;
    draw();
    if (hadFocus) (rows?.length ? parts.table.querySelector("button") : parts.start).focus();
  }

  function draw() {
    const isCurrent = ranking !== null && ranking.subject === subjectOf(app);
    parts.said.textContent = isCurrent ? saidOfRanking(ranking)
      : `How much does each head matter for ${wordsOf(app)}? Each is replaced by zero in turn.`;
    parts.start.hidden = running || isCurrent;
    parts.running.hidden = !running;
    parts.result.hidden = !isCurrent || !ranking.rows.length;
    if (parts.result.hidden) return;
    drawRanking(app, parts.table, ranking.rows.slice(0, HEADS_LISTED));
    if (parts.mapped !== ranking) drawEffects(app, parts.map, ranking.rows);
    parts.mapped = ranking;
  }

  return draw;
}

/** What a ranking is about, to tell whether it is still of what the page shows. */
function subjectOf(app) {
  return JSON.stringify([app.state.model, app.tokenIds.slice(0, app.token + 1), app.target]);
}

function wordsOf(app) {
  return `\u201c${app.label(app.target)}\u201d after \u201c${wordBefore(app)}\u201d`;
}

function saidOfRanking({ rows, words, note }) {
  if (rows.length) return `${words}: ${percent(rows[0].before)} with all heads, and without:`;
  return `No effects were recorded for ${words}${note ? `: ${note}` : ""}.`;
}

function buildRanking(root, start, cancel) {
  make("h3", "Rank all heads", root);
  const said = make("p", null, root);
  const startButton = button("rank all heads", root, start);
  const running = make("div", null, root, { class: "row" });
  const progress = make("progress", null, running, { "aria-label": "heads ranked" });
  const cancelButton = button("cancel", running, cancel);
  const result = make("div", null, root);
  const table = make("table", null, make("div", null, result, { class: "scroll" }),
    { class: "ranking" });
  make("p", "All heads: a row for each block, a column for each head. Larger squares changed the " +
    "probability more; a cross: without this head it rose. Click one to look at it.", result,
  { class: "muted explanation" });
  const map = svg("svg", null, result, { class: "effects", role: "img" });
  return { said, start: startButton, running, progress, cancel: cancelButton, result, table, map,
    canceled: false };
}

function showRankingProgress(parts, done, total) {
  parts.start.hidden = true;
  parts.running.hidden = false;
  parts.progress.max = total;
  parts.progress.value = done;
}

// ---- the heads with the largest effects

function drawRanking(app, table, rows) {
  const largest = Math.abs(rows[0].after - rows[0].before);
  children(table, rows.length, () => newRankedRow(app)).forEach((element, i) => {
    const { layer, head, before, after } = rows[i], difference = after - before;
    const [go, , bar] = [...element.children].map((cell) => cell.firstChild);
    element.head = { kind: "head", layer, head, value: "zero" };
    go.textContent = `head ${layer}.${head}`;
    go.setAttribute("aria-label", `look at head ${layer}.${head}`);
    element.children[1].textContent = `${percent(after)} (${change(difference)})`;
    bar.style.width = `${(2.6 * Math.abs(difference)) / (largest || 1)}rem`;
    bar.className = difference < 0 ? "bar" : "bar change";
    drawSwitch(app, element);
  });
}

function newRankedRow(app) {
  const row = make("tr");
  button("", make("td", null, row), () => lookAtHead(app, row.head));
  make("td", null, row, { class: "number" });
  make("span", null, make("td", null, row), { class: "bar" });
  if (app.live) button("", make("td", null, row), () => toggleHead(app, row.head));
  return row;
}

function drawSwitch(app, row) {
  if (!app.live) return;
  const isOff = app.state.off.some((part) => isSamePart(part, row.head));
  const press = row.lastElementChild.firstChild;
  press.textContent = isOff ? "switch on" : "switch off";
  press.setAttribute("aria-label", `${press.textContent} head ${row.head.layer}.${row.head.head}`);
}

function toggleHead(app, part) {
  const { off } = app.state;
  const isOff = off.some((other) => isSamePart(other, part));
  app.set({ off: isOff ? withPartOn(off, part) : withPartOff(off, part) });
}

function lookAtHead(app, { layer, head }) {
  app.set({ layer, head, middle: "heads" });
}

// ---- the map of all heads

function drawEffects(app, map, rows) {
  const { n_layers, n_heads } = app.config;
  const largest = Math.abs(rows[0].after - rows[0].before) || 1;
  const left = 2.2 * EFFECT_CELL; // for the numbers of the blocks
  clear(map);
  const [width, height] = [left + n_heads * EFFECT_CELL, (n_layers + 1) * EFFECT_CELL];
  map.setAttribute("viewBox", `0 0 ${width} ${height}`);
  map.style.width = `min(100%, ${width * 0.14}rem)`;
  map.setAttribute("aria-label", `Effect of each of ${rows.length} heads; the largest are in the ` +
    "table above.");
  const label = (text, x, y) => svg("text", text, map, { x, y, "text-anchor": "middle" });
  for (let layer = 0; layer < n_layers; layer++) {
    label(layer, EFFECT_CELL, (layer + 1.75) * EFFECT_CELL);
  }
  for (let head = 0; head < n_heads; head++) {
    label(head, left + (head + 0.5) * EFFECT_CELL, 0.75 * EFFECT_CELL);
  }
  for (const row of rows) {
    const [x, y] = [left + row.head * EFFECT_CELL, (row.layer + 1) * EFFECT_CELL];
    drawEffect(app, map, row, { x, y, largest });
  }
}

/** A square whose area is the size of the change; with a cross where the probability rose. */
function drawEffect(app, map, { layer, head, before, after }, { x, y, largest }) {
  const cell = svg("g", null, map);
  svg("title", `head ${layer}.${head}: ${percent(before)} \u2192 ${percent(after)}`, cell);
  svg("rect", null, cell, { x, y, width: EFFECT_CELL, height: EFFECT_CELL, class: "behind" });
  const side = EFFECT_CELL * 0.9 * Math.sqrt(Math.abs(after - before) / largest);
  const [left, top] = [x + (EFFECT_CELL - side) / 2, y + (EFFECT_CELL - side) / 2];
  const kind = after > before ? "rise" : "fall";
  svg("rect", null, cell, { x: left, y: top, width: side, height: side, class: kind });
  if (after > before) {
    const d = `M${left} ${top}l${side} ${side}m0 ${-side}l${-side} ${side}`;
    svg("path", null, cell, { d, class: "cross" });
  }
  cell.addEventListener("click", () => lookAtHead(app, { layer, head }));
}
