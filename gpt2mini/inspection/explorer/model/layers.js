// The layers that engine.js is made of: what torch.nn is to model.py.
//
// A layer is a function (x, y, rows): it reads rows of x and writes the same rows of y. rows: from
// `first` to before `end`.

export const MOST_TOKENS = 128; // rows of a pass: the longest text that the page reads

/** The layers with the weights of a model. linear: see linear.js. */
export class Layers {
  constructor(weights, linear) {
    this.weights = weights;
    this.product = linear.product.bind(linear);
  }

  weight(name) {
    const found = this.weights[`${name}.weight`];
    if (!found) throw new Error(`the model has no ${name}.weight`);
    return found;
  }

  // y = W x + b, as nn.Linear. A layer without bias (qkv_bias=False, a tied head) adds none.
  linear(name, inputs) {
    const weight = this.weight(name);
    const bias = this.weights[`${name}.bias`] ?? null;
    return (x, y, rows) => this.product(x, weight, bias, y, rows, inputs);
  }

  // y = (x - mean) / sqrt(variance + 1e-5) * weight + bias, as nn.LayerNorm.
  norm(name) {
    const weight = this.weight(name);
    const bias = this.weights[`${name}.bias`];
    return (x, y, rows) => {
      for (let t = rows.first; t < rows.end; t++) normalize(x, weight, bias, y, t * weight.length);
    };
  }
}

function normalize(x, weight, bias, y, start) {
  const size = weight.length;
  let mean = 0;
  for (let i = 0; i < size; i++) mean += x[start + i] / size;
  let variance = 0;
  for (let i = 0; i < size; i++) variance += (x[start + i] - mean) * (x[start + i] - mean) / size;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  for (let i = 0; i < size; i++) y[start + i] = (x[start + i] - mean) * scale * weight[i] + bias[i];
}

// In place: exp(x) / sum of exp(x). The largest is subtracted first, so that no exp overflows.
export function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
}

// GPT-2 was trained with the tanh form of GELU: x / 2 * (1 + tanh(u)), which is x / (1 + exp(-2u)).
export function geluTanh(x) {
  const scale = Math.sqrt(2 / Math.PI);
  for (let i = 0; i < x.length; i++) {
    const u = scale * (x[i] + 0.044715 * x[i] * x[i] * x[i]);
    x[i] /= 1 + Math.exp(-2 * u);
  }
}

// The exact form: x times the probability that a standard normal number is below x.
export function geluExact(x) {
  for (let i = 0; i < x.length; i++) x[i] *= (1 + erf(x[i] / Math.SQRT2)) / 2;
}

// The error function, by a series of positive terms (Abramowitz and Stegun 1964, 7.1.6):
// 2 / sqrt(pi) * exp(-x^2) * (x + 2/3 x^3 + 4/15 x^5 + ...). Each term is the one before it, times
// 2 x^2 / (2n + 1).
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x); // to 16 digits
  let [term, sum] = [x, x];
  for (let n = 1; Math.abs(term) > 1e-17; n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

// ---- rows

export function newRows(width) {
  return new Float32Array(MOST_TOKENS * width);
}

export function rowsOf(x, { first, end }) {
  const width = x.length / MOST_TOKENS;
  return x.subarray(first * width, end * width);
}

// sum = x + change
export function addRows(x, change, sum, rows) {
  const width = x.length / MOST_TOKENS;
  for (let i = rows.first * width; i < rows.end * width; i++) sum[i] = x[i] + change[i];
}

// Replaces an activation, or some columns of it, if one of the patches names it.
export function patchRows(patches, name, x, rows, columns = null) {
  const width = x.length / MOST_TOKENS;
  const { start, end } = columns ?? { start: 0, end: width };
  for (const { value, position } of patches.filter((patch) => patch.name === name)) {
    for (let t = rows.first; t < rows.end; t++) {
      if (position !== null && position !== t) continue;
      if (typeof value === "number") x.fill(value, t * width + start, t * width + end);
      else x.set(value, t * width + start);
    }
  }
}
