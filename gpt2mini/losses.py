"""Losses: pure functions of tensors. Each returns (sum, count), so that the caller divides once.

Why not the mean: with several micro-batches or several machines, the mean of means is not the mean.
Sum the sums, sum the counts, divide at the end, and k micro-batches equal one big batch exactly.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gpt2mini.model import TiedHead
from gpt2mini.padding import last_token

IGNORED = -100  # a label that asks for nothing: padding, or a prompt that is only read


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross entropy of each token given those before it: (sum in nats, number of targets).

    `labels` are the token ids themselves, not shifted, with IGNORED where nothing is to be learned:

        labels      The   cat   sat   .
        learned           cat   sat   .      each from the logits one position to its left

    The textbook form. `chunked_next_token_loss` gives the same number without the logits.
    """
    targets = next_tokens(labels)
    logits = at_least_float32(logits[:, :-1].flatten(0, 1))  # (batch * (tokens - 1), vocab)
    loss_sum = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (targets != IGNORED).sum()


def chunked_next_token_loss(
    hidden: Float[Tensor, "batch tokens emb"],
    out_head: nn.Module,
    labels: Int[Tensor, "batch tokens"],
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """`next_token_loss(out_head(hidden), labels)` without ever holding all the logits.

    At 4 x 1024 tokens the logits of GPT-2 take 823 MB, and their gradient as much again. Here the
    head and the cross entropy work on a few positions at a time, and ignored positions are skipped.

    out_head: `model.out_head`, tied or an `nn.Linear`.
    chunk_size: positions at a time; the default keeps the logits of a chunk in the processor's
    cache.
    """
    targets = next_tokens(labels)  # (batch, tokens - 1)
    kept = targets != IGNORED  # (batch, tokens - 1)
    if not isinstance(out_head, nn.Linear | TiedHead):
        raise TypeError(
            f"the head must be linear to be worked on in chunks, not {type(out_head).__name__}: "
            "use next_token_loss(model(token_ids), labels) for any other"
        )
    weight, bias = out_head.weight, out_head.bias
    rows = chunk_size or max(64, 2**22 // weight.shape[0])
    arguments = (hidden[:, :-1][kept], weight, bias, targets[kept], rows)
    if torch.is_grad_enabled():
        loss_sum = ChunkedCrossEntropy.apply(*arguments)
    else:
        loss_sum = chunked_cross_entropy(*arguments)
    return loss_sum, kept.sum()


def last_token_loss(
    logits: Float[Tensor, "batch tokens classes"],
    labels: Int[Tensor, " batch"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross entropy of each text's class at its last real token: (sum in nats, number of texts).

    A label of IGNORED leaves its text out. Only one position of the logits is used: to compute no
    others, give the head that position alone, as `gpt2mini.training.last_token_step` does.
    """
    last = at_least_float32(last_token(logits, attention_mask))  # (batch, classes)
    known = labels != IGNORED  # (batch)
    if not known.any():
        raise ValueError(f"no label to learn from: all of {len(labels)} are {IGNORED} (ignored)")
    wrong = labels[known & ((labels < 0) | (labels >= logits.shape[2]))]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is none of {logits.shape[2]} classes, from 0")
    loss_sum = F.cross_entropy(last, labels, ignore_index=IGNORED, reduction="sum")
    return loss_sum, known.sum()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is enough to multiply in, not to add up thousands of probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def next_tokens(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens-1"]:
    """What each position but the last is to predict. The one place where labels are shifted."""
    targets = labels[:, 1:]
    if not (targets != IGNORED).any():
        raise ValueError(
            f"no label to learn from: all of {tuple(labels.shape)} are {IGNORED} (ignored), or "
            "each row has only one token; leave such batches out"
        )
    return targets


def check_labels_not_shifted(
    token_ids: Int[Tensor, "batch tokens"], labels: Int[Tensor, "batch tokens"]
) -> None:
    """Raise ValueError if somebody has shifted the labels already, which would train the token
    after next."""
    kept = labels[:, :-1] != IGNORED
    looks_shifted = (labels[:, :-1] == token_ids[:, 1:])[kept].all()
    looks_right = (labels == token_ids)[labels != IGNORED].all()
    if kept.any() and looks_shifted and not looks_right:
        raise ValueError(
            "the labels look already shifted by one (labels[:, :-1] equals token_ids[:, 1:]): "
            "pass the token ids themselves; the loss does the shift"
        )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a linear head, chunk by chunk, its gradient computed on the way.

    The gradient of cross entropy is softmax(logits) - one_hot(target): known as soon as the logits
    are, so the logits of a chunk can be forgotten before those of the next are computed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_size):
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_weight = sum_buffer(weight)
        grad_bias = sum_buffer(bias)
        gradients = (grad_hidden, grad_weight, grad_bias)
        loss_sum = chunked_cross_entropy(hidden, weight, bias, targets, chunk_size, gradients)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients = ctx.saved_tensors
        if grad_output != 1:  # `loss_sum.backward()` needs no copy of the vocabulary's gradient
            gradients = [None if g is None else g * grad_output for g in gradients]
        return *gradients, None, None


def sum_buffer(parameter: Tensor | None) -> Tensor | None:
    """Zeros to add a gradient up in, chunk after chunk, if one is asked for."""
    if parameter is None or not parameter.requires_grad:
        return None
    return at_least_float32(torch.zeros_like(parameter))


def chunked_cross_entropy(hidden, weight, bias, targets, chunk_size, gradients=(None, None, None)):
    """The loop of `ChunkedCrossEntropy`; fills the gradient buffers that it is given."""
    grad_hidden, grad_weight, grad_bias = gradients
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    loss_sum = at_least_float32(hidden.new_zeros(()))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        weight, hidden = weight.to(dtype), hidden.to(dtype)  # cast once, not once a chunk
        bias = None if bias is None else bias.to(dtype)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk, target = hidden[rows], targets[rows, None]  # (chunk, emb), (chunk, 1)
            logits = at_least_float32(F.linear(chunk, weight, bias))  # (chunk, vocab)
            log_normaliser = logits.logsumexp(dim=1, keepdim=True)  # (chunk, 1)
            loss_sum += (log_normaliser - logits.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # softmax(logits) - one_hot(target), in place of the logits
            grad_logits = logits.sub_(log_normaliser).exp_()  # (chunk, vocab)
            grad_logits.scatter_add_(1, target, torch.full_like(log_normaliser, -1.0))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.T, chunk)  # no second tensor of its size
                else:
                    grad_weight += grad_logits.T @ chunk
    return loss_sum
