"""The logit lens, the nearest tokens of an embedding, and the log-probabilities of a text.

The **logit lens** (nostalgebraist 2020, "interpreting GPT: the logit lens") applies the final norm
and the output head to the residual stream after every block. It shows at which layer a prediction
is formed.
"""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.inspection.tracing import trace
from gpt2mini.model import GPT2, accepts_shortcut
from gpt2mini.modes import evaluating
from gpt2mini.sampling import FORBIDDEN
from gpt2mini.tokenizer import Tokenizer

# ---- the logit lens


@dataclass(frozen=True)
class Lens:
    """The most likely next tokens after each layer, at each position. Layer 0 is the embedding,
    layer n the stream after block n - 1; the last layer is the model's own prediction."""

    layers: list[str]  # names as in `trace`
    token_ids: Int[Tensor, "layers batch tokens k"]
    probabilities: Float[Tensor, "layers batch tokens k"]

    def summary(self, tokenizer: Tokenizer, row: int = 0) -> list[dict[str, Any]]:
        """For JSON: layer by layer, at each position, the tokens and their probabilities."""
        ids, probabilities = self.token_ids[:, row].tolist(), self.probabilities[:, row].tolist()
        return [
            {
                "layer": layer,
                "tokens": [[tokenizer.decode([i]) for i in position] for position in of_ids],
                "probabilities": [[round(p, 6) for p in position] for position in of_probabilities],
            }
            for layer, of_ids, of_probabilities in zip(self.layers, ids, probabilities, strict=True)
        ]


def logit_lens(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    k: int = 5,
    forbidden_ids: Sequence[int] = (),
) -> Lens:
    """The k most likely next tokens after each layer, at each position (all logits would be layers
    x tokens x vocab numbers). forbidden_ids: tokens that cannot come next, as in `generate`, such
    as `tokenizer.missing_ids(model.config.vocab_size)` of a padded vocabulary. Raises ValueError
    for a classifier."""
    check_predicts_tokens(model)
    forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=model.tok_emb.weight.device)
    k = min(k, model.config.vocab_size - len(forbidden.unique()))
    names = ["embedding", "blocks.*.stream"]
    streams = trace(model, token_ids, attention_mask, names)
    best = []
    with evaluating(model):
        for name in streams:
            logits = read_stream(model, streams[name], attention_mask).float()
            allowed = logits.index_fill(2, forbidden, FORBIDDEN)  # (batch, tokens, vocab)
            best.append(allowed.softmax(dim=2).topk(k, dim=2))
    return Lens(
        streams.names,
        torch.stack([layer.indices for layer in best]).cpu(),
        torch.stack([layer.values for layer in best]).cpu(),
    )


