// What the panels read from a model that runs in the page: probabilities, attention weights, the
// logit lens. recorded.js gives the same from stored numbers.

import { GPT2, MOST_TOKENS } from "./engine.js";
import { makeLinear } from "./linear.js";
import { choose, distribution, logSumExp, mostLikely, seededRandom } from "./sampling.js";
import { bytesFromBase64, extentOf, gunzip, readTensors, unpackNumbers } from "./weights.js";

const MOST_IN_LENS = 20; // tokens that are kept for each layer
const MOST_VALUES = 16; // of a vector, in `step`

/**
 * The models of a page: [{model, means, kind}]. entries: data.models. blobs: base64 of their
 * weights. kernel: base64 of kernel.wasm, or "". kind: WebAssembly or JavaScript, which computes.
 */
export async function buildModels(entries, blobs, kernel) {
  const linear = await makeLinear(kernel && bytesFromBase64(kernel), extentOf(entries));
  const built = [];
  let first = {};
  for (const [i, entry] of entries.entries()) {
    const bytes = await gunzip(bytesFromBase64(blobs[i]));
    const tensors = readTensors(entry, bytes, (size) => linear.allocate(size), first);
    if (i === 0) first = tensors;
    const names = Object.keys(tensors).filter((name) => name.startsWith("means."));
    const means = Object.fromEntries(names.map((name) => [name, tensors[name]]));
    built.push({ model: new GPT2(entry.config, tensors, linear), means, kind: linear.kind });
  }
  return built;
}

/** The largest difference between the engine's logits and Python's, which the page holds. */
export function proveEngine(model, { token_ids: tokenIds, positions, logits }) {
  const pass = model.newPass();
  model.forward(pass, tokenIds);
  const vocab = model.config.vocab_size;
  const right = unpackNumbers(logits);
  const differences = positions.flatMap((position, row) =>
    Array.from({ length: vocab }, (_, id) =>
      Math.abs(pass.logits[position * vocab + id] - right[row * vocab + id])));
  // NaN, unlike in Math.max's comparisons with >, stays NaN: it must not pass for a small one
  return differences.reduce((a, b) => Math.max(a, b), 0);
}

/** The largest difference that rounding explains. */
export function engineTolerance({ logits }) {
  return 1e-3 * (1 + unpackNumbers(logits).reduce((a, b) => Math.max(a, Math.abs(b)), 0));
}

/**
 * Makes readings of texts. It has one pass, and computes only the rows of tokens that have changed
 * since the last text. So a reading holds until the next one of the same source: take a source for
 * each text, or each set of patches, that you look at side by side. They share the model.
 */
export class LiveSource {
  live = true;

  constructor(model, { name = "", means = null, forbiddenIds = [] } = {}) {
    this.model = model;
    this.config = model.config;
    this.name = name;
    this.means = means;
    this.forbiddenIds = forbiddenIds; // without a token: never shown, never written
    this.mostTokens = Math.min(MOST_TOKENS, model.config.context_length);
    this.kept = { pass: null, tokenIds: [], patches: [], rows: [] };
  }

  /** A reading of a text, with activations replaced by the patches of `GPT2.forward`. */
  read(tokenIds, patches = []) {
    this.check(tokenIds);
    const { kept } = this;
    kept.pass ??= this.model.newPass();
    const past = samePatches(patches, kept.patches) ? sharedPrefix(tokenIds, kept.tokenIds) : 0;
    if (past < tokenIds.length) {
      this.model.forward(kept.pass, tokenIds, { past, patches });
      this.forbid(kept.pass.logits, past, tokenIds.length);
    }
    kept.rows.length = Math.min(kept.rows.length, past); // what was derived from changed rows
    kept.tokenIds = [...tokenIds];
    kept.patches = patches;
    return new LiveReading(this, kept, kept.tokenIds);
  }

  check(tokenIds) {
    if (tokenIds.length === 0) throw new Error("the text is empty");
    if (tokenIds.length > this.mostTokens) {
      throw new Error(`${tokenIds.length} tokens are more than ${this.mostTokens}`);
    }
  }

