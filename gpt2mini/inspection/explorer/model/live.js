// A model that runs in the page: read texts, rank heads, write on. recorded.js does what it can of
// that with stored numbers.

import { GPT2 } from "./engine.js";
import { MOST_TOKENS } from "./layers.js";
import { makeLinear } from "./linear.js";
import { LiveReading, rowOf } from "./reading.js";
import { choose, distribution, seededRandom } from "./sampling.js";
import { bytesFromBase64, extentOf, gunzip, readTensors, unpackNumbers } from "./weights.js";

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
  constructor(model, { means = null, forbiddenIds = [] } = {}) {
    this.model = model;
    this.config = model.config;
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

// ---- rows and texts

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
