// The next token after the chosen one: probabilities, how a token is chosen from them, and writing.

import { announce, button, children, make, percent, rovingGroup } from "./dom.js";
import { tokenName } from "./cell.js";
import { isUntouched, nextRows, RANKED, whyLikely } from "./next_tokens.js";
import { patchesOf } from "./patches.js";
import { samplingControls } from "./sampling_controls.js";
import { continuedText, writeTokens } from "./writing.js";

const AT_ONCE = 30; // tokens of "write 30"

export function nextPanel(app, root) {
  const title = make("h3", null, root);
  make("p", "The model gives every token of its vocabulary a number (logit). Softmax turns them " +
    "into probabilities, from which the next token is drawn.", root, { class: "intro" });
  const controls = samplingControls(app, root);
  const drawWriting = writingControls(app, root);
  const table = make("tbody", null, make("table", null, root, { class: "bar-table next-tokens" }));
  const note = make("p", null, root, { class: "muted" });
  const why = make("p", null, root);
  const markTabStop = rovingGroup(table, ".next-token");

  function draw() {
    title.textContent = `After ${tokenName(app, app.token)}`;
    controls.draw();
    drawWriting();
    const rows = nextRows(app);
    drawRows(app, table, rows);
    markTabStop();
    note.textContent = noteOf(app, rows);
    why.textContent = whyLikely(app);
  }

  return { draw };
}

// ---- the list

function drawRows(app, table, rows) {
  const full = Math.max(...rows.map((row) => Math.max(row.p, row.before?.p ?? 0, row.plain)));
  children(table, rows.length, () => makeNextRow(app)).forEach((element, i) => {
    const row = rows[i], name = app.label(row.id);
    const [rank, token, bars, numbers] = element.children;
    element.tokenId = row.id;
    element.classList.toggle("selected", row.isActual);
    element.classList.toggle("removed", row.isRemoved);
    rank.textContent = row.rank ?? `>${RANKED}`;
    token.firstChild.textContent = name;
    if (app.live) token.firstChild.setAttribute("aria-label", `add ${name}, ${percent(row.p)}`);
    drawNextBars(bars, row, full);
    const asText = ({ p, isRemoved }) => (isRemoved ? "removed" : percent(p));
    numbers.children[0].textContent = asText(row);
    numbers.children[1].textContent = row.before ? `before ${asText(row.before)}`
      : isUntouched(app.state) ? "" : `model ${percent(row.plain)}`;
  });
}

function drawNextBars(bars, { p, plain, before, isRemoved, isActual }, full) {
  const [now, was, said] = bars.children;
  now.style.width = `${(100 * (isRemoved ? plain : p)) / (full || 1)}%`;
  was.style.width = `${(100 * (before?.p ?? 0)) / (full || 1)}%`;
  was.hidden = before === null;
  said.textContent = isActual ? "\u25b2 follows in the text" : "";
}

function makeNextRow(app) {
  const row = make("tr");
  make("td", null, row, { class: "number muted" });
  const cell = make("th", null, row, { scope: "row" });
  if (app.live) {
    button("", cell, () => addToken(app, row.tokenId), { class: "next-token code" });
  } else make("span", null, cell, { class: "code" });
  const bars = make("td", null, row, { class: "two-bars" });
  make("span", null, bars, { class: "bar" });
  make("span", null, bars, { class: "bar before" });
  make("span", null, bars, { class: "in-text" });
  const numbers = make("td", null, row, { class: "number" });
  make("span", null, numbers);
  make("small", null, numbers);
  return row;
}

function noteOf(app, rows) {
  const shown = rows.reduce((sum, { p }) => sum + p, 0);
  const others = `All other tokens together: ${percent(Math.max(0, 1 - shown))}.`;
  const actual = rows.find((row) => row.isActual);
  if (!actual) return `${others} Nothing follows in the text.`;
  const rank = actual.rank ? `number ${actual.rank} of the list`
    : `not among the ${RANKED} most likely`;
  return `${others} In the text ${app.label(actual.id)} follows: ${rank}, ` +
    `${percent(actual.plain)} by the model.`;
}

// ---- writing

function addToken(app, id) {
  const text = continuedText(app, [id]);
  if (text === null) {
    announce(`${app.label(id)} is only a part of a character; a text needs whole ones.`);
  } else if (app.token + 1 < app.data.most_tokens) app.set({ text, token: null, key: null });
}

/** Buttons that let the model write, and the seed; returns a function that draws them. */
function writingControls(app, parent) {
  const line = make("div", null, parent, { class: "row writing" });
  if (!app.live) {
    line.textContent = "This page holds recorded numbers of one text: nothing can be added to it.";
    return () => {};
  }
  const add = button("add one", line, () => write(1));
  const many = button(`write ${AT_ONCE}`, line, () => (running ? stop() : write(AT_ONCE)));
  const seed = seedInput(app, line);
  const said = make("p", null, parent, { class: "muted", role: "status" });
  let running = null; // {expected}: the state that the writing has last shown

  function stop() {
    running = null;
  }

  async function write(n) {
    const own = { expected: app.state, isFirst: true };
    running = own;
    drawWriting();
    const end = await writeTokens(app, n, patchesInForce(app), (text, nWritten) => {
      if (running !== own || app.state !== own.expected) return false; // the reader went on
      app.set({ text, token: null, key: null }, { undo: own.isFirst });
      Object.assign(own, { expected: app.state, isFirst: false });
      said.textContent = n > 1 ? `${nWritten} of ${n}` : "";
      return true;
    });
    if (running === own) running = null;
    said.textContent = saidAtEnd(end, app);
    drawWriting();
  }

  function drawWriting() {
    const isFull = app.token + 1 >= app.data.most_tokens;
    add.disabled = isFull || running !== null;
    many.disabled = isFull && running === null;
    many.textContent = running ? "stop" : `write ${AT_ONCE}`;
    seed.draw();
    if (running) return;
    const cuts = app.token < app.tokenIds.length - 1;
    if (isFull) {
      said.textContent = `The page reads ${app.data.most_tokens} tokens; the text is full.`;
    } else if (cuts) {
      said.textContent = "The model would write on from the chosen token: what follows it in the " +
        "text is then removed (undo brings it back).";
    } else if (!said.textContent.endsWith("ended.")) said.textContent = "";
  }

  return drawWriting;
}

function saidAtEnd(end, app) {
  if (end === "end") return "The model drew the token that ends a text; writing ended.";
  if (end === "no character") return "The model drew bytes that spell no character; writing ended.";
  if (end === "full") return `The text has ${app.data.most_tokens} tokens; writing ended.`;
  return "";
}

function patchesInForce(app) {
  const { patch } = app.state;
  return patchesOf(app.state, app.source, patch && app.readSecond(patch.text));
}

/** The seed: the same text, settings and seed give the same continuation. */
function seedInput(app, parent) {
  const label = make("label", "seed ", parent, {
    title: "the same text, settings and seed give the same continuation" });
  const input = make("input", null, label, { type: "number", min: 0, step: 1, class: "short" });
  input.addEventListener("change", () => {
    app.set({ seed: Math.max(0, Math.trunc(input.value) || 0) });
  });
  return { draw() { input.value = app.state.seed; } };
}
