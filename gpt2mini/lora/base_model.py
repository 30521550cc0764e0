"""Which base model were adapters trained on? A fingerprint of it is kept with them.

Adapters are corrections of certain weights: on others they compute without an error and say
nonsense. The fingerprint is the dtype, and three values of every tensor that is not saved with the
adapters.
"""

import json

from torch import nn

from gpt2mini.checkpoints.huggingface import is_tied
from gpt2mini.checkpoints.origin import (
    Samples,
    equal_up_to_rounding,
    first_middle_last,
    origin_of,
)
from gpt2mini.lora.adapt import adapter_parameters
from gpt2mini.model import GPT2, TiedHead


def base_fingerprint(model: GPT2) -> str:
    """The fingerprint as JSON, for `check_base`. A head that is saved beside adapters is no part of
    the base."""
    has_head = isinstance(model.out_head, nn.Linear) and not is_tied(model)
    is_in_base = has_head and not trained_head(model)
    head = head_values(model) if is_in_base else {}
    return json.dumps({"dtype": str(model.tok_emb.weight.dtype), **base_values(model), **head})


def base_values(model: GPT2) -> Samples:
    """The first, the middle and the last value of every tensor but the adapters' and the head's."""
    adapters = adapter_parameters(model)
    return {
        name: first_middle_last(parameter)
        for name, parameter in model.named_parameters()
        if name not in adapters and not name.startswith("out_head.")
    }


def head_values(model: GPT2) -> Samples:
    """The same of a head that is not tied."""
    parameters = model.out_head.named_parameters()
    return {f"out_head.{name}": first_middle_last(parameter) for name, parameter in parameters}


def check_base(model: GPT2, fingerprint: str | None) -> None:
    """Raise ValueError if the fingerprint is that of another base model. None, as in PEFT's own
    files, is not checked."""
    if fingerprint is None:
        return
    expected = json.loads(fingerprint)
    same_dtype = expected.pop("dtype") == str(model.tok_emb.weight.dtype)
    if added := [name for name in base_values(model) if name not in expected]:
        raise ValueError(f"it was trained on another base model: {added[0]} is not in that one")
    found = base_values(model) | head_values(model)
    for name, values in expected.items():
        if name not in found or not equal_up_to_rounding(found[name], values, same_dtype):
            raise ValueError(
                f"it was trained on another base model: {name} has {found.get(name)} here and "
                f"{values} there"
            )


def name_of_base(model: GPT2) -> str | None:
    """The folder or the repository that the base was loaded from; None if there is none, or if its
    weights are not those any more."""
    origin, found = origin_of(model), base_values(model)
    loaded = {n: s for n, s in origin.samples.items() if not n.startswith("out_head.")}
    if found.keys() != loaded.keys():
        return None
    same = [equal_up_to_rounding(found[n], loaded[n], same_dtype=True) for n in found]
    return origin.base if all(same) else None


def predicts_tokens(model: GPT2) -> bool:
    """Whether the head has an output for each token, by its size."""
    return getattr(model.out_head, "out_features", None) == model.config.vocab_size


def trained_head(model: GPT2) -> dict[str, nn.Parameter]:
    """The parameters of a head that the base does not have: a classifier's, or a trainable one."""
    head = model.out_head
    if isinstance(head, TiedHead):
        return {}
    parameters = dict(head.named_parameters())
    if predicts_tokens(model) and not any(p.requires_grad for p in parameters.values()):
        return {}
    if not isinstance(head, nn.Linear) or head.in_features != model.config.emb_dim:
        raise ValueError(
            f"the output head is {head}: an adapter's files have a place for "
            f"nn.Linear({model.config.emb_dim}, classes)"
        )
    return parameters
