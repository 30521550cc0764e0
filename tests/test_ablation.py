"""Ablation: probabilities without one part are those of a model in which it is zero."""

from copy import deepcopy

import pytest
import torch
from conftest import random_ids
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config
from gpt2mini.inspection import (
    first_token_score,
    head_effects,
    head_scores,
    mean_activations,
    patched,
    trace,
)
from gpt2mini.inspection.ablation import ablation_effects

TOKEN_IDS = random_ids(1, 11)


def probabilities(model: GPT2, token_ids: Tensor, patches: dict[str, float]) -> Tensor:
    with torch.no_grad(), patched(model, patches):
        return model(token_ids)[0].softmax(dim=1)  # (tokens, vocab)


def without_head(model: GPT2, layer: int, head: int) -> GPT2:
    """The head's columns of the output projection are zero: it adds nothing to the stream."""
    model = deepcopy(model)
    width = model.config.head_dim
    attn_out = model.trf_blocks[layer].get_submodule("attn.attn_out")
    assert isinstance(attn_out, nn.Linear)
    with torch.no_grad():
        attn_out.weight[:, head * width : (head + 1) * width] = 0
    return model


def test_effects_of_heads_are_those_of_weights_set_to_zero(tiny_model: GPT2) -> None:
    effects = head_effects(tiny_model, TOKEN_IDS, position=7, target=5)
    assert effects.target == 5
    whole = probabilities(tiny_model, TOKEN_IDS, {})[7, 5]
    assert effects.before == pytest.approx(float(whole), rel=1e-4)
    for layer in range(3):
        for head in range(6):
            p = probabilities(without_head(tiny_model, layer, head), TOKEN_IDS, {})[7, 5]
            assert float(effects.after[layer, head]) == pytest.approx(float(p), rel=1e-3)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("shape", [(2, 11), (6, 5), (11,)])
