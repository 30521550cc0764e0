"""GPT-2: token ids in, logits out. The whole architecture, to be read from top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; OpenAI's own code is
`src/model.py` of github.com/openai/gpt-2. One alphabet names the axes, here and everywhere:
batch, tokens, emb (width of the residual stream), heads, head_dim = emb / heads, vocab.

This is the only place that says how attention, a block or the head is computed. Generation,
classification, training and inspection call it; what you change here is changed there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.cache import KeyValueCache, LayerCache
from gpt2mini.checks import (
    check_blocks,
    check_config,
    check_derived_positions,
    check_mask_and_cache,
    check_positions,
    check_start,
)
from gpt2mini.config import GPT2Config
from gpt2mini.masking import build_attn_mask, count_positions, segment_ids
from gpt2mini.modes import accepts_argument, has_hooks, has_hooks_inside, uncompiled


class MultiHeadAttention(nn.Module):
    """Every token attends to itself and to the tokens before it, in several heads side by side.

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
        last_only: bool = False,
    ) -> Float[Tensor, "batch outputs emb"]:
        """attn_mask: True where a token (row) may attend to a token (column), the cached ones
        included; None: the plain causal pattern. last_only: the output at the last token alone."""
        query, key, value = map(self.split_heads, self.project(x, last_only))
        if cache is not None:
            key, value = cache.append(key, value)  # (batch, heads, total, head_dim)
        if last_only and attn_mask is not None:
            attn_mask = attn_mask[..., -1:, :]
        # Without a mask all tokens are new, or there is one query, which may attend to all keys.
        # (As a plain bool, also where a length is symbolic: torch.export, torch.compile.)
        is_causal = True if attn_mask is None and query.shape[2] == key.shape[2] else False  # noqa: SIM210
        context = F.scaled_dot_product_attention(  # (batch, heads, tokens, head_dim)
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=self.drop_rate if self.training else 0.0,
        )
        return self.attn_out(context.transpose(1, 2).flatten(2))  # (batch, tokens, emb)

    def project(
        self, x: Float[Tensor, "batch tokens emb"], last_only: bool
    ) -> Sequence[Float[Tensor, "batch _ emb"]]:
        """Queries of the tokens whose output is wanted; keys and values of all."""
        return self.query(x[:, -1:] if last_only else x), self.key(x), self.value(x)

    def split_heads(
        self, x: Float[Tensor, "batch tokens emb"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two layers, applied to every token by itself: emb -> 4 emb -> emb."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.mlp_in = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.mlp_out = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: Float[Tensor, "batch tokens emb"]) -> Float[Tensor, "batch tokens emb"]:
        # GPT-2 was trained with the tanh form of GELU. The exact (erf) form moves every logit.
        hidden = F.gelu(self.mlp_in(x), approximate=self.gelu)  # (batch, tokens, 4 * emb)
        return self.mlp_out(hidden)  # (batch, tokens, emb)


class TransformerBlock(nn.Module):
    """Attention, then the MLP, each added to the residual stream.

    GPT-2 normalizes the input of each part (pre-norm), so the stream itself is never rescaled.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.drop_rate = config.drop_rate
        self.norm1 = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.attn = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb"],
        attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch outputs emb"]:
        """Arguments as for `MultiHeadAttention.forward`."""
        attended = call_layer(self.attn, self.norm1(x), attn_mask, cache, last_only)
        x = x[:, -1:] if last_only else x
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x

    def dropout(self, x: Float[Tensor, "*axes emb"]) -> Float[Tensor, "*axes emb"]:
        return F.dropout(x, self.drop_rate) if self.training and self.drop_rate else x


def call_layer(
    layer: nn.Module,
    x: Float[Tensor, "batch tokens emb"],
    attn_mask: Tensor | None,
    cache: LayerCache | None,
    last_only: bool,
) -> Float[Tensor, "batch outputs emb"]:
    """Call a block, or an attention. One of your own need not know `last_only`, and hooks see what
    they see in any other call: then it computes all outputs, and the last is kept."""
    if not last_only:
        return layer(x, attn_mask, cache)
    knows_it = accepts_argument(layer.forward, "last_only") and not has_hooks_inside(layer)
    shortcut = {"last_only": True} if knows_it else {}
    return layer(x, attn_mask, cache, **shortcut)[:, -1:]


class TiedHead(nn.Module):
    """The output head that *is* the token embedding: logits = hidden @ tok_emb.weight.T.

    It refers to the embedding without owning its weight (a tuple hides it from `nn.Module`), so the
    state dict holds one tensor under one key, and the tie outlives `.to()`, `deepcopy` and
    reloading. In a model it is tied to `model.tok_emb`, also to one assigned later.
    """

    bias = None

    def __init__(self, tok_emb: nn.Embedding) -> None:
        super().__init__()
        self.tie(tok_emb)

    def tie(self, tok_emb: nn.Embedding) -> None:
        self._tok_emb = (tok_emb,)

    @property
    def tok_emb(self) -> nn.Embedding:
        return self._tok_emb[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def weight(self) -> Float[Tensor, "vocab emb"]:
        return self.tok_emb.weight

    def forward(self, hidden: Float[Tensor, "*axes emb"]) -> Float[Tensor, "*axes vocab"]:
        return F.linear(hidden, self.weight)


class GPT2(nn.Module):
    """Token ids (batch, tokens) -> logits (batch, tokens, vocab); nothing else.

    The head can be swapped by plain assignment, `model.out_head = nn.Linear(emb_dim, classes)`;
    the logits are then (batch, tokens, classes).
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.trf_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.emb_dim, eps=1e-5)
        self.out_head = TiedHead(self.tok_emb)
        self.apply(self.init_weights)

    @property
    def out_head(self) -> nn.Module:
        """The output head. A tied one follows `tok_emb`, which may have been replaced since."""
        head = self._modules["out_head"]
        if head is None:
            raise ValueError("the model has no output head: nn.Identity() gives hidden states")
        if isinstance(head, TiedHead) and head.tok_emb is not self.tok_emb:
            head.tie(self.tok_emb)
        return head

    @out_head.setter
    def out_head(self, head: nn.Module) -> None:  # for type checkers: nn.Module registers it itself
        self.register_module("out_head", head)

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
        token_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
        **shortcuts: Any,
    ) -> Float[Tensor, "batch outputs vocab"]:
        """Logits of the next token at every position; arguments as for `residual_stream`, such as
        `inputs_embeds` or, as shortcuts, `last_only`."""
        return self.out_head(
            self.hidden_states(token_ids, attention_mask, position_ids, cache, **shortcuts)
        )

    def hidden_states(
        self,
        token_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
        **shortcuts: Any,
    ) -> Float[Tensor, "batch outputs emb"]:
        """What the output head reads: the residual stream after the final norm."""
        return self.final_norm(
            self.residual_stream(token_ids, attention_mask, position_ids, cache, **shortcuts)
        )

    def residual_stream(
        self,
        token_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch total"] | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cache: KeyValueCache | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch tokens emb"] | None = None,
        last_only: bool = False,
        stream: Float[Tensor, "batch tokens emb"] | None = None,
        first_block: int = 0,
        n_blocks: int | None = None,
    ) -> Float[Tensor, "batch outputs emb"]:
        """The sum of the embedding and of what the blocks add to it.

        attention_mask: 1 (or True) for a real token, 0 for padding, which may stand on either side.
            With a cache it may cover the new tokens alone or the cached ones too, for which it has
            to be what it was. Outputs at real tokens are those of the unpadded text; outputs at
            padding are finite and meaningless.
            Segment ids 1, 2, 3, ... pack several texts into one row: none attends to another.
        position_ids: the default counts the real tokens of each row from 0.
        cache: keys and values of earlier tokens; this call's tokens are added to it.
        inputs_embeds: vectors in place of `tok_emb(token_ids)` (token_ids is None then): soft
            prompts, gradients with respect to the input. Positions are added as usual.
        last_only: the output at the last token alone, (batch, 1, emb); the last block computes no
            other, unless there are hooks in it. Texts of several lengths have to be padded on the
            left (`masking.align_right`).
        stream, first_block: continue from this residual stream, as it enters block number
            `first_block` (token_ids is None then).
        n_blocks: stop after so many blocks; None: after the last. A cache goes with all blocks.
        Raises ValueError for too many tokens, ids outside the vocabulary, or shapes that do not
        fit. Values of tensors are checked where they can be read (`checks.holds`). A compiled model
        checks token ids alone, on the CPU (RuntimeError); on a GPU, torch's embedding does.
        """
        start = check_start(self.config, token_ids, inputs_embeds, stream)
        n_blocks = len(self.trf_blocks) if n_blocks is None else n_blocks
        check_blocks(self.config, len(self.trf_blocks), first_block, n_blocks, cache)
        # of which the shape (batch, tokens) and the device count
        like = start if stream is None and inputs_embeds is None else start[..., 0]
        attn_mask, position_ids = self.mask_and_positions(like, attention_mask, position_ids, cache)
        x = self.embed(start, position_ids) if stream is None else stream
        for layer, block in enumerate(self.trf_blocks):
            if first_block <= layer < n_blocks:
                layer_cache = None if cache is None else cache.layers[layer]
                is_last = layer == n_blocks - 1
                x = call_layer(block, x, attn_mask, layer_cache, last_only and is_last)
        return x[:, -1:] if last_only else x

    def embed(
        self,
        token_ids: Int[Tensor, "batch tokens"] | Float[Tensor, "batch tokens emb"],
        position_ids: Int[Tensor, "#batch tokens"],
    ) -> Float[Tensor, "batch tokens emb"]:
        """The start of the residual stream: a vector of each token and one of each position.
        token_ids: or the vectors of the tokens in their place."""
        vectors = token_ids if token_ids.is_floating_point() else self.tok_emb(token_ids)
        x = vectors + self.pos_emb(position_ids)  # (batch, tokens, emb)
        drop_rate = self.config.drop_rate
        return F.dropout(x, drop_rate) if self.training and drop_rate else x

    def mask_and_positions(
        self,
        like: Shaped[Tensor, "batch tokens"],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Bool[Tensor, "#batch 1 tokens total"] | None, Int[Tensor, "#batch tokens"]]:
        """(attn_mask, position_ids) for new tokens of the shape of `like`. What padding, packing
        and cached tokens mean for attention is in `gpt2mini.masking`."""
        check_mask_and_cache(self.config, like, attention_mask, cache)
        past, tokens = 0 if cache is None else cache.length, like.shape[1]
        segments = segment_ids(like, attention_mask, cache)  # (batch, total) or None
        attn_mask = build_attn_mask(like, segments, past)  # (batch or 1, 1, tokens, total) or None
        if position_ids is not None:
            check_positions(self.config, position_ids, like)
        else:
            position_ids = count_positions(like, segments, attn_mask, past)
            check_derived_positions(self.config, position_ids, past + tokens, segments)
        if cache is not None:
            cache.segment_ids = segments  # later calls need not repeat the mask of earlier tokens
        return attn_mask, position_ids

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
    ) -> "GPT2":
        """Load a model; see `gpt2mini.checkpoints.load_model`."""
        # Imported here: the architecture itself does not depend on file formats.
        from gpt2mini.checkpoints import load_model

        return load_model(name_or_folder, dtype, device)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Write a Hugging Face GPT-2 folder; see `gpt2mini.checkpoints.save_model`."""
        from gpt2mini.checkpoints import save_model

        save_model(self, folder, dtype, class_names)

    def quantize(self, weights: str = "int8") -> "GPT2":
        """Keep the weights in fewer bits, in place, to write faster; see `gpt2mini.quantize`."""
        from gpt2mini.quantize import quantize_model

        return quantize_model(self, weights)


def accepts_shortcut(model: GPT2, name: str) -> bool:
    """Whether the model takes an argument such as `last_only` as far as `residual_stream`. A
    `forward` or `hidden_states` of your own need not know it: then the model computes all. So it
    does instead of `last_only` for hooks behind the blocks, which may look at any token."""
    methods = (model.forward, model.hidden_states, model.residual_stream)
    if name == "last_only" and has_hooks_behind_blocks(model):
        return False
    return all(accepts_argument(method, name) for method in methods)


def has_hooks_behind_blocks(model: GPT2) -> bool:
    layers = (model.final_norm, model.out_head)
    return has_hooks(uncompiled(model)) or any(map(has_hooks_inside, layers))
