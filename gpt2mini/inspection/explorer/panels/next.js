// The next token after the chosen one: probabilities, how a token is chosen from them, and writing.

import { button, children, make, percent, rovingGroup } from "../dom.js";
import { tokenName } from "./cell.js";
import { isUntouched, nextRows, RANKED, whyLikely } from "./next_tokens.js";
import { samplingControls } from "./sampling_controls.js";
import { writingControls } from "./writing_controls.js";


export function nextPanel(app, root) {
  const title = make("h3", null, root);
  make("p", "The model gives every token of its vocabulary a number (logit). Softmax turns them " +
    "into probabilities, from which the next token is drawn.", root, { class: "intro" });
  const controls = samplingControls(app, root);
  const writing = writingControls(app, root);
  const table = make("tbody", null, make("table", null, root, { class: "bar-table next-tokens" }));
  const note = make("p", null, root, { class: "muted" });
  const why = make("p", null, root);
  const markTabStop = rovingGroup(table, ".next-token");

  function draw() {
    title.textContent = `After ${tokenName(app, app.token)}`;
    controls.draw();
    writing.draw();
    const rows = nextRows(app);
    drawRows(app, table, rows, (id) => writing.add(id));
    markTabStop();
    note.textContent = noteOf(app, rows);
    why.textContent = whyLikely(app);
  }

  return { draw };
}

// ---- the list

/** add(id): called for a token that is clicked. */
function drawRows(app, table, rows, add) {
  const full = Math.max(...rows.map((row) => Math.max(row.p, row.before?.p ?? 0, row.plain)));
  children(table, rows.length, () => makeNextRow(app, add)).forEach((element, i) => {
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

function makeNextRow(app, add) {
  const row = make("tr");
  make("td", null, row, { class: "number muted" });
  const cell = make("th", null, row, { scope: "row" });
  if (app.live) {
    button("", cell, () => add(row.tokenId), { class: "next-token code" });
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
