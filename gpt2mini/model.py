"""GPT-2: token ids in, logits out. The whole architecture, to be read from top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; OpenAI's own code is
`src/model.py` of github.com/openai/gpt-2. One alphabet names the axes, here and everywhere:
batch, tokens, emb (width of the residual stream), heads, head_dim = emb / heads, vocab.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.cache import KeyValueCache, LayerCache
from gpt2mini.checks import check_input, check_length, check_positions
from gpt2mini.config import GPT2Config
from gpt2mini.masking import build_attn_mask, count_positions, segment_ids


class MultiHeadAttention(nn.Module):
    """Every token looks at itself and at the tokens before it, in several heads side by side.

    softmax(query @ key.T / sqrt(head_dim)) @ value, per head (Vaswani et al. 2017, equation 1).
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.attn_out = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb"],
        attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch tokens emb"]:
        query, key, value = map(self.split_heads, self.project(x))
        if cache is not None:
            key, value = cache.append(key, value)  # (batch, heads, total, head_dim)
        context = F.scaled_dot_product_attention(  # (batch, heads, tokens, head_dim)
            query,
            key,
            value,
            attn_mask=attn_mask,
            # Without a mask all tokens are new, or there is one, which may see everything.
            is_causal=attn_mask is None and query.shape[2] > 1,
            dropout_p=self.drop_rate if self.training else 0.0,
        )
        return self.attn_out(context.transpose(1, 2).flatten(2))  # (batch, tokens, emb)

    def project(self, x: Float[Tensor, "*axes emb"]) -> Sequence[Float[Tensor, "*axes emb"]]:
        """What each token looks for, what it is found by, and what it then hands over."""
        return self.query(x), self.key(x), self.value(x)

    def split_heads(
        self, x: Float[Tensor, "batch tokens emb"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Every token on its own: widen fourfold, bend, narrow."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        # GPT-2 was trained with the tanh form of GELU. The exact (erf) form moves every logit.
        self.gelu = nn.GELU(approximate="tanh")
        self.mlp_out = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: Float[Tensor, "batch tokens emb"]) -> Float[Tensor, "batch tokens emb"]:
        widened = self.gelu(self.mlp_in(x))  # (batch, tokens, 4 * emb)
        return self.mlp_out(widened)  # (batch, tokens, emb)


class TransformerBlock(nn.Module):
    """Attention, then the MLP, each added to a stream that passes by unchanged.

    GPT-2 normalizes the input of each part (pre-norm), so the stream itself is never rescaled.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.attn = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb"],
        attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch tokens emb"]:
        x = x + self.drop(self.attn(self.norm1(x), attn_mask, cache))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class TiedHead(nn.Module):
    """The output head that *is* the token embedding: logits = hidden @ tok_emb.weight.T.

    It refers to the embedding without owning its weight (a tuple hides it from `nn.Module`), so the
    state dict holds one tensor under one key, and the tie outlives `.to()`, `deepcopy` and
    reloading.
    """

    bias = None

    def __init__(self, tok_emb: nn.Embedding) -> None:
        super().__init__()
        self._tok_emb = (tok_emb,)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def weight(self) -> Float[Tensor, "vocab emb"]:
        return self._tok_emb[0].weight

    def forward(self, hidden: Float[Tensor, "*axes emb"]) -> Float[Tensor, "*axes vocab"]:
        return F.linear(hidden, self.weight)


class GPT2(nn.Module):
    """Token ids (batch, tokens) -> logits (batch, tokens, vocab); nothing else.

    The head can be swapped by plain assignment, `model.out_head = nn.Linear(emb_dim, classes)`;
    the logits are then (batch, tokens, classes).
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.out_head: nn.Module = TiedHead(self.tok_emb)
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02), but the projections into the residual stream, two for each block, are
        scaled down by the square root of their number (Radford et al. 2019, section 2.3)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, TransformerBlock):
            # `apply` visits a block after the layers inside it, so this has the last word.
            for projection in (module.attn.attn_out, module.mlp.mlp_out):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def forward(
        self,
        token_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits of the next token at every position; arguments as for `hidden_states`."""
        return self.out_head(self.hidden_states(token_ids, attention_mask, position_ids, cache))

    def hidden_states(
        self,
        token_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch tokens emb"]:
        """What the output head reads: the residual stream after the final norm.

        attention_mask: 1 (or True) for a real token, 0 for padding, which may stand on either side.
            With a cache it may cover the new tokens alone or the cached ones too, for which it has
            to be what it was. Outputs at real tokens are those of the unpadded text; outputs at
            padding are finite and meaningless.
            Several texts in one row are numbered 1, 2, 3, ...: none sees the others.
        position_ids: the default counts the real tokens of each row from 0.
        cache: keys and values of earlier tokens; this call's tokens are added to it.
        Raises ValueError for too many tokens, ids outside the vocabulary, or shapes that do not
        fit.
        """
        x, attn_mask = self.embed(token_ids, attention_mask, position_ids, cache)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, attn_mask, cache=None if cache is None else cache.layers[layer])
        return self.final_norm(x)  # (batch, tokens, emb)

    def embed(
        self,
        token_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Tensor, "batch tokens emb"], Bool[Tensor, "#batch 1 tokens _"] | None]:
        """What the first block reads, and whom each token may attend to, the cached ones included
        (None: the plain causal pattern). Arguments as for `hidden_states`."""
        past = 0 if cache is None else cache.length
        check_input(self.config, token_ids, attention_mask, position_ids, cache)
        segments = segment_ids(token_ids, attention_mask, cache)  # (batch, total) or None
        attn_mask = build_attn_mask(token_ids, segments, past)  # (batch or 1, 1, tokens, total)
        if position_ids is None and segments is None:
            check_length(self.config, past + token_ids.shape[1])  # no wait for a GPU
            position_ids = count_positions(token_ids, None, None, past)  # (1, tokens)
        else:
            if position_ids is None:
                position_ids = count_positions(token_ids, segments, attn_mask, past)
            check_positions(self.config, position_ids)  # (batch or 1, tokens)
        if cache is not None:
            cache.segment_ids = segments  # later calls need not repeat the mask of earlier tokens
        x = self.tok_emb(token_ids) + self.pos_emb(position_ids)  # (batch, tokens, emb)
        return self.drop_emb(x), attn_mask

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "GPT2":
        """Load a model; see `gpt2mini.checkpoints.load_model`."""
        # Imported here: the architecture itself does not depend on file formats.
        from gpt2mini.checkpoints import load_model

        return load_model(name_or_folder, dtype, device)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Write a Hugging Face GPT-2 folder; see `gpt2mini.checkpoints.save_model`."""
        from gpt2mini.checkpoints import save_model

        save_model(self, folder, dtype, class_names)

    def quantize(self, weights: str = "int8") -> "GPT2":
        """Keep the weights in fewer bits, in place, to write faster; see `gpt2mini.quantize`."""
        from gpt2mini.quantize import quantize_model

        return quantize_model(self, weights)
