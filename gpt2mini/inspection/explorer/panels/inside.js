// An opened part of the architecture: what it reads and writes, what it does to the chosen token,
// its shapes, its parameters and its lines of source code.

import { isHeadOff, nowAndBefore, offSaid, tokenName, tokenText } from "./cell.js";
import { button, children, clear, make, number, percent, rovingGroup } from "../dom.js";
import { drawSource, makeSource } from "./source_code.js";

// What each part reads and writes, in words.
const READS_AND_WRITES = {
  embedding: {
    reads: "the ids of the tokens",
    writes: "the start of the residual stream: one vector for each token",
  },
  block: {
    reads: "the residual stream",
    writes: "two vectors added to each token's stream: first attention's, then the MLP's",
  },
  attention: {
    reads: "the stream of this token and of all tokens before it, after norm1",
    writes: "one vector, added to this token's stream",
  },
  mlp: {
    reads: "the stream of this token alone, after norm2",
    writes: "one vector, added to this token's stream",
  },
  final_norm: {
    reads: "the stream after the last block",
    writes: "the vector that the output head reads",
  },
  out_head: {
    reads: "the vector of each token after the final norm",
    writes: "logits: one number for each token of the vocabulary; softmax makes probabilities",
  },
};

export function insidePanel(app, root) {
  const choices = make("div", null, root, { class: "row" });
  const partChoice = makePartChoice(app, choices);
  const block = makeBlockChoice(app, choices);
  const title = make("h3", null, root);
  const text = make("p", null, root);
  const facts = make("dl", null, root, { class: "facts" });
  const heads = makeHeadReads(app, root);
  const parameters = make("div", null, root, { class: "parameters" });
  make("h3", "Source code", root);
  const source = makeSource(root);

  function draw() {
    const part = openedPart(app);
    partChoice.value = part.key;
    block.draw();
    block.element.hidden = !part.in_block;
    title.textContent = titleOf(app, part);
    text.textContent = part.text;
    drawFacts(app, facts, part);
    heads.draw(part);
    drawParameters(app, parameters, part);
    drawSource(source, part);
  }

  return { draw };
}

export function partOf(app, key) {
  return app.data.parts.find((part) => part.key === key);
}

/** The part that the state names, or attention if it names none. */
function openedPart(app) {
  return partOf(app, app.state.part) ?? partOf(app, "attention");
}

function titleOf(app, part) {
  if (!part.in_block) return part.title;
  if (part.key === "block") return `Block ${app.state.layer}`;
  return `${part.title} of block ${app.state.layer}`;
}

// ---- choices

function makePartChoice(app, parent) {
  const choice = make("select", null, make("label", "part ", parent));
  for (const { key, title } of app.data.parts) choice.add(new Option(title, key));
  choice.addEventListener("change", () => app.set({ part: choice.value }));
  return choice;
}

/** A list of the blocks, with buttons to the block before and after. At an end a button is marked
 * as disabled and does nothing: a button that is really disabled would lose the focus. */
export function makeBlockChoice(app, parent) {
  const element = make("span", null, parent, { class: "row", role: "group" });
  const go = (layer) => app.set({ layer });
  const earlier = button("\u2190", element, () => go(app.state.layer - 1),
    { "aria-label": "the block before" });
  const choice = make("select", null, make("label", null, element), { "aria-label": "block" });
  const later = button("\u2192", element, () => go(app.state.layer + 1),
    { "aria-label": "the block after" });
  choice.addEventListener("change", () => go(Number(choice.value)));

  function draw() {
    const { layer } = app.state, last = app.config.n_layers - 1;
    while (choice.options.length <= last) {
      choice.add(new Option(`block ${choice.options.length}`, choice.options.length));
    }
    choice.value = layer;
    earlier.setAttribute("aria-disabled", layer === 0);
    later.setAttribute("aria-disabled", layer === last);
  }

  return { element, draw };
}

// ---- facts

function drawFacts(app, list, part) {
  clear(list);
  const { reads, writes } = READS_AND_WRITES[part.key];
  const here = hereFact(app, part), shape = shapeFact(app, part);
  for (const [name, text] of Object.entries({ reads, writes, "for this token": here, shape })) {
    make("dt", name, list);
    make("dd", text, list);
  }
}

/** The shape with the name of the axis, and with the number of tokens of this text. */
function shapeFact({ reading: { nTokens } }, { shape }) {
  return `${shape}; here, with ${nTokens} ${nTokens === 1 ? "token" : "tokens"}: ` +
    shape.replaceAll(/\btokens\b/g, nTokens);
}

