"""Losses of pairs of answers, the one preferred to the other: reward models and DPO."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.checks import check_same_shape


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
    of pairs that may be labeled the wrong way round; with "dpo" only. variant "ipo": the squared
    distance of the margin from 1 / (2 beta) instead (Azar et al. 2023, equation 17), which does not
    drive it to infinity. The log-probabilities are sums over an answer's tokens, as in the paper;
    trl takes their means, for which each argument is divided by the answer's number of tokens
    (`dpo_step(length_normalized=True)`).
    """
    check_options(beta, label_smoothing, variant)
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
    else:
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return losses.sum(), len(margin)


def check_options(beta: float, label_smoothing: float, variant: str) -> None:
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(
            "beta must be above 0 and label_smoothing in [0, 0.5), "
            f"not {beta} and {label_smoothing}"
        )
    if variant not in ("dpo", "ipo"):
        raise ValueError(f"variant must be 'dpo' or 'ipo', not {variant!r}")
    if variant == "ipo" and label_smoothing:
        raise ValueError(
            f"variant 'ipo' has no label smoothing: leave label_smoothing at 0, not "
            f"{label_smoothing}, or take variant 'dpo'"
        )