  forbid(logits, first, end) {
    for (let t = first; t < end; t++) {
      for (const id of this.forbiddenIds) logits[t * this.config.vocab_size + id] = -Infinity;
    }
  }

  /**
   * The probability of `target` after `position`, with each head switched off (its output zero):
   * [{layer, head, before, after}], the largest change first. progress(done, total) is called after
   * each head; if it returns false, the ranking stops and gives null.
   */
  async rankHeads(reading, position, target, progress = () => true) {
    const { n_layers: nLayers, n_heads: nHeads } = this.config;
    const before = reading.probability(position, target);
    const { tokenIds, patches } = reading;
    const pass = this.model.newPass();
    copyStreams(reading.pass, pass, position + 1);
    const ranked = [];
    // From the last block to the first: each start then finds the stream before it as it was.
    for (let layer = nLayers - 1; layer >= 0; layer--) {
      for (let head = 0; head < nHeads; head++) {
        const off = { name: `blocks.${layer}.head.${head}`, value: 0, position: null };
        const options = { firstBlock: layer, patches: [...patches, off], lastOnly: true };
        const logits = this.lastLogits(pass, tokenIds.slice(0, position + 1), options);
        ranked.push({ layer, head, before, after: distribution(logits)[target] });
        if (progress(ranked.length, nLayers * nHeads) === false) return null;
        await nextTurn();
      }
    }
    const change = ({ before, after }) => Math.abs(after - before);
    return ranked.sort((a, b) => change(b) - change(a));
  }

  /**
   * Continue a text: for await (const id of source.write(ids, 30, {temperature, topK, topP, seed,
   * patches})). One token at a time, until the text has as many tokens as the page can read.
   */
  async* write(tokenIds, n, { seed = 1, patches = [], ...sampling } = {}) {
    const random = seededRandom(seed);
    const pass = this.model.newPass();
    const text = [...tokenIds];
    let past = 0;
    for (let i = 0; i < n && text.length < this.mostTokens; i++) {
      const logits = this.lastLogits(pass, text, { past, patches, lastOnly: true });
      past = text.length;
      text.push(choose(distribution(logits, sampling), random));
      yield text.at(-1);
      await nextTurn();
    }
  }

  lastLogits(pass, tokenIds, options) {
    this.check(tokenIds);
    this.model.forward(pass, tokenIds, options);
    this.forbid(pass.logits, tokenIds.length - 1, tokenIds.length);
    return rowOf(pass.logits, this.config.vocab_size, tokenIds.length - 1);
  }
}

/** What one text does in the model. Layers, heads and positions count from 0. */
class LiveReading {
  live = true;

  constructor(source, { pass, patches, rows }, tokenIds) {
    this.source = source;
    this.model = source.model;
    this.pass = pass;
    this.patches = patches;
    this.rows = rows; // of each position: what was derived from it before
    this.tokenIds = tokenIds;
    this.nTokens = tokenIds.length;
  }

  derived(position) {
    this.rows[position] ??= {};
    return this.rows[position];
  }

  logits(position) {
    return rowOf(this.pass.logits, this.model.config.vocab_size, position);
  }

  /** Of a token as the next one after `position`. */
  probability(position, id) {
    const row = this.derived(position);
    row.logSumExp ??= logSumExp(this.logits(position));
    return Math.exp(this.logits(position)[id] - row.logSumExp);
  }

  /** -ln of the probability that token t had, in nats; null for the first: nothing predicts it. */
  surprise(t) {
    return t === 0 ? null : -Math.log(this.probability(t - 1, this.tokenIds[t]));
  }

  /** The most likely next tokens, [{id, p}], after the rules of sampling.js. */
  nextTokens(position, sampling, n) {
    return mostLikely(distribution(this.logits(position), sampling), n);
  }

  /** How much a head's query looks at a key; 0 for later keys, which it cannot see. */
  attention(layer, head, query, key) {
    if (key > query) return 0;
    return this.pass.blocks[layer].attention[(head * MOST_TOKENS + query) * MOST_TOKENS + key];
  }

