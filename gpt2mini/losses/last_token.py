"""Cross entropy of a text's class at its last token: what classifiers are trained on."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.checks import check_same_shape, holds
from gpt2mini.losses.chunked import at_least_float32
from gpt2mini.masking import IGNORED, last_token


def last_token_loss(
    logits: Float[Tensor, "batch tokens classes"],
    labels: Int[Tensor, " batch"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Cross entropy of each text's class at its last real token: (sum in nats, number of texts).

    A label of IGNORED leaves its text out. Only one position of the logits is used: to compute no
    others, give the head that position alone, as `last_token_step` does.
    """
    if logits.ndim != 3:
        raise ValueError(
            f"logits must have the shape (batch, tokens, classes), not {tuple(logits.shape)}: of "
            "the last token alone, logits[:, None]"
        )
    check_same_shape("labels", labels, logits[:, 0, 0])
    last = at_least_float32(last_token(logits, attention_mask))  # (batch, classes)
    known = labels != IGNORED  # (batch)
    if holds(~known.any()):
        raise ValueError(f"no label to learn from: all of {len(labels)} are {IGNORED} (ignored)")
    outside = known & ((labels < 0) | (labels >= logits.shape[2]))  # (batch)
    if holds(outside.any()):
        raise ValueError(
            f"label {int(labels[outside][0])} is none of {logits.shape[2]} classes, from 0"
        )
    loss_sum = F.cross_entropy(last, labels.long(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, known.sum()
