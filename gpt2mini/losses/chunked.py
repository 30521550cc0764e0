"""Output head and cross entropy together, a few positions at a time: the logits never all exist.

At 4 x 1024 tokens the logits of GPT-2 take 823 MB, and their gradient as much again. The gradient
of cross entropy with respect to the logits is softmax(logits) - one_hot(target): known as soon as
the logits are, so those of a chunk can be forgotten before those of the next are computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2mini.losses.deferred import linear_parameters


def summed_cross_entropy(
    hidden: Float[Tensor, "n emb"],
    out_head: nn.Module,
    targets: Int[Tensor, " n"],
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log p(target) over all positions, its gradient computed on the way.

    chunk_size: positions at a time; the default suits the processor's cache.
    """
    head = LinearHead.of(out_head, hidden, chunk_size)
    if head is None:
        return cross_entropy_of_any_head(hidden, out_head, targets, chunk_size).sum()
    if torch.is_grad_enabled():
        return SummedCrossEntropy.apply(hidden, head.weight, head.bias, targets, head)
    return cross_entropy_in_chunks(hidden, head.weight, head.bias, targets, head).sum()


def cross_entropy_of_each(
    hidden: Float[Tensor, "n emb"],
    out_head: nn.Module,
    targets: Int[Tensor, " n"],
    chunk_size: int | None = None,
) -> Float[Tensor, " n"]:
    """-log p(target) at each position. What gradient each will get is not known before backward, so
    backward computes the logits again."""
    head = LinearHead.of(out_head, hidden, chunk_size)
    if head is None:
        return cross_entropy_of_any_head(hidden, out_head, targets, chunk_size)
    return CrossEntropyOfEach.apply(hidden, head.weight, head.bias, targets, head)


