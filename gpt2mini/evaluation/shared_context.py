"""Several continuations of one context, as in multiple choice: the context is read once.

Its keys and values are kept in a cache, from which every continuation goes on. All of them stand at
the positions at which they stand in a row of their own, so their scores are the same, within
rounding.
"""

from collections.abc import Sequence

import torch

from gpt2mini.cache import KeyValueCache
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length
from gpt2mini.data.text import Window
from gpt2mini.masking import pad_left
from gpt2mini.model import GPT2
from gpt2mini.reader import Reader

Group = list[int]  # indices of rows that begin with the same context


def shared_contexts(rows: Sequence[Window], context_length: int) -> list[Group]:
    """The rows whose context is that of another row, too. A context of one token is none to share:
    each row reads the last token of its context itself, which predicts the first that is scored.
    Nor are rows that fill the model's context: beside longer continuations, all of their tokens
    are read, and the last has no position."""
    groups: dict[tuple[int, ...], Group] = {}
    for i, row in enumerate(rows):
        if row.n_context > 1 and len(row.token_ids) <= context_length:
            context = tuple(row.token_ids[: row.n_context].tolist())
            groups.setdefault(context, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def batches_of_groups(rows: Sequence[Window], groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of similar size, whose rows together have at most BATCH_TOKENS tokens to cache (or one
    group)."""
    sizes = [len(group) * max(len(rows[i].token_ids) for i in group) for group in groups]
    return [[groups[i] for i in batch] for batch in batches_by_length(sizes, BATCH_TOKENS)]


def read_contexts(
    model: GPT2, rows: Sequence[Window], groups: Sequence[Group]
) -> tuple[KeyValueCache, list[Window]]:
    """(the cached contexts but for their last token, what is left of the rows), group after group.
    Raises whatever a model of your own raises that takes no cache."""
    firsts = [rows[group[0]] for group in groups]
    contexts = [torch.as_tensor(row.token_ids[: row.n_context - 1]) for row in firsts]
    token_ids, is_real = (x.to(model.tok_emb.weight.device) for x in pad_left(contexts))
    reader = Reader(model, len(groups), token_ids.shape[1], slide=False)
    reader.read(token_ids, is_real)
    assert reader.cache is not None
    left = [
        Window(row.token_ids[row.n_context - 1 :], n_context=1)
        for row in (rows[i] for group in groups for i in group)
    ]
    copies = torch.tensor([len(group) for group in groups], device=token_ids.device)
    longest = max(row.n_scored for row in left)
    return reader.cache.repeated(copies, reader.cache.length + longest), left
