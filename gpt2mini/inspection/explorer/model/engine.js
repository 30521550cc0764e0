// GPT-2: token ids in, logits out. The same architecture as gpt2mini/model.py, name by name, to be
// read beside it from top to bottom. Radford et al. 2019, "Language Models are Unsupervised
// Multitask Learners".
//
// Where model.py returns tensors, the layers here write into the arrays of a "pass", which holds
// every activation: row t of an array belongs to token t. The rows of tokens that did not change
// are kept from one call to the next: a causal model never looks ahead, so they stay right.

import {
  addRows, geluExact, geluTanh, Layers, MOST_TOKENS, newRows, patchRows, rowsOf, softmax,
} from "./layers.js";

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
      const columns = this.columnsOf(head);
      patchRows(patches, `${this.name}.head.${head}`, now.context, rows, columns);
    }
    this.attn_out(now.context, now.attn_out, rows);
    patchRows(patches, `${this.name}.attn_out`, now.attn_out, rows);
  }

  // The attention weights of query t: softmax over the keys 0 ... t.
  weigh({ query, key, attention }, head, t) {
    const { width, start, end } = this.columnsOf(head);
    const scale = 1 / Math.sqrt(this.head_dim);
    const row = (head * MOST_TOKENS + t) * MOST_TOKENS;
    const weights = attention.subarray(row, row + t + 1);
    for (let k = 0; k <= t; k++) {
      let product = 0;
      for (let i = start; i < end; i++) product += query[t * width + i] * key[k * width + i];
      weights[k] = product * scale;
    }
    softmax(weights);
  }

  // The head's output for query t: the sum of the values, each times its weight.
  addValues({ attention, value, context }, head, t) {
    const { width, start, end } = this.columnsOf(head);
    const row = (head * MOST_TOKENS + t) * MOST_TOKENS;
    context.fill(0, t * width + start, t * width + end);
    for (let k = 0; k <= t; k++) {
      const weight = attention[row + k];
      for (let i = start; i < end; i++) context[t * width + i] += weight * value[k * width + i];
    }
  }

  // Where the numbers of a head are in a row, which has those of all heads one after another.
  columnsOf(head) {
    const start = head * this.head_dim;
    return { width: this.n_heads * this.head_dim, start, end: start + this.head_dim };
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