/** What the part does to the chosen token, in numbers. */
function hereFact(app, { key }) {
  const { token, state: { layer } } = app;
  const length = (vector, block = layer) =>
    nowAndBefore(app, (reading) => number(reading.norm(vector, block, token)));
  const stream = (after) => (after < 0 ? length("embedding", 0) : length("stream", after));
  const off = (kind) => offSaid(app.state, layer, kind);
  const facts = {
    embedding: () => `a vector of length ${length("embedding")}; without any block, the model ` +
      `would say ${lensSaid(app, 0)}`,
    block: () => `the stream enters with length ${stream(layer - 1)}; there the model would say ` +
      `${lensSaid(app, layer)}. It leaves${off("layer") && " the block, which is switched off,"} ` +
      `with length ${stream(layer)}; there the model would say ${lensSaid(app, layer + 1)}`,
    attention: () => `adds a vector of length ${length("attn_out")}${off("attn")}; the stream ` +
      `enters the block with length ${stream(layer - 1)}; then it has length ${length("middle")}`,
    mlp: () => `adds a vector of length ${length("mlp_out")}${off("mlp")}; the stream has length ` +
      `${length("middle")}; then it has length ${length("stream")}`,
    final_norm: () => `reads a stream of length ${stream(app.config.n_layers - 1)}`,
    out_head: () => `next the model says ${lensSaid(app, app.config.n_layers, 3)}`,
  };
  return `token ${token}, ${tokenText(app, token)}: ${facts[key]()}`;
}

/** The likeliest next tokens at this place of the stream, with their probabilities. */
export function lensSaid(app, layer, n = 1) {
  const likeliest = (reading) => reading.lens(layer, app.token, n).slice(0, n)
    .map(({ id, p }) => `${app.label(id)} (${percent(p)})`).join(", ");
  return nowAndBefore(app, likeliest, n > 1 ? "; " : ", ");
}

// ---- what the heads of an attention read

/** A row for each head: a button that shows its picture, and the tokens that it attends to. */
function makeHeadReads(app, parent) {
  const element = make("div", null, parent, { class: "head-reads" });
  const title = make("h3", null, element);
  const table = make("table", null, element);
  const markTabStop = rovingGroup(table, "button");
  const makeRow = (head) => {
    const row = make("tr");
    button("", make("th", null, row, { scope: "row" }), () => app.set({ head, middle: "heads" }));
    make("td", null, row);
    return row;
  };

  function draw(part) {
    element.hidden = part.key !== "attention";
    if (element.hidden) return;
    title.textContent = `What each head reads for token ${app.token}: its largest weights`;
    const { layer } = app.state;
    children(table, app.config.n_heads, makeRow).forEach((row, head) => {
      const off = isHeadOff(app.state, layer, head) ? " (off)" : "";
      row.querySelector("button").textContent = `head ${layer}.${head}${off}`;
      row.lastElementChild.textContent = mostRead(app, head);
    });
    markTabStop();
  }

  return { draw };
}

/** The tokens with the largest attention weights of a head. */
function mostRead(app, head) {
  const weight = (reading, key) => reading.attention(app.state.layer, head, app.token, key);
  const keys = Array.from({ length: app.token + 1 }, (_, key) => key);
  keys.sort((a, b) => weight(app.reading, b) - weight(app.reading, a));
  return keys.slice(0, 3).map((key) => `${tokenName(app, key)} ` +
    nowAndBefore(app, (reading) => percent(weight(reading, key)))).join("; ");
}

// ---- parameters

function drawParameters(app, element, part) {
  if (element.part === part) return;
  element.part = part;
  clear(element);
  const total = app.data.models[0].n_parameters;
  const named = Object.entries(part.parameters);
  make("h3", "Parameters", element);
  make("p", parametersSaid(part, app.config.n_layers, total), element);
  if (!named.length) return;
  const table = make("table", null, make("div", null, element, { class: "scroll" }));
  for (const [name, shape] of named) {
    const row = make("tr", null, table);
    make("code", name, make("th", null, row, { scope: "row" }));
    make("td", `(${shape.join(", ")})`, row);
    make("td", count(shape.reduce((a, b) => a * b, 1)), row, { class: "number" });
  }
  const sum = make("tr", null, table, { class: "sum" });
  make("th", "total", sum, { scope: "row", colspan: 2 });
  make("td", count(part.n_parameters), sum, { class: "number" });
}

function parametersSaid({ key, in_block: inBlock, n_parameters: own }, nLayers, total) {
  if (own === 0 && key === "out_head") {
    return "None of its own: its matrix is that of the token embedding, tok_emb.weight.";
  }
  const all = inBlock ? nLayers * own : own;
  const times = !inBlock ? "" : nLayers === 1 ? " in the one block"
    : ` in each block, ${count(all)} in all ${nLayers} blocks`;
  return `${count(own)}${times}: ${percent(all / total)} of the model's ${count(total)}.`;
}

function count(n) {
  return n.toLocaleString("en");
}
