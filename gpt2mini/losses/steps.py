"""Loss functions of a batch, as a training loop or an evaluation calls them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gpt2mini.checks import check_labels_not_shifted
from gpt2mini.device import autocast
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.losses.next_token import chunked_next_token_loss
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating

# A batch is anything that `to_device` and the loss function take.
LossFunction = Callable[[Any, Any], tuple[Tensor, Tensor | int]]


def next_token_step(model: GPT2, batch: Any) -> tuple[Tensor, Tensor]:
    """(sum, count) of a batch's next-token loss; the full logits are never materialized.

    batch: a `Batch`. Raises TypeError for anything without token_ids.
    """
    if not hasattr(batch, "token_ids"):
        raise TypeError(
            f"expected a Batch, with token_ids and labels; got a {type(batch).__name__}: make one, "
            "Batch(token_ids, labels=token_ids), or give a loss_function that takes it"
        )
    check_labels_not_shifted(batch.token_ids, batch.labels)
    hidden, head = hidden_states_and_head(model, batch.token_ids, batch.attention_mask)
    return chunked_next_token_loss(hidden, head, batch.labels)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with `.to(device)`, or a tuple, list or dict of such, as a DataLoader gives them."""
    if isinstance(batch, dict):
        return {name: to_device(member, device) for name, member in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(to_device(member, device) for member in batch))
    if isinstance(batch, list | tuple):
        return [to_device(member, device) for member in batch]
    return batch.to(device) if hasattr(batch, "to") else batch


def evaluate_loss(
    model: GPT2,
    batches: Iterable[Any],
    loss_function: LossFunction = next_token_step,
    precision: str = "auto",
) -> float:
    """Mean loss over all targets of all batches, in eval mode; the previous mode is restored."""
    device = next(model.parameters()).device
    loss_sum, count = 0.0, 0.0
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            batch_sum, batch_count = loss_function(model, to_device(batch, device))
            loss_sum, count = loss_sum + float(batch_sum), count + float(batch_count)
    if count == 0:
        raise ValueError("there is nothing to evaluate on: the batches contain no target")
    return loss_sum / count
