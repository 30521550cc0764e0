// A reading: what one text does in a model that runs in the page. The panels see nothing else of
// it. recorded.js has the same methods for stored numbers.

import { MOST_TOKENS } from "./layers.js";
import { distribution, logSumExp, mostLikely } from "./sampling.js";

const MOST_IN_LENS = 20; // tokens that are kept for each layer
const MOST_VALUES = 16; // of a vector, in `step`

/** What one text does in the model. Layers, heads and positions count from 0. */
export class LiveReading {
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

  /** The probability with which a token is drawn, after the rules of sampling.js. */
  chance(position, id, sampling) {
    const row = this.derived(position), rules = JSON.stringify(sampling);
    if (row.drawn?.rules !== rules) {
      row.drawn = { rules, all: distribution(this.logits(position), sampling) };
    }
    return row.drawn.all[id];
  }

  /** The attention weight of a query on a key; 0 for later keys, which are masked. */
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

/** The length of a vector, its first numbers and how many it has. */
export function described(row) {
  const values = Array.from(row.subarray(0, MOST_VALUES));
  return { norm: lengthOf(row), values, size: row.length };
}

/** One row of an array, not copied. */
export function rowOf(x, width, row) {
  return x.subarray(row * width, (row + 1) * width);
}

function lengthOf(vector) {
  return Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
}
