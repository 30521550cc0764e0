// What the eight steps of a block are: their words, their numbers, their lines of model.py.

import { isHeadOff, tokenName } from "./cell.js";
import { make, number, percent } from "../dom.js";

const MOST_SHOWN = 6; // attention weights

/** Each step: `say` is one sentence, `show` adds vectors to an element, `lines` are the
 * beginnings of lines of code. All three are about one token, one block and one head. */
export const STEPS = [
  {
    title: "The residual stream enters the block",
    short: "enter",
    say: ({ name, layer }) => `The stream of ${name} is one vector: ` +
      `the embedding${addedBefore(layer)}.`,
    show: ({ vectors, layer }, parent) => {
      vectorNumbers(parent, `stream before block ${layer}`, vectors.before);
    },
    lines: { block: ["x: Float"] },
  },
  {
    title: "norm1 normalizes it",
    short: "norm1",
    say: () => "The numbers get mean 0 and variance 1, then each is scaled and shifted. Only " +
      "attention reads this copy; the stream itself stays as it is.",
    show: ({ vectors }, parent) => {
      vectorNumbers(parent, "stream", vectors.before);
      vectorNumbers(parent, "norm1(stream)", vectors.norm1);
    },
    lines: { block: ["attended = "] },
  },
  {
    title: "Query, key and value",
    short: "q, k, v",
    say: ({ layer, head }) => "Three matrices make three vectors for each head. The query says " +
      "what this token looks for, the key what it can be found by, the value what it passes on. " +
      `These are of head ${layer}.${head}.`,
    show: ({ ofHead }, parent) => {
      const names = ["query", "key", "value"];
      for (const name of names) vectorNumbers(parent, name, ofVector(ofHead[name]));
    },
    lines: { block: ["attended = "], attention: ["query, key, value = "] },
  },
  {
    title: "Scores become attention weights",
    short: "weights",
    say: ({ ofHead }) => "The query is compared with the key of this token and of every token " +
      `before it: score = query \u00b7 key / \u221a${ofHead.query.length}. Softmax turns the ` +
      "scores into weights that are positive and add up to 1.",
    show: (now, parent) => weightsTable(now, parent),
    lines: { block: ["attended = "],
             attention: ["context = ", "query,\n", "key,\n", "attn_mask=", "is_causal="] },
  },
  {
    title: "The values are summed, each times its weight",
    short: "sum",
    say: ({ layer, head }) => `The output of head ${layer}.${head} is a mixture of the values of ` +
      "the tokens that it attends to. This is how information moves from one token to another.",
    show: (now, parent) => {
      for (const { key, weight } of weightsOf(now).slice(0, 3)) {
        const value = now.reading.head(now.layer, now.head, key).value;
        const name = `${percent(weight)} \u00d7 value of ${tokenName(now.app, key)}`;
        vectorNumbers(parent, name, ofVector(value.map((x) => x * weight)));
      }
      const off = isHeadOff(now.app.state, now.layer, now.head) ? ", switched off" : "";
      vectorNumbers(parent, `sum over all tokens: the head's output${off}`,
        ofVector(now.ofHead.context));
    },
    lines: { block: ["attended = "], attention: ["context = ", "value,\n"] },
  },
  {
    title: "attn_out mixes the heads; the result is added to the stream",
    short: "add",
    say: ({ config }) => `The outputs of the ${countOf(config.n_heads, "head")}, side by side, ` +
      "go through one more matrix. The result is added: the stream keeps all that it held.",
    show: ({ app, layer, vectors }, parent) => {
      vectorNumbers(parent, "stream", vectors.before);
      const off = offSaid(app, layer, "attn");
      vectorNumbers(parent, `+ attn_out${off}`, vectors.attn_out, "attention");
      vectorNumbers(parent, "= stream after attention", vectors.middle);
    },
    lines: { block: ["x = x + self.dropout(attended)"], attention: ["return self.attn_out("] },
  },
  {
    title: "norm2, then the MLP widens it, then GELU",
    short: "MLP",
    say: ({ vectors }) => "The MLP reads this token alone. It computes " +
      `${vectors.hidden.size.toLocaleString("en")} numbers; GELU keeps large positive ones and ` +
      "brings the negative ones near 0.",
    show: ({ vectors }, parent) => {
      vectorNumbers(parent, "norm2(stream)", vectors.norm2);
      vectorNumbers(parent, "hidden, after GELU", vectors.hidden);
    },
    lines: { block: ["x = x + self.dropout(self.mlp("], mlp: ["hidden = "] },
  },
  {
    title: "mlp_out is added; the stream leaves the block",
    short: "leave",
    say: ({ layer, lensBefore, lensAfter }) => "A last matrix makes a vector as wide as the " +
      `stream, which is added. Before block ${layer} the model would say ${lensBefore}; now it ` +
      `would say ${lensAfter}.`,
    show: ({ app, vectors, layer }, parent) => {
      vectorNumbers(parent, "stream after attention", vectors.middle);
      vectorNumbers(parent, `+ mlp_out${offSaid(app, layer, "mlp")}`, vectors.mlp_out, "mlp");
      vectorNumbers(parent, `= stream after block ${layer}`, vectors.stream);
    },
    lines: { block: ["x = x + self.dropout(self.mlp(", "return x"], mlp: ["return self.mlp_out("] },
  },
];

