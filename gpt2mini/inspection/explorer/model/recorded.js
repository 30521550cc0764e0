// What the panels read from numbers that Python has recorded of one text (recorded.py, which says
// what is exact and what is approximate). live.js gives the same from a model that runs here.

import { unpackNumbers } from "./weights.js";

/** Readings of the one text that was recorded. entry: of data.models. */
export class RecordedSource {
  means = null;

  constructor(entry, forbiddenIds = []) {
    this.config = entry.config;
    this.forbiddenIds = forbiddenIds;
    this.note = entry.recorded.effects.note; // why there are no effects, or ""
    this.reading = new RecordedReading(this, entry.recorded);
  }

  /** The reading of the recorded text; other texts and patches were not recorded. */
  read(tokenIds, patches = []) {
    const recorded = this.reading.tokenIds;
    if (patches.length) throw new Error("nothing was recorded with parts switched off");
    if (tokenIds.length !== recorded.length || tokenIds.some((id, i) => id !== recorded[i])) {
      throw new Error("only the text with which the page was made was recorded");
    }
    return this.reading;
  }

  /**
   * The probability of `target` after `position` without each head: [{layer, head, before, after}],
   * the largest change first. Empty for another target than the token that follows in the text (at
   * the end: the most likely one), and if no effects were recorded.
   */
  async rankHeads(reading, position, target) {
    const { effects, next, nTokens } = this.reading;
    if (effects === null || next.targets[position] !== target) return [];
    const before = effects.before[position];
    const ranked = Array.from(effects.heads.slice(0, effects.heads.length / nTokens), (_, i) => ({
      layer: Math.floor(i / this.config.n_heads),
      head: i % this.config.n_heads,
      before,
      after: effects.heads[i * nTokens + position],
    }));
    return ranked.sort((a, b) => Math.abs(b.after - before) - Math.abs(a.after - before));
  }
}

/** What the text does in the model. Layers, heads and positions count from 0. */
class RecordedReading {
  constructor(source, recorded) {
    this.source = source;
    this.config = source.config;
    this.tokenIds = recorded.token_ids;
    this.nTokens = recorded.token_ids.length;
    this.weights = unpackNumbers(recorded.attention);
    this.vectors = unpackAll(recorded, ["query", "key", "value"]);
    this.steps = unpackSteps(recorded.steps);
    this.embeddingNorms = unpackNumbers(recorded.embedding_norms);
    this.ofLens = unpackAll(recorded.lens, ["ids", "probabilities"]);
    this.next = { ...recorded.next, ...unpackAll(recorded.next, NEXT_ARRAYS) };
    const hasEffects = recorded.effects.note === "";
    this.effects = hasEffects ? unpackAll(recorded.effects, EFFECT_ARRAYS) : null;
  }

  // ---- next tokens

  /** Logits at one position: [{id, logit, count}], the largest first. An entry without an id stands
   * for several tokens: `count` of them, each with this logit, have the same sum of exp(logit). */
  logits(position) {
    const { ids, logits, other_counts: counts, other_logits: others } = this.next;
    const nBest = ids.length / this.nTokens, nOthers = others.length / this.nTokens;
    const best = Array.from({ length: nBest }, (_, i) => {
      const at = position * nBest + i;
      return { id: ids[at], logit: logits[at], count: 1 };
    });
    const rest = Array.from({ length: nOthers }, (_, i) => {
      const at = position * nOthers + i;
      return { id: null, logit: others[at], count: counts[at] };
    });
    return [...best, ...rest.filter(({ count }) => count > 0)];
  }

  /** Of a token as the next one after `position`. */
  probability(position, id) {
    if (this.source.forbiddenIds.includes(id)) return 0;
    const entries = withProbabilities(this.logits(position));
    const found = entries.find((entry) => entry.id === id);
    if (found) return found.p;
    if (this.next.targets[position] === id) {
      return entries[0].p * Math.exp(this.next.target_logits[position] - entries[0].logit);
    }
    const others = entries.filter((entry) => entry.id === null);
    return sumOf(others, ({ p }) => p) / Math.max(1, sumOf(others, ({ count }) => count));
  }

  /** -ln of the probability that token t had, in nats; null for the first: nothing predicts it. */
  surprise(t) {
    return t === 0 ? null : -Math.log(this.probability(t - 1, this.tokenIds[t]));
  }

  /** The most likely next tokens, [{id, p}], after temperature, top-k and top-p, as sampling.js. */
  nextTokens(position, { temperature = 1, topK = 0, topP = 1 } = {}, n = 20) {
    const entries = this.logits(position);
    if (temperature === 0) return [{ id: entries[0].id, p: 1 }];
    let kept = entries.map((entry) => ({ ...entry, logit: entry.logit / temperature }));
    if (topK > 0) kept = keepMostLikely(kept, topK);
    if (topP < 1) kept = keepNucleus(kept, topP);
    const tokens = withProbabilities(kept).filter(({ id, p }) => id !== null && p > 0);
    return tokens.slice(0, n).map(({ id, p }) => ({ id, p }));
  }

