// Logits -> next token, as gpt2mini/sampling.py: temperature, then top-k, then top-p. A rule that
// forbids a token sets its logit to minus infinity, which softmax turns into probability 0.

/** No rule changes the model's own probabilities. */
export const AS_THE_MODEL = { temperature: 1, topK: 0, topP: 1 };

/**
 * The probabilities of all tokens, after all rules. temperature 0: the most likely has all of it.
 * topK: choose among the k most likely; 0: among all. topP: choose among the fewest whose
 * probabilities add up to p; 1: among all.
 */
export function distribution(logits, { temperature = 1, topK = 0, topP = 1 } = {}) {
  let kept = new Float64Array(logits);
  if (temperature > 0 && temperature !== 1) kept = divideByTemperature(kept, temperature);
  if (topK > 0) kept = keepTopK(kept, topK);
  if (topP < 1) kept = keepTopP(kept, topP);
  return temperature === 0 ? onlyTheLargest(kept) : probabilitiesOf(kept);
}

/** Below 1 sharpens the distribution, above 1 flattens it. The largest is subtracted first, so that
 * nothing overflows. */
function divideByTemperature(logits, temperature) {
  const largest = largestOf(logits);
  return logits.map((x) => (x - largest) / temperature);
}

/** Keep the k most likely tokens (Fan et al. 2018), and those that are as likely as the last. */
function keepTopK(logits, k) {
  const smallestKept = logits.slice().sort()[Math.max(0, logits.length - k)];
  return logits.map((x) => (x < smallestKept ? -Infinity : x));
}

/** Keep the fewest tokens whose probabilities add up to p (nucleus, Holtzman et al. 2020). */
function keepTopP(logits, p) {
  const probabilities = probabilitiesOf(logits);
  const kept = new Float64Array(logits.length).fill(-Infinity);
  let before = 0; // the sum over more likely tokens
  for (const id of mostLikelyFirst(probabilities)) {
    if (before >= p) break;
    kept[id] = logits[id];
    before += probabilities[id];
  }
  return kept;
}

function onlyTheLargest(logits) {
  const all = new Float64Array(logits.length);
  all[logits.indexOf(largestOf(logits))] = 1;
  return all;
}

/** The logarithm of the sum of exp(logit): log p = logit - logSumExp. */
export function logSumExp(logits) {
  const largest = largestOf(logits);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - largest);
  return largest + Math.log(sum);
}

function probabilitiesOf(logits) {
  const total = logSumExp(logits);
  return new Float64Array(logits).map((x) => Math.exp(x - total));
}

function largestOf(x) {
  let largest = -Infinity;
  for (let i = 0; i < x.length; i++) if (x[i] > largest) largest = x[i];
  return largest;
}

/** Token ids by their probability; those of probability 0 are left out. */
function mostLikelyFirst(probabilities) {
  const ids = [];
  for (let id = 0; id < probabilities.length; id++) if (probabilities[id] > 0) ids.push(id);
  return ids.sort((a, b) => probabilities[b] - probabilities[a] || a - b);
}

/** The n most likely tokens: [{id, p}], the most likely first, none of probability 0. */
export function mostLikely(probabilities, n) {
  const best = [];
  for (let id = 0; id < probabilities.length; id++) {
    const p = probabilities[id];
    if (p === 0 || (best.length === n && p <= best[n - 1].p)) continue;
    let place = best.length;
    while (place > 0 && best[place - 1].p < p) place--;
    best.splice(place, 0, { id, p });
    if (best.length > n) best.pop();
  }
  return best;
}

/** Inverse transform sampling: the first token whose cumulative probability exceeds a uniform
 * random number. random: a function that returns one, such as `seededRandom(1)`. */
export function choose(probabilities, random) {
  const point = random() * probabilities.reduce((sum, p) => sum + p, 0);
  let [sum, last] = [0, 0];
  for (let id = 0; id < probabilities.length; id++) {
    if (probabilities[id] > 0) last = id;
    sum += probabilities[id];
    if (sum > point) return id;
  }
  return last; // the sum above, rounded, was larger than this one
}

/** Uniform random numbers in [0, 1), the same ones for the same seed: mulberry32 by Tommy Ettinger
 * (2017, public domain), 32 bits of state. */
export function seededRandom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
