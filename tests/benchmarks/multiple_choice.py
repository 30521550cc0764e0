"""HellaSwag: questions a second, beside lm-eval's `hf` model or a plain loop over transformers.

    python tests/benchmarks/multiple_choice.py hellaswag_val.jsonl --limit 40
    python tests/benchmarks/multiple_choice.py hellaswag_val.jsonl --tokenizer models/gpt2

Four endings follow one context. gpt2mini reads the context once and lets the endings go on from its
cache; "whole rows" reads context and ending for each, as lm-eval does (batches of 8 rows sorted by
length, its logits for all tokens). The scores have to agree. Random weights of GPT-2's shape, one
process, a few questions first to warm up. Needs transformers; lm-eval where it is installed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length
from gpt2mini.evaluation.continuations import (
    Continuation,
    fit,
    score_batch,
    score_continuations,
)
from gpt2mini.evaluation.multiple_choice import read_hellaswag
from gpt2mini.modes import evaluating

Scorer = Callable[[Sequence[Continuation]], list[float]]  # log p of each continuation


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    config = GPT2Config.from_name(args.size)
    model = GPT2(GPT2Config(**{**vars(config), "vocab_size": tokenizer.vocab_size})).eval()
    questions = read_hellaswag(args.file)[: args.limit]
    rows = [
        Continuation.of(tokenizer, one.context, ending)
        for one in questions
        for ending in one.endings
    ]
    tokens = sum(len(row.context) + len(row.ids) for row in rows)
    print(f"{args.size}, {len(questions)} questions, {tokens:,} tokens; {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        peer, scorer = peer_on(folder)
    compare(rows, len(questions), {peer: scorer} | ours(model))


def compare(rows: Sequence[Continuation], questions: int, scorers: dict[str, Scorer]) -> None:
    expected, slowest = torch.empty(0), 0.0
    for name, scorer in scorers.items():
        scorer(rows[:8])
        began = time.perf_counter()
        found = torch.tensor(scorer(rows))
        seconds = time.perf_counter() - began
        if not len(expected):
            expected, slowest = found, seconds
        print(
            f"{name:28}{questions / seconds:7.2f} questions/s   {slowest / seconds:.2f} x   "
            f"largest difference {float((found - expected).abs().max()):.1e} nats"
        )


def ours(model: GPT2) -> dict[str, Scorer]:
    @torch.no_grad()
    def whole_rows(continuations: Sequence[Continuation]) -> list[float]:
        rows = [fit(one, model.config.context_length) for one in continuations]
        found = [0.0] * len(rows)
        with evaluating(model):
            for indices in batches_by_length([len(row.token_ids) for row in rows], BATCH_TOKENS):
                scores = score_batch(model, [rows[i] for i in indices])
                for i, score in zip(indices, scores, strict=True):
                    found[i] = score.logprob
        return found

    def shared(continuations: Sequence[Continuation]) -> list[float]:
        return [score.logprob for score in score_continuations(model, continuations)]

    return {"gpt2mini, whole rows": whole_rows, "gpt2mini, contexts once": shared}


def peer_on(folder: str) -> tuple[str, Scorer]:
    if find_spec("lm_eval") is None:
        return "transformers, a plain loop", plain_loop(folder)
    from lm_eval.models.huggingface import HFLM

    harness: Any = HFLM(pretrained=folder, device="cpu", batch_size=8, dtype="float32")

    def score(continuations: Sequence[Continuation]) -> list[float]:
        requests = [(("", str(i)), one.context, one.ids) for i, one in enumerate(continuations)]
        found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        return [logprob for logprob, _ in found]

    return "lm-eval, hf", score


def plain_loop(folder: str) -> Scorer:
    """The four endings of a question in a batch, padded; all logits."""
    import transformers

    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def score(continuations: Sequence[Continuation]) -> list[float]:
        found = []
        for first in range(0, len(continuations), 4):
            some = continuations[first : first + 4]
            ids = [torch.tensor(one.context + one.ids) for one in some]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            logprobs: Tensor = model(padded).logits.log_softmax(dim=2)
            for one, row in zip(some, logprobs, strict=True):
                start, targets = len(one.context) - 1, torch.tensor(one.ids)[:, None]
                scored = row[start : start + len(one.ids)].gather(1, targets)
                found.append(float(scored.sum()))
        return found

    return score


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="HellaSwag's validation file")
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--tokenizer", default="gpt2-nano", help="a folder, or a name")
    parser.add_argument("--limit", type=int, default=40, help="questions (default 40)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
