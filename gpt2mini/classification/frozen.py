"""Frozen layers cost nothing: their output is the same in every epoch, so it is computed once.

Below the first trainable layer there is nothing to differentiate and nothing to update; without
dropout the residual stream that enters it is constant. `FrozenStream` computes it once for every
text, in batches of similar length, and makes training batches of it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2mini.classification.labeled import LabeledBatch, pad_texts
from gpt2mini.data.batching import BATCH_TOKENS, LengthBatches, batches_by_length
from gpt2mini.device import autocast
from gpt2mini.losses.last_token import last_token_loss
from gpt2mini.masking import pad_left
from gpt2mini.model import GPT2, accepts_shortcut
from gpt2mini.modes import evaluating
from gpt2mini.reader import last_token_logits
from gpt2mini.training.distributed import is_sharded

LARGEST_IN_MEMORY = 2**31  # bytes; a larger stream goes to a temporary file


def frozen_blocks(model: GPT2) -> int:
    """How many blocks at the bottom, with the embeddings below them, learn nothing."""
    if any(p.requires_grad for p in (model.tok_emb.weight, model.pos_emb.weight)):
        return 0
    for i, block in enumerate(model.trf_blocks):
        if any(p.requires_grad for p in block.parameters()):
            return i
    return len(model.trf_blocks)


@dataclass(frozen=True)
class StreamBatch:
    """The stream of several texts as it enters a block, and their classes."""

    first_block: int
    stream: Float[Tensor, "batch tokens emb"]
    labels: Int[Tensor, " batch"]
    attention_mask: Int[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device) -> "StreamBatch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return StreamBatch(self.first_block, self.stream.to(device), self.labels.to(device), mask)


class FrozenStream:
    """The stream that enters the first learning block, for every text of a data set.

    Raises ValueError where it would not be the same in every epoch: with dropout.
    """

    def __init__(
        self,
        model: GPT2,
        rows: Sequence[Tensor],
        labels: Sequence[int],
        precision: str = "auto",
    ) -> None:
        if model.config.drop_rate:
            raise ValueError(
                f"with dropout ({model.config.drop_rate}) the frozen layers' output changes from "
                "epoch to epoch and cannot be kept: load the model with drop_rate 0"
            )
        self.first_block = frozen_blocks(model)
        self.labels = list(labels)
        self.lengths = [len(row) for row in rows]
        self.ends = np.cumsum(self.lengths)
        self.values = allocate(int(self.ends[-1]), model)  # (tokens of all texts, emb)
        device = model.tok_emb.weight.device
        with evaluating(model), autocast(device, precision):
            for indices in batches_by_length(self.lengths, BATCH_TOKENS):
                batch = pad_texts([rows[i] for i in indices], [0] * len(indices)).to(device)
                mask, n_blocks = batch.attention_mask, self.first_block
                x = model.residual_stream(batch.token_ids, mask, n_blocks=n_blocks)
                for i, stream in zip(indices, x, strict=True):
                    self.values[self.place(i)] = stream[: self.lengths[i]].cpu()

    def place(self, i: int) -> slice:
        return slice(int(self.ends[i]) - self.lengths[i], int(self.ends[i]))

    def batch(self, indices: Sequence[int]) -> StreamBatch:
        """Some of the texts side by side, padded on the left to the longest of them."""
        rows = [self.values[self.place(i)] for i in indices]
        padded, is_real = pad_left(rows)  # (batch, tokens, emb), (batch, tokens)
        mask = None if is_real.all() else is_real.long()
        labels = torch.tensor([self.labels[i] for i in indices])
        return StreamBatch(self.first_block, padded, labels, mask)


def allocate(tokens: int, model: GPT2) -> Tensor:
    """Room for the stream, in memory or in a file that is gone when the process is."""
    like = model.tok_emb.weight
    shape = (tokens, model.config.emb_dim)
    if tokens * model.config.emb_dim * like.element_size() <= LARGEST_IN_MEMORY:
        return torch.empty(shape, dtype=like.dtype)
    folder = tempfile.TemporaryDirectory(prefix="gpt2mini-")
    values = torch.from_file(
        str(Path(folder.name) / "stream"), shared=True, size=tokens * shape[1], dtype=like.dtype
    )
    folder.cleanup()  # the mapping keeps the contents alive
    return values.view(shape)


class PlainTexts:
    """The same face for texts whose stream cannot be kept: with dropout, or if all layers learn."""

    def __init__(self, rows: Sequence[Tensor], labels: Sequence[int]) -> None:
        self.rows, self.labels = list(rows), list(labels)
        self.lengths = [len(row) for row in rows]

    def batch(self, indices: Sequence[int]) -> LabeledBatch:
        return pad_texts([self.rows[i] for i in indices], [self.labels[i] for i in indices])


class LabeledBatches(LengthBatches):
    """Shuffled batches of texts of similar length, determined by the seed; iterating over them is
    one epoch."""

    def __init__(self, data: FrozenStream | PlainTexts, batch_size: int, seed: int) -> None:
        self.data = data
        super().__init__(data.lengths, batch_size, seed)

    def batch(self, indices: Sequence[int]) -> StreamBatch | LabeledBatch:
        return self.data.batch(indices)


def last_token_step(model: GPT2, batch: StreamBatch | LabeledBatch) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropy of each text's class at its last token, number of texts)."""
    return last_token_loss(batch_logits(model, batch)[:, None], batch.labels)


