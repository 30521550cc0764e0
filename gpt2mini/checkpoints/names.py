"""One table: the names of the published GPT-2 tensors, ours, and what happens on the way.

OpenAI stored linear layers as 1x1 convolutions, (in, out), with query, key and value side by side
in one. Inside gpt2mini a linear layer is an `nn.Linear`, (out, in), and the three are three. This
file is the only place that knows both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2mini.config import GPT2Config


@dataclass(frozen=True)
class Rule:
    """One published tensor becomes one of ours, or several that lie side by side in it."""

    published: str
    ours: tuple[str, ...]
    transposed: bool = False


TOP = [
    Rule("wte.weight", ("tok_emb.weight",)),
    Rule("wpe.weight", ("pos_emb.weight",)),
    Rule("ln_f.weight", ("final_norm.weight",)),
    Rule("ln_f.bias", ("final_norm.bias",)),
]
HEAD = Rule("lm_head.weight", ("out_head.weight",))
BLOCK = [
    Rule("ln_1.weight", ("norm1.weight",)),
    Rule("ln_1.bias", ("norm1.bias",)),
    Rule(
        "attn.c_attn.weight",
        ("attn.query.weight", "attn.key.weight", "attn.value.weight"),
        transposed=True,
    ),
    Rule("attn.c_attn.bias", ("attn.query.bias", "attn.key.bias", "attn.value.bias")),
    Rule("attn.c_proj.weight", ("attn.attn_out.weight",), transposed=True),
    Rule("attn.c_proj.bias", ("attn.attn_out.bias",)),
    Rule("ln_2.weight", ("norm2.weight",)),
    Rule("ln_2.bias", ("norm2.bias",)),
    Rule("mlp.c_fc.weight", ("mlp.mlp_in.weight",), transposed=True),
    Rule("mlp.c_fc.bias", ("mlp.mlp_in.bias",)),
    Rule("mlp.c_proj.weight", ("mlp.mlp_out.weight",), transposed=True),
    Rule("mlp.c_proj.bias", ("mlp.mlp_out.bias",)),
]
QKV_BIASES = ("attn.query.bias", "attn.key.bias", "attn.value.bias")

# Buffers that old files carry: the causal mask, under a misleading name, and its fill value.
KNOWN_AND_UNUSED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def rules(config: GPT2Config, tied: bool = True) -> list[Rule]:
    """The table written out for every block of a model, and its own head if it has one."""
    blocks = [
        Rule(
            f"h.{i}.{rule.published}",
            tuple(f"trf_blocks.{i}.{name}" for name in rule.ours),
            rule.transposed,
        )
        for i in range(config.n_layers)
        for rule in BLOCK
    ]
    return TOP + blocks + ([] if tied else [HEAD])


def to_published(
    state: Mapping[str, Tensor], config: GPT2Config, tied: bool = True
) -> dict[str, Tensor]:
    """Our state dict -> tensors under their published names and in their published layout.

    The published layout has no switch for `qkv_bias`: what a model lacks is written as zeros.
    """
    table = rules(config, tied)
    names = [name for rule in table for name in rule.ours]
    if not config.qkv_bias:
        zeros = torch.zeros_like(state["final_norm.bias"])
        state = {name: zeros for name in names if name.endswith(QKV_BIASES)} | dict(state)
    if set(state) != set(names):
        raise ValueError(
            "the model's tensors are not those of a GPT-2: "
            f"unknown {sorted(set(state) - set(names))[:5]}, "
            f"missing {sorted(set(names) - set(state))[:5]}"
        )
    published = {}
    for rule in table:
        tensor = torch.cat([state[name] for name in rule.ours])
        published[rule.published] = (tensor.T if rule.transposed else tensor).contiguous()
    return published


@torch.no_grad()
def fill_from_published(
    model: nn.Module, published: Mapping[str, Tensor], table: list[Rule]
) -> None:
    """Copy published tensors into the model's own parameters, in place.

    Every tensor of the file is used exactly once and every parameter filled exactly once; anything
    left over on either side is a ValueError that lists both sides.
    """
    parameters = dict(model.named_parameters())
    unused = {name for name in published if not KNOWN_AND_UNUSED.fullmatch(name)}
    missing = [rule.published for rule in table if rule.published not in published]
    unused -= {rule.published for rule in table}
    if missing or unused:
        raise ValueError(
            f"the tensors do not fit this model: {len(missing)} missing {missing[:5]}, "
            f"{len(unused)} unknown {sorted(unused)[:5]}"
        )
    for rule in table:
        tensor = published[rule.published]
        parts = [parameters[name] for name in rule.ours]
        expected = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        found = tuple(reversed(tensor.shape)) if rule.transposed else tuple(tensor.shape)
        if found != expected:
            expected = tuple(reversed(expected)) if rule.transposed else expected
            raise ValueError(
                f"{rule.published} has the shape {tuple(tensor.shape)}; "
                f"the config asks for {expected}"
            )
        pieces = (tensor.T if rule.transposed else tensor).chunk(len(parts))
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)
