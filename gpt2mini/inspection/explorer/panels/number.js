// One attention weight being made, in its real numbers: the product of a query and a key, the
// scale, the mask, softmax, and the weighted sum of values.

import { children, make, percent } from "../dom.js";
import {
  attentionArithmetic, fixed, inBrackets, indexOfLargest, largestTerms,
} from "./attention_arithmetic.js";
import { isHeadOff, nowAndBefore, shownCell, tokenName } from "./cell.js";
import { vectorBars } from "./vector_bars.js";

const PRODUCTS = 4, ROWS = 6, PARTS = 3; // how many of the largest terms are shown

export function numberPanel(app, root) {
  const title = make("h3", null, root);
  make("p", "softmax(query @ key.T / sqrt(head_dim)) @ value", root, { class: "code formula" });
  const list = make("ol", null, root, { class: "number-steps" });
  const steps = [productStep, scaleStep, maskStep, softmaxStep, valueStep]
    .map((build) => build(make("li", null, list)));

  function draw() {
    const { layer, head } = app.state, { query, key } = shownCell(app);
    title.textContent = `How this weight is made: ${tokenName(app, query)} reads ` +
      `${tokenName(app, key)} in head ${layer}.${head}`;
    const arithmetic = (reading) => attentionArithmetic(reading, layer, head, query);
    const made = arithmetic(app.reading);
    const madeBefore = app.before === app.reading ? made : arithmetic(app.before);
    const both = (say) => nowAndBefore(app, (one) => say(one === app.reading ? made : madeBefore));
    for (const drawStep of steps) drawStep(app, { ...made, query, key, both });
  }

  return { draw };
}

// ---- the steps; each builds its elements once and returns a function that draws. both: what a
// function says of the numbers and, while interventions are in force, of those without them

function productStep(item) {
  make("p", "Every token has a query, what it looks for, and a key, by which it is found. The " +
    "head computes both from the token's vector in the residual stream, after norm1. Query and " +
    "key are multiplied number by number, and the products are summed: the sum is large where " +
    "the two agree.", item);
  const drawQuery = vectorBars(item), drawKey = vectorBars(item), drawProducts = vectorBars(item);
  const drawSum = sumTable(item), result = make("p", null, item, { class: "code" });
  const drawAll = allProducts(item);
  return (app, { query, key, queryVector, rows, size, both }) => {
    const keyVector = rows[key].key, terms = Array.from(queryVector, (x, i) => x * keyVector[i]);
    const marked = indexOfLargest(terms);
    drawQuery(`query of ${tokenName(app, query)}`, queryVector, { marked });
    drawKey(`key of ${tokenName(app, key)}`, keyVector, { marked });
    drawProducts("their products", terms, { marked });
    const { shown, rest, nRest, sum } = largestTerms(terms, PRODUCTS);
    drawSum("number", shown.map(({ i, term }) => [
      `${i}`, `${fixed(queryVector[i], 3)} \u00d7 ${inBrackets(keyVector[i], 3)}`, fixed(term)]),
    nRest ? [`${nRest} others of ${size}`, "", fixed(rest)] : null, ["sum", "", fixed(sum)]);
    result.hidden = app.reading === app.before; // the table ends with the same sum
    result.textContent = `query \u00b7 key = ${both(({ sums }) => fixed(sums[key]))}`;
    drawAll(queryVector, keyVector, terms);
  };
}

/** Every product in a table, which is drawn while it is open. */
function allProducts(item) {
  const details = make("details", null, item), summary = make("summary", null, details);
  const table = make("table", null, make("div", null, details, { class: "scroll" }));
  let vectors = [];
  const draw = () => {
    if (!details.open) return;
    const rows = vectors[0].length + 1;
    children(table, rows, makeProductRow).forEach((row, i) => {
      const texts = i === 0 ? ["number", "query", "key", "product"]
        : [i - 1, ...vectors.map((vector) => fixed(vector[i - 1], 3))];
      texts.forEach((text, column) => { row.children[column].textContent = text; });
    });
  };
  details.addEventListener("toggle", draw);
  return (...shown) => {
    vectors = shown;
    summary.textContent = `all ${shown[0].length} products`;
    draw();
  };
}

function makeProductRow(i) {
  const row = make("tr");
  for (let column = 0; column < 4; column++) {
    make(i === 0 || column === 0 ? "th" : "td", null, row, { class: "number" });
  }
  return row;
}

function scaleStep(item) {
  const text = make("p", null, item), result = make("p", null, item, { class: "code" });
  return (app, { sums, size, key, both }) => {
    text.textContent = `Scale: divided by the square root of head_dim, ${size}, for sums of more ` +
      "products are larger. This is the score.";
    result.textContent = `${fixed(sums[key])} / sqrt(${size}) = ${fixed(sums[key])} / ` +
      `${fixed(Math.sqrt(size))} = ${both(({ scores }) => fixed(scores[key]))}`;
  };
}

function maskStep(item) {
  const text = make("p", null, item);
  return (app, { query }) => {
    const later = app.reading.nTokens - 1 - query;
    const name = tokenName(app, query);
    const excluded = later === 0 ? `Nothing comes after ${name}, so no token is excluded.`
      : `After ${name} ${later === 1 ? "comes 1 token" : `come ${later} tokens`}, with the score ` +
        "\u2212\u221e whatever the product is, and so with the weight 0.";
    text.textContent = "Mask: a token reads only itself and earlier tokens, for the model has to " +
      `predict what comes later. ${excluded}`;
  };
}