def batch_logits(model: GPT2, batch: StreamBatch | LabeledBatch) -> Float[Tensor, "batch classes"]:
    """The head's logits at each text's last token."""
    if not isinstance(batch, StreamBatch):
        return last_token_logits(model, batch.token_ids, batch.attention_mask)
    shortcuts = {"stream": batch.stream, "first_block": batch.first_block}
    if accepts_shortcut(model, "last_only"):
        shortcuts["last_only"] = True
    return model(None, batch.attention_mask, **shortcuts)[:, -1]


def texts_to_train_on(
    model: GPT2, rows: Sequence[Tensor], labels: Sequence[int], precision: str = "auto"
) -> FrozenStream | PlainTexts:
    """The stream, computed once, if there are frozen blocks and no dropout (and all blocks are in
    this process); else the texts."""
    is_constant = not model.config.drop_rate and not is_sharded(model)
    if frozen_blocks(model) and is_constant and continues_from_stream(model, rows[0]):
        return FrozenStream(model, rows, labels, precision)
    return PlainTexts(rows, labels)


def continues_from_stream(model: GPT2, row: Int[Tensor, " tokens"]) -> bool:
    """Whether the trainable blocks need the stream alone, tried with one text. In a model of your
    own they may need more: the embedding again, for instance."""
    if not accepts_shortcut(model, "stream"):
        return False
    token_ids, n_blocks = row[None].to(model.tok_emb.weight.device), frozen_blocks(model)
    with evaluating(model):
        stream = model.residual_stream(token_ids, n_blocks=n_blocks)
        found = model(None, stream=stream, first_block=n_blocks)
        return torch.allclose(found, model(token_ids), rtol=1e-3, atol=1e-3)


def evaluate_classes(
    model: GPT2,
    data: FrozenStream | PlainTexts,
    precision: str = "auto",
    only: Sequence[int] | None = None,
) -> tuple[float, float]:
    """(mean loss, accuracy) over all texts, or some, in eval mode; the mode found is restored."""
    chosen = range(len(data.lengths)) if only is None else only
    loss_sum, correct = 0.0, 0
    device = model.tok_emb.weight.device
    with evaluating(model), autocast(device, precision):
        for places in batches_by_length([data.lengths[i] for i in chosen], BATCH_TOKENS):
            batch = data.batch([chosen[place] for place in places]).to(device)
            logits = batch_logits(model, batch)
            loss_sum += float(last_token_loss(logits[:, None], batch.labels)[0])
            correct += int((logits.argmax(dim=1) == batch.labels).sum())
    return loss_sum / len(chosen), correct / len(chosen)
