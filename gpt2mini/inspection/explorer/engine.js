// GPT-2: token ids in, logits out. The same architecture as gpt2mini/model.py, name by name, to be
// read beside it from top to bottom. Radford et al. 2019, "Language Models are Unsupervised
// Multitask Learners".
//
// Where model.py returns tensors, the layers here write into the arrays of a "pass", which holds
// every activation: row t of an array belongs to token t. The rows of tokens that did not change
// are kept from one call to the next: a causal model never looks ahead, so they stay right.

export const MOST_TOKENS = 128; // rows of a pass: the longest text that the page reads

// Every token attends to itself and to the tokens before it, in several heads side by side:
// softmax(query @ key.T / sqrt(head_dim)) @ value, per head (Vaswani et al. 2017, equation 1).
class MultiHeadAttention {
  constructor(layers, name, config) {
    this.name = name; // "blocks.3"
    this.n_heads = config.n_heads;
    this.head_dim = config.emb_dim / config.n_heads;
    this.query = layers.linear(`trf_${name}.attn.query`, config.emb_dim);
    this.key = layers.linear(`trf_${name}.attn.key`, config.emb_dim);
    this.value = layers.linear(`trf_${name}.attn.value`, config.emb_dim);
    this.attn_out = layers.linear(`trf_${name}.attn.attn_out`, config.emb_dim);
  }

  forward(now, rows, patches) {
    this.query(now.norm1, now.query, rows);
    this.key(now.norm1, now.key, rows);
    this.value(now.norm1, now.value, rows);
    for (let head = 0; head < this.n_heads; head++) {
      for (let t = rows.first; t < rows.end; t++) {
        this.weigh(now, head, t);
        this.addValues(now, head, t);
      }
      const columns = { start: head * this.head_dim, size: this.head_dim };
      patchRows(patches, `${this.name}.head.${head}`, now.context, rows, columns);
    }
    this.attn_out(now.context, now.attn_out, rows);
    patchRows(patches, `${this.name}.attn_out`, now.attn_out, rows);
  }

  // The attention weights of query t: softmax over the keys 0 ... t.
  weigh({ query, key, attention }, head, t) {
    const scale = 1 / Math.sqrt(this.head_dim);
    const at = (head * MOST_TOKENS + t) * MOST_TOKENS;
    const weights = attention.subarray(at, at + t + 1);
    const width = this.n_heads * this.head_dim;
    const start = head * this.head_dim; // of the head's columns
    for (let k = 0; k <= t; k++) {
      let product = 0;
      for (let i = start; i < start + this.head_dim; i++) {
        product += query[t * width + i] * key[k * width + i];
      }
      weights[k] = product * scale;
    }
    softmax(weights);
  }

  // The head's output for query t: the sum of the values, each times its weight.
  addValues({ attention, value, context }, head, t) {
    const width = this.n_heads * this.head_dim;
    const start = head * this.head_dim;
    context.fill(0, t * width + start, t * width + start + this.head_dim);
    for (let k = 0; k <= t; k++) {
      const weight = attention[(head * MOST_TOKENS + t) * MOST_TOKENS + k];
      for (let i = start; i < start + this.head_dim; i++) {
        context[t * width + i] += weight * value[k * width + i];
      }
    }
  }
}

// Two layers, applied to every token by itself: emb -> 4 emb -> emb.
class MLP {
  constructor(layers, name, config) {
    this.name = name;
    this.gelu = config.gelu === "tanh" ? geluTanh : geluExact;
    this.mlp_in = layers.linear(`trf_${name}.mlp.mlp_in`, config.emb_dim);
    this.mlp_out = layers.linear(`trf_${name}.mlp.mlp_out`, 4 * config.emb_dim);
  }

  forward(now, rows, patches) {
    this.mlp_in(now.norm2, now.hidden, rows);
    this.gelu(rowsOf(now.hidden, rows));
    this.mlp_out(now.hidden, now.mlp_out, rows);
    patchRows(patches, `${this.name}.mlp_out`, now.mlp_out, rows);
  }
}

// Attention, then the MLP, each added to the residual stream. GPT-2 normalizes the input of each
// part (pre-norm), so the stream itself is never rescaled.
class TransformerBlock {
  constructor(layers, name, config) {
    this.name = name;
    this.norm1 = layers.norm(`trf_${name}.norm1`);
    this.attn = new MultiHeadAttention(layers, name, config);
    this.norm2 = layers.norm(`trf_${name}.norm2`);
    this.mlp = new MLP(layers, name, config);
  }

  // x: the stream that enters the block. now: the activations of this block.
  forward(x, now, rows, patches) {
    this.norm1(x, now.norm1, rows);
    this.attn.forward(now, rows, patches);
    addRows(x, now.attn_out, now.middle, rows);
    this.norm2(now.middle, now.norm2, rows);
    this.mlp.forward(now, rows, patches);
    addRows(now.middle, now.mlp_out, now.stream, rows);
    patchRows(patches, `${this.name}.stream`, now.stream, rows);
  }
}

