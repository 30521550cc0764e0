"""One table: the names and shapes of the published GPT-2 tensors, ours, and what lies between.

OpenAI stored linear layers as 1x1 convolutions, (in, out), with query, key and value side by side
in one. Inside gpt2mini a linear layer is an `nn.Linear`, (out, in), and the three are three. This
file is the only place that knows both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2mini.config import GPT2Config


@dataclass(frozen=True)
class Rule:
    """One published tensor becomes one of ours, or several that lie side by side in it."""

    published: str
    shape: str  # of the published tensor, by the names of its axes
    ours: tuple[str, ...]
    transposed: bool = False


TOP = [
    Rule("wte.weight", "vocab emb", ("tok_emb.weight",)),
    Rule("wpe.weight", "context emb", ("pos_emb.weight",)),
    Rule("ln_f.weight", "emb", ("final_norm.weight",)),
    Rule("ln_f.bias", "emb", ("final_norm.bias",)),
]
BLOCK = [
    Rule("ln_1.weight", "emb", ("norm1.weight",)),
    Rule("ln_1.bias", "emb", ("norm1.bias",)),
    Rule(
        "attn.c_attn.weight",
        "emb 3*emb",
        ("attn.query.weight", "attn.key.weight", "attn.value.weight"),
        transposed=True,
    ),
    Rule("attn.c_attn.bias", "3*emb", ("attn.query.bias", "attn.key.bias", "attn.value.bias")),
    Rule("attn.c_proj.weight", "emb emb", ("attn.attn_out.weight",), transposed=True),
    Rule("attn.c_proj.bias", "emb", ("attn.attn_out.bias",)),
    Rule("ln_2.weight", "emb", ("norm2.weight",)),
    Rule("ln_2.bias", "emb", ("norm2.bias",)),
    Rule("mlp.c_fc.weight", "emb 4*emb", ("mlp.mlp_in.weight",), transposed=True),
    Rule("mlp.c_fc.bias", "4*emb", ("mlp.mlp_in.bias",)),
    Rule("mlp.c_proj.weight", "4*emb emb", ("mlp.mlp_out.weight",), transposed=True),
    Rule("mlp.c_proj.bias", "emb", ("mlp.mlp_out.bias",)),
]
QKV_BIASES = ("attn.query.bias", "attn.key.bias", "attn.value.bias")

# The output heads that a file may hold. A tied one is not there: it is the token embedding.
OWN_HEAD = [Rule("lm_head.weight", "vocab emb", ("out_head.weight",))]
CLASS_HEAD = [Rule("score.weight", "classes emb", ("out_head.weight",))]
CLASS_HEAD_BIAS = [Rule("score.bias", "classes", ("out_head.bias",))]  # transformers has none

# What wrappers put in front of every name, in any order: data parallelism, Lightning,
# torch.compile, and the language model around `transformers`' inner model.
WRAPPERS = re.compile(r"^(module\.|model\.|_orig_mod\.|transformer\.)+")

# Buffers that old files carry: the causal mask, under a misleading name, and its fill value.
KNOWN_AND_UNUSED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def rules(config: GPT2Config, head: Sequence[Rule] = ()) -> list[Rule]:
    """The table written out for every block of a model, and for its head if it has its own."""
    blocks = [
        replace(
            rule,
            published=f"h.{i}.{rule.published}",
            ours=tuple(f"trf_blocks.{i}.{name}" for name in rule.ours),
        )
        for i in range(config.n_layers)
        for rule in BLOCK
    ]
    return [*TOP, *blocks, *head]


def published_shape(rule: Rule, config: GPT2Config, classes: int) -> tuple[int, ...]:
    """What the axes of a published tensor measure in a model of this config."""
    size = {
        "vocab": config.vocab_size,
        "context": config.context_length,
        "emb": config.emb_dim,
        "3*emb": 3 * config.emb_dim,
        "4*emb": 4 * config.emb_dim,
        "classes": classes,
    }
    return tuple(size[axis] for axis in rule.shape.split())


def openai_name(published: str) -> str:
    """The name of a tensor in OpenAI's own files: `h.0.ln_1.weight` is `model/h0/ln_1/g` there."""
    *path, kind = published.split(".")
    if path[-1] in ("wte", "wpe"):
        return f"model/{path[-1]}"
    letter = "b" if kind == "bias" else "g" if path[-1].startswith("ln_") else "w"
    return "/".join(["model", *path, letter]).replace("model/h/", "model/h")


def check_names(names: Iterable[str], table: list[Rule]) -> None:
    """Every tensor of a file is used exactly once, every parameter filled exactly once: anything
    left over on either side is a ValueError that lists both sides."""
    unused = {name for name in names if not KNOWN_AND_UNUSED.fullmatch(name)}
    missing = [rule.published for rule in table if rule.published not in unused]
    unused -= {rule.published for rule in table}
    if missing or unused:
        raise ValueError(
            f"the tensors do not fit this model: {len(missing)} missing {missing[:5]}, "
            f"{len(unused)} unknown {sorted(unused)[:5]}"
        )


def from_published(rule: Rule, tensor: Tensor) -> tuple[Tensor, ...]:
    """A published tensor -> the part of each of ours, as views."""
    return (tensor.T if rule.transposed else tensor).chunk(len(rule.ours))


def to_published(
    state: Mapping[str, Tensor], config: GPT2Config, head: Sequence[Rule] = ()
) -> dict[str, Tensor]:
    """Our state dict -> tensors under their published names and in their published layout.

    The published layout has no switch for `qkv_bias`: what a model lacks is written as zeros.
    """
    table = rules(config, head)
    names = [name for rule in table for name in rule.ours]
    if not config.qkv_bias:
        zeros = torch.zeros_like(state["final_norm.bias"])
        state = {name: zeros for name in names if name.endswith(QKV_BIASES)} | dict(state)
    if set(state) != set(names):
        adapted = any(name.endswith(".lora_A") for name in state)
        advice = "; it has adapters: merge_lora(model) first, or save_adapter(model, folder)"
        raise ValueError(
            "the model's tensors are not those of a GPT-2: "
            f"unknown {sorted(set(state) - set(names))[:5]}, "
            f"missing {sorted(set(names) - set(state))[:5]}{advice if adapted else ''}"
        )
    published = {}
    for rule in table:
        parts = [state[name] for name in rule.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        published[rule.published] = (tensor.T if rule.transposed else tensor).contiguous()
    return published
