"""A text longer than the context, in windows of consecutive tokens that score each token once.

Rolling windows, as lm-eval's. A model of 4 positions that reads 4 tokens predicts 4:

    reads    <eos> the cat sat      scores   the cat sat on
             on the mat .                    the mat . She
             mat . She slept                 slept ,                 (the last window is full too)

Sliding windows, as in the documentation of transformers. Window 4, stride 2:

    reads    <eos> the cat sat      scores   the cat sat
             cat sat on the                  on the
             on the mat .                    mat .

A rolling window after the first gives its first token one token of context, and a sliding one
`context_length - stride`: perplexity is lower, and costs more windows.

The tokens that two windows share are read twice. Their keys cannot be kept: GPT-2 adds a vector of
the absolute position to each token, a token has another position in each window, and so other keys
and values from the first block on. (Texts that begin alike can keep them: `shared_context`.)
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2mini.data.text import (
    Batch,
    Window,
    check_context_length,
    pad_windows,
    sliding_windows,
)
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.losses.next_token import next_tokens
from gpt2mini.masking import IGNORED
from gpt2mini.model import GPT2


def rolling_windows(texts: Sequence[Tensor], context_length: int) -> list[Window]:
    """Windows over each text that together score every token but the first exactly once.

    A window scores up to `context_length` tokens and holds one more, for the model does not read
    the last one. The last window of a text keeps its length and scores only what is left. Longest
    first. The same as `get_rolling_token_windows(..., context_len=1)` of lm-eval.
    """
    found = []
    for ids in texts:
        for first in range(1, len(ids), context_length):  # of the tokens that a window scores
            stop = min(first + context_length, len(ids))
            start = max(0, stop - context_length - 1)
            found.append(Window(ids[start:stop], first - start))
    return sorted(found, key=lambda window: -len(window.token_ids))


def text_windows(texts: Sequence[Tensor], context_length: int, stride: int | None) -> list[Window]:
    """Rolling windows, or sliding ones with a stride."""
    if stride is None:
        return rolling_windows(texts, context_length)
    return sliding_windows(texts, context_length, stride)


def window_batches(rows: Sequence[Window], batch_size: int) -> list[Batch]:
    """The windows in batches, padded."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    firsts = range(0, len(rows), batch_size)
    return [pad_windows(rows[first : first + batch_size]) for first in firsts]


def check_window(model: GPT2, context_length: int | None, stride: int | None) -> int:
    """The length of the window: the model's context where it is None. Raises ValueError for a
    length or a stride that the model cannot use."""
    longest = model.config.context_length
    context_length = longest if context_length is None else context_length
    step = context_length if stride is None else stride
    if not 1 <= step <= context_length <= longest:
        raise ValueError(
            f"expected 1 <= stride ({step}) <= context_length ({context_length}), which lies in "
            f"1 to the model's {longest}"
        )
    if stride is not None:
        check_context_length(context_length)
    return context_length


def states_and_targets(
    model: GPT2, batch: Batch, **arguments: Any
) -> tuple[Float[Tensor, "n emb"], nn.Module, Int[Tensor, " n"]]:
    """(hidden states, the output head, the tokens that they are to predict), row after row, of all
    labels of a batch. The last column is not read: no label comes after it. arguments: of the
    model, such as `cache`."""
    mask = None if batch.attention_mask is None else batch.attention_mask[:, :-1]
    targets = next_tokens(batch.labels)  # (batch, tokens - 1)
    hidden, head = hidden_states_and_head(model, batch.token_ids[:, :-1], mask, **arguments)
    scored = targets != IGNORED
    return hidden[scored], head, targets[scored]