export class GPT2 {
  // weights: Float32Arrays by their names in model.py's state dict. linear: see linear.js.
  constructor(config, weights, linear) {
    this.config = config;
    const layers = new Layers(weights, linear);
    this.tok_emb = layers.weight("tok_emb");
    this.pos_emb = layers.weight("pos_emb");
    this.trf_blocks = Array.from(
      { length: config.n_layers },
      (_, layer) => new TransformerBlock(layers, `blocks.${layer}`, config),
    );
    this.final_norm = layers.norm("final_norm");
    // Without a head of its own, the model reads out with the token embedding (a tied head).
    const head = "out_head.weight" in weights ? "out_head" : "tok_emb";
    this.out_head = layers.linear(head, config.emb_dim);
  }

  // Arrays for all activations of a text.
  newPass() {
    const { n_layers, n_heads, emb_dim, vocab_size } = this.config;
    const wide = ["norm1", "query", "key", "value", "context", "attn_out", "middle", "norm2"];
    const newBlock = () => ({
      ...Object.fromEntries(wide.map((name) => [name, newRows(emb_dim)])),
      attention: new Float32Array(n_heads * MOST_TOKENS * MOST_TOKENS), // see `weigh`
      hidden: newRows(4 * emb_dim), // after GELU
      mlp_out: newRows(emb_dim),
      stream: newRows(emb_dim),
    });
    return {
      embedding: newRows(emb_dim),
      blocks: Array.from({ length: n_layers }, newBlock),
      final_norm: newRows(emb_dim),
      logits: newRows(vocab_size),
    };
  }

  // Fills the rows of all tokens from number `past` on; earlier rows are kept, keys and values too.
  // firstBlock: start from the stream that enters this block, as the pass holds it.
  // patches: activations to replace, [{name, value, position}]: a name as in tracing.py, a number
  // or one row, one position or all (null). lastOnly: the logits of the last token alone.
  forward(pass, tokenIds, { past = 0, firstBlock = 0, patches = [], lastOnly = false } = {}) {
    const rows = { first: past, end: tokenIds.length };
    if (firstBlock === 0) this.embed(tokenIds, pass.embedding, rows, patches);
    const x = this.residual_stream(pass, firstBlock, rows, patches);
    const read = { first: lastOnly ? Math.max(past, rows.end - 1) : past, end: rows.end };
    this.final_norm(x, pass.final_norm, read);
    this.out_head(pass.final_norm, pass.logits, read);
  }

  // The start of the residual stream: a vector of each token and one of each position.
  embed(tokenIds, x, rows, patches) {
    const { emb_dim } = this.config;
    for (let t = rows.first; t < rows.end; t++) {
      for (let i = 0; i < emb_dim; i++) {
        const vector = this.tok_emb[tokenIds[t] * emb_dim + i];
        x[t * emb_dim + i] = vector + this.pos_emb[t * emb_dim + i];
      }
    }
    patchRows(patches, "embedding", x, rows);
  }

  // The sum of the embedding and of what the blocks add to it.
  residual_stream(pass, firstBlock, rows, patches) {
    let x = firstBlock === 0 ? pass.embedding : pass.blocks[firstBlock - 1].stream;
    for (let layer = firstBlock; layer < this.config.n_layers; layer++) {
      this.trf_blocks[layer].forward(x, pass.blocks[layer], rows, patches);
      x = pass.blocks[layer].stream;
    }
    return x;
  }

  // The logits of any rows of a residual stream, as if no block followed: the logit lens.
  read(streamRows, nRows) {
    const rows = { first: 0, end: nRows };
    const normed = new Float32Array(nRows * this.config.emb_dim);
    const logits = new Float32Array(nRows * this.config.vocab_size);
    this.final_norm(streamRows, normed, rows);
    this.out_head(normed, logits, rows);
    return logits;
  }
}

// ---- layers, as functions (x, y, rows): read rows of x, write the same rows of y

class Layers {
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
function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
}

// GPT-2 was trained with the tanh form of GELU: x / 2 * (1 + tanh(u)), which is x / (1 + exp(-2u)).
function geluTanh(x) {
  const scale = Math.sqrt(2 / Math.PI);
  for (let i = 0; i < x.length; i++) {
    const u = scale * (x[i] + 0.044715 * x[i] * x[i] * x[i]);
    x[i] /= 1 + Math.exp(-2 * u);
  }
}

// The exact form: x times the probability that a standard normal number is below x.
function geluExact(x) {
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

function newRows(width) {
  return new Float32Array(MOST_TOKENS * width);
}

function rowsOf(x, { first, end }) {
  const width = x.length / MOST_TOKENS;
  return x.subarray(first * width, end * width);
}

// sum = x + change
function addRows(x, change, sum, rows) {
  const width = x.length / MOST_TOKENS;
  for (let i = rows.first * width; i < rows.end * width; i++) sum[i] = x[i] + change[i];
}

// Replaces an activation, or some columns of it, if one of the patches names it.
function patchRows(patches, name, x, rows, columns = { start: 0, size: x.length / MOST_TOKENS }) {
  const width = x.length / MOST_TOKENS;
  for (const { value, position } of patches.filter((patch) => patch.name === name)) {
    for (let t = rows.first; t < rows.end; t++) {
      const start = t * width + columns.start;
      if (position !== null && position !== t) continue;
      if (typeof value === "number") x.fill(value, start, start + columns.size);
      else x.set(value, start);
    }
  }
}
