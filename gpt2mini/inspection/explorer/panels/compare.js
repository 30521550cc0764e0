// Two models side by side on the same text: which tokens became more likely, what comes next, after
// which block they part, and where the lengths of their vectors differ.

import { change, children, make, number, percent } from "../dom.js";
import { mostChanged, pairOfBars, wordBefore } from "./before_after.js";
import { groupSurprise, tokenStrip } from "./strip.js";

const MOST_RATIO = 3; // nats, from where a column of the strip is full: a factor of 20

export function comparePanel(app, root) {
  make("h2", "Two models side by side", root);
  if (app.sources.length < 2) return withoutOther(app, root);
  const names = app.data.models.map(({ name }) => name);
  make("p", `${names[0]} and ${names[1]} read the text above; what is switched off is so in ` +
    "both. The other panels show the model chosen at the top.", root, { class: "muted" });
  const parts = [comparedTextPart(app, root, names), comparedNextPart(app, root, names),
    comparedLensPart(app, root, names), comparedNormsPart(app, root, names)];
  return { draw: () => parts.forEach((drawPart) => drawPart()) };
}

function withoutOther(app, root) {
  if (app.data.models.length > 1) { // see refusalOf in models.js
    make("p", "The second model is not shown: the page has no recorded numbers of it.", root);
    return { draw() {} };
  }
  const line = make("p", "This page has one model. To compare two: ", root);
  make("code", "gpt2mini explore --model BASE --other FOLDER", line);
  line.append(", with the folder of a tuned model or of an adapter.");
  return { draw() {} };
}

/** The readings of both models, the first model's first, whichever is shown. */
function bothModels(app) {
  return app.state.model === 0 ? [app.reading, app.other] : [app.other, app.reading];
}

// ---- the tokens of the text

const ROWS_LISTED = 6;

function comparedTextPart(app, root, names) {
  make("h3", "Each token of the text", root);
  const drawStrip = tokenStrip(root, (token) => app.set({ token, key: null }));
  const list = newTextTable(root);
  return function draw() {
    const changes = changesOfText(app);
    drawStrip({
      app,
      columns: changes.map(ratioColumn),
      summary: textSummary(changes, names),
      legend: "Up: the second model gives the token a higher probability, down: a lower one; " +
        "full height is a factor of 20. Most changed:",
    });
    const known = changes.filter(({ ratio }) => ratio !== null);
    known.sort((a, b) => Math.abs(b.ratio) - Math.abs(a.ratio));
    const rows = known.slice(0, ROWS_LISTED).map(({ text, tokens, ps, ratio }) =>
      [`${text} (${tokens[0]})`, ...ps.map(percent), `\u00d7\u00a0${number(Math.exp(ratio))}`]);
    drawTextTable(list, ["token", ...names, "factor"], rows);
  };
}

/** For each token its probabilities, and the logarithm of their ratio; null for the first. */
function changesOfText(app) {
  return app.groups.map((group) => {
    const [first, second] = bothModels(app).map((reading) => groupSurprise(reading, group));
    if (first === null) return { ...group, ratio: null };
    return { ...group, ratio: first - second, ps: [Math.exp(-first), Math.exp(-second)] };
  });
}

function ratioColumn({ text, tokens, ratio, ps }) {
  if (ratio === null) return { text, tokens, bars: [], title: `${text}: the first token` };
  const share = Math.min(1, Math.abs(ratio) / MOST_RATIO) / 2;
  const bar = ratio > 0 ? { low: 0.5, high: 0.5 + share, kind: "after" }
    : { low: 0.5 - share, high: 0.5, kind: "change" };
  const title = `${text}: ${percent(ps[0])} \u2192 ${percent(ps[1])}`;
  return { text, tokens, title, bars: [{ left: 0.15, right: 0.85, ...bar }] };
}

function textSummary(changes, names) {
  const known = changes.filter(({ ratio }) => ratio !== null);
  if (!known.length) return "The text has one token, which nothing predicts.";
  const risen = known.filter(({ ratio }) => ratio > 0).length;
  const mean = known.reduce((sum, { ratio }) => sum + ratio, 0) / known.length;
  const tokens = known.length === 1 ? "token is" : "tokens are";
  return `${risen} of ${known.length} ${tokens} more likely under ${names[1]}; in the geometric ` +
    `mean a token's probability is ${number(Math.exp(mean))} times that under ${names[0]}.`;
}

// ---- the next token

