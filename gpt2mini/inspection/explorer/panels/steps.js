// What the eight steps of a block are: their words, their numbers, their lines of model.py.

import { attentionArithmetic } from "./attention_arithmetic.js";
import { isHeadOff, nowAndBefore, offSaid, tokenName } from "./cell.js";
import { make, number, percent } from "../dom.js";
import { described } from "../model/reading.js";

const MOST_SHOWN = 6; // attention weights

/** Each step: `say` is one sentence, `show` adds vectors to an element, `lines` are the
 * beginnings of lines of code. All three are about one token, one block and one head. */
export const STEPS = [
  {
    title: "The residual stream enters the block",
    short: "enter",
    say: ({ name, layer }) => `The stream of ${name} is one vector: ` +
      `the embedding${addedBefore(layer)}.`,
    show: (now, parent) => showVector(now, parent, `stream before block ${now.layer}`, "before"),
    lines: { block: ["x: Float"] },
  },
  {
    title: "norm1 normalizes it",
    short: "norm1",
    say: () => "The numbers get mean 0 and variance 1, then each is scaled and shifted. Only " +
      "attention reads this copy; the stream itself stays as it is.",
    show: (now, parent) => {
      showVector(now, parent, "stream", "before");
      showVector(now, parent, "norm1(stream)", "norm1");
    },
    lines: { block: ["attended = "] },
  },
  {
    title: "Query, key and value",
    short: "q, k, v",
    say: ({ layer, head }) => "Three matrices make three vectors for each head. The query says " +
      "what this token looks for, the key what it can be found by, the value what it passes on. " +
      `These are of head ${layer}.${head}.`,
    show: (now, parent) => {
      for (const name of ["query", "key", "value"]) showHeadVector(now, parent, name, name);
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
      for (const { key, weight, weightSaid, value } of weightsOf(now).slice(0, 3)) {
        const name = `value of ${tokenName(now.app, key)} \u00d7 ${weightSaid}`;
        vectorNumbers(parent, name, described(value.map((x) => x * weight)));
      }
      const off = isHeadOff(now.app.state, now.layer, now.head) ? ", switched off" : "";
      showHeadVector(now, parent, `sum over all tokens: the head's output${off}`, "context");
    },
    lines: { block: ["attended = "], attention: ["context = ", "value,\n"] },
  },
  {
    title: "attn_out mixes the heads; the result is added to the stream",
    short: "add",
    say: ({ config }) => `The outputs of the ${countOf(config.n_heads, "head")}, side by side, ` +
      "go through one more matrix. The result is added to the stream, not put in its place. It " +
      "can also cancel some of what is there.",
    show: (now, parent) => {
      showVector(now, parent, "stream", "before");
      const off = offSaid(now.app.state, now.layer, "attn");
      showVector(now, parent, `+ attn_out${off}`, "attn_out", "attention");
      showVector(now, parent, "= stream after attention", "middle");
    },
    lines: { block: ["x = x + self.dropout(attended)"], attention: ["return self.attn_out("] },
  },
  {
    title: "norm2, then the MLP widens it, then GELU",
    short: "MLP",
    say: ({ vectors }) => "The MLP reads this token alone. It computes " +
      `${vectors.hidden.size.toLocaleString("en")} numbers; GELU keeps large positive ones and ` +
      "brings the negative ones near 0.",
    show: (now, parent) => {
      showVector(now, parent, "norm2(stream)", "norm2");
      showVector(now, parent, "hidden, after GELU", "hidden");
    },
    lines: { block: ["x = x + self.dropout(self.mlp("], mlp: ["hidden = "] },
  },
  {
    title: "mlp_out is added; the stream leaves the block",
    short: "leave",
    say: ({ layer, lensAtStart, lensAtEnd }) => "A last matrix makes a vector as wide as the " +
      `stream, which is added. Where the stream enters block ${layer}, the model would say ` +
      `${lensAtStart}. Where it leaves, it would say ${lensAtEnd}.`,
    show: (now, parent) => {
      showVector(now, parent, "stream after attention", "middle");
      const off = offSaid(now.app.state, now.layer, "mlp");
      showVector(now, parent, `+ mlp_out${off}`, "mlp_out", "mlp");
      showVector(now, parent, `= stream after block ${now.layer}`, "stream");
    },
    lines: { block: ["x = x + self.dropout(self.mlp(", "return x"], mlp: ["return self.mlp_out("] },
  },
];

