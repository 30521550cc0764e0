"""Changes that people make to a GPT-2, each in one place.

EDITS: name -> what is put in the place of which text of `model.py`.
LIVE: name -> a function that changes a plain model, by a subclass, a replaced layer or a hook, and
returns it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fork_paths import CONFIG, model_with
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini import GPT2
from gpt2mini.model import MLP, MultiHeadAttention, TiedHead, TransformerBlock

# ---- model.py as text

Edit = list[tuple[str, str]]

ATTENTION = "class MultiHeadAttention("
ATTENTION_CALL = "context = F.scaled_dot_product_attention("
DROPOUT_ARGUMENT = "            dropout_p=self.drop_rate if self.training else 0.0,\n"
LAST_ATTENTION_LAYER = "        self.attn_out = nn.Linear(config.emb_dim, config.emb_dim)\n"
USE_CACHE = "        if cache is not None:\n            key, value = cache.append(key, value)"
ADD_ATTENTION = "        x = x + self.dropout(attended)\n"
ADD_MLP = "        x = x + self.dropout(self.mlp(self.norm2(x)))\n"
GELU = "F.gelu(self.mlp_in(x), approximate=self.gelu)"
HEAD = "TiedHead(self.tok_emb)\n"
END_OF_INIT = "        self.apply(self.init_weights)\n"
LOGITS = """\
        return self.out_head(
            self.hidden_states(token_ids, attention_mask, position_ids, cache, **shortcuts)
        )
"""

OWN_ATTENTION = """\
def own_attention(query, key, value, attn_mask=None, is_causal=False, dropout_p=0.0):
    columns = torch.arange(key.shape[2], device=query.device)  # (total)
    distance = columns[-query.shape[2] :, None] - columns  # (tokens, total)
    mask = distance >= 0 if attn_mask is None else attn_mask
"""
WINDOW = """\
    mask = mask & (distance < 8)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)


"""
ALIBI = """\
    slopes = 2.0 ** -torch.arange(1, 1 + query.shape[1], device=query.device)
    bias = -slopes[:, None, None] * distance  # (heads, tokens, total)
    mask = bias.masked_fill(~mask, float("-inf")).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)


"""
SOFT_CAP = """\
    scores = torch.tanh(query @ key.mT)  # (batch, heads, tokens, total)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=3) @ value