function addedBefore(layer) {
  if (layer === 0) return "; no block has added anything yet";
  if (layer === 1) return " plus what block 0 has added";
  return ` plus what blocks 0 to ${layer - 1} have added`;
}

function offSaid({ state }, layer, kind) {
  const isOff = state.off.some((part) =>
    part.layer === layer && [kind, "layer"].includes(part.kind));
  return isOff ? ", switched off" : "";
}

function countOf(n, noun) {
  return n === 1 ? `one ${noun}` : `${n} ${noun}s`;
}

// ---- vectors

/** {norm, values, size} of a whole vector, as the steps of a reading have it. */
function ofVector(vector) {
  const norm = Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
  return { norm, values: vector.slice(0, 16), size: vector.length };
}

/** The first 16 numbers of a vector, tinted by sign and size relative to the largest of them. */
function vectorNumbers(parent, name, { norm, values, size }, kind = "") {
  const figure = make("figure", null, parent, { class: `vector-numbers ${kind}` });
  const shown = Math.min(size, values.length);
  const caption = make("figcaption", null, figure);
  make("b", name, caption);
  make("span", ` shape (${size.toLocaleString("en")}), length ${number(norm)}` +
    (shown < size ? `, first ${shown}:` : ""), caption, { class: "muted" });
  const list = make("ol", null, figure, { "aria-label": `first numbers of ${name}` });
  const largest = Math.max(...[...values].map(Math.abs)) || 1;
  for (const value of values) {
    const item = make("li", short(value), list, { class: value < 0 ? "negative" : "positive" });
    item.style.setProperty("--share", (Math.abs(value) / largest).toFixed(2));
  }
}

/** Two significant digits: many of them stand in one row. */
function short(x) {
  const size = Math.abs(x);
  const text = size < 0.005 ? "0" : size < 1 ? size.toFixed(2).slice(1)
    : size.toFixed(size < 10 ? 1 : 0);
  return (x < 0 && text !== "0" ? "\u2212" : "") + text;
}

// ---- attention weights

/** {key, score, weight} of the chosen token for itself and all before it, largest weight first. */
function weightsOf({ reading, layer, head, token, ofHead: { query } }) {
  const rows = Array.from({ length: token + 1 }, (_, key) => {
    const other = reading.head(layer, head, key).key;
    const product = query.reduce((sum, x, i) => sum + x * other[i], 0);
    return { key, score: product / Math.sqrt(query.length),
             weight: reading.attention(layer, head, token, key) };
  });
  return rows.sort((a, b) => b.weight - a.weight);
}

function weightsTable(now, parent) {
  const rows = weightsOf(now);
  const table = make("table", null, make("div", null, parent, { class: "scroll" }));
  const top = make("tr", null, table);
  for (const name of ["key of", "score", "weight", ""]) {
    make("th", name, top, { scope: "col" });
  }
  for (const { key, score, weight } of rows.slice(0, MOST_SHOWN)) {
    const row = make("tr", null, table);
    make("th", tokenName(now.app, key), row, { scope: "row" });
    make("td", number(score), row, { class: "number" });
    make("td", percent(weight), row, { class: "number" });
    make("span", null, make("td", null, row), { class: "bar" }).style.width = `${8 * weight}rem`;
  }
  const others = rows.slice(MOST_SHOWN);
  const rest = others.reduce((sum, { weight }) => sum + weight, 0);
  if (others.length) {
    make("p", `${countOf(others.length, "other token")}: ${percent(rest)} together.`, parent,
      { class: "muted" });
  }
}