function addedBefore(layer) {
  if (layer === 0) return "; no block has added anything yet";
  if (layer === 1) return " plus what block 0 has added";
  return ` plus what blocks 0 to ${layer - 1} have added`;
}

function countOf(n, noun) {
  return n === 1 ? `one ${noun}` : `${n} ${noun}s`;
}

// ---- vectors

/** One of the vectors of `reading.step`. */
function showVector({ vectors, without }, parent, name, vector, kind = "") {
  vectorNumbers(parent, name, vectors[vector], without?.vectors[vector].norm, kind);
}

/** One of the vectors of the head. */
function showHeadVector({ ofHead, without }, parent, name, vector) {
  const lengthBefore = without ? described(without.ofHead[vector]).norm : undefined;
  vectorNumbers(parent, name, described(ofHead[vector]), lengthBefore);
}

/** The first 16 numbers of a vector, tinted by sign and size relative to the largest of them.
 * lengthBefore: its length without interventions. */
function vectorNumbers(parent, name, { norm, values, size }, lengthBefore, kind = "") {
  const figure = make("figure", null, parent, { class: `vector-numbers ${kind}` });
  const shown = Math.min(size, values.length);
  const caption = make("figcaption", null, figure);
  make("b", name, caption);
  const before = lengthBefore === undefined ? "" : `, before: ${number(lengthBefore)}`;
  make("span", ` shape (${size.toLocaleString("en")}), length ${number(norm)}${before}` +
    (shown < size ? `; first ${shown}:` : ""), caption, { class: "muted" });
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
  const text = size < 0.005 ? "0" : size < 0.995 ? size.toFixed(2).slice(1)
    : size.toFixed(size < 9.95 ? 1 : 0);
  return (x < 0 && text !== "0" ? "\u2212" : "") + text;
}

// ---- attention weights

/** {key, value, weight} of the chosen token for itself and all before it, largest weight first;
 * scoreSaid, weightSaid: the score and the weight in words. */
function weightsOf({ app, reading, layer, head, token }) {
  const made = new Map([app.before, reading].map((one) =>
    [one, attentionArithmetic(one, layer, head, token)]));
  const weightIn = (one, key) => one.attention(layer, head, token, key);
  return made.get(reading).rows.map(({ value }, key) => ({
    key, value, weight: weightIn(reading, key),
    scoreSaid: nowAndBefore(app, (one) => number(made.get(one).scores[key])),
    weightSaid: nowAndBefore(app, (one) => percent(weightIn(one, key))),
  })).sort((a, b) => b.weight - a.weight);
}

function weightsTable(now, parent) {
  const rows = weightsOf(now);
  const table = make("table", null, make("div", null, parent, { class: "scroll" }));
  const top = make("tr", null, table);
  for (const name of ["key of", "score", "weight", ""]) {
    make("th", name, top, { scope: "col" });
  }
  for (const { key, weight, scoreSaid, weightSaid } of rows.slice(0, MOST_SHOWN)) {
    const row = make("tr", null, table);
    make("th", tokenName(now.app, key), row, { scope: "row" });
    make("td", scoreSaid, row, { class: "number" });
    make("td", weightSaid, row, { class: "number" });
    make("span", null, make("td", null, row), { class: "bar" }).style.width = `${8 * weight}rem`;
  }
  const others = rows.slice(MOST_SHOWN);
  const { layer, head, token } = now;
  const rest = nowAndBefore(now.app, (one) => percent(others.reduce(
    (sum, { key }) => sum + one.attention(layer, head, token, key), 0)));
  if (others.length) {
    make("p", `${countOf(others.length, "other token")} together: ${rest}.`, parent,
      { class: "muted" });
  }
}