def read_stream(
    model: GPT2,
    stream: Float[Tensor, "batch tokens emb"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens vocab"]:
    """The logits of a residual stream as the output of the last block, by the model's own code."""
    if not accepts_shortcut(model, "stream"):  # then replace what the final norm reads
        any_ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        with model.final_norm.register_forward_pre_hook(lambda norm, arguments: stream):
            return model(any_ids, attention_mask)
    return model(None, attention_mask, stream=stream, first_block=len(model.trf_blocks))


# ---- embeddings


@torch.no_grad()
def nearest_tokens(
    model: GPT2,
    token: int | Int[Tensor, ""] | Float[Tensor, " emb"],
    k: int = 10,
    forbidden_ids: Sequence[int] = (),
) -> list[tuple[int, float]]:
    """(token id, cosine similarity), the most similar first, for the embedding of a token (itself
    included) or for any vector of the width of the residual stream. forbidden_ids: left out, as in
    `logit_lens`."""
    table = model.tok_emb.weight
    if not isinstance(token, Tensor) or token.ndim == 0:
        token_id = int(token)
        if not 0 <= token_id < len(table):
            raise ValueError(f"token id {token_id} is not in the vocabulary of {len(table)}")
        token = table[token_id]
    if token.shape != table.shape[1:]:
        raise ValueError(
            f"a vector must have the shape {tuple(table.shape[1:])} of an embedding, "
            f"not {tuple(token.shape)}"
        )
    # In float32: half precision has so few digits that the order of near tokens would be rounding.
    vector = token.to(table.device, torch.float32)
    cosines = F.cosine_similarity(vector[None], table.float(), dim=1)  # (vocab)
    allowed = torch.ones(len(table), dtype=torch.bool)
    allowed[list(forbidden_ids)] = False
    ids = allowed.nonzero()[:, 0].to(cosines.device)  # (allowed)
    best = cosines[ids].topk(min(k, len(ids)))
    return list(zip(ids[best.indices].tolist(), best.values.tolist(), strict=True))


# ---- log-probabilities of a text


@dataclass(frozen=True)
class Piece:
    """A token of a text, or several tokens that form one character."""

    text: str
    token_ids: list[int]
    logprob: float  # in nats, given all tokens before it


def score_text(model: GPT2, tokenizer: Tokenizer, text: str) -> list[Piece]:
    """The log-probability of each token of a text, the first one after <|endoftext|>.

    Raises ValueError for an empty text, one that is too long for the context, and a classifier.
    """
    check_predicts_tokens(model)
    if not text:
        raise ValueError("the text is empty: there is nothing to score")
    ids, context = tokenizer.encode(text), model.config.context_length
    if len(ids) > context:
        raise ValueError(f"the text has {len(ids)} tokens; the context is of {context}: shorten it")
    # the last token is predicted, and not read
    one = Continuation([tokenizer.eos_id], ids)
    (score,) = score_continuations(model, [one])
    return list(whole_characters(tokenizer, ids, score.logprobs.tolist()))


def whole_characters(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float]
) -> Iterator[Piece]:
    """One piece for each token; tokens that share a character form one piece."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start = 0
    for end, token_id in enumerate(ids, start=1):
        text = decoder.decode(tokenizer.token_bytes(token_id), final=end == len(ids))
        if decoder.getstate()[0] == b"":
            yield Piece(text, list(ids[start:end]), sum(logprobs[start:end]))
            start = end
        elif text:  # whole characters and the beginning of another: wait for its end
            decoder.setstate((text.encode() + decoder.getstate()[0], 0))


# For each range of probabilities its lower bound, its number of brackets, and its ANSI colors, of
# the 256 that are the same in every terminal: black (16) on light and on middle orange, white (231)
# on dark red, distinct by lightness alone. Likely tokens have the terminal's own colors.
DEGREES = (
    (0.1, 0, ""),
    (0.01, 1, "38;5;16;48;5;223"),
    (0.001, 2, "38;5;16;48;5;209"),
    (0.0, 3, "38;5;231;48;5;88"),
)


def surprise_text(pieces: Sequence[Piece], color: bool = True) -> str:
    """A text for the terminal with improbable tokens in color, or in brackets: more for a lower
    probability. Control characters are escaped, so that no text controls the terminal."""
    return "".join(mark(escape(piece.text), piece.logprob, color) for piece in pieces)


def surprise_legend(color: bool = True) -> str:
    """The meaning of the colors or brackets of `surprise_text`."""
    names = ("p >= 0.1", "p >= 0.01", "p >= 0.001", "p < 0.001")
    samples = [
        mark(name, math.log(max(least, 1e-9)), color)
        for name, (least, _, _) in zip(names, DEGREES, strict=True)
    ]
    return "  ".join(samples)


def mark(text: str, logprob: float, color: bool) -> str:
    depth, code = next(
        (depth, code) for least, depth, code in DEGREES if least == 0 or logprob >= math.log(least)
    )
    shown, line_end, _ = text.partition("\n") if text.endswith("\n") else (text, "", "")
    if color:
        return f"\x1b[{code}m{shown}\x1b[0m{line_end}" if code else shown + line_end
    return "[" * depth + shown + "]" * depth + line_end


def escape(text: str) -> str:
    r"""Unprintable characters as \x1b, \t, ...; a final newline as \n and itself."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown) + ("\n" if text.endswith("\n") else "")