  /** The logit lens: what would come next if no block followed, [{id, p}], n <= 20. Layer 0 is the
   * embedding, layer l the stream after block l - 1; the last is the model's own prediction. */
  lens(layer, position, n = 5) {
    const row = this.derived(position);
    row.lens ??= this.lensOfAllLayers(position);
    return row.lens[layer].slice(0, n);
  }

  lensOfAllLayers(position) {
    const { emb_dim: width, vocab_size: vocab, n_layers: nLayers } = this.model.config;
    const streams = new Float32Array((nLayers + 1) * width);
    for (let layer = 0; layer <= nLayers; layer++) {
      streams.set(this.stream(layer, position), layer * width);
    }
    const logits = this.model.read(streams, nLayers + 1);
    this.source.forbid(logits, 0, nLayers + 1);
    return Array.from({ length: nLayers + 1 }, (_, layer) =>
      mostLikely(distribution(rowOf(logits, vocab, layer)), MOST_IN_LENS));
  }

  /** One row of the residual stream, layers as in `lens`. */
  stream(layer, position) {
    const { embedding, blocks } = this.pass;
    const rows = layer === 0 ? embedding : blocks[layer - 1].stream;
    return rowOf(rows, this.model.config.emb_dim, position).slice();
  }

  /** The Euclidean length of a vector. part: embedding, attn_out, mlp_out, middle or stream. */
  norm(part, layer, position) {
    const rows = part === "embedding" ? this.pass.embedding : this.pass.blocks[layer][part];
    return lengthOf(rowOf(rows, this.model.config.emb_dim, position));
  }

  /** The vectors of one head at one position. context: the head's output. */
  head(layer, head, position) {
    const { emb_dim: width, n_heads: nHeads } = this.model.config;
    const place = position * nHeads + head;
    const { query, key, value, context } = this.pass.blocks[layer];
    const part = (rows) => rowOf(rows, width / nHeads, place).slice();
    return { query: part(query), key: part(key), value: part(value), context: part(context) };
  }

  /** The vectors of one token on its way through a block, in order: {norm, values, size}. */
  step(layer, position) {
    const block = this.pass.blocks[layer];
    const names = ["norm1", "query", "key", "value", "context", "attn_out", "middle", "norm2",
      "hidden", "mlp_out", "stream"];
    const rows = names.map((name) =>
      [name, rowOf(block[name], block[name].length / MOST_TOKENS, position)]);
    const all = [["before", this.stream(layer, position)], ...rows];
    return Object.fromEntries(all.map(([name, row]) => [name, described(row)]));
  }
}

function described(row) {
  const values = Array.from(row.subarray(0, MOST_VALUES));
  return { norm: lengthOf(row), values, size: row.length };
}

// ---- rows and texts

function rowOf(x, width, row) {
  return x.subarray(row * width, (row + 1) * width);
}

function lengthOf(vector) {
  return Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
}

function copyStreams(from, to, nRows) {
  const copy = (source, target) => {
    target.set(source.subarray(0, (nRows * source.length) / MOST_TOKENS));
  };
  copy(from.embedding, to.embedding);
  from.blocks.forEach(({ stream }, layer) => copy(stream, to.blocks[layer].stream));
}

function sharedPrefix(ids, others) {
  const different = ids.findIndex((id, i) => id !== others[i]);
  return different === -1 ? ids.length : different;
}

function samePatches(some, others) {
  return some.length === others.length && some.every((one, i) => {
    const other = others[i];
    return one.name === other.name && one.position === other.position &&
      sameValue(one.value, other.value);
  });
}

function sameValue(one, other) {
  if (typeof one === "number" || typeof other === "number") return one === other;
  return one.length === other.length && one.every((x, i) => x === other[i]);
}

/** Lets the page draw and react before the work goes on. */
function nextTurn() {
  return new Promise((resolve) => setTimeout(resolve, 0));
}
