"""The reference model: what the policy was before training, for KL penalties and DPO."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from gpt2mini.lora.adapt import lora_disabled, lora_layers
from gpt2mini.lora.base_model import base_fingerprint, check_base
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating


@contextmanager
def using_reference(policy: GPT2, reference: GPT2 | None = None) -> Iterator[GPT2]:
    """Inside, the reference model in eval mode without gradients. The default is the policy with
    its adapters disabled, which needs no second copy of the weights."""
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
    if lora_layers(policy):
        try:
            check_base(policy, base_fingerprint(reference))
        except ValueError as error:
            raise ValueError(f"the reference is not the base of the adapter: {error}") from None