function softmaxStep(item) {
  make("p", "Softmax turns the scores of the row into weights that add up to 100\u00a0%: e to " +
    "the power of each score, divided by the sum of all of these. One more in the score is 2.7 " +
    "times the weight. (The largest score is subtracted first: the weights stay the same, and no " +
    "number gets too large.)", item);
  const drawSum = sumTable(item, "softmax");
  const result = make("p", null, item, { class: "code" }), differs = make("p", null, item);
  return (app, { query, key, scores, largest, exponentials, total, weights, both }) => {
    const { shown, rest, nRest, sum } = largestTerms(exponentials, ROWS, 3, key);
    const restWeight = shown.reduce((left, { i }) => left - weights[i], 1);
    drawSum("token", shown.map(({ i, term }) => [
      tokenName(app, i), `e^(${fixed(scores[i])} \u2212 ${inBrackets(largest)})`,
      fixed(term, 3), percent(weights[i]), i === key]),
    nRest ? [`${nRest} others`, "", fixed(rest, 3), percent(Math.max(0, restWeight))] : null,
    ["sum", "", fixed(sum, 3), percent(1)]);
    result.textContent = `weight of ${tokenName(app, key)} = ${fixed(exponentials[key], 3)} / ` +
      `${fixed(total, 3)} = ${both((numbers) => percent(numbers.weights[key]))}`;
    const { layer, head } = app.state, used = app.reading.attention(layer, head, query, key);
    differs.textContent = Math.abs(used - weights[key]) < 0.01 ? ""
      : `This model computes its attention in another way: its own weight is ${percent(used)}.`;
  };
}

function valueStep(item) {
  make("p", "Every token also has a value: what is passed on if it is read. The head's output is " +
    "the sum of all values, each times its weight.", item);
  const drawValue = vectorBars(item), drawPart = vectorBars(item), drawContext = vectorBars(item);
  const intro = make("p", null, item), drawSum = sumTable(item);
  const after = make("p", null, item);
  return (app, { key, rows, weights, context, size, both }) => {
    const value = rows[key].value, largest = sizeOfLargest([value, context]);
    const marked = indexOfLargest(context);
    drawValue(`value of ${tokenName(app, key)}`, value, { marked, largest });
    const part = value.map((x) => x * weights[key]);
    drawPart(`times its weight, ${percent(weights[key])}`, part, { marked, largest });
    drawContext("sum over all tokens: the output", context, { marked, largest });
    intro.textContent = `Number ${marked} of the output, the largest in size of ${size}: ` +
      `${both((numbers) => fixed(numbers.context[marked], 3))}.`;
    const terms = weights.map((weight, t) => weight * rows[t].value[marked]);
    const { shown, rest, nRest, sum } = largestTerms(terms, PARTS, 3, key);
    drawSum("token", shown.map(({ i, term }) => [
      tokenName(app, i), `${percent(weights[i])} \u00d7 ${inBrackets(rows[i].value[marked], 3)}`,
      fixed(term, 3), "", i === key]),
    nRest ? [`${nRest} others`, "", fixed(rest, 3)] : null,
    ["sum", "", fixed(sum, 3)]);
    after.textContent = whereItGoes(app);
  };
}

function whereItGoes(app) {
  const { layer, head } = app.state;
  if (!isHeadOff(app.state, layer, head)) {
    return `The outputs of all ${app.config.n_heads} heads of block ${layer}, side by side, go ` +
      "through the layer attn_out, whose output is added to the residual stream of the token.";
  }
  return `Head ${layer}.${head} is switched off: all this is computed, but zero or a mean is put ` +
    "in the place of the output, so nothing of it reaches the residual stream.";
}

// ---- tables

function sizeOfLargest(vectors) {
  return Math.max(...vectors.flatMap((vector) => Array.from(vector, Math.abs)));
}

/** A table of the terms of a sum. Returns a function that draws rows [name, how the term is made,
 * the term, its share, whether it is the shown cell], the rest of the terms, and the sum. */
function sumTable(parent, kind = "") {
  const scroll = make("div", null, parent, { class: "scroll" });
  const table = make("table", null, scroll, { class: `sum-table ${kind}` });
  return function draw(heading, shown, rest, sum) {
    const rows = [...shown, rest, sum].filter(Boolean);
    const elements = children(table, rows.length, makeSumRow);
    rows.forEach(([name, made, term, share = "", isCell = false], i) => {
      const texts = [name, made, term, share];
      elements[i].classList.toggle("selected", isCell);
      elements[i].classList.toggle("sum-row", i === rows.length - 1);
      texts.forEach((text, column) => { elements[i].children[column].textContent = text; });
    });
    table.setAttribute("aria-label", `terms of the sum, by ${heading}`);
  };
}

function makeSumRow() {
  const row = make("tr");
  make("th", null, row, { scope: "row" });
  for (let i = 0; i < 3; i++) make("td", null, row, { class: "number" });
  return row;
}
