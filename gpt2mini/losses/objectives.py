"""Losses: pure functions of tensors. Each returns (sum, count), so that the caller divides once.

Why not the mean: with several micro-batches or several machines, the mean of means is not the mean.
Sum the sums, sum the counts, divide at the end, and k micro-batches equal one big batch exactly.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checks import check_in_vocabulary, check_same_shape
from gpt2mini.losses.chunked import LinearHead, at_least_float32, summed_cross_entropy
from gpt2mini.masking import IGNORED, last_token


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross entropy of each token given those before it: (sum in nats, number of targets).

    `labels` are the token ids themselves, not shifted, with IGNORED where nothing is to be learned:

        labels      The   cat   sat   .
        learned           cat   sat   .      each from the logits one position to its left

    The textbook form. `chunked_next_token_loss` gives the same number without the logits.
    """
    check_same_shape("labels", labels, logits[..., 0])
    targets = next_tokens(labels)  # (batch, tokens - 1)
    check_in_vocabulary(targets, logits.shape[2])
    logits = at_least_float32(logits[:, :-1].flatten(0, 1))  # (batch * (tokens - 1), vocab)
    loss_sum = F.cross_entropy(
        logits, targets.flatten().long(), ignore_index=IGNORED, reduction="sum"
    )
    return loss_sum, (targets != IGNORED).sum()


def chunked_next_token_loss(
    hidden: Float[Tensor, "batch tokens emb"],
    out_head: nn.Module,
    labels: Int[Tensor, "batch tokens"],
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """`next_token_loss(out_head(hidden), labels)` without ever holding all the logits.

    Head and cross entropy work on a few positions at a time (see `gpt2mini.losses.chunked`), and
    ignored positions are skipped. out_head: `model.out_head`, tied or an `nn.Linear`. chunk_size:
    positions at a time; the default suits the processor's cache.
    """
    targets = next_tokens(labels)  # (batch, tokens - 1)
    kept = targets != IGNORED  # (batch, tokens - 1)
    check_in_vocabulary(targets, len(LinearHead.of(out_head, chunk_size).weight))
    loss_sum = summed_cross_entropy(hidden[:, :-1][kept], out_head, targets[kept], chunk_size)
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
    if logits.ndim != 3:
        raise ValueError(
            f"logits must have the shape (batch, tokens, classes), not {tuple(logits.shape)}: of "
            "the last token alone, logits[:, None]"
        )
    check_same_shape("labels", labels, logits[:, 0, 0])
    last = at_least_float32(last_token(logits, attention_mask))  # (batch, classes)
    known = labels != IGNORED  # (batch)
    if not known.any():
        raise ValueError(f"no label to learn from: all of {len(labels)} are {IGNORED} (ignored)")
    wrong = labels[known & ((labels < 0) | (labels >= logits.shape[2]))]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is none of {logits.shape[2]} classes, from 0")
    loss_sum = F.cross_entropy(last, labels.long(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, known.sum()


def next_tokens(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens-1"]:
    """What each position but the last is to predict. The one place where labels are shifted."""
    targets = labels[:, 1:]
    if not (targets != IGNORED).any():
        raise ValueError(
            f"no label to learn from: all of {tuple(labels.shape)} are {IGNORED} (ignored), or "
            "each row has only one token; leave such batches out"
        )
    return targets


# ---- preferences


def pairwise_reward_loss(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
) -> tuple[Float[Tensor, ""], int]:
    """-log sigmoid(chosen - rejected): the rewards of the better answers should be the higher ones
    (Bradley and Terry 1952; Ouyang et al. 2022, equation 1). (sum, number of pairs)."""
    check_same_shape("chosen", chosen, chosen.flatten())
    check_same_shape("rejected", rejected, chosen)
    return -F.logsigmoid(chosen - rejected).sum(), len(chosen)


def dpo_loss(
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"] | None = None,
    reference_rejected: Float[Tensor, " pairs"] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "dpo",
) -> tuple[Float[Tensor, ""], int]:
    """Direct preference optimization (Rafailov et al. 2023, equation 7): (sum, number of pairs).

    Arguments are the log-probabilities of whole answers, from `sequence_logprobs`. Without those of
    a reference all its answers count as equally likely (reference-free). label_smoothing: the share
    of pairs that may be labeled the wrong way round. variant "ipo": the squared distance of the
    margin from 1 / (2 beta) instead (Azar et al. 2023, equation 17), which does not drive it to
    infinity.
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(
            "beta must be above 0 and label_smoothing in [0, 0.5), "
            f"not {beta} and {label_smoothing}"
        )
    check_same_shape("policy_chosen", policy_chosen, policy_chosen.flatten())
    check_same_shape("policy_rejected", policy_rejected, policy_chosen)
    for reference in (reference_chosen, reference_rejected):
        if reference is not None:
            check_same_shape("the reference's log-probabilities", reference, policy_chosen)
    margin = policy_chosen - policy_rejected  # (pairs)
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("give the reference's log-probabilities of both answers, or of neither")
    if reference_chosen is not None and reference_rejected is not None:
        margin = margin - (reference_chosen - reference_rejected)
    if variant == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif variant == "dpo":
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    else:
        raise ValueError(f"variant must be 'dpo' or 'ipo', not {variant!r}")
    return losses.sum(), len(margin)


# ---- on-policy reinforcement


def ppo_loss(
    logprobs: Float[Tensor, "batch tokens"],
    old_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    clip: float = 0.2,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The clipped objective (Schulman et al. 2017, equation 7), to be minimized, summed over the
    response's tokens: (sum, number of tokens).

    A token that has become more likely by more than `clip` earns nothing for becoming more likely
    yet; one that has become less likely, nothing for becoming less likely yet.
    """
    ratio = (logprobs - old_logprobs).exp()  # (batch, tokens)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective[response_mask].sum(), response_mask.sum()


def value_loss(
    values: Float[Tensor, "batch tokens"],
    old_values: Float[Tensor, "batch tokens"],
    returns: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    clip: float = 0.2,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Half the squared error of the value estimates, the worse of plain and clipped to `clip` about
    the old ones (Ziegler et al. 2019's code): (sum, number of tokens)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (batch, tokens)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2
    return errors[response_mask].sum(), response_mask.sum()


def kl_from_samples(
    logprobs: Float[Tensor, "*axes"], reference_logprobs: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """An estimate of KL(policy, reference) at each token that the policy drew: r - 1 - log r, with
    r = reference / policy. Unbiased, never negative, of low variance (Schulman 2020, "k3")."""
    log_ratio = reference_logprobs - logprobs
    return log_ratio.expm1() - log_ratio
