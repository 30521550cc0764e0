"""The reference model: what the policy was before training, for KL penalties and DPO."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from gpt2mini.lora.adapt import lora_disabled, lora_layers, trainable_beside_adapters
from gpt2mini.lora.base_model import base_fingerprint, base_values, check_base
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.training.distributed import whole_tensor

logger = logging.getLogger(__name__)


@contextmanager
def using_reference(policy: GPT2, reference: GPT2 | None = None) -> Iterator[GPT2]:
    """Inside, the reference model in eval mode without gradients. The default is the policy with
    its adapters disabled, which needs no second copy of the weights. A policy whose adapters were
    trained before (supervised fine-tuning), or of which more than adapters learns while the
    reference is in use, needs `reference=deepcopy(policy)`, or a copy with merged adapters."""
    check_reference(policy, reference)
    with nullcontext() if reference else lora_disabled(policy), evaluating(reference or policy):
        yield reference or policy


def check_reference(policy: GPT2, reference: GPT2 | None) -> None:
    """Raise ValueError for a reference that the policy cannot have started from."""
    if reference is None:
        if not lora_layers(policy):
            raise ValueError(
                "there is no reference: the policy has no adapters to disable; pass "
                "reference=deepcopy(policy) before you train it, or add_lora(policy)"
            )
        return
    if reference is policy:
        raise ValueError("the reference is the policy itself, which training changes: pass a copy")
    if replace(reference.config, drop_rate=0.0) != replace(policy.config, drop_rate=0.0):
        raise ValueError(
            f"the reference is another model: {reference.config}; the policy is {policy.config}"
        )
    check_same_base(policy, reference)


def check_same_base(policy: GPT2, reference: GPT2) -> None:
    """Raise ValueError if the policy's adapters were made for another model than the reference.

    Of the layers that have adapters nothing is asked: in a reference these may be merged. Nor of
    parameters that learn beside the adapters: after the first step they are others.
    """
    adapted = {f"{name}.weight" for name in lora_layers(policy)}
    if not adapted:
        return
    left_out = adapted | {name for name, p in policy.named_parameters() if p.requires_grad}
    facts = json.loads(base_fingerprint(reference))
    facts = {name: values for name, values in facts.items() if name not in left_out}
    facts |= {name: values for name, values in base_values(policy).items() if name in left_out}
    try:
        check_base(policy, json.dumps(facts))
    except ValueError as error:
        raise ValueError(f"the reference is not the base of the adapter: {error}") from None


def check_reference_does_not_learn(policy: GPT2, reference: GPT2 | None) -> None:
    """Raise ValueError if the default reference, the policy without its adapters, would learn with
    the policy: if a parameter that is no adapter's is trainable. (A critic's head is no part of the
    policy.)"""
    if reference is not None or not lora_layers(policy):
        return
    if learning := trainable_beside_adapters(policy):
        raise ValueError(
            "the reference is the policy without its adapters, and would learn too: "
            f"{', '.join(learning[:3])}{' ...' * (len(learning) > 3)} can be trained; pass "
            "reference=deepcopy(policy) before you train it, or freeze all but the adapters"
        )


def warn_if_adapters_are_trained(policy: GPT2, reference: GPT2 | None) -> None:
    """Before training: the default reference leaves out what the adapters have learned already."""
    layers = lora_layers(policy).values()
    if reference is None and any(whole_tensor(layer.lora_B).any() for layer in layers):
        logger.warning(
            "the reference is the base model without the adapters, although these are trained "
            "already: the policy starts away from it. To start from the adapters, pass "
            "reference=deepcopy(policy), or merge them and add new ones"
        )