"""
ROTATE = """\
def rotate(x, start):
    positions = torch.arange(start, start + x.shape[2], device=x.device)
    angles = positions[:, None] * 100.0 ** -torch.linspace(0, 1, x.shape[3] // 2)
    first, second = x.chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


"""
SCALED_LINEAR = """\
class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


"""


def own_attention(rest: str) -> Edit:
    """A function of one's own in the place of torch's."""
    call = (ATTENTION_CALL, "context = own_attention(")
    return [call, (ATTENTION, OWN_ATTENTION + rest + ATTENTION)]


EDITS: dict[str, Edit] = {
    "another attention scale": [(DROPOUT_ARGUMENT, DROPOUT_ARGUMENT + "            scale=1.0,\n")],
    "a sliding window": own_attention(WINDOW),
    "ALiBi": own_attention(ALIBI),
    "soft-capped attention": own_attention(SOFT_CAP),  # without torch's attention
    "rotary embeddings": [
        (ATTENTION, ROTATE + ATTENTION),
        (
            USE_CACHE,
            "        end = key.shape[2] + (0 if cache is None else cache.length)\n"
            "        query, key = (rotate(x, end - x.shape[2]) for x in (query, key))\n"
            + USE_CACHE,
        ),
    ],
    "a norm on queries and keys": [
        (
            USE_CACHE,
            "        query, key = (2 * F.rms_norm(x, x.shape[-1:]) for x in (query, key))\n"
            + USE_CACHE,
        )
    ],
    "a gate on values": [
        (
            LAST_ATTENTION_LAYER,
            LAST_ATTENTION_LAYER
            + "        self.gate = nn.Linear(config.emb_dim, config.emb_dim)\n",
        ),
        (USE_CACHE, "        value = value * self.split_heads(self.gate(x)).tanh()\n" + USE_CACHE),
    ],
    "attention and MLP in parallel": [
        (ADD_ATTENTION, ""),
        (ADD_MLP, ADD_MLP.replace("x + ", "x + attended + ")),
    ],
    "the embedding added to every block": [
        ("        for layer, block in", "        start = x\n        for layer, block in"),
        ("x = call_layer(block, x, attn_mask", "x = call_layer(block, x + 0.3 * start, attn_mask"),
    ],
    "a scaled residual branch": [(ADD_MLP, ADD_MLP.replace("x + ", "x + 0.5 * "))],
    "squared ReLU": [(GELU, "F.relu(self.mlp_in(x)).square()")],
    "no biases": [
        ("bias=config.qkv_bias", "bias=False"),
        ("nn.Linear(config.emb_dim, config.emb_dim)", "NoBias(config.emb_dim, config.emb_dim)"),
        ("nn.Linear(config.emb_dim, 4 * ", "NoBias(config.emb_dim, 4 * "),
        ("nn.Linear(4 * config.emb_dim, ", "NoBias(4 * config.emb_dim, "),
        ("eps=1e-5", "eps=1e-5, bias=False"),
        (ATTENTION, "NoBias = partial(nn.Linear, bias=False)\n\n\n" + ATTENTION),
        ("import math\n", "import math\nfrom functools import partial\n"),
    ],
    "RMSNorm": [("nn.LayerNorm(", "nn.RMSNorm(")],
    "a linear layer that scales": [
        ("self.key = nn.Linear(", "self.key = ScaledLinear("),
        ("self.mlp_out = nn.Linear(", "self.mlp_out = ScaledLinear("),
        (ATTENTION, SCALED_LINEAR + ATTENTION),
    ],
    "a hook on a block": [
        (
            END_OF_INIT,
            END_OF_INIT
            + "        self.trf_blocks[1].register_forward_hook(\n"
            + "            lambda block, args, x: x + torch.arange(x.shape[2]) / 16\n"
            + "        )\n",
        )
    ],
    "a head of one's own": [
        (
            HEAD,
            "nn.Sequential(\n"
            "            nn.Linear(config.emb_dim, 24),\n"
            "            nn.Tanh(),\n"
            "            nn.Linear(24, config.vocab_size),\n"
            "        )\n",
        )
    ],
    "a head with a bias": [(HEAD, "nn.Linear(config.emb_dim, config.vocab_size)\n")],
    "a scaled tied head": [
        ("return F.linear(hidden, self.weight)", "return 0.5 * F.linear(hidden, self.weight)")
    ],
    "scaled hidden states": [
        ("return self.final_norm(", "return 1.5 * self.final_norm("),
    ],
    "soft-capped logits": [
        (
            LOGITS,
            LOGITS.replace("return ", "logits = ") + "        return 3 * torch.tanh(logits / 3)\n",
        )
    ],
    "scaled embeddings": [
        ("self.tok_emb(token_ids)", "math.sqrt(self.config.emb_dim) * self.tok_emb(token_ids)")
    ],
}


def edited(source: str, edit: Edit) -> str:
    for old, new in edit:
        assert old in source, f"model.py no longer has {old!r}"
        source = source.replace(old, new)
    return source


# ---- a live model

Change = Callable[[GPT2], GPT2]
LIVE: dict[str, Change] = {}


def live(name: str) -> Callable[[Change], Change]:
    def enter(change: Change) -> Change:
        LIVE[name] = change
        return change

    return enter


def blocks_of(model: GPT2) -> list[Any]:
    return list(model.trf_blocks)


def with_weights_of(new: nn.Module, old: nn.Module) -> Any:
    new.load_state_dict(old.state_dict(), strict=False)
    return new.eval()


def use_attention(model: GPT2, kind: type[MultiHeadAttention]) -> GPT2:
    for block in blocks_of(model):
        block.attn = with_weights_of(kind(model.config), block.attn)
    return model


class OwnAttention(MultiHeadAttention):
    """Written out by somebody who knows the arguments of `MultiHeadAttention.forward`."""

    def forward(
        self, x: Tensor, attn_mask: Any = None, cache: Any = None, last_only: bool = False
    ) -> Tensor:
        query = self.heads(self.query(x[:, -1:] if last_only else x))
        key, value = self.heads(self.key(x)), self.heads(self.value(x))
        if cache is not None:
            key, value = cache.append(key, value)
        columns = torch.arange(key.shape[2])
        distance = columns[-query.shape[2] :, None] - columns
        visible = distance >= 0 if attn_mask is None else attn_mask[:, :, -query.shape[2] :]
        context = self.attend(query, key, value, visible, distance)
        return self.attn_out(context.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, distance: Tensor
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)


@live("another attention scale")
def another_scale(model: GPT2) -> GPT2:
    return use_attention(model, OwnAttention)


class WindowAttention(OwnAttention):
    def forward(  # type: ignore[override]  # by somebody who knows nothing of `last_only`
        self, x: Tensor, attn_mask: Any = None, cache: Any = None
    ) -> Tensor:
        return super().forward(x, attn_mask, cache)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, distance: Tensor
    ) -> Tensor:
        mask = visible & (distance < 8)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@live("a sliding window")
def sliding_window(model: GPT2) -> GPT2:
    return use_attention(model, WindowAttention)


class AlibiAttention(OwnAttention):
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, distance: Tensor
    ) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, 1 + self.n_heads)
        bias = (-slopes[:, None, None] * distance).masked_fill(~visible, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


@live("ALiBi")
def alibi(model: GPT2) -> GPT2:
    return use_attention(model, AlibiAttention)


class HeadNorm(nn.Module):
    """A projection whose output has length `2 * sqrt(head_dim)` in each head."""

    def __init__(self, projection: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.projection, self.head_dim = projection, head_dim

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (-1, self.head_dim))
        return 2 * F.rms_norm(heads, (self.head_dim,)).flatten(-2)


@live("a norm on queries and keys")
def norm_on_queries_and_keys(model: GPT2) -> GPT2:
    for block in blocks_of(model):
        block.attn.query = HeadNorm(block.attn.query, model.config.head_dim)
        block.attn.key = HeadNorm(block.attn.key, model.config.head_dim)
    return model


class Gated(nn.Module):
    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.gate = nn.Linear(projection.in_features, projection.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) * self.gate(x).tanh()


@live("a gate on values")
def gate_on_values(model: GPT2) -> GPT2:
    for block in blocks_of(model):
        block.attn.value = Gated(block.attn.value)
    return model


class ParallelBlock(TransformerBlock):
    def forward(  # type: ignore[override]  # by somebody who knows nothing of `last_only`
        self, x: Tensor, attn_mask: Any = None, cache: Any = None
    ) -> Tensor:
        return x + self.attn(self.norm1(x), attn_mask, cache) + self.mlp(self.norm2(x))


@live("attention and MLP in parallel")
def parallel(model: GPT2) -> GPT2:
    for layer, block in enumerate(blocks_of(model)):
        model.trf_blocks[layer] = with_weights_of(ParallelBlock(model.config), block)
    return model


class OwnBlock(nn.Module):
    """A block by its parts' names alone, with one norm more."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )

    def forward(self, x: Tensor, attn_mask: Any = None, cache: Any = None) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask, cache)
        x = x + F.layer_norm(attended, attended.shape[-1:])
        return x + self.mlp(self.norm2(x))


