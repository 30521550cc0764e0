"""Inside a model: traces against transformers, patches, comparisons worked by hand, the lens."""

import json
import math
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from conftest import TINY, enlarge, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.cache import KeyValueCache
from gpt2mini.cli import main
from gpt2mini.inspection import (
    activation_names,
    activation_plots,
    compare_models,
    head_scores,
    induction_score,
    logit_lens,
    nearest_tokens,
    patched,
    plot_attention,
    plot_change,
    plot_figures,
    plot_head_scores,
    plot_lens,
    plot_runs,
    plot_trace,
    previous_token_score,
    score_text,
    surprise_text,
    token_labels,
    trace,
)
from gpt2mini.inspection.compare import Difference, effective_rank
from gpt2mini.inspection.lens import Piece, escape, read_stream
from gpt2mini.inspection.plots import averaged
from gpt2mini.lora import add_lora, lora_disabled, lora_layers, merge_lora, save_adapter
from gpt2mini.model import TransformerBlock

PRECISION = 1e-5
LAST = TINY.n_layers - 1
ids = random_ids(2, 9)
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def block_of(model: GPT2, layer: int) -> TransformerBlock:
    block = model.trf_blocks[layer]
    assert isinstance(block, TransformerBlock)
    return block


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def lora_model(own_model: GPT2) -> GPT2:
    """With adapters everywhere, which change a lot."""
    targets = ("query", "key", "value", "attn_out", "mlp_in", "mlp_out")
    add_lora(own_model, rank=2, targets=targets)
    enlarge(own_model, seed=3)
    return own_model.eval()


# ---- trace


@pytest.fixture(scope="module")
def theirs(tiny_model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> GPT2LMHeadModel:
    folder = tmp_path_factory.mktemp("ours")
    tiny_model.save_pretrained(folder)
    config = TheirConfig.from_pretrained(folder, attn_implementation="eager")
    return GPT2LMHeadModel.from_pretrained(folder, config=config).eval()


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
def test_a_trace_is_what_transformers_reports(
    tiny_model: GPT2, theirs: GPT2LMHeadModel, mask: Tensor | None
) -> None:
    ours = trace(tiny_model, ids, mask)
    extra = {}
    if mask is not None:  # transformers does not count positions itself
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True, output_attentions=True, **extra)
    is_real = torch.ones_like(ids).bool() if mask is None else mask.bool()

    def same(name: str, their: Tensor) -> None:
        assert_close(ours[name][is_real], their[is_real], atol=1e-4, rtol=0)

    same("embedding", expected.hidden_states[0])
    for layer in range(LAST):
        same(f"blocks.{layer}.stream", expected.hidden_states[layer + 1])
    same("final_norm", expected.hidden_states[-1])  # theirs of the last block is normed already
    same("logits", expected.logits)
    for layer, attention in enumerate(expected.attentions):
        found = ours[f"blocks.{layer}.attention"].transpose(1, 2)[is_real]
        assert_close(found, attention.transpose(1, 2)[is_real], atol=PRECISION, rtol=0)


def test_the_stream_is_the_sum_of_its_parts(tiny_model: GPT2) -> None:
    found = trace(tiny_model, ids)
    stream = found["embedding"]
    for layer in range(TINY.n_layers):
        stream = stream + found[f"blocks.{layer}.attn_out"] + found[f"blocks.{layer}.mlp_out"]
        assert_close(found[f"blocks.{layer}.stream"], stream)
    assert_close(found["logits"], tiny_model(ids), atol=0, rtol=0)


@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1), torch.tensor([[1] * 4 + [2] * 5] * 2)])
def test_traced_weights_times_values_are_the_output_of_each_head(
    lora_model: GPT2, mask: Tensor | None
) -> None:
    """With padding and with two segments in a row, too."""
    found = trace(lora_model, ids, mask)
    for layer in range(TINY.n_layers):
        block = block_of(lora_model, layer)
        normed = block.norm1(
            found["embedding"] if layer == 0 else found[f"blocks.{layer - 1}.stream"]
        )
        values = block.attn.split_heads(block.attn.value(normed))
        context = found[f"blocks.{layer}.attention"] @ values
        for head in range(TINY.n_heads):
            fast = found[f"blocks.{layer}.head.{head}"]
            size = max(1.0, float(fast.detach().abs().max()))  # of an enlarged model, above 1
            assert_close(context[:, head], fast, atol=PRECISION * size, rtol=1e-5)


def test_attention_rows_sum_to_one_and_see_no_later_token(tiny_model: GPT2) -> None:
    attention = trace(tiny_model, ids, MASK)["blocks.1.attention"]
    assert_close(attention.sum(dim=3), torch.ones(2, TINY.n_heads, 9))
    assert not attention.triu(1).any()
    assert not attention[1, :, 4:, :4].any()  # nor padding


