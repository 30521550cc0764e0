"""Recorded readings of the explorer page: in JavaScript, the numbers are those of the model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from written_page import TEXT, called

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection import head_effects, logit_lens, trace
from gpt2mini.inspection.explorer import page_data
from gpt2mini.model import TransformerBlock
from gpt2mini.sampling import divide_by_temperature, keep_top_k, keep_top_p


@pytest.fixture(scope="module")
def token_ids(tokenizer: Tokenizer) -> Tensor:
    return torch.tensor([tokenizer.encode(TEXT)])


@pytest.fixture(scope="module")
def recorded(word_model: GPT2, tokenizer: Tokenizer) -> dict[str, Any]:
    """The data of a page that is not live, through JSON."""
    data = page_data(word_model, tokenizer, TEXT, live="off")
    return json.loads(json.dumps(data, allow_nan=False))


def test_attention_and_vectors_of_heads_are_the_models(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    found, n = trace(word_model, token_ids), token_ids.shape[1]
    places = [(1, 0, n - 1, 2), (2, 1, 3, 3), (0, 1, 2, 5)]
    calls = [["attention", *place] for place in places]
    for (layer, head, row, column), p in zip(
        places, called(recorded, tmp_path, *calls), strict=True
    ):
        expected = float(found[f"blocks.{layer}.attention"][0, head, row, column])
        assert p == pytest.approx(expected, abs=1e-5)
    (vectors,) = called(recorded, tmp_path, ["head", 1, 1, n - 1])
    context = found["blocks.1.head.1"][0, -1]
    np.testing.assert_allclose(vectors["context"], context, atol=2e-3 * float(context.norm()))
    stream = found["blocks.0.stream"]
    block = word_model.trf_blocks[1]
    norm1 = block.get_submodule("norm1")(stream)
    for name in ("query", "key", "value"):
        rows = block.get_submodule(f"attn.{name}")(norm1)[0, -1, 8:].detach()
        np.testing.assert_allclose(vectors[name], rows, rtol=1e-3, atol=1e-3)


def test_the_steps_of_a_block_are_those_of_its_forward_pass(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    found, t = trace(word_model, token_ids), 4
    (step,) = called(recorded, tmp_path, ["step", 2, t])
    block = word_model.trf_blocks[2]
    assert isinstance(block, TransformerBlock)
    before, attended = found["blocks.1.stream"][0, t], found["blocks.2.attn_out"][0, t]
    with torch.no_grad():
        norm1, middle = block.norm1(before), before + attended
        norm2 = block.norm2(middle)
        expected = {
            "before": before,
            "norm1": norm1,
            "query": block.attn.query(norm1),
            "key": block.attn.key(norm1),
            "value": block.attn.value(norm1),
            "context": torch.cat([found[f"blocks.2.head.{head}"][0, t] for head in (0, 1)]),
            "attn_out": attended,
            "middle": middle,
            "norm2": norm2,
            "hidden": F.gelu(block.mlp.mlp_in(norm2), approximate="tanh"),
            "mlp_out": found["blocks.2.mlp_out"][0, t],
            "stream": found["blocks.2.stream"][0, t],
        }
    assert list(step) == list(expected)
    for name, vector in expected.items():
        assert step[name]["size"] == len(vector) and len(step[name]["values"]) == 16
        assert step[name]["norm"] == pytest.approx(float(vector.norm()), rel=1e-4)
        np.testing.assert_allclose(step[name]["values"], vector[:16], rtol=2e-3, atol=1e-3)


def test_lens_and_norms_are_the_models(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    found, lens = trace(word_model, token_ids), logit_lens(word_model, token_ids)
    layers = [["lens", layer, 3, 9] for layer in range(4)]
    for layer, best in enumerate(called(recorded, tmp_path, *layers)):
        assert [token["id"] for token in best] == lens.token_ids[layer, 0, 3].tolist()
        shares = [token["p"] for token in best]
        np.testing.assert_allclose(shares, lens.probabilities[layer, 0, 3], atol=1e-6)
    (three,) = called(recorded, tmp_path, ["lens", 1, 3, 3])
    assert len(three) == 3
    parts = ("attn_out", "mlp_out", "stream")
    norms = called(
        recorded, tmp_path, ["norm", "embedding", 0, 2], *(["norm", part, 2, 2] for part in parts)
    )
    vectors = [found["embedding"][0, 2], *(found[f"blocks.2.{part}"][0, 2] for part in parts)]
    np.testing.assert_allclose(norms, [float(vector.norm()) for vector in vectors], rtol=1e-5)


def test_probabilities_at_temperature_1_are_exact(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        shares = word_model(token_ids)[0].softmax(dim=1)  # (tokens, vocab)
    best = shares[3].topk(200).indices.tolist()
    actual = [int(token_ids[0, t]) for t in range(1, token_ids.shape[1])]
    calls = [["probability", 3, i] for i in (best[0], best[99], best[199])]
    calls += [["probability", t, i] for t, i in enumerate(actual)]
    calls += [["surprise", t] for t in range(token_ids.shape[1])]
    found = called(recorded, tmp_path, *calls)
    expected = [float(shares[3, i]) for i in (best[0], best[99], best[199])]
    of_actual = [float(shares[t, i]) for t, i in enumerate(actual)]
    n = len(expected + of_actual)
    np.testing.assert_allclose(found[:n], expected + of_actual, rtol=1e-4)
    assert found[n] is None
    np.testing.assert_allclose(found[n + 1 :], [-math.log(p) for p in of_actual], rtol=1e-4)


def test_a_token_outside_the_most_likely_has_the_mean_of_the_others(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        shares = word_model(token_ids)[0, 3].softmax(dim=0)
    in_order = shares.sort(descending=True)
    unlikely = next(i for i in in_order.indices.tolist()[300:] if i != int(token_ids[0, 4]))
    (p,) = called(recorded, tmp_path, ["probability", 3, unlikely])
    assert p == pytest.approx(float(in_order.values[200:].mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "tolerance"),
    [
        (1.0, 0, 1.0, 1e-4),
        (1.0, 40, 1.0, 1e-4),
        (0.7, 40, 0.6, 1e-4),  # all kept ones are among the 200 most likely
        (0.5, 0, 1.0, 3e-3),  # the sum over the others is approximate
        (2.0, 0, 1.0, 3e-3),
        (1.5, 0, 0.9, 1e-2),
        (2.0, 1000, 0.95, 1e-2),
    ],
)
def test_next_tokens_after_temperature_top_k_and_top_p(
    recorded: dict[str, Any],
    word_model: GPT2,
    token_ids: Tensor,
    tmp_path: Path,
    temperature: float,
    top_k: int,
    top_p: float,
    tolerance: float,
) -> None:
    with torch.no_grad():
        logits = divide_by_temperature(word_model(token_ids)[0, -1:], temperature)
    logits = keep_top_k(logits, top_k) if top_k else logits
    expected = keep_top_p(logits, top_p).softmax(dim=1)[0].topk(20)
    sampling = {"temperature": temperature, "topK": top_k, "topP": top_p}
    (found,) = called(recorded, tmp_path, ["nextTokens", token_ids.shape[1] - 1, sampling, 20])
    kept = int((expected.values > 0).sum())
    assert [token["id"] for token in found] == expected.indices[:kept].tolist()
    shares = [token["p"] for token in found]
    np.testing.assert_allclose(shares, expected.values[:kept], rtol=tolerance)


def test_temperature_0_and_top_k_1_leave_the_most_likely_token(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        best = int(word_model(token_ids)[0, 2].argmax())
    for sampling in ({"temperature": 0}, {"topK": 1}, {"topP": 1e-9}):
        (found,) = called(recorded, tmp_path, ["nextTokens", 2, sampling, 5])
        assert found == [{"id": best, "p": 1}]


def test_effects_are_those_of_heads_switched_off(
    recorded: dict[str, Any], word_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    n, target = token_ids.shape[1], int(token_ids[0, 4])
    last = head_effects(word_model, token_ids)
    calls = [["source.rankHeads", 3, target], ["source.rankHeads", n - 1, last.target]]
    calls += [["source.rankHeads", 3, target + 1]]
    ranked, at_end, of_another = called(recorded, tmp_path, *calls)
    for found, effects in (
        (ranked, head_effects(word_model, token_ids, 3, target)),
        (at_end, last),
    ):
        assert len(found) == 6
        for one in found:
            assert one["before"] == pytest.approx(effects.before, rel=1e-3)
            after = float(effects.after[one["layer"], one["head"]])
            assert one["after"] == pytest.approx(after, rel=1e-3)
        changes = [abs(one["after"] - one["before"]) for one in found]
        assert changes == sorted(changes, reverse=True)
    assert of_another == []


def test_other_texts_and_patches_are_refused(recorded: dict[str, Any], tmp_path: Path) -> None:
    ids = recorded["models"][0]["recorded"]["token_ids"]
    patch = {"name": "blocks.0.head.0", "value": 0, "position": None}
    calls = [["source.read", ids], ["source.read", ids[1:]], ["source.read", ids, [patch]]]
    same, other, patches = called(recorded, tmp_path, *calls)
    assert same is None and "only the text" in other and "switched off" in patches


def test_ids_without_a_token_are_never_shown(
    padded_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    n = tokenizer.vocab_size
    data = page_data(padded_model, tokenizer, "a lamp", live="off")
    assert data["forbidden_ids"] == list(range(n, n + 47))
    calls = [["nextTokens", 1, {"temperature": t}, 1000] for t in (0, 1, 2)]
    calls += [["lens", layer, 1] for layer in range(4)]
    lists = called(data, tmp_path, *calls, ["probability", 1, n + 3])
    assert lists.pop() == 0
    assert all(token["id"] < n for tokens in lists for token in tokens)
    with torch.no_grad():
        logits = padded_model(torch.tensor([tokenizer.encode("a lamp")]))[0, 1, :n]
    np.testing.assert_allclose(lists[1][0]["p"], float(logits.softmax(0).max()), rtol=1e-4)
    live = page_data(padded_model, tokenizer, "a lamp", live="int8")
    assert live["live"] and live["forbidden_ids"] == data["forbidden_ids"]
