"""`HarnessModel` beside lm-eval's own `hf` model, on an exported folder: every figure equal.

    pip install lm-eval
    python tests/compare_lm_eval.py

Kept out of the test suite for the size of lm-eval: thirty packages. `test_lm_eval_model.py` has the
same requests, with transformers as the oracle.
"""

import argparse
import tempfile
from copy import deepcopy
from typing import Any

import torch
from conftest import enlarge

from gpt2mini import GPT2, GPT2Config, Tokenizer

PROSE = (
    "The old man mended nets. He had no boat, only a chair, a needle and the whole harbour to talk "
    "to; and when the wind was in the north he talked to that.\n\n"
)
LIKELIHOODS = [
    ("The old man", " mended nets"),
    ("", "Nets"),
    ("The old man ", "mended"),  # the space belongs to what follows
    (PROSE * 3, " again and again"),  # longer than the context
    ("Two ", "words"),
    ("one<|endoftext|>two", " three"),
    ("x", PROSE),
]
TEXTS = [PROSE, PROSE * 3, "Hi", PROSE * 2 + "and"]
GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    (PROSE, {"until": ["\n", "e"], "max_gen_toks": 20}),
    ("The ship", {"until": [], "max_gen_toks": 20}),
    ("The", {"until": ["\n", "e"], "max_gen_toks": 20}),
    (PROSE * 3, {"until": "zz", "max_gen_toks": 9, "do_sample": False}),
]


def small_model(tokenizer: Tokenizer) -> GPT2:
    config = GPT2Config(tokenizer.vocab_size, context_length=64, emb_dim=48, n_heads=6, n_layers=2)
    torch.manual_seed(0)
    model = GPT2(config)
    enlarge(model)
    return model.eval()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from gpt2mini.evaluation.lm_eval_model import HarnessModel

    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    model = small_model(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        theirs = HFLM(pretrained=folder, device="cpu", batch_size=3, dtype="float32")
    ours = HarnessModel(model, tokenizer, batch_size=3)
    for kind, rows in (
        ("loglikelihood", LIKELIHOODS),
        ("loglikelihood_rolling", [(text,) for text in TEXTS]),
        ("generate_until", GENERATIONS),
    ):
        requests = [Instance(kind, doc={}, arguments=row, idx=0) for row in deepcopy(rows)]
        pairs = zip(
            getattr(ours, kind)(requests), getattr(theirs, kind)(deepcopy(requests)), strict=True
        )
        for one, other in pairs:
            print(f"{kind:22} ours {one!r:60.60} theirs {other!r:60.60}")
            assert is_equal(one, other)
    print("all equal")


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return is_equal(one[0], other[0]) and one[1] == other[1]
    if isinstance(one, float):
        return abs(one - other) < 1e-5 * abs(other)
    return one == other


if __name__ == "__main__":
    main()