def test_a_trace_leaves_nothing_behind(own_model: GPT2) -> None:
    own_model.train()
    block_of(own_model, 1).eval()
    modes = [module.training for module in own_model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = trace(own_model, ids)
    assert hooks_in(own_model) == 0
    assert [module.training for module in own_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not any(found[name].requires_grad for name in found)


def test_hooks_are_removed_after_exceptions(
    own_model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="do not fit the context"):
        trace(own_model, random_ids(1, 65))
    with (
        pytest.raises(ZeroDivisionError),
        patched(own_model, {"blocks.1.attention": lambda x: x / (1 // 0)}),
    ):
        own_model(ids)
    assert hooks_in(own_model) == 0
    monkeypatch.setattr(block_of(own_model, 2).mlp, "mlp_out", None)
    with pytest.raises(TypeError):
        trace(own_model, ids)
    assert hooks_in(own_model) == 0 and own_model.training is False


def test_names_choose_what_is_kept(tiny_model: GPT2) -> None:
    assert trace(tiny_model, ids).names == activation_names(TINY)
    some = trace(tiny_model, ids, names=["logits", "blocks.*.stream"])
    assert list(some) == ["blocks.0.stream", "blocks.1.stream", "blocks.2.stream", "logits"]
    assert "logits" in some and "embedding" not in some and len(some) == 4
    assert [x.shape for x in some.of_each_block("stream")] == [(2, 9, TINY.emb_dim)] * 3
    with pytest.raises(ValueError, match=r"not in the trace, which has blocks\.0\.stream, "):
        some["embedding"]
    with pytest.raises(ValueError, match="no block has 'mlp_out'"):
        some.of_each_block("mlp_out")


@pytest.mark.parametrize("name", ["blocks.3.stream", "blocks.0.head.6", "block.0.stream", ""])
def test_an_unknown_name_lists_the_known_ones(tiny_model: GPT2, name: str) -> None:
    known = "embedding, final_norm, logits and, for blocks.0 to blocks.2, attention, attn_out"
    with pytest.raises(ValueError, match=f"no activation is called {name!r}; there are {known}"):
        trace(tiny_model, ids, names=[name])
    with pytest.raises(ValueError, match=r"head.0 ... head.5"), patched(tiny_model, {name: 0}):
        pass


def test_no_tokens_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="hold at least one token"):
        trace(tiny_model, torch.zeros(1, 0, dtype=torch.long))


# ---- ablation and patching


def test_without_any_block_the_embedding_goes_straight_to_the_head(tiny_model: GPT2) -> None:
    silent = {f"blocks.{layer}.{part}": 0 for layer in range(3) for part in ("attn_out", "mlp_out")}
    places = torch.arange(9)
    embedding = tiny_model.tok_emb(ids) + tiny_model.pos_emb(places)
    expected = tiny_model.out_head(tiny_model.final_norm(embedding))
    with patched(tiny_model, silent):
        assert_close(tiny_model(ids), expected, atol=0, rtol=0)


def test_without_heads_only_the_bias_is_left(tiny_model: GPT2) -> None:
    with patched(tiny_model, {f"blocks.1.head.{head}": 0 for head in range(6)}):
        found = trace(tiny_model, ids)["blocks.1.attn_out"]
    assert_close(found, block_of(tiny_model, 1).attn.attn_out.bias.expand_as(found))


def test_one_head_ablated_takes_its_own_part_away(tiny_model: GPT2) -> None:
    before = trace(tiny_model, ids)
    with patched(tiny_model, {"blocks.1.head.2": 0}):
        after = trace(tiny_model, ids)
    columns = slice(2 * TINY.head_dim, 3 * TINY.head_dim)
    weight = block_of(tiny_model, 1).attn.attn_out.weight[:, columns]  # (emb, head_dim)
    part = before["blocks.1.head.2"] @ weight.T
    assert_close(after["blocks.1.attn_out"], before["blocks.1.attn_out"] - part)
    assert not after["blocks.1.head.2"].any()
    assert_close(after["blocks.1.head.3"], before["blocks.1.head.3"])


@pytest.mark.parametrize("name", ["embedding", "blocks.1.stream", "final_norm", "logits"])
def test_patching_all_that_flows_on_reproduces_the_other_run(tiny_model: GPT2, name: str) -> None:
    other_ids = random_ids(2, 9, seed=1)
    other = trace(tiny_model, other_ids)
    with patched(tiny_model, {name: other[name]}):
        found = tiny_model(ids)
    assert torch.equal(found, other["logits"])
    assert not torch.equal(tiny_model(ids), found)


@pytest.mark.parametrize("part", ["attention", "head.4", "attn_out", "mlp_out"])
def test_patching_a_run_with_itself_changes_nothing(lora_model: GPT2, part: str) -> None:
    own = trace(lora_model, ids, MASK)
    name = f"blocks.1.{part}"
    with patched(lora_model, {name: own[name]}):
        assert_close(lora_model(ids, MASK), own["logits"], atol=1e-4, rtol=1e-5)


def test_patched_weights_give_the_output_of_heads_and_are_traced(
    tiny_model: GPT2,
) -> None:
    only_itself = torch.eye(9)
    with patched(tiny_model, {"blocks.0.attention": only_itself, "blocks.0.head.1": 0}):
        found = trace(tiny_model, ids)
    attn, norm1 = block_of(tiny_model, 0).attn, block_of(tiny_model, 0).norm1
    values = attn.split_heads(attn.value(norm1(found["embedding"])))
    assert_close(found["blocks.0.attention"], only_itself.expand(2, 6, 9, 9))
    assert_close(found["blocks.0.head.0"], values[:, 0])
    assert not found["blocks.0.head.1"].any()


def test_a_function_sees_the_activation_and_gradients_flow_through_it(own_model: GPT2) -> None:
    scale = torch.ones((), requires_grad=True)
    with patched(own_model, {"blocks.1.head.0": lambda x: scale * x}):
        own_model(ids).sum().backward()
    assert scale.grad is not None and scale.grad != 0


def test_nested_patches_both_count_and_end_with_their_blocks(tiny_model: GPT2) -> None:
    before = tiny_model(ids)
    with patched(tiny_model, {"logits": lambda x: x + 1}):
        with patched(tiny_model, {"logits": lambda x: 2 * x}):
            assert_close(tiny_model(ids), 2 * (before + 1))
        assert_close(tiny_model(ids), before + 1)
    assert_close(tiny_model(ids), before)


def test_a_patch_counts_with_a_cache_too(tiny_model: GPT2) -> None:
    patches: dict[str, Any] = {"blocks.1.attention": lambda x: x**2, "blocks.2.head.0": 0}
    cache = KeyValueCache(TINY, 2, 9)
    with patched(tiny_model, patches):
        expected = tiny_model(ids)
        parts = [tiny_model(part, cache=cache) for part in ids.split([5, 1, 3], dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (torch.zeros(9, 7), r"gives \(9, 7\); expected the shape \(2, 9, 48\)"),
        (torch.zeros(3, 2, 9, 48), r"gives \(3, 2, 9, 48\)"),
        (lambda x: x[:, :1, :5], r"gives \(2, 1, 5\)"),
        (lambda x: None, "gives NoneType"),
        ("0", "a number, a tensor or a function, not str"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_a_patch_that_does_not_fit_is_refused(tiny_model: GPT2, patch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), patched(tiny_model, {"blocks.0.mlp_out": patch}):
        tiny_model(ids)
    assert hooks_in(tiny_model) == 0


# ---- comparing


def one(differences: list[Difference], name: str) -> Difference:
    return next(difference for difference in differences if difference.name == name)


def zeros_but(weights: dict[str, Tensor]) -> GPT2:
    """A GPT-2 of width 2 whose parameters are all zero, but for those given."""
    model = GPT2(GPT2Config(vocab_size=3, context_length=4, emb_dim=2, n_heads=1, n_layers=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.get(name, torch.zeros(())))
    return model


def test_differences_worked_by_hand() -> None:
    """query: rows (3, 4) -> (4, 3) and (0, 2) -> (0, 4); d = (1, -1), (0, 2)."""
    query, bias = "trf_blocks.0.attn.query.weight", "trf_blocks.0.attn.query.bias"
    a = zeros_but({query: torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
    b = zeros_but({query: torch.tensor([[4.0, 3.0], [0.0, 4.0]]), bias: torch.tensor([0.0, 2.0])})
    comparison = compare_models(a, b)
    found = one(comparison.parameters, query)
    assert (found.layer, found.shape) == ("block 0", (2, 2))
    assert found.mean_absolute == pytest.approx((1 + 1 + 0 + 2) / 4)
    assert found.maximum == 2
    assert found.standard_deviation == pytest.approx(math.sqrt((1 + 1 + 0 + 4) / 4 - 0.5**2))
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.distance == pytest.approx((math.sqrt(2) + 2) / 2)
    assert found.relative == pytest.approx(math.sqrt(6) / math.sqrt(29))
    # d d^T = [[2, -2], [-2, 4]]: its eigenvalues 3 +- sqrt(5) are the squared singular values
    singular = np.sqrt(3 + np.array([1, -1]) * math.sqrt(5))
    shares = singular / singular.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))

    biased = one(comparison.parameters, bias)  # from zeros, so there is no ratio and no angle
    assert (biased.relative, biased.cosine, biased.effective_rank) == (math.inf, 0, None)
    whole = one(comparison.layers, "block 0")
    numbers = sum(p.numel() for p in a.trf_blocks.parameters())
    assert whole.shape == (numbers,)
    assert whole.mean_absolute == pytest.approx((4 + 2) / numbers)
    assert whole.relative == pytest.approx(math.sqrt(6 + 4) / math.sqrt(29))
    assert whole.maximum == 2
    rest = one(comparison.layers, "tok_emb")
    assert (rest.relative, rest.cosine, rest.maximum, rest.distance) == (0, 1, 0, 0)


def test_the_figures_are_those_of_plain_torch(tiny_model: GPT2) -> None:
    other = deepcopy(tiny_model)
    enlarge(other, seed=4)
    comparison = compare_models(tiny_model, other, ids, MASK)
    for name, parameter in tiny_model.named_parameters():
        a, b = parameter.detach(), other.get_parameter(name).detach()
        found = one(comparison.parameters, name)
        d = b - a
        assert found.mean_absolute == pytest.approx(float(d.abs().mean()), rel=1e-4)
        assert found.standard_deviation == pytest.approx(float(d.std(correction=0)), rel=1e-4)
        cosine = torch.cosine_similarity(a, b, dim=-1).mean()
        assert found.cosine == pytest.approx(float(cosine), rel=1e-4)
        distance = torch.atleast_2d(d).norm(dim=1).mean()
        assert found.distance == pytest.approx(float(distance), rel=1e-4)
    d = (trace(other, ids, MASK)["logits"] - trace(tiny_model, ids, MASK)["logits"])[MASK.bool()]
    assert one(comparison.activations, "logits").maximum == pytest.approx(float(d.abs().max()))


def test_a_model_is_equal_to_itself(tiny_model: GPT2) -> None:
    comparison = compare_models(tiny_model, deepcopy(tiny_model), ids)
    for difference in (*comparison.parameters, *comparison.layers, *comparison.activations):
        assert difference.relative == difference.maximum == 0
        assert difference.cosine == pytest.approx(1)
        assert not difference.effective_rank
    assert len(comparison.parameters) == len(list(tiny_model.parameters()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_compared_too(tiny_model: GPT2, own_model: GPT2, value: float) -> None:
    own_model.trf_blocks[0].get_parameter("mlp.mlp_in.weight").data[0, 0] = value
    comparison = compare_models(tiny_model, own_model, ids)
    changed = one(comparison.parameters, "trf_blocks.0.mlp.mlp_in.weight")
    assert changed.effective_rank is not None and math.isnan(changed.effective_rank)
    assert "block 0" in str(comparison)
    json.dumps(comparison.summary(), allow_nan=False)


def test_nan_comes_first_in_a_table(tiny_model: GPT2, own_model: GPT2) -> None:
    with torch.no_grad():
        block_of(own_model, 2).mlp.mlp_in.weight *= 3
        own_model.trf_blocks[1].get_parameter("mlp.mlp_out.bias")[0] = math.nan
    comparison = compare_models(tiny_model, own_model)
    layers, parameters = comparison.table(longest=1).split("\n\n")
    assert layers.splitlines()[1].startswith("block 1 ")
    assert parameters.splitlines()[1].startswith("block 1 mlp_out.bias ")
    for found in (
        one(comparison.parameters, "trf_blocks.1.mlp.mlp_out.bias"),
        one(comparison.layers, "block 1"),
    ):
        for measure in (found.relative, found.maximum, found.standard_deviation, found.distance):
            assert math.isnan(measure)


def test_nan_beside_zeros_is_no_infinite_change() -> None:
    a, b = zeros_but({}), zeros_but({"final_norm.bias": torch.tensor([math.nan, 0.0])})
    assert math.isnan(one(compare_models(a, b).parameters, "final_norm.bias").relative)


def test_an_adapted_model_counts_with_its_effective_weights(
    tiny_model: GPT2, own_model: GPT2
) -> None:
    add_lora(own_model, rank=2)
    with torch.no_grad():
        for name, parameter in own_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted = compare_models(tiny_model, own_model, ids)
    changed = {x.name for x in adapted.parameters if x.relative > 0}
    expected = {f"trf_blocks.{i}.attn.{n}.weight" for i in range(3) for n in ("query", "value")}
    assert changed == expected
    ranks = [one(adapted.parameters, name).effective_rank for name in changed]
    assert all(1 < rank < 2 + 1e-2 for rank in ranks if rank is not None)
    with lora_disabled(own_model):
        assert all(x.relative == 0 for x in compare_models(tiny_model, own_model).parameters)
    merged = deepcopy(own_model)
    merge_lora(merged)
    against_merged = compare_models(own_model, merged, ids)
    assert all(x.relative == 0 for x in against_merged.parameters)
    assert all(x.relative < 1e-4 for x in against_merged.activations)
    assert len(lora_layers(own_model)) == 6  # the models stay as they are


@given(st.integers(1, 6))
def test_effective_rank_of_equal_singular_values_is_their_number(r: int) -> None:
    orthogonal = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(r))).Q
    matrix = 0.3 * orthogonal[:, :r] @ torch.eye(6, 8)[:r]
    assert effective_rank(matrix) == pytest.approx(r, rel=1e-3)


def test_models_of_different_shapes_are_refused(tiny_model: GPT2) -> None:
    wider = GPT2(GPT2Config(211, 64, emb_dim=96, n_heads=6, n_layers=3))
    with pytest.raises(
        ValueError, match=r"tok_emb\.weight is 211 x 48 in the first and 211 x 96 in"
    ):
        compare_models(tiny_model, wider)
    classifier = deepcopy(tiny_model)
    classifier.out_head = nn.Linear(48, 2)
    message = "same shape can be compared: out_head.weight is 211 x 48 in the first and 2 x 48 in"
    with pytest.raises(ValueError, match=message):
        compare_models(tiny_model, classifier)


def test_quantized_models_have_no_weights_to_compare(tiny_model: GPT2, own_model: GPT2) -> None:
    own_model.quantize("int8")
    for first, second in ((own_model, deepcopy(own_model)), (tiny_model, own_model)):
        with pytest.raises(ValueError, match=r"quantized.*comparing them needs.* load the model"):
            compare_models(first, second)


def test_a_tied_head_is_compared_with_an_untied_one(tiny_model: GPT2, own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(48, 211, bias=False)
    own_model.out_head.weight = nn.Parameter(1.25 * tiny_model.tok_emb.weight.detach())
    for first, second in ((tiny_model, own_model), (own_model, tiny_model)):
        found = {p.name: p.relative for p in compare_models(first, second).parameters}
        assert found.pop("out_head.weight") == pytest.approx(0.25 if first is tiny_model else 0.2)
        assert set(found.values()) == {0.0}


def test_a_comparison_as_table_and_as_json(tiny_model: GPT2, own_model: GPT2) -> None:
    with torch.no_grad():
        block_of(own_model, 1).mlp.mlp_in.weight *= 1.5
        own_model.pos_emb.weight *= 1.1
    comparison = compare_models(tiny_model, own_model, ids)
    tables = str(comparison).split("\n\n")
    assert [table.split()[0] for table in tables] == ["layer", "parameter", "activation"]
    rows = [line.split() for line in tables[1].splitlines()]
    assert [" ".join(row[:-7]) for row in rows[1:3]] == ["block 1 mlp_in.weight", "pos_emb.weight"]
    assert [float(row[-7]) for row in rows[1:3]] == [0.5, 0.1]
    assert comparison.table(longest=1).count("more") == 3
    again = json.loads(json.dumps(comparison.summary(), allow_nan=False))
    assert again["parameters"][1]["relative"] == pytest.approx(0.1)
    infinite = compare_models(zeros_but({}), zeros_but({"final_norm.weight": torch.ones(2)}))
    assert (
        json.loads(json.dumps(infinite.summary(), allow_nan=False))["layers"][-1]["relative"]
        is None
    )


# ---- the lens, and texts


def test_the_last_layer_of_the_lens_is_the_model(tiny_model: GPT2) -> None:
    lens = logit_lens(tiny_model, ids, k=4)
    assert lens.layers == ["embedding", *(f"blocks.{i}.stream" for i in range(3))]
    with torch.no_grad():
        last_stream = trace(tiny_model, ids)["blocks.2.stream"]
        assert torch.equal(read_stream(tiny_model, last_stream), tiny_model(ids))
        best = tiny_model(ids).softmax(dim=2).topk(4)
    assert torch.equal(lens.token_ids[-1], best.indices)
    assert_close(lens.probabilities[-1], best.values)


class DoubledStream(GPT2):
    def residual_stream(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().residual_stream(*args, **kwargs)


class CappedLogits(GPT2):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 3 * torch.tanh(super().forward(*args, **kwargs) / 3)


@pytest.mark.parametrize("own", [DoubledStream, CappedLogits])
def test_the_lens_follows_what_a_model_does_after_its_blocks(
    own_model: GPT2, own: type[GPT2]
) -> None:
    plain = logit_lens(own_model, ids, MASK)
    own_model.__class__ = own
    lens = logit_lens(own_model, ids, MASK)
    with torch.no_grad():
        best = own_model(ids, MASK).softmax(dim=2).topk(5)
    assert torch.equal(lens.token_ids[-1], best.indices)
    assert_close(lens.probabilities[-1], best.values)
    assert not torch.allclose(lens.probabilities, plain.probabilities)


def test_the_nearest_token_of_an_embedding_is_itself(tiny_model: GPT2) -> None:
    (first, cosine), *others = nearest_tokens(tiny_model, 17, k=5)
    assert first == 17 and cosine == pytest.approx(1)
    assert [c for _, c in others] == sorted((c for _, c in others), reverse=True)
    table = tiny_model.tok_emb.weight.detach()
    assert nearest_tokens(tiny_model, -table[3], k=211)[-1][0] == 3
    with pytest.raises(ValueError, match="token id 211 is not in the vocabulary of 211"):
        nearest_tokens(tiny_model, 211)
    assert nearest_tokens(tiny_model, torch.tensor(17)) == nearest_tokens(tiny_model, 17)


def test_the_nearest_tokens_in_half_precision_are_those_of_its_own_numbers(own_model: GPT2) -> None:
    with torch.no_grad():  # all are near to each other
        own_model.tok_emb.weight.mul_(0.01).add_(torch.linspace(0.5, 1.0, 48))
    half = own_model.bfloat16()
    assert nearest_tokens(half, 17) == nearest_tokens(deepcopy(half).float(), 17)
    vector = torch.linspace(0.0, 1.001, 48)  # in more digits than the weights have
    assert nearest_tokens(half, vector) == nearest_tokens(deepcopy(half).float(), vector)


def test_ids_without_a_token_are_in_no_lens_and_no_neighborhood(
    padded_model: GPT2, tokenizer: Tokenizer
) -> None:
    missing = tokenizer.missing_ids(padded_model.config.vocab_size)
    ids = torch.tensor([tokenizer.encode("The lamp")])
    assert logit_lens(padded_model, ids).token_ids.max() >= tokenizer.vocab_size
    lens = logit_lens(padded_model, ids, k=5, forbidden_ids=missing)
    with torch.no_grad():
        best = padded_model(ids)[..., : tokenizer.vocab_size].softmax(dim=2).topk(5)
    assert torch.equal(lens.token_ids[-1], best.indices)
    assert_close(lens.probabilities[-1], best.values)
    assert max(i for i, _ in nearest_tokens(padded_model, 5)) >= tokenizer.vocab_size
    near = nearest_tokens(padded_model, 5, len(padded_model.tok_emb.weight), missing)
    assert sorted(i for i, _ in near) == list(range(tokenizer.vocab_size)) and near[0][0] == 5


def test_inspecting_a_padded_model_shows_only_tokens(
    padded_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    padded_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for what in ("trace", "lens", "attention", "compare"):
        main(["inspect", what, "--model", str(tmp_path / "model"), "--out", str(tmp_path)])
        assert json.loads((tmp_path / f"{what}.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("no_shape_checks")
def test_a_vector_of_another_shape_has_no_neighbors(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(48,\) of an embedding"):
        nearest_tokens(tiny_model, torch.zeros(2, 48))


def test_pieces_of_a_text_have_its_log_probabilities(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    text = "The lamp 中文 naïve 🙂\nend"
    pieces = score_text(word_model, tokenizer, text)
    assert "".join(piece.text for piece in pieces) == text
    token_ids = tokenizer.encode(text)
    assert [i for piece in pieces for i in piece.token_ids] == token_ids
    with torch.no_grad():
        logits = word_model(torch.tensor([[tokenizer.eos_id, *token_ids]]))
    logprobs = logits.log_softmax(dim=2)[0, torch.arange(len(token_ids)), token_ids]
    assert sum(piece.logprob for piece in pieces) == pytest.approx(float(logprobs.sum()), rel=1e-5)
    assert "中" in [piece.text for piece in pieces]


def test_texts_that_cannot_be_scored_are_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        score_text(word_model, tokenizer, "")
    ids = tokenizer.encode("a word " * 80)
    assert len(score_text(word_model, tokenizer, tokenizer.decode(ids[:64]))) == 64
    with pytest.raises(ValueError, match="has 65 tokens; the context is of 64"):
        score_text(word_model, tokenizer, tokenizer.decode(ids[:65]))


def test_a_classifier_predicts_no_next_token(own_model: GPT2, tokenizer: Tokenizer) -> None:
    own_model.out_head = nn.Linear(own_model.config.emb_dim, 2)
    with pytest.raises(ValueError, match="output head has"):
        logit_lens(own_model, ids)
    with pytest.raises(ValueError, match="output head has"):
        score_text(own_model, tokenizer, "text")


@given(st.text(), st.floats(-20, 0))
def test_colored_text_never_controls_the_terminal(text: str, logprob: float) -> None:
    shown = surprise_text([Piece(text, [0], logprob)])
    plain = re.sub("\x1b\\[[0-9;]+m", "", shown)
    assert plain == escape(text)
    assert all(c.isprintable() or c == "\n" for c in plain)


def test_brackets_replace_colors() -> None:
    pieces = [Piece("a", [0], -0.1), Piece("b\n", [1], -3.0), Piece("c", [2], -9.0)]
    assert surprise_text(pieces, color=False) == "a[b\\n]\n[[[c]]]"


# ---- heads


def test_hand_made_patterns_score_one() -> None:
    period, tokens = 4, 8
    induction = torch.zeros(1, 2, tokens, tokens)
    for t in range(period, tokens):
        induction[0, 0, t, t - period + 1] = 1
    induction[0, 1, 1:, :-1] = torch.eye(tokens - 1)  # the other head: one token back
    assert induction_score(induction, period).tolist() == [1, 0]
    assert previous_token_score(induction).tolist() == [0, 1]


def test_uniform_attention_scores_what_it_must() -> None:
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    expected = np.mean([1 / 4, 1 / 5, 1 / 6])
    assert induction_score(uniform[None, None], 3).item() == pytest.approx(expected)
    expected = np.mean([1 / n for n in range(2, 7)])
    assert previous_token_score(uniform[None, None]).item() == pytest.approx(expected)


def test_head_scores_of_a_model(tiny_model: GPT2) -> None:
    scores = head_scores(tiny_model, period=8, batch_size=2)
    assert scores.induction.shape == scores.previous_token.shape == (3, 6)
    (layer, head, score), *_ = scores.strongest("induction")
    assert score == scores.induction.max() == scores.induction[layer, head]
    assert torch.equal(head_scores(tiny_model, 8, 2).induction, scores.induction)
    with pytest.raises(ValueError, match="from 2 to 32, half of the context"):
        head_scores(tiny_model, period=33)
    with pytest.raises(ValueError, match="previous_token, induction or first_token"):
        scores.strongest("other")
    with pytest.raises(ValueError, match="2 <= period"):
        induction_score(torch.ones(1, 1, 4, 4), 4)


# ---- pictures


def test_labels_show_unprintable_characters(tokenizer: Tokenizer) -> None:
    labels = token_labels(tokenizer, tokenizer.encode(" a\n\x1b中"))
    assert "".join(labels).startswith("\u2423a\\n\\x1b\\xe4")
    assert all(label.isprintable() for label in labels)


def test_averages_over_every_n_steps() -> None:
    assert averaged(np.arange(7.0), 3).tolist() == [1, 4, 6]


def test_more_than_three_figures_go_on_in_the_next_row(tmp_path: Path) -> None:
    names = ["loss", "margin", "accuracy", "reward"]
    row = json.dumps({"step": 1} | dict.fromkeys(names, 0.5))
    (tmp_path / "metrics.jsonl").write_text(row, encoding="utf-8")
    sizes = []
    for n in (3, 4):
        plot_figures(tmp_path / "metrics.jsonl", names[:n], tmp_path / "figures.png", "a run")
        header = (tmp_path / "figures.png").read_bytes()[16:24]
        sizes.append((int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")))
    (width, height), (width_of_four, height_of_four) = sizes
    assert width_of_four == width and height_of_four > 1.5 * height


def draw_everything(
    folder: Path, model: GPT2, tokenizer: Tokenizer
) -> dict[str, Callable[[Path], None]]:
    """One small picture of each kind, of a text with what is hard to draw."""
    token_ids = torch.tensor([tokenizer.encode("It cost $5, or $6:\t中文")])
    tokens = [str(i) for i in range(token_ids.shape[1])]
    attention = trace(model, token_ids)["blocks.0.attention"][0]
    rows = [{"step": step, "loss": 3 - step / 10} for step in range(8)]
    metrics = folder / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    runs = {"one": metrics, "two": metrics}
    lens, scores = logit_lens(model, token_ids), head_scores(model, 4)
    comparison = compare_models(model, model, token_ids)
    return {
        "heads": lambda picture: plot_attention(attention, tokens, picture, "all"),
        "head": lambda picture: plot_attention(attention[:1], tokens, picture, "one"),
        "lens": lambda picture: plot_lens(lens, tokenizer, token_ids, picture, "lens"),
        "change": lambda picture: plot_change(comparison, picture, "change"),
        "trace": lambda picture: plot_trace(trace(model, token_ids), picture, "trace"),
        "scores": lambda picture: plot_head_scores(scores, picture, "scores"),
        "runs": lambda picture: plot_runs(runs, picture, "runs", average_every=3),
    }


def test_pictures_are_drawn_without_a_warning(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, draw in draw_everything(tmp_path, word_model, tokenizer).items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_a_long_text_shows_its_last_positions(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_plots, "MOST_POSITIONS", 8)
    widths = []
    for tokens in (8, 20):
        token_ids = torch.tensor([tokenizer.encode("a b " * 20)[:tokens]])
        lens = logit_lens(word_model, token_ids)
        plot_lens(lens, tokenizer, token_ids, tmp_path / "lens.png", "lens")
        widths.append(int.from_bytes((tmp_path / "lens.png").read_bytes()[16:20], "big"))
    assert widths[0] == widths[1]


def test_without_matplotlib_every_picture_says_what_to_install(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = draw_everything(tmp_path, word_model, tokenizer)
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    for draw in draws.values():
        with pytest.raises(ImportError, match=r"pip install 'gpt2mini\[plots\]'"):
            draw(tmp_path / "no.png")


def test_pictures_refuse_what_they_cannot_show(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(heads, 3, 3\) for 3 tokens, not \(1, 2, 2\)"):
        plot_attention(torch.ones(1, 2, 2), ["a", "b", "c"], tmp_path / "a.png", "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="has no metric 'loss'"):
        plot_runs({"run": tmp_path / "metrics.jsonl"}, tmp_path / "a.png", "")
    with pytest.raises(ValueError, match="average_every must be at least 1"):
        plot_runs({}, tmp_path / "a.png", "", average_every=0)


# ---- the command


@pytest.fixture
def inspect_here(word_folder: Path) -> Callable[..., None]:
    def inspect(*arguments: str | Path) -> None:
        main(["inspect", *map(str, arguments), "--model", str(word_folder)])

    return inspect


def test_the_command_runs_as_a_user_runs_it(tmp_path: Path) -> None:
    done = run("inspect", "trace", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "After 'The old keeper" in done.stdout
    contents = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert len(contents["lengths"]) == 12


@pytest.mark.parametrize(
    ("what", "pictures", "said"),
    [
        ("trace", ["trace.png"], "Names in the trace"),
        ("attention", ["attention.png", "heads.png"], "induction heads"),
        ("lens", ["lens.png"], "nats per token"),
        ("compare", ["compare.png"], "largest relative change first"),
    ],
)
def test_the_command_shows_and_writes(
    what: str,
    pictures: list[str],
    said: str,
    inspect_here: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inspect_here(what, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert said in shown and "\x1b" not in shown
    paths_and_text = (str(tmp_path.parent), "[The]")
    lines = [line for line in shown.splitlines() if not any(x in line for x in paths_and_text)]
    assert max(map(len, lines)) <= 80
    json.loads((tmp_path / f"{what}.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "--text", ""], "the text is empty"),
        (["attention", "--layer", "3"], "--layer must be from 0 to 2, not 3"),
        (["compare", "--other", "gpt2-nano"], "only models of the same shape can be compared"),
        (["lens", "--text", "word " * 80], "do not fit the context of 64"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    arguments: list[str], message: str, inspect_here: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        inspect_here(*arguments, "--out", tmp_path)


@pytest.mark.parametrize("what", ["trace", "compare"])
def test_the_command_looks_at_a_model_with_its_adapter(
    what: str, word_folder: Path, tmp_path: Path
) -> None:
    """Beside the base the adapter is what differs; beside itself nothing does."""
    tuned = GPT2.from_pretrained(word_folder)
    add_lora(tuned, rank=2)
    for layer in lora_layers(tuned).values():
        nn.init.normal_(layer.lora_B)
    adapter = tmp_path / "adapter"
    save_adapter(tuned, adapter)
    model = ["--model", str(word_folder), "--adapter", str(adapter), "--text", "The old keeper"]
    done = run("inspect", what, *model, "--other" if what == "compare" else "--layer",
               str(adapter) if what == "compare" else "0", "--out", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{what}.json").read_text(encoding="utf-8"))
    if what == "compare":
        assert f"{word_folder} with the adapter {adapter}" in done.stdout
        assert max(row["relative"] for row in found["layers"]) < 1e-6
    else:
        ids = torch.tensor([Tokenizer.from_pretrained(word_folder).encode("The old keeper")])
        best = tuned(ids)[0, -1].softmax(dim=0).max().item()
        assert max(found["next_token"].values()) == pytest.approx(best, rel=1e-4)
