// How one attention weight and a head's output come about, in numbers:
// softmax(query @ key.T / sqrt(head_dim)) @ value, for one query of one head.

function dot(a, b) {
  return a.reduce((sum, x, i) => sum + x * b[i], 0);
}

/** All numbers on the way from a query and the keys to the head's output. */
export function attentionArithmetic(reading, layer, head, query) {
  const rows = Array.from({ length: query + 1 }, (_, t) => reading.head(layer, head, t));
  const queryVector = Float64Array.from(rows[query].query), size = queryVector.length;
  const sums = rows.map(({ key }) => dot(queryVector, key));
  const scores = sums.map((sum) => sum / Math.sqrt(size));
  const largest = Math.max(...scores);
  const exponentials = scores.map((score) => Math.exp(score - largest));
  const total = exponentials.reduce((sum, x) => sum + x, 0);
  const weights = exponentials.map((x) => x / total);
  const context = Float64Array.from({ length: size }, (_, i) =>
    weights.reduce((sum, weight, t) => sum + weight * rows[t].value[i], 0));
  return { rows, queryVector, size, sums, scores, largest, exponentials, total, weights, context };
}

/** The terms of a sum that are largest in size, and the sum of the rest, as numbers rounded so that
 * what is shown adds up: {shown: [{i, term}], rest, nRest, sum}. always: an index that is shown. */
export function largestTerms(terms, n, digits = 2, always = null) {
  const rounded = (x) => Number(x.toFixed(digits));
  const order = terms.map((term, i) => ({ i, term }))
    .sort((a, b) => (b.i === always) - (a.i === always) || Math.abs(b.term) - Math.abs(a.term));
  const shown = order.slice(0, n).map(({ i, term }) => ({ i, term: rounded(term) }));
  const sum = rounded(terms.reduce((total, x) => total + x, 0));
  const rest = rounded(sum - shown.reduce((total, { term }) => total + term, 0));
  shown.sort((a, b) => Math.abs(b.term) - Math.abs(a.term));
  return { shown, rest, nRest: terms.length - shown.length, sum };
}

export function indexOfLargest(numbers) {
  return numbers.reduce((best, x, i) => (Math.abs(x) > Math.abs(numbers[best]) ? i : best), 0);
}

// ---- numbers as text, all with the same decimals, so that they can be added up by eye

/** A number with so many decimals, and a true minus sign. */
export function fixed(x, digits = 2) {
  const text = Math.abs(x).toFixed(digits);
  return x < 0 && Number(text) !== 0 ? `\u2212${text}` : text;
}

export function inBrackets(x, digits) {
  const text = fixed(x, digits);
  return text.startsWith("\u2212") ? `(${text})` : text;
}