function comparedNextPart(app, root, names) {
  const title = make("h3", null, root);
  make("p", `Of two bars the upper, grey one is of ${names[0]}.`, root,
    { class: "muted explanation" });
  const table = newTextTable(root);
  const bars = new Map(); // the bars of each row
  return function draw() {
    title.textContent = `Next token after ${wordBefore(app)}`;
    const rows = likelyInEither(bothModels(app), app.token);
    drawTextTable(table, ["token", ...names, "points", ""], rows.map(({ id, before, after }) =>
      [app.label(id), percent(before), percent(after), change(after - before), null]));
    const full = Math.max(...rows.flatMap(({ before, after }) => [before, after]));
    [...table.rows].slice(1).forEach((row, i) => {
      if (!bars.has(row)) bars.set(row, pairOfBars(row.children[4]));
      bars.get(row)(rows[i].before, rows[i].after, full);
    });
  };
}

/** Tokens that are among the most likely of either model, the most likely first. */
function likelyInEither(readings, position) {
  const highest = ({ before, after }) => Math.max(before, after);
  return mostChanged(readings, position, 8).sort((a, b) => highest(b) - highest(a)).slice(0, 10);
}

// ---- the logit lens of both

function comparedLensPart(app, root, names) {
  make("h3", "What each would say after each block", root);
  const said = make("p", null, root);
  const table = newTextTable(root);
  return function draw() {
    const layers = Array.from({ length: app.config.n_layers + 1 }, (_, layer) =>
      bothModels(app).map((reading) => reading.lens(layer, app.token, 1)[0]));
    const differs = layers.map(([first, second]) => first.id !== second.id);
    said.textContent = saidOfLens(differs);
    drawTextTable(table, ["after", ...names, ""], layers.map((best, layer) => [
      lensLayerName(layer),
      ...best.map(({ id, p }) => `${app.label(id)} ${percent(p)}`),
      differs[layer] ? "\u2260" : "",
    ]));
    [...table.rows].slice(1).forEach((row, i) => row.classList.toggle("selected", differs[i]));
  };
}

function lensLayerName(layer) {
  return layer ? `block ${layer - 1}` : "embedding";
}

function saidOfLens(differs) {
  const first = differs.indexOf(true);
  if (first < 0) return "The most likely token is the same after every block.";
  const last = differs.at(-1) ? "and at the end" : "but at the end they agree";
  const where = (first ? "" : "the ") + lensLayerName(first);
  return `The most likely token first differs (\u2260) after ${where}, ${last}.`;
}

// ---- lengths of vectors

const COMPARED_VECTORS = ["attn_out", "mlp_out", "stream"];

function comparedNormsPart(app, root, names) {
  make("h3", "Largest differences of lengths", root);
  make("p", "The Euclidean length of what attention and the MLP add for the chosen token, and of " +
    "the stream.", root, { class: "muted" });
  const table = newTextTable(root);
  return function draw() {
    const largest = differencesOfNorms(app).slice(0, ROWS_LISTED);
    const rows = largest.map(({ name, norms: [first, second] }) =>
      [name, number(first), number(second), `\u00d7\u00a0${number(second / first)}`]);
    drawTextTable(table, ["vector", ...names, ""], rows);
  };
}

function differencesOfNorms(app) {
  const layers = Array.from({ length: app.config.n_layers }, (_, layer) => layer);
  const rows = layers.flatMap((layer) => COMPARED_VECTORS.map((part) => ({
    name: `blocks.${layer}.${part}`,
    norms: bothModels(app).map((reading) => reading.norm(part, layer, app.token) + 1e-9),
  })));
  const size = ({ norms: [first, second] }) => Math.abs(Math.log(second / first));
  return rows.sort((a, b) => size(b) - size(a));
}

// ---- tables

function newTextTable(parent) {
  return make("table", null, make("div", null, parent, { class: "scroll" }));
}

/** Fill a table with texts; a cell whose text is null is left as it is. */
function drawTextTable(table, head, rows) {
  const all = [head, ...rows];
  const newRow = (i) => newTextRow(i ? "td" : "th", head.length);
  children(table, all.length, newRow).forEach((row, i) => all[i].forEach((text, column) => {
    const cell = row.children[column];
    if (text !== null) cell.textContent = text;
    if (cell.tagName === "TH") cell.title = text; // long names are cut
  }));
}

function newTextRow(tag, columns) {
  const row = make("tr");
  for (let i = 0; i < columns; i++) make(tag, null, row, { class: i ? "number" : "code" });
  return row;
}
