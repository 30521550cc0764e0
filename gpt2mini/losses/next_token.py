"""Cross entropy of the next token: what language models are trained on."""

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checks import check_in_vocabulary, check_same_shape, holds
from gpt2mini.losses.chunked import at_least_float32, summed_cross_entropy
from gpt2mini.losses.deferred import count_outputs
from gpt2mini.masking import IGNORED


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
    ignored positions are skipped. out_head: any module; where it is not linear, its chunks are
    computed again in backward. chunk_size: positions at a time; the default suits the processor's
    cache. Of a whole model, `hidden_states_and_head` gives the first two arguments. Call it outside
    of torch.compile and torch.func, which cannot follow positions that depend on values.
    """
    targets = next_tokens(labels)  # (batch, tokens - 1)
    kept = targets != IGNORED  # (batch, tokens - 1)
    before = hidden[:, :-1][kept]  # (n, emb): what predicts each target
    check_in_vocabulary(targets, count_outputs(out_head, before))
    loss_sum = summed_cross_entropy(before, out_head, targets[kept], chunk_size)
    return loss_sum, kept.sum()


def next_tokens(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens-1"]:
    """What each position but the last is to predict. The one place where labels are shifted."""
    targets = labels[:, 1:]
    if holds((targets == IGNORED).all()):
        raise ValueError(
            f"no label to learn from: all of {tuple(labels.shape)} are {IGNORED} (ignored), or "
            "each row has only one token; leave such batches out"
        )
    return targets
