// Attention heads: all of them small, one large, and what the chosen token reads in it.

import { button, children, make, percent, rovingGroup } from "../dom.js";
import { isHeadOff, shownCell, tokenName } from "./cell.js";
import { kindInWords, kindOfHead } from "./head_kinds.js";
import { largeHead } from "./large_head.js";
import { makeLegend, smallHeads, switchHead } from "./small_heads.js";

const STRONGEST = 5; // weights that are listed

export function headsPanel(app, root) {
  make("p", "By attention a token reads from itself and from earlier tokens, in each head in " +
    "another way. In a picture a row is a token that reads, a column one that is read; the " +
    "stronger the color (by the square root), the larger the weight; a row adds up to " +
    "100\u00a0%. Of a long text a pixel of a small picture is the largest of several weights.",
  root, { class: "intro" });
  const layout = make("div", null, root, { class: layoutFor(app.data.models[0].config.n_heads) });
  const small = smallHeads(app, make("div", null, layout));
  const one = make("div", null, layout, { class: "one-head" });
  const title = buildTitle(app, one);
  const view = buildViews(one, () => large.draw(view.chosen()));
  const large = largeHead(app, one);
  one.append(title.kind); // under the picture, so that the arithmetic of a cell is in view
  const words = buildWords(app, make("div", null, layout, { class: "read-words" }));
  makeLegend(app, root);

  function draw() {
    small.draw();
    title.draw();
    view.draw(app.reading !== app.before);
    large.draw(view.chosen());
    words.draw();
  }

  return { draw };
}

/** Many small pictures beside each other leave less room for the large one. */
function layoutFor(nHeads) {
  return `heads-layout ${nHeads > 14 ? "very-wide" : nHeads > 6 ? "wide" : ""}`;
}

/** Which head is shown large, what kind it is, and a button to switch it off. */
function buildTitle(app, parent) {
  const line = make("div", null, parent, { class: "row" });
  const name = make("h3", null, line);
  const toggle = button("", line, () => switchHead(app, app.state.layer, app.state.head));
  toggle.hidden = !app.live;
  const kind = make("p", null, parent, { class: "muted head-kind" });

  function draw() {
    const { layer, head, model } = app.state, off = isHeadOff(app.state, layer, head);
    name.textContent = `Head ${layer}.${head}${off ? " (off)" : ""}`;
    toggle.textContent = off ? "switch on" : "switch off";
    toggle.disabled = off && app.state.off.some((part) => part.layer === layer &&
      (part.kind === "attn" || part.kind === "layer")); // that is a choice of another panel
    const found = kindOfHead(app.data.models[model], layer, head);
    kind.textContent = `Head ${head} of block ${layer}.${found ? ` ${kindInWords(found)}` : ""}`;
  }

  return { kind, draw };
}

/** after | before | difference, offered while interventions are in force. */
function buildViews(parent, redraw) {
  const group = make("div", null, parent, { class: "row", role: "group", "aria-label": "weights" });
  const names = { after: "after", before: "before", difference: "difference" };
  let chosen = "after";
  const buttons = Object.entries(names).map(([kind, text]) => button(text, group, () => {
    chosen = kind;
    draw(true);
    redraw();
  }));
  const note = make("span", "blue: more than before, orange: less", group, { class: "muted" });

  function draw(inForce) {
    group.hidden = !inForce;
    if (!inForce) chosen = "after";
    note.hidden = chosen !== "difference";
    buttons.forEach((one) => one.setAttribute("aria-pressed", one.textContent === names[chosen]));
  }

  return { draw, chosen: () => chosen };
}

/** The row of the chosen token: the text shaded by its weights, and the largest in numbers. */
function buildWords(app, parent) {
  const title = make("h3", null, parent);
  const tokens = make("div", null, parent, {
    class: "read-tokens", role: "radiogroup", "aria-label": "tokens that are read: choose one",
  });
  const later = make("p", null, parent, { class: "muted" });
  const table = make("tbody", null, make("table", null, parent, { class: "bar-table" }));
  const markTabStop = rovingGroup(tokens, ".token");

  function draw() {
    const { layer, head } = app.state;
    title.textContent = `What ${tokenName(app, app.token)} reads in head ${layer}.${head}`;
    drawReadTokens(app, tokens);
    markTabStop();
    const after = app.reading.nTokens - 1 - app.token;
    later.textContent = after === 0 ? "" : after === 1 ? "The token after it is masked: not read."
      : `The ${after} tokens after it are masked: not read.`;
    drawStrongest(app, table);
  }

  return { draw };
}

function drawReadTokens(app, parent) {
  const { layer, head } = app.state, shown = shownCell(app).key;
  const read = app.groups.filter(({ tokens }) => tokens[0] <= app.token);
  const choose = (i) => app.set({ token: app.token, key: app.groups[i].tokens[0] });
  const buttons = children(parent, read.length, (i) =>
    button("", null, () => choose(i), { role: "radio", class: "token read-token" }));
  read.forEach(({ text, tokens }, i) => {
    const allowed = tokens.filter((t) => t <= app.token);
    const weight = allowed.reduce(
      (sum, t) => sum + app.reading.attention(layer, head, app.token, t), 0);
    buttons[i].textContent = text;
    buttons[i].style.setProperty("--share", Math.sqrt(Math.min(1, weight)).toFixed(3));
    buttons[i].setAttribute("aria-checked", tokens.includes(shown));
    buttons[i].setAttribute("aria-label", `${text} (${tokens[0]}), ${percent(weight)}`);
    buttons[i].title = `${text} (${tokens[0]}): ${percent(weight)}`;
  });
}

/** The largest weights of the chosen token's row, and those without interventions beside them. */
function drawStrongest(app, table) {
  const { layer, head } = app.state, query = app.token;
  const weight = (key) => app.reading.attention(layer, head, query, key);
  const before = (key) => app.before.attention(layer, head, query, key);
  const compared = app.before !== app.reading;
  const keys = Array.from({ length: query + 1 }, (_, key) => key)
    .sort((a, b) => weight(b) - weight(a)).slice(0, STRONGEST);
  const rows = children(table, keys.length, makeStrongestRow);
  keys.forEach((key, i) => {
    const [name, share, bars] = rows[i].children;
    name.textContent = tokenName(app, key);
    share.children[0].textContent = percent(weight(key));
    share.children[1].textContent = compared ? `before ${percent(before(key))}` : "";
    bars.children[0].style.width = `${100 * weight(key)}%`;
    bars.children[1].style.width = `${100 * before(key)}%`;
    bars.children[1].hidden = !compared;
  });
}

function makeStrongestRow() {
  const row = make("tr");
  make("th", null, row, { scope: "row", class: "code" });
  const share = make("td", null, row, { class: "number" });
  make("span", null, share);
  make("small", null, share);
  const bars = make("td", null, row, { class: "two-bars", "aria-hidden": "true" });
  make("span", null, bars, { class: "bar" });
  make("span", null, bars, { class: "bar before" });
  return row;
}