def cross_entropy_of_any_head(
    hidden: Float[Tensor, "n emb"],
    out_head: nn.Module,
    targets: Int[Tensor, " n"],
    chunk_size: int | None = None,
) -> Float[Tensor, " n"]:
    """-log p(target) at each position, of a head that is not linear: the logits of a chunk are
    forgotten, and computed again in backward (Chen et al. 2016, activation checkpointing)."""

    def of_chunk(chunk: Tensor, target: Tensor) -> Tensor:
        logits = at_least_float32(out_head(chunk))  # (chunk, vocab)
        return F.cross_entropy(logits, target.long(), reduction="none")

    rows = chunk_size or 256  # 51 MB of GPT-2's logits
    return torch.cat(
        [
            checkpoint(of_chunk, chunk, target, use_reentrant=False)
            for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )


def logprobs_in_chunks(
    hidden: Float[Tensor, "n emb"], out_head: nn.Module, chunk_size: int = 64
) -> Iterator[Float[Tensor, "chunk vocab"]]:
    """log p of every token of the vocabulary, a few positions at a time: to evaluate, not to train,
    for autograd would keep every chunk."""
    for chunk in hidden.split(chunk_size):
        yield at_least_float32(out_head(chunk)).log_softmax(dim=1)


@dataclass(frozen=True)
class LinearHead:
    """The head's parameters, how many positions to take at a time, and in which dtype."""

    weight: Tensor  # (vocab, emb)
    bias: Tensor | None  # (vocab)
    dtype: torch.dtype
    rows: int
    rows_in_cache: int  # of these, how many the passes over the logits take at a time

    @staticmethod
    def of(out_head: nn.Module, hidden: Tensor, chunk_size: int | None) -> "LinearHead | None":
        """None for a head that is not linear."""
        parameters = linear_parameters(out_head, hidden)
        if parameters is None:
            return None
        weight, bias = parameters
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        vocab = weight.shape[0]
        # 51 MB of GPT-2's logits: not so few rows that the products get slow
        rows = chunk_size or max(1024 // dtype.itemsize, 2**22 // vocab)
        # 1 MB in float32; a GPU has no such cache, and would rather be called less often
        rows_in_cache = max(1, 2**18 // vocab) if device == "cpu" else rows
        return LinearHead(weight, bias, dtype, rows, rows_in_cache)


class SummedCrossEntropy(torch.autograd.Function):
    """Gradients are computed in forward, each chunk's beside its loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        gradients = Gradients.of(hidden, weight, bias)
        losses = cross_entropy_in_chunks(hidden, weight, bias, targets, head, gradients)
        ctx.save_for_backward(*gradients.cast(hidden, weight, bias))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients = ctx.saved_tensors
        if grad_output != 1:  # `loss_sum.backward()` needs no copy of the vocabulary's gradient
            gradients = [None if g is None else g * grad_output for g in gradients]
        return *gradients, None, None


class CrossEntropyOfEach(torch.autograd.Function):
    """Gradients are computed in backward, from logits computed anew."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = head
        return cross_entropy_in_chunks(hidden, weight, bias, targets, head)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, weight, bias, targets = ctx.saved_tensors
        asked = ctx.needs_input_grad
        gradients = Gradients.of(hidden, weight, bias, asked)
        cross_entropy_in_chunks(hidden, weight, bias, targets, ctx.head, gradients, grad_output)
        return *gradients.cast(hidden, weight, bias), None, None


@dataclass(frozen=True)
class Gradients:
    """Buffers in which the chunks' gradients add up; None where none is asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(hidden, weight, bias, asked=None) -> "Gradients":
        asked = asked or [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        return Gradients(
            torch.empty_like(hidden) if asked[0] else None,
            # half precision would lose what many chunks add
            at_least_float32(torch.zeros_like(weight)) if asked[1] else None,
            at_least_float32(torch.zeros_like(bias)) if asked[2] else None,
        )

    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, rows: slice, grad_logits: Tensor, chunk: Tensor, weight: Tensor) -> None:
        """What a chunk contributes, given the gradient of its logits, (chunk, vocab)."""
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=0, dtype=self.bias.dtype))
        if self.hidden is not None:
            self.hidden[rows] = grad_logits @ weight
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(grad_logits.T, chunk)  # no second tensor of its size
            else:  # nor here on a CPU: of some rows of the vocabulary at a time
                some = 512 if chunk.device.type == "cpu" else len(weight)
                parts = zip(self.weight.split(some), grad_logits.split(some, dim=1), strict=True)
                for part, grad_part in parts:
                    part.add_(grad_part.T @ chunk)

    def cast(self, hidden, weight, bias) -> list[Tensor | None]:
        return [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in (
                (self.hidden, hidden),
                (self.weight, weight),
                (self.bias, bias),
            )
        ]


def cross_entropy_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: LinearHead,
    gradients: Gradients | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """-log p(target) of each position; fills the gradient buffers that it is given.

    scale: the gradient that each position's loss is to have, (n); 1 if there is none.
    """
    losses = at_least_float32(hidden.new_empty(len(targets)))
    if gradients is None or not gradients.any():
        gradients = scale = None
    elif scale is None:
        scale = torch.ones_like(losses)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weight, hidden = weight.to(head.dtype), hidden.to(head.dtype)  # cast once, not once a chunk
        bias = None if bias is None else bias.to(head.dtype)
        # Every chunk's logits take the same place: fresh memory costs more than a pass over it.
        buffer = hidden.new_empty(min(head.rows, len(targets)), len(weight))
        for start in range(0, len(targets), head.rows):
            rows = slice(start, start + head.rows)
            chunk, target = hidden[rows], targets[rows]  # (chunk, emb), (chunk)
            logits = linear_into(buffer[: len(chunk)], chunk, weight, bias)  # (chunk, vocab)
            grad_losses = None if scale is None else scale[rows]
            losses[rows] = cross_entropy_in_place(logits, target, grad_losses, head.rows_in_cache)
            if gradients is not None:
                gradients.add(rows, logits, chunk, weight)
    return losses


def linear_into(buffer: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which cannot be told where to put its result."""
    if bias is None:
        return torch.mm(x, weight.T, out=buffer)
    return torch.addmm(bias, x, weight.T, out=buffer)


def cross_entropy_in_place(
    logits: Float[Tensor, "chunk vocab"],
    targets: Int[Tensor, " chunk"],
    grad_losses: Float[Tensor, " chunk"] | None,
    rows_in_cache: int,
) -> Float[Tensor, " chunk"]:
    """-log p(target) of each position. Given the gradients that these losses are to have, the
    logits become theirs.

    A few rows at a time, so that the passes over them, in float32, find them in the cache.
    """
    losses = []
    for start in range(0, len(logits), rows_in_cache):
        rows = slice(start, start + rows_in_cache)
        target = targets[rows, None]  # (rows, 1)
        logprobs = at_least_float32(logits[rows]).log_softmax(dim=1)  # (rows, vocab)
        of_target = logprobs.gather(1, target)  # (rows, 1)
        losses.append(-of_target[:, 0])
        if grad_losses is not None:  # softmax(logits) - one_hot(target)
            grad_logits = logprobs.exp_().scatter_(1, target, of_target.expm1())
            logits[rows] = grad_logits.mul_(grad_losses[rows, None])
    return torch.cat(losses)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is enough to multiply in, not to add up thousands of probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
