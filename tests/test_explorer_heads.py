"""The explorer's panels of heads and of the next token: what they show adds up, and is what the
model computes."""

import base64
import json
import math
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import HANGS

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection import trace
from gpt2mini.inspection.explorer import page_data
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.sampling import divide_by_temperature, keep_top_k, keep_top_p

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
HARNESS = Path(__file__).with_name("explorer") / "heads.mjs"
TEXT = "The old keeper lit the lamp. Then the old keeper"


def called(
    folder: Path, *calls: list[Any], data: Any = None, tokenizer: Tokenizer | None = None
) -> list[Any]:
    """Results of functions of heads.mjs."""
    assert NODE is not None
    packed = None if tokenizer is None else base64.b64encode(pack_tokenizer(tokenizer)).decode()
    given, result = folder / "input.json", folder / "output.json"
    asked = {"data": data, "tokenizer": packed, "calls": calls}
    given.write_text(json.dumps(asked), encoding="utf-8")
    subprocess.run([NODE, str(HARNESS), str(given), str(result)], check=True, timeout=HANGS)
    found = json.loads(result.read_text(encoding="utf-8"))
    assert isinstance(found, list)
    return found


def test_a_weight_and_the_heads_output_are_made_as_in_the_model(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(page_data(word_model, tokenizer, TEXT, live="off")))
    token_ids = torch.tensor([tokenizer.encode(TEXT)])
    found, last = trace(word_model, token_ids), token_ids.shape[1] - 1
    places = [(0, 0, last), (1, 1, 3), (2, 0, 0)]
    made = called(tmp_path, *(["arithmetic", *place] for place in places), data=data)
    for (layer, head, query), numbers in zip(places, made, strict=True):
        attention = found[f"blocks.{layer}.attention"][0, head, query, : query + 1]
        context = found[f"blocks.{layer}.head.{head}"][0, query]
        np.testing.assert_allclose(numbers["weights"], attention, atol=2e-3)
        np.testing.assert_allclose(numbers["context"], context, atol=5e-3 * float(context.norm()))
        scores = torch.tensor(numbers["sums"]) / math.sqrt(numbers["size"])
        np.testing.assert_allclose(numbers["scores"], scores, rtol=1e-6)
        assert numbers["total"] == pytest.approx(sum(numbers["exponentials"]))