  /** The probability with which a token is drawn. Of a token that is not among the stored ones it
   * is known whether it was removed only if some of the stored ones were. */
  chance(position, id, sampling) {
    const { temperature = 1, topK = 0, topP = 1 } = sampling;
    const kept = this.nextTokens(position, sampling, Infinity);
    const found = kept.find((one) => one.id === id);
    if (found) return found.p;
    const stored = this.logits(position).filter((one) => one.id !== null).length;
    const removes = topK > 0 || topP < 1 || temperature === 0;
    if (removes && kept.length < stored) return 0;
    const ratio = this.probability(position, id) / this.probability(position, kept[0].id);
    return kept[0].p * ratio ** (1 / temperature);
  }

  /** The logit lens, [{id, p}], n <= 5. Layer 0 is the embedding, layer l the stream after block
   * l - 1; the last is the model's own prediction. */
  lens(layer, position, n = 5) {
    const { ids, probabilities } = this.ofLens;
    const width = ids.length / ((this.config.n_layers + 1) * this.nTokens);
    const first = (layer * this.nTokens + position) * width;
    return Array.from({ length: Math.min(n, width) }, (_, i) =>
      ({ id: ids[first + i], p: probabilities[first + i] }));
  }

  // ---- inside a block

  /** The attention weight of a query on a key; 0 for later keys, which are masked. */
  attention(layer, head, query, key) {
    if (key > query) return 0;
    const pairs = (this.nTokens * (this.nTokens + 1)) / 2;
    const row = (layer * this.config.n_heads + head) * pairs + (query * (query + 1)) / 2;
    return this.weights[row + key] / 65535;
  }

  /** The Euclidean length of a vector. part: embedding, attn_out, mlp_out, middle or stream. */
  norm(part, layer, position) {
    if (part === "embedding") return this.embeddingNorms[position];
    const vectors = this.steps[part];
    return vectors === null ? NaN : vectors.norms[layer * this.nTokens + position];
  }

  /** The vectors of one head at one position. context, the head's output: the values, weighted. */
  head(layer, head, position) {
    const part = (name, t) => {
      const width = this.vectors[name].length / (this.config.n_layers * this.nTokens);
      const headDim = width / this.config.n_heads;
      const first = (layer * this.nTokens + t) * width + head * headDim;
      return this.vectors[name].slice(first, first + headDim);
    };
    const context = new Float32Array(part("value", position).length);
    for (let key = 0; key <= position; key++) {
      const weight = this.attention(layer, head, position, key);
      part("value", key).forEach((x, i) => { context[i] += weight * x; });
    }
    const [query, key, value] = ["query", "key", "value"].map((name) => part(name, position));
    return { query, key, value, context };
  }

  /** The vectors of one token on its way through a block, in order: {norm, values, size}. A block
   * of one's own may lack some: they have the size 0. */
  step(layer, position) {
    const row = layer * this.nTokens + position;
    return Object.fromEntries(Object.entries(this.steps).map(([name, vectors]) => {
      if (vectors === null) return [name, { norm: NaN, values: [], size: 0 }];
      const width = vectors.values.length / (this.config.n_layers * this.nTokens);
      const values = Array.from(vectors.values.subarray(row * width, (row + 1) * width));
      return [name, { norm: vectors.norms[row], values, size: vectors.size }];
    }));
  }
}

// ---- the rules of sampling.js for entries that may stand for several tokens

/** Keep the k most likely tokens, and those that are as likely as the last. */
function keepMostLikely(entries, k) {
  let before = 0;
  const kept = [];
  for (const entry of entries) {
    const tied = before >= k && entry.id !== null && entry.logit === kept.at(-1).logit;
    const count = tied ? 1 : Math.min(entry.count, k - before);
    if (count <= 0) break;
    kept.push({ ...entry, count });
    before += count;
  }
  return kept;
}

/** Keep the fewest tokens whose probabilities add up to p. */
function keepNucleus(entries, p) {
  let before = 0;
  const kept = [];
  for (const entry of withProbabilities(entries)) {
    const ofOne = entry.p / entry.count;
    const count = Math.min(entry.count, Math.ceil((p - before) / ofOne));
    if (count <= 0) break;
    kept.push({ ...entry, count });
    before += count * ofOne;
  }
  return kept;
}

/** Entries with p, the probability of all the tokens that each stands for. */
function withProbabilities(entries) {
  const largest = entries[0].logit;
  const shares = entries.map(({ logit, count }) => count * Math.exp(logit - largest));
  const total = sumOf(shares, (share) => share);
  return entries.map((entry, i) => ({ ...entry, p: shares[i] / total }));
}

function sumOf(items, value) {
  return items.reduce((sum, item) => sum + value(item), 0);
}

// ---- from the page's JSON

const NEXT_ARRAYS = ["ids", "logits", "target_logits", "other_counts", "other_logits"];
const EFFECT_ARRAYS = ["before", "heads"];

function unpackAll(stored, names) {
  return Object.fromEntries(names.map((name) => [name, unpackNumbers(stored[name])]));
}

function unpackSteps(steps) {
  return Object.fromEntries(Object.entries(steps).map(([name, stored]) => {
    if (stored === null) return [name, null];
    return [name, { size: stored.size, ...unpackAll(stored, ["norms", "values"]) }];
  }));
}