def test_effects_of_heads_are_of_one_text(tiny_model: GPT2, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the shape \(1, tokens\), one text"):
        head_effects(tiny_model, torch.zeros(shape, dtype=torch.long))


def test_attention_weights_have_no_mean(tiny_model: GPT2) -> None:
    """It would let tokens attend to later ones."""
    with pytest.raises(ValueError, match=r"blocks\.1\.attention has no mean over positions"):
        mean_activations(tiny_model, TOKEN_IDS, ["blocks.1.*"])


def test_the_default_is_the_most_likely_token_after_the_text(tiny_model: GPT2) -> None:
    last = probabilities(tiny_model, TOKEN_IDS, {})[-1]
    effects = head_effects(tiny_model, TOKEN_IDS)
    assert effects.target == int(last.argmax())
    assert effects.before == pytest.approx(float(last.max()), rel=1e-4)
    assert torch.equal(effects.after, head_effects(tiny_model, TOKEN_IDS, position=10).after)


def test_strongest_are_the_heads_with_the_largest_change(tiny_model: GPT2) -> None:
    effects = head_effects(tiny_model, TOKEN_IDS)
    strongest = effects.strongest(18)
    changes = [abs(after - effects.before) for _, _, after in strongest]
    assert changes == sorted(changes, reverse=True)
    assert {(layer, head) for layer, head, _ in strongest} == {
        (layer, head) for layer in range(3) for head in range(6)
    }
    layer, head, after = strongest[0]
    assert after == float(effects.after[layer, head])


def test_a_forbidden_token_is_no_target_and_takes_no_probability(tiny_model: GPT2) -> None:
    likeliest = head_effects(tiny_model, TOKEN_IDS).target
    effects = head_effects(tiny_model, TOKEN_IDS, forbidden_ids=[likeliest])
    last = probabilities(tiny_model, TOKEN_IDS, {})[-1]
    rest = last.index_fill(0, torch.tensor([likeliest]), 0)
    assert effects.target == int(rest.argmax())
    assert effects.before == pytest.approx(float(rest.max() / rest.sum()), rel=1e-4)


def test_effects_of_any_parts_at_all_positions(
    tiny_model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["blocks.2.mlp_out", "blocks.0.attn_out", "blocks.1.head.3", "blocks.0.head.0"]
    names += [f"blocks.0.head.{head}" for head in range(1, 6)]
    targets, told = random_ids(11, seed=1), []
    for most in (2**24, 3 * 11 * 211):  # all of a block in one batch, or three at a time
        monkeypatch.setattr("gpt2mini.inspection.ablation.MOST_LOGITS", most)
        before, after = ablation_effects(
            tiny_model, TOKEN_IDS, names, targets, progress=lambda *done: told.append(done)
        )
        each = torch.arange(11)
        expected = probabilities(tiny_model, TOKEN_IDS, {})[each, targets]
        torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-7)
        for name, found in zip(names, after, strict=True):
            expected = probabilities(tiny_model, TOKEN_IDS, {name: 0})[each, targets]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
        assert told[-1] == (9, 9)


def test_a_model_that_cannot_start_at_a_block_is_ablated_all_the_same(tiny_model: GPT2) -> None:
    class Own(GPT2):
        def residual_stream(self, token_ids, attention_mask=None, position_ids=None, cache=None):  # type: ignore[override]
            return super().residual_stream(token_ids, attention_mask, position_ids, cache)

    own = deepcopy(tiny_model)
    own.__class__ = Own
    expected = head_effects(tiny_model, TOKEN_IDS).after
    torch.testing.assert_close(head_effects(own, TOKEN_IDS).after, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["embedding", "blocks.0.stream", "blocks.1.mlp_out"])
def test_effects_inside_a_patch_have_that_patch_once(tiny_model: GPT2, name: str) -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    with patched(tiny_model, {name: doubled}):
        effects = head_effects(tiny_model, TOKEN_IDS, target=5)
        for layer in range(3):
            p = probabilities(tiny_model, TOKEN_IDS, {f"blocks.{layer}.head.2": 0})[-1, 5]
            assert float(effects.after[layer, 2]) == pytest.approx(float(p), rel=1e-3)


def test_ablation_leaves_the_model_as_it_was(own_model: GPT2) -> None:
    own_model.train()
    expected = own_model(TOKEN_IDS)
    head_effects(own_model, TOKEN_IDS)
    mean_activations(own_model, TOKEN_IDS, ["blocks.*.mlp_out"])
    assert own_model.training and torch.equal(own_model(TOKEN_IDS), expected)


def test_means_are_over_all_positions_of_all_rows_and_can_be_patched(tiny_model: GPT2) -> None:
    texts = random_ids(5, 9, seed=2)
    means = mean_activations(tiny_model, texts, ["blocks.*.head.5", "blocks.1.mlp_out"])
    found = trace(tiny_model, texts)
    assert list(means) == [f"blocks.{i}.{x}" for i, x in ((0, "head.5"), (1, "head.5"))] + [
        "blocks.1.mlp_out",
        "blocks.2.head.5",
    ]
    for name, mean in means.items():
        rows = found[name].reshape(45, -1)
        torch.testing.assert_close(mean, torch.stack(list(rows)).sum(dim=0) / 45)
    with patched(tiny_model, {"blocks.1.mlp_out": means["blocks.1.mlp_out"]}):
        replaced = trace(tiny_model, TOKEN_IDS)["blocks.1.mlp_out"]
    assert torch.equal(replaced, means["blocks.1.mlp_out"].expand(1, 11, 48))


def test_what_cannot_be_ablated_is_refused(tiny_model: GPT2) -> None:
    for position in (11, -12):
        with pytest.raises(ValueError, match=f"position {position} is not in the text of 11"):
            head_effects(tiny_model, TOKEN_IDS, position=position)
    classifier = GPT2(GPT2Config(50, 16, emb_dim=8, n_heads=2, n_layers=1))
    classifier.out_head = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="the output head has 2 outputs"):
        head_effects(classifier, torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="no activation is called"):
        mean_activations(tiny_model, TOKEN_IDS, ["blocks.9.mlp_out"])


def test_the_first_token_score_is_the_mean_attention_to_the_first_token(tiny_model: GPT2) -> None:
    attention = torch.zeros(1, 2, 3, 3)
    attention[0, 0, :, 0] = 1  # all attention on the first token
    attention[0, 1] = torch.tensor([[1, 0, 0], [0.25, 0.75, 0], [0.75, 0, 0.25]])
    assert first_token_score(attention).tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="at least 2 tokens"):
        first_token_score(attention[..., :1, :1])
    scores = head_scores(tiny_model, period=8)
    assert scores.first_token.shape == (3, 6)
    layer, head, score = scores.strongest("first_token", 1)[0]
    assert score == float(scores.first_token.max()) == float(scores.first_token[layer, head])
    with pytest.raises(ValueError, match="previous_token, induction or first_token"):
        scores.strongest("last_token")