def test_the_terms_that_are_shown_add_up(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lists = [generator.normal(0, 5, size).tolist() for size in (1, 3, 4, 5, 64, 128)]
    calls = [["largestTerms", terms, 4, 2, len(terms) - 1] for terms in lists]
    for terms, found in zip(lists, called(tmp_path, *calls), strict=True):
        shown = [one["term"] for one in found["shown"]]
        assert sum(shown) + found["rest"] == pytest.approx(found["sum"], abs=1e-9)
        assert found["sum"] == pytest.approx(sum(terms), abs=0.00501)
        assert len(shown) + found["nRest"] == len(terms)
        assert len(terms) - 1 in [one["i"] for one in found["shown"]]  # it is always shown
        assert all(abs(a) >= abs(b) for a, b in pairwise(shown))
        if not found["nRest"]:  # each is rounded by itself
            assert abs(found["rest"]) <= 0.005 * len(terms) + 1e-9


def test_numbers_as_text_have_a_true_minus_sign_and_no_negative_zero(tmp_path: Path) -> None:
    calls = [["fixed", -1.005, 1], ["fixed", -0.001, 2], ["fixed", 2, 3]]
    assert called(tmp_path, *calls) == ["\u22121.0", "0.00", "2.000"]


def test_heads_are_marked_by_how_far_they_are_above_equal_weights(tmp_path: Path) -> None:
    scores = {
        "previous_token": [[0.9, 0.05, 0.32, 0.0, 0.1]],
        "induction": [[0.02, 0.02, 0.19, 0.22, 0.199]],
        "first_token": [[0.1, 0.06, 0.29, 0.5, 0.2]],
    }
    even = {"previous_token": 0.06, "induction": 0.02, "first_token": 0.06}
    model = {"head_scores": scores, "even_scores": even}
    kinds = called(tmp_path, *(["kindOfHead", model, 0, head] for head in range(5)))
    assert kinds[1] is None
    found = [(one["kind"], one["clear"]) for one in kinds if one]
    assert found == [
        ("previous_token", True),
        ("previous_token", True),  # 5.3 times, 32 %; the higher 9.5 times are not clear
        ("induction", True),
        ("induction", False),
    ]
    said = called(tmp_path, *(["kindInWords", one] for one in kinds if one))
    assert said[2:] == [
        "On random tokens, 22.0\u00a0% of its weight is on the token that came next when the "
        "current one occurred before, 11 times as much as equal weights would put there: "
        "an induction head.",
        "On random tokens, 19.9\u00a0% of its weight is on the token that came next when the "
        "current one occurred before, 9.9 times as much as equal weights would put there: "
        "it leans to an induction head.",
    ]


def test_the_data_have_the_scores_of_equal_weights(word_model: GPT2, tokenizer: Tokenizer) -> None:
    (model,) = page_data(word_model, tokenizer, TEXT, live="off")["models"]
    weights = [1 / (t + 1) for t in range(64)]  # at position t; 32 random tokens, repeated once
    assert model["even_scores"] == pytest.approx(
        {
            "previous_token": np.mean(weights[1:]),
            "induction": np.mean(weights[32:]),
            "first_token": np.mean(weights[1:]),
        }
    )


def test_the_arrow_keys_stay_where_a_token_may_read(tmp_path: Path) -> None:
    moves = [((2, 2), [0, 1]), ((2, 2), [-1, 0]), ((0, 0), [0, -1]), ((4, 1), [1, 0])]
    calls = [["movedCell", {"query": q, "key": k}, step, 5] for (q, k), step in moves]
    cells = [(cell["query"], cell["key"]) for cell in called(tmp_path, *calls)]
    assert cells == [(2, 2), (1, 1), (0, 0), (4, 1)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (2, 0, 1), (1, 7, 1), (0.7, 0, 0.3), (1.3, 60, 0.8), (0, 0, 1)],
)
def test_next_tokens_are_those_of_sampling(
    temperature: float, top_k: int, top_p: float, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, before = (3 * torch.randn(2, 1000, generator=generator)).double()
    order = logits.argsort(descending=True).tolist()
    state = {"temperature": temperature, "topK": top_k, "topP": top_p}
    ranks = [None, 3, 190, 900]
    actual = [None if rank is None else order[rank - 1] for rank in ranks]
    calls = [["rows", logits.tolist(), before.tolist(), id_, state] for id_ in actual]
    expected, expected_before = (sampled(x, temperature, top_k, top_p) for x in (logits, before))
    found = called(tmp_path, *calls)
    assert [len(rows) for rows in found] == [15, 15, 16, 16]
    for rows, follows in zip(found, actual, strict=True):
        assert [row["id"] for row in rows[:15]] == order[:15]
        assert [row["id"] for row in rows if row["isActual"]] == [follows] * (follows is not None)
        for row in rows:
            p = float(expected[row["id"]])
            assert row["p"] == pytest.approx(p, rel=1e-6)
            assert row["isRemoved"] == (p == 0)
            assert row["before"]["p"] == pytest.approx(float(expected_before[row["id"]]), rel=1e-6)
            assert row["plain"] == pytest.approx(float(logits.softmax(dim=0)[row["id"]]))
            place = order.index(row["id"]) + 1
            assert row["rank"] == (place if place <= 200 else None)


def sampled(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities of all tokens after the rules of `gpt2mini.sampling`."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    kept = divide_by_temperature(logits[None], temperature)
    kept = keep_top_k(kept, top_k) if top_k else kept
    kept = keep_top_p(kept, top_p) if top_p < 1 else kept
    return kept.softmax(dim=1)[0]


def test_where_a_token_comes_up_in_the_layers(tmp_path: Path) -> None:
    layers = [[1, 2], [9, 1], [1, 9], [9, 1], [9, 2]]
    found = called(tmp_path, ["layers", layers, 9], ["layers", layers, 2], ["layers", layers, 5])
    assert found == [
        {"among": 1, "first": 3},
        {"among": 4, "first": None},
        {"among": None, "first": None},
    ]


def test_a_text_is_continued_by_whole_characters(tmp_path: Path) -> None:
    nano = Tokenizer.from_pretrained("gpt2-nano")
    text, lamp, parts = "The old \u4e2d", nano.encode(" lamp"), nano.encode("\u6587")
    assert len(parts) == 3
    last_of_first = len(nano.encode("The")) - 1
    half = len(nano.encode(text)) - 2  # inside the last character
    found = called(
        tmp_path,
        ["continued", text, None, lamp],
        ["continued", text, last_of_first, lamp],
        ["continued", text, None, parts[:2]],
        ["continued", text, None, parts],
        ["continued", text, half, nano.encode(text)[-1:]],
        ["continued", "\ufffd", None, lamp],
        tokenizer=nano,
    )
    assert found == [text + " lamp", "The lamp", None, text + "\u6587", text, "\ufffd lamp"]


def test_writing_ends_for_a_reason(tmp_path: Path) -> None:
    nano = Tokenizer.from_pretrained("gpt2-nano")
    [lamp], parts = nano.encode(" lamp"), nano.encode("\u6587")
    found = called(
        tmp_path,
        ["write", "The", None, 2, [lamp] * 9, 9],
        ["write", "The", None, 5, [lamp] * 9, 3],
        ["write", "The", None, 5, [lamp] * 3, 9],
        ["write", "The", None, 5, [lamp, nano.eos_id, lamp], 9],
        ["write", "The", None, 1, parts, 9],
        ["write", "The", None, 1, parts[:1] * 9, 9],
        ["write", "The old keeper", 0, 1, [lamp], 9],
        tokenizer=nano,
    )
    endings = ["done", "stopped", "full", "end", "done", "no character", "done"]
    assert [one["ending"] for one in found] == endings
    assert [len(one["shown"]) for one in found] == [2, 3, 3, 1, 1, 0, 1]
    assert found[4]["shown"] == ["The\u6587"] and found[6]["shown"] == ["The lamp"]
