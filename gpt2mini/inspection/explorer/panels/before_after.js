// Before and after the interventions: the token that follows, the tokens that changed most, and how
// much each token of the text surprises the model.

import { change, children, make, number, percent } from "../dom.js";
import { AS_THE_MODEL } from "../model/sampling.js";
import { groupSurprise, tokenStrip } from "./strip.js";

const TOKENS_COMPARED = 40; // the most likely ones before, and those after
const CHANGES_SHOWN = 8;

/** Returns a function that draws. */
export function beforeAfterPart(app, root) {
  const section = make("div", null, root);
  make("h3", "Before and after", section);
  const said = make("p", null, section, { class: "before-after" });
  const drawBars = pairOfBars(section);
  make("h3", "Next tokens that changed most, in percentage points", section);
  const table = make("table", null, make("div", null, section, { class: "scroll" }));
  make("h3", "Surprise of each token of the text", section);
  const drawStrip = tokenStrip(section, (token) => app.set({ token, key: null }));
  return function draw() {
    section.hidden = app.reading === app.before;
    if (section.hidden) return;
    const [before, after] = bothReadings(app).map((one) => one.probability(app.token, app.target));
    const target = app.label(app.target);
    said.textContent = `\u201c${target}\u201d after \u201c${wordBefore(app)}\u201d: ` +
      `${percent(before)} \u2192 ${percent(after)}`;
    drawBars(before, after);
    drawChanges(app, table, mostChanged(bothReadings(app), app.token).slice(0, CHANGES_SHOWN));
    drawSurprises(app, drawStrip);
  };
}

function bothReadings(app) {
  return [app.before, app.reading];
}

/** The label of the chosen token, with the tokens before it back to the beginning of its word. */
export function wordBefore(app) {
  let first = app.token;
  const startsWord = (label) => /^[\u2423\u23ce]/.test(label);
  while (first > 0 && app.token - first < 4 && !startsWord(app.tokenLabels[first])) first--;
  return app.tokenLabels.slice(first, app.token + 1).join("");
}

/** Two bars, of shares of 1: the first in grey. Returns a function that draws them. */
export function pairOfBars(parent) {
  const box = make("div", null, parent, { class: "pair", "aria-hidden": "true" });
  const bars = ["bar before", "bar"].map((kind) => make("span", null, box, { class: kind }));
  return function draw(before, after, full = Math.max(before, after)) {
    [before, after].forEach((p, i) => { bars[i].style.width = `${(100 * p) / (full || 1)}%`; });
  };
}

/** [{id, before, after}] of the tokens whose probability differs most between two readings. */
export function mostChanged([first, second], position, n = TOKENS_COMPARED) {
  const ids = new Set([first, second].flatMap((reading) =>
    reading.nextTokens(position, AS_THE_MODEL, n).map(({ id }) => id)));
  const rows = [...ids].map((id) => ({
    id, before: first.probability(position, id), after: second.probability(position, id) }));
  const size = (row) => Math.abs(row.after - row.before);
  return rows.sort((a, b) => size(b) - size(a) || a.id - b.id);
}

const CHANGE_COLUMNS = ["token", "before", "after", "points"];

function drawChanges(app, table, rows) {
  children(table, rows.length + 1, (i) => newChangeRow(i ? "td" : "th")).forEach((element, i) => {
    const texts = i ? textsOfChange(app, rows[i - 1]) : CHANGE_COLUMNS;
    texts.forEach((text, column) => { element.children[column].textContent = text; });
  });
}

function newChangeRow(tag) {
  const row = make("tr");
  CHANGE_COLUMNS.forEach((name, i) => make(tag, null, row, { class: i ? "number" : "code" }));
  return row;
}

function textsOfChange(app, { id, before, after }) {
  return [app.label(id), percent(before), percent(after), change(after - before)];
}

// ---- the surprise of each token

function drawSurprises(app, drawStrip) {
  const pairs = app.groups.map((group) =>
    bothReadings(app).map((reading) => groupSurprise(reading, group)));
  const full = Math.max(1, ...pairs.flat().filter((x) => x !== null));
  drawStrip({
    app,
    columns: app.groups.map((group, i) => surpriseColumn(group, pairs[i], full)),
    summary: surpriseSummary(app, pairs),
    legend: "Left, grey: before. Right: after. Higher: the token surprises the model more.",
  });
}

function surpriseColumn({ text, tokens }, [before, after], full) {
  if (before === null) return { text, tokens, bars: [], title: `${text}: the first token` };
  return {
    text,
    tokens,
    bars: [
      { left: 0.1, right: 0.45, low: 0, high: before / full, kind: "before" },
      { left: 0.55, right: 0.9, low: 0, high: after / full, kind: "after" },
    ],
    title: `${text}: ${percent(Math.exp(-before))} \u2192 ${percent(Math.exp(-after))}`,
  };
}

function surpriseSummary(app, pairs) {
  const known = pairs.map(([before, after], i) => ({ i, before, after }))
    .filter(({ before }) => before !== null);
  if (!known.length) return "The text has one token, which nothing predicts.";
  const most = known.reduce((a, b) =>
    (Math.abs(b.after - b.before) > Math.abs(a.after - a.before) ? b : a));
  const mean = (side) => number(known.reduce((sum, one) => sum + one[side], 0) / known.length);
  return `Mean surprise: ${mean("before")} \u2192 ${mean("after")} nats. Most changed: ` +
    `${app.groups[most.i].text} (token ${app.groups[most.i].tokens[0]}), ` +
    `${number(most.before)} \u2192 ${number(most.after)}.`;
}