@live("a block class of one's own")
def own_block(model: GPT2) -> GPT2:
    model.trf_blocks = nn.ModuleList(map(OwnBlock, model.trf_blocks))
    return model


class SquaredReLU(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)).square())


@live("squared ReLU")
def squared_relu(model: GPT2) -> GPT2:
    for block in blocks_of(model):
        block.mlp = with_weights_of(SquaredReLU(model.config), block.mlp)
    return model


@live("no biases")
def no_biases(model: GPT2) -> GPT2:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = None  # type: ignore[assignment]
    return model


def add_vector(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output + torch.arange(output.shape[-1]) / 16


@live("a hook on a block")
def hook_on_a_block(model: GPT2) -> GPT2:
    model.trf_blocks[1].register_forward_hook(add_vector)
    return model


@live("a hook on the last block")
def hook_on_the_last_block(model: GPT2) -> GPT2:
    model.trf_blocks[-1].register_forward_hook(add_vector)
    return model


@live("a hook on attention")
def hook_on_attention(model: GPT2) -> GPT2:
    blocks_of(model)[-1].attn.register_forward_hook(add_vector)
    return model


@live("a hook before a layer")
def hook_before_a_layer(model: GPT2) -> GPT2:
    def double(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (2 * arguments[0],)

    blocks_of(model)[-1].mlp.mlp_out.register_forward_pre_hook(double)
    return model


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


@live("a linear layer that scales")
def linear_that_scales(model: GPT2) -> GPT2:
    for block in blocks_of(model):
        for part, name in ((block.attn, "key"), (block.attn, "value"), (block.mlp, "mlp_out")):
            old = getattr(part, name)
            setattr(part, name, with_weights_of(ScaledLinear(*old.weight.shape[::-1]), old))
    return model


@live("a head of one's own")
def own_head(model: GPT2) -> GPT2:
    emb, vocab = model.config.emb_dim, model.config.vocab_size
    model.out_head = nn.Sequential(nn.Linear(emb, 24), nn.Tanh(), nn.Linear(24, vocab))
    return model


class CosineHead(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.directions = nn.Parameter(weight.detach().clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return 5 * F.normalize(hidden, dim=-1) @ F.normalize(self.directions, dim=-1).mT


@live("a head without a weight")
def head_without_a_weight(model: GPT2) -> GPT2:
    model.out_head = CosineHead(model.tok_emb.weight)
    return model


@live("a head with a bias")
def head_with_a_bias(model: GPT2) -> GPT2:
    model.out_head = nn.Linear(model.config.emb_dim, model.config.vocab_size)
    return model


class ScaledTiedHead(TiedHead):
    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden)


@live("a scaled tied head")
def scaled_tied_head(model: GPT2) -> GPT2:
    model.out_head = ScaledTiedHead(model.tok_emb)
    return model


@live("a hook on the head")
def hook_on_the_head(model: GPT2) -> GPT2:
    model.out_head.register_forward_hook(add_vector)
    return model


@live("a hook on the whole model")
def hook_on_the_model(model: GPT2) -> GPT2:
    model.register_forward_hook(lambda module, arguments, logits: 0.5 * logits)
    return model


@live("RMSNorm")
def rms_norm(model: GPT2) -> GPT2:
    emb = model.config.emb_dim
    for block in blocks_of(model):
        block.norm1 = with_weights_of(nn.RMSNorm(emb, 1e-5), block.norm1)
        block.norm2 = with_weights_of(nn.RMSNorm(emb, 1e-5), block.norm2)
    model.final_norm = with_weights_of(nn.RMSNorm(emb, 1e-5), model.final_norm)
    return model


class SoftCapped(GPT2):
    def forward(  # type: ignore[override]  # the arguments of the documented contract
        self,
        token_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
    ) -> Tensor:
        logits = super().forward(token_ids, attention_mask, position_ids, cache)
        return 3 * torch.tanh(logits / 3)


@live("soft-capped logits")
def soft_capped(model: GPT2) -> GPT2:
    return model_with(model.state_dict(), SoftCapped)


class ScaledHidden(GPT2):
    def hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * super().hidden_states(*args, **kwargs)


@live("scaled hidden states")
def scaled_hidden_states(model: GPT2) -> GPT2:
    return model_with(model.state_dict(), ScaledHidden)


class OwnHidden(GPT2):
    def hidden_states(  # type: ignore[override]  # the arguments of the documented contract
        self,
        token_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
    ) -> Tensor:
        return super().hidden_states(token_ids, attention_mask, position_ids, cache).tanh()


@live("hidden states of one's own")
def own_hidden_states(model: GPT2) -> GPT2:
    return model_with(model.state_dict(), OwnHidden)


@live("scaled embeddings")
def scaled_embeddings(model: GPT2) -> GPT2:
    model.tok_emb.register_forward_hook(lambda *call: call[2] * model.config.emb_dim**0.5)
    return model


class Halved(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.branch(x)


@live("a scaled residual branch")
def scaled_residual_branch(model: GPT2) -> GPT2:
    for block in blocks_of(model):
        block.mlp = Halved(block.mlp)
    return model


@live("a method replaced in an instance")
def method_replaced(model: GPT2) -> GPT2:
    mlp = blocks_of(model)[-1].mlp
    mlp.forward = partial(halved_mlp, mlp)
    return model


def halved_mlp(mlp: MLP, x: Tensor) -> Tensor:
    return 0.5 * MLP.forward(mlp, x)


def plain_model() -> GPT2:
    return model_with({})


assert CONFIG.n_layers == 3  # what the changes of block 1 and of the last block count on
