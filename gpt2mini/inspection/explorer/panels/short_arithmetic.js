// How one attention weight is made, in three lines under the large picture, where they can be read
// while the pointer is on a cell. number.js shows the same in full.

import { attentionArithmetic, fixed, inBrackets, largestTerms } from "./attention_arithmetic.js";
import { nowAndBefore } from "./cell.js";
import { make, percent } from "../dom.js";

const SHORT_PRODUCTS = 3; // how many of the largest are shown

/** Builds the lines once; returns a function that draws them for a cell {query, key}. */
export function shortArithmetic(parent) {
  const list = make("dl", null, parent, { class: "short-arithmetic" });
  const [product, score, weight] = ["query \u00b7 key", "score", "softmax"].map((name) => {
    make("dt", name, list);
    return make("dd", null, list);
  });

  return function draw(app, { query, key }) {
    const { layer, head } = app.state;
    const made = attentionArithmetic(app.reading, layer, head, query);
    const of = (say) => nowAndBefore(app, (reading) => say(reading === app.reading ? made
      : attentionArithmetic(reading, layer, head, query)));
    product.textContent = `${termsSaid(made, key)} = ${of(({ sums }) => fixed(sums[key]))}`;
    score.textContent = `${fixed(made.sums[key])} / sqrt(${made.size}) = ` +
      of(({ scores }) => fixed(scores[key]));
    weight.textContent = `e^(${fixed(made.scores[key])} \u2212 ${inBrackets(made.largest)}) / ` +
      `${fixed(made.total, 3)}, the row's sum, = ${of(({ weights }) => percent(weights[key]))}`;
  };
}

/** "3.10 + 2.72 + (\u22122.05) + 1.44 (61 others)": the products that are summed. */
function termsSaid({ rows, queryVector }, key) {
  const products = Array.from(queryVector, (x, i) => x * rows[key].key[i]);
  const { shown, rest, nRest } = largestTerms(products, SHORT_PRODUCTS);
  const terms = shown.map(({ term }, i) => (i === 0 ? fixed(term) : inBrackets(term)));
  return terms.join(" + ") + (nRest ? ` + ${inBrackets(rest)} (${nRest} others)` : "");
}
