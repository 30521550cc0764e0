"""Quantized weights: what rounding may cost, and what stays as it was."""

import io
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, enlarge, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gpt2mini import GPT2, GPT2Config, Tokenizer, generate, quantize, quantized_layers, resize_vocab
from gpt2mini.cache import LayerCache
from gpt2mini.classification import last_token_logits
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch
from gpt2mini.evaluation import perplexity
from gpt2mini.generation import stream
from gpt2mini.lora import add_lora, merge_lora
from gpt2mini.losses import next_token_loss
from gpt2mini.model import MultiHeadAttention, TiedHead, TransformerBlock
from gpt2mini.quantize import QuantizedBlock
from gpt2mini.quantized_layers import (
    FORMATS,
    GROUP,
    BlockedBfloat16Linear,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    PackedHalfLinear,
    pack,
    quantized_linear,
    unpack,
)
from gpt2mini.training import Settings, adamw, train

each_format = pytest.mark.parametrize("weights", FORMATS)
GENERAL = sample("general.txt")


def random_linear(outputs: int, inputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


# ---- one layer


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e4), inputs=st.integers(1, 70))
def test_int8_is_off_by_half_a_step_at_most(seed: int, scale: float, inputs: int) -> None:
    weight = random_linear(5, inputs, seed).weight.detach() * scale
    layer = Int8Linear(weight, None)
    error = (layer.dequantized() - weight).abs()
    assert (error <= layer.scales.float()[:, None] * 0.501).all()
    steps = weight.abs().amax(dim=1) / layer.scales.float()  # of the largest weight
    assert ((steps - 127).abs() < 0.5).all()


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-6, 1e4),
    shift=st.floats(-3, 3),
    inputs=st.integers(1, 70),
)
def test_int4_rounds_each_group_to_16_levels_of_its_own(
    seed: int, scale: float, shift: float, inputs: int
) -> None:
    weight = (random_linear(5, inputs, seed).weight.detach() + shift) * scale
    rounded = Int4Linear(weight, None).dequantized()
    for start in range(0, inputs, GROUP):
        group, found = weight[:, start : start + GROUP], rounded[:, start : start + GROUP]
        lowest, highest = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        step = (highest - lowest) / 15  # (rows)
        off = 16.1 / 256  # bfloat16 rounds the step, up to 8 of which lie beside a middle, and that
        assert ((found - group).abs() <= (0.5 + off) * step[:, None]).all()
        steps = (found - lowest[:, None]) / step[:, None]
        assert ((steps - steps.round()).abs() < off).all()


@pytest.mark.parametrize("block", [2, 32, 64])
def test_two_integers_of_a_byte_come_back(block: int) -> None:
    integers = torch.randint(16, (128, 6), dtype=torch.uint8)
    packed = pack(integers, block)
    assert packed.numel() == integers.numel() / 2
    assert torch.equal(unpack(packed), integers)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_row_of_zeros_stays_one(weights: str) -> None:
    layer = quantized_linear(torch.zeros(2, 8), None, weights).eval()
    assert torch.equal(layer(torch.ones(1, 8)), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("weights", "error"), [("int8", 1 / 250), ("int4", 1 / 14), ("fp16", 2**-11), ("bf16", 2**-8)]
)
def test_rounded_weights_lie_within_their_grid(weights: str, error: float) -> None:
    weight = random_linear(7, 33).weight.detach()
    rounded = quantized_linear(weight, None, weights).dequantized()
    assert (rounded - weight).abs().max() <= error * weight.abs().max()


@each_format
@pytest.mark.parametrize("inputs", [1, 7, 31, 48, 64, 768])
@pytest.mark.parametrize("outputs", [1, 3, 50])
def test_few_rows_and_many_give_the_product_with_the_rounded_weight(
    weights: str, inputs: int, outputs: int
) -> None:
    """Whatever the shape, on both sides of the number of rows at which the way changes."""
    linear = random_linear(outputs, inputs)
    layer = quantized_linear(linear.weight, linear.bias, weights).eval()
    for rows in (1, 2, 3, 5, 8, 32, 33):
        x = torch.randn(rows, inputs)
        with torch.no_grad():
            expected = nn.functional.linear(x, layer.dequantized(), linear.bias)
            size = nn.functional.linear(x.abs(), linear.weight.abs(), linear.bias.abs())
            assert ((layer(x) - expected).abs() <= 2**-7 * size).all()


@each_format
def test_layers_take_any_leading_axes(weights: str) -> None:
    layer = quantized_linear(random_linear(5, 32).weight, None, weights).eval()
    x = torch.randn(2, 3, 4, 32)
    with torch.no_grad():
        assert layer(x).shape == (2, 3, 4, 5)
        torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=0, atol=0.02)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("weights", "bytes_each"), [("int8", 1), ("int4", 5 / 8), ("bf16", 2)])
def test_int8_weights_take_a_quarter_of_the_memory(
    weights: str, bytes_each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layers, "has_onednn", lambda: False)  # whose order is its own
    config = replace(TINY, emb_dim=192)  # whole groups and blocks of int4
    model = GPT2(config).quantize(weights)
    linear = sum(p.numel() for b in GPT2(config).trf_blocks for p in b.parameters() if p.ndim == 2)
    kept = [b for b in model.trf_blocks.buffers() if b.ndim > 1]
    assert sum(b.numel() * b.element_size() for b in kept) == bytes_each * linear
    assert not [p for p in model.trf_blocks.parameters() if p.ndim == 2]


# ---- a model


@each_format
def test_logits_stay_near(own_model: GPT2, weights: str) -> None:
    ids = random_ids(2, 20)
    with torch.no_grad():
        before = own_model(ids)
        after = own_model.quantize(weights)(ids)
    error = (after - before).norm() / before.norm()
    assert error < {"int8": 0.05, "int4": 0.3, "fp16": 2e-3, "bf16": 0.02}[weights]


@pytest.mark.parametrize(
    ("weights", "cost"), [("int8", 0.005), ("int4", 0.05), ("fp16", 2e-4), ("bf16", 0.005)]
)
def test_perplexity_of_the_bundled_model_hardly_changes(weights: str, cost: float) -> None:
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    model, text = GPT2.from_pretrained("gpt2-nano"), GENERAL.read_text(encoding="utf-8")[:2500]
    before = perplexity(model, tokenizer, text).loss
    assert abs(perplexity(model.quantize(weights), tokenizer, text).loss - before) < cost  # nats


@pytest.mark.parametrize(("weights", "cost"), [("int8", 0.01), ("int4", 0.05)])
def test_perplexity_through_the_kernels_too(
    monkeypatch: pytest.MonkeyPatch, weights: str, cost: float
) -> None:
    """With many rows weights are converted first; here the kernel for few rows multiplies all."""
    monkeypatch.setitem(quantized_layers.FEW_ROWS, weights, 10**9)
    tokenizer, model = Tokenizer.from_pretrained("gpt2-nano"), GPT2.from_pretrained("gpt2-nano")
    text = GENERAL.read_text(encoding="utf-8")[:1500]
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        (before, count), (after, _) = (
            next_token_loss(logits(ids), ids)
            for logits in (model, deepcopy(model).quantize(weights))
        )
    assert abs(after - before) / count < cost


@each_format
def test_the_head_keeps_digits_for_differences(weights: str) -> None:
    """A trained GPT-2 gives logits near -100, all of them: in bfloat16 they would be multiples of
    a half."""
    model = GPT2(TINY)
    enlarge(model)
    with torch.no_grad():
        model.tok_emb.weight += 8 * torch.randn(TINY.emb_dim, generator=torch.manual_seed(0))
        hidden = torch.randn(1, TINY.emb_dim)
        before = model.out_head(hidden)
        after = model.quantize(weights).eval().out_head(hidden)
    assert before.abs().mean() > 20
    assert (after - before).abs().max() < 0.1


@each_format
def test_cached_generation_is_that_of_the_whole_text(own_model: GPT2, weights: str) -> None:
    model, ids = own_model.quantize(weights), random_ids(1, 5)
    text = generate(model, ids, 20, temperature=0).token_ids
    with torch.no_grad():
        logits = model(text[:, :-1])[0, 4:]  # (20, vocab): of each new token, read at once
    chosen = logits.gather(1, text[0, 5:, None])[:, 0]
    assert (logits.amax(dim=1) - chosen).max() < 0.05 * logits.std()


@each_format
def test_padding_changes_nothing(own_model: GPT2, weights: str) -> None:
    model = own_model.quantize(weights)
    short, long = random_ids(1, 5), random_ids(1, 9, seed=1)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        alone, together = model(short)[0], model(ids, mask)[0, 4:]
    error = (together - alone).norm() / alone.norm()
    assert error < 0.01


@pytest.mark.parametrize("inputs", [48, 64])  # without the kernels and with them
@each_format
def test_a_row_does_not_depend_on_its_neighbors(weights: str, inputs: int) -> None:
    """Activations are not quantized, so no scale is shared: here a neighbor is a thousand times
    as large."""
    layer = quantized_linear(random_linear(6, inputs).weight, None, weights).eval()
    x = torch.randn(3, inputs)
    with torch.no_grad():
        alone = layer(x)[0]
        x[1:] *= 1000
        assert torch.equal(layer(x)[0], alone)


@each_format
def test_a_copy_is_a_model_of_its_own(own_model: GPT2, weights: str) -> None:
    model, ids = own_model.quantize(weights), random_ids(2, 7)
    copy = deepcopy(model)
    with torch.no_grad():
        expected = model(ids)
        model.tok_emb.weight.zero_()
        assert torch.equal(copy(ids), expected)


@each_format
def test_quantising_gives_back_the_model_in_eval_mode_frozen(weights: str) -> None:
    model = GPT2(TINY)
    state = torch.random.get_rng_state()
    assert model.quantize(weights) is model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@each_format
def test_a_quantized_model_needs_no_no_grad(weights: str) -> None:
    model = GPT2(TINY).quantize(weights)
    logits = model(random_ids(1, 5))
    assert logits.shape == (1, 5, TINY.vocab_size) and not logits.requires_grad


def test_fp16_uses_the_packed_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_linear(4, 8).weight
    found = type(quantized_linear(weight, None, "fp16"))
    assert found is (PackedHalfLinear if quantized_layers.has_fbgemm() else HalfLinear)
    monkeypatch.setattr(quantized_layers, "has_fbgemm", lambda: False)
    assert type(quantized_linear(weight, None, "fp16")) is HalfLinear


def test_bf16_uses_the_ordered_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = random_linear(50, 64), torch.randn(3, 64)
    layer = quantized_linear(linear.weight, linear.bias, "bf16").eval()
    assert type(layer) is (BlockedBfloat16Linear if quantized_layers.has_onednn() else HalfLinear)
    monkeypatch.setattr(quantized_layers, "has_onednn", lambda: False)
    plain = quantized_linear(linear.weight, linear.bias, "bf16").eval()
    assert type(plain) is HalfLinear
    assert torch.equal(layer.dequantized(), plain.dequantized())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), rtol=0.01, atol=0.01)


@each_format
def test_copies_multiply_alike(weights: str) -> None:
    layer = quantized_linear(random_linear(5, 32).weight.detach(), None, weights).eval()
    written = io.BytesIO()
    torch.save(layer, written)
    written.seek(0)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(deepcopy(layer)(x), layer(x))
        assert torch.equal(torch.load(written, weights_only=False)(x), layer(x))


def test_without_its_kernel_int8_converts_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int8Linear(random_linear(4, 32).weight, None).eval(), torch.randn(2, 32)
    with torch.no_grad():
        with_kernel = layer(x)
        monkeypatch.setattr(quantized_layers, "INT8_KERNEL", None)
        torch.testing.assert_close(layer(x), with_kernel, rtol=0, atol=0.02)


@pytest.mark.parametrize("block", [None, 64])  # no kernel; one with another order of bytes
def test_without_its_kernel_int4_converts_the_weights(
    monkeypatch: pytest.MonkeyPatch, block: int | None
) -> None:
    weight, x = random_linear(40, 64).weight, torch.randn(2, 64)
    here = Int4Linear(weight, None).eval()
    with torch.no_grad():
        expected = here(x)
        monkeypatch.setattr(quantized_layers, "int4_block", lambda: block)
        elsewhere = Int4Linear(weight, None).eval()
        monkeypatch.setattr(quantized_layers, "int4_block", lambda: None)
        assert torch.equal(elsewhere.dequantized(), here.dequantized())
        assert_close(elsewhere(x), x @ here.dequantized().T)
        assert_close(here(x), expected, rtol=0, atol=0.02)


def test_int4_keeps_eight_bits_in_the_head(own_model: GPT2) -> None:
    head = own_model.quantize("int4").out_head
    assert isinstance(head, quantize.QuantizedHead) and isinstance(head.centered, Int8Linear)


def test_streaming_a_quantized_model(own_model: GPT2) -> None:
    tokenizer, model = Tokenizer.from_pretrained("gpt2-nano"), GPT2.from_pretrained("gpt2-nano")
    model.quantize("int8").train()  # streaming reads in eval mode and gives the mode back
    pieces = stream(model, tokenizer, "Once", 5, temperature=0)
    assert next(pieces)
    assert all(module.training for module in model.modules())


# ---- beside other parts


def test_a_classifier_keeps_its_head(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 3)
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        before = last_token_logits(own_model, ids, mask)
        own_model.quantize("int8")
        assert type(own_model.out_head) is nn.Linear
        after = last_token_logits(own_model, ids, mask)
    assert (after - before).norm() < 0.1 * before.norm()


@each_format
@pytest.mark.parametrize("has_bias", [True, False])
def test_query_key_and_value_become_one_product(weights: str, has_bias: bool) -> None:
    block = TransformerBlock(replace(TINY, qkv_bias=has_bias)).eval()
    x, attn = torch.randn(2, 6, TINY.emb_dim), block.attn
    apart = [
        quantized_linear(p.weight, p.bias, weights) for p in (attn.query, attn.key, attn.value)
    ]
    with torch.no_grad():
        expected = torch.cat([layer.eval()(x) for layer in apart], dim=2)
        assert_close(QuantizedBlock(block, weights).eval().query_key_value(x), expected)


def test_a_query_of_ones_own_is_left_alone(own_model: GPT2) -> None:
    class OwnQuery(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    own_model.get_submodule("trf_blocks.0.attn").query = OwnQuery()
    width = TINY.emb_dim
    own_model.get_submodule("trf_blocks.1.attn").query = nn.Linear(width, width, bias=False)
    ids = random_ids(1, 6)
    with torch.no_grad():
        before = own_model(ids)
        assert (own_model.quantize()(ids) - before).norm() < 0.1 * before.norm()
    kinds = [type(block) for block in own_model.trf_blocks]
    assert kinds == [TransformerBlock, TransformerBlock, QuantizedBlock]
    assert generate(own_model, ids, 4, temperature=0).token_ids.shape == (1, 10)


class Recorder:
    """A hook that belongs to something, as most do."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def note(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        self.seen.append(output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["trf_blocks.0", "trf_blocks.0.mlp.mlp_out"])
def test_hooks_and_their_handles_stay_in_force(
    own_model: GPT2, part: str, dtype: torch.dtype
) -> None:
    recorder, ids = Recorder(), random_ids(1, 6)
    handle = own_model.to(dtype).get_submodule(part).register_forward_hook(recorder.note)
    own_model(ids)  # an output with gradients, which cannot be copied
    own_model.quantize()
    recorder.seen.clear()
    own_model(ids)
    assert [output.shape for output in recorder.seen] == [(1, 6, TINY.emb_dim)]
    handle.remove()
    own_model(ids)
    assert len(recorder.seen) == 1


def test_a_steering_hook_can_be_removed(own_model: GPT2) -> None:
    plain, ids = deepcopy(own_model).quantize(), random_ids(1, 6)
    hook = own_model.trf_blocks[1].register_forward_hook(lambda *call: call[2] + 5)
    steered = own_model.quantize()(ids)
    hook.remove()
    assert (own_model(ids) - plain(ids)).norm() < 0.05 * (steered - plain(ids)).norm()


@pytest.mark.parametrize("name", ["norm1", "norm2", "mlp_in", "mlp_out", "attn_out"])
def test_layers_of_a_quantized_block_can_be_replaced_and_hooked(own_model: GPT2, name: str) -> None:
    model, ids = own_model.quantize(), random_ids(1, 6)
    before, layer = model(ids), model.trf_blocks[0].get_submodule(name)
    model.trf_blocks[0].add_module(name, nn.Sequential(layer, nn.Threshold(0.0, 3.0)))
    replaced = model(ids)
    model.trf_blocks[0].add_module(name, layer)
    assert torch.equal(model(ids), before)
    recorder = Recorder()
    layer.register_forward_hook(recorder.note)
    layer.register_forward_hook(lambda *call: F.threshold(call[2], 0.0, 3.0))
    assert torch.equal(model(ids), replaced) and not torch.allclose(replaced, before)
    assert [output.shape[:2] for output in recorder.seen] == [(1, 6)]


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_quantized_model_can_change_its_dtype(
    own_model: GPT2, weights: str, dtype: torch.dtype
) -> None:
    model, ids = own_model.quantize(weights), random_ids(1, 6)
    before = model(ids)
    after = model.to(dtype)(ids)
    assert after.dtype == dtype
    assert (after.float() - before).norm() < 0.05 * before.norm()


@each_format
def test_a_context_of_one_token_can_be_quantized(weights: str) -> None:
    model = GPT2(replace(TINY, context_length=1)).quantize(weights)
    assert {type(block) for block in model.trf_blocks} == {QuantizedBlock}


def test_an_untied_head_is_quantized_too(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    ids = random_ids(1, 5)
    with torch.no_grad():
        before, state = own_model(ids), torch.random.get_rng_state()
        assert (own_model.quantize()(ids) - before).norm() < 0.1 * before.norm()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(own_model.out_head, quantize.QuantizedHead)


def test_adapters_are_merged_before(own_model: GPT2) -> None:
    add_lora(own_model)
    with pytest.raises(ValueError, match=r"LoRALinear.*merge_lora"):
        own_model.quantize("int8")
    merge_lora(own_model)
    ids = random_ids(1, 5)
    with torch.no_grad():
        before = own_model(ids)
        assert (own_model.quantize("int8")(ids) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("weights", ["int3", "", "INT8"])
def test_an_unknown_format_is_refused(own_model: GPT2, weights: str) -> None:
    with pytest.raises(ValueError, match="one of int8, int4, fp16, bf16"):
        own_model.quantize(weights)


@each_format
def test_what_needs_the_weights_is_refused(own_model: GPT2, weights: str, tmp_path: Path) -> None:
    model = own_model.quantize(weights)
    for needs_weights in (
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: add_lora(model),
        lambda: resize_vocab(model, 300),
        lambda: model.quantize(weights),
    ):
        with pytest.raises(ValueError, match=r"quantized.*load the model again"):
            needs_weights()
    assert not (tmp_path / "model").exists()


@each_format
def test_training_is_refused(own_model: GPT2, weights: str) -> None:
    model, ids = own_model.quantize(weights), random_ids(1, 5)
    with pytest.raises(RuntimeError, match=r"cannot be trained.*quantize"):
        model.train()(ids)
    model.eval().tok_emb.weight.requires_grad = True
    with pytest.raises(RuntimeError, match=r"cannot be trained.*quantize"):
        model(ids)


def test_the_training_loop_refuses_a_quantized_model(own_model: GPT2) -> None:
    model, ids = own_model.quantize("int8"), random_ids(1, 5)
    model.tok_emb.weight.requires_grad = True
    settings = Settings(steps=1, schedule=lambda step: 1.0, progress=False, recompute=False)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        list(train(model, [Batch(ids, ids)], [adamw(model, lr=1e-3)], settings))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_can_be_quantized_and_called(
    own_model: GPT2, weights: str, dtype: torch.dtype
) -> None:
    small = own_model.to(dtype).quantize(weights)
    assert not any(tensor.requires_grad for tensor in (*small.parameters(), *small.buffers()))
    assert small(random_ids(2, 9)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 33])
def test_int8_holds_in_float16_what_float16_holds(rows: int) -> None:
    """A sum of products with the integers, of up to 127, would overflow."""
    layer = Int8Linear(torch.full((8, 3072), 0.1, dtype=torch.half), None).eval()
    found = layer(torch.full((rows, 3072), 0.5, dtype=torch.half))
    assert_close(found, torch.full((rows, 8), 153.6).half(), atol=1, rtol=0)


def test_a_model_in_bfloat16_can_be_quantized() -> None:
    model = GPT2(GPT2Config(50, 16, 32, 2, 2)).to(torch.bfloat16).quantize("int8")
    out = generate(model, torch.tensor([[1, 2]]), 4, temperature=0)
    assert out.token_ids.shape == (1, 6) and math.isfinite(float(out.logprobs.sum()))


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_a_compiled_model_still_generates(own_model: GPT2, no_shape_checks: None) -> None:
    """Compiled without a code generator: what can break is the tracing of Python."""
    model, ids = own_model.quantize("int8"), random_ids(1, 5)
    expected = generate(model, ids, 8, temperature=0).token_ids
    for block in model.trf_blocks:
        block.compile(backend="eager", dynamic=True)
    assert torch.equal(generate(model, ids, 8, temperature=0).token_ids, expected)


@each_format
def test_a_state_dict_holds_the_weights(weights: str, own_model: GPT2) -> None:
    ids = random_ids(2, 9)
    expected = own_model.quantize(weights)(ids)
    torch.manual_seed(1)
    other = GPT2(own_model.config).quantize(weights)
    assert not torch.equal(other(ids), expected)
    other.load_state_dict(own_model.state_dict())
    assert torch.equal(other(ids), expected)


# ---- the fused block proves itself


def change_attention(monkeypatch: pytest.MonkeyPatch, window: int, scale: float | None) -> None:
    """As an edit of model.py does: another window, another scale, in the class itself."""

    def forward(
        self: MultiHeadAttention,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        query, key, value = map(self.split_heads, self.project(x, last_only))
        if cache is not None:
            key, value = cache.append(key, value)
        columns = torch.arange(key.shape[2])
        rows = columns[-query.shape[2] :, None]
        mask = (columns <= rows) & (columns > rows - window)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return self.attn_out(context.transpose(1, 2).flatten(2))

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)


@each_format
@pytest.mark.parametrize(("window", "scale"), [(8, None), (48, None), (64, 0.2)])
def test_a_changed_attention_stays_in_force(
    monkeypatch: pytest.MonkeyPatch, own_model: GPT2, weights: str, window: int, scale: float | None
) -> None:
    change_attention(monkeypatch, window, scale)
    ids = random_ids(2, TINY.context_length)
    with torch.no_grad():
        expected = own_model(ids)
        found = own_model.quantize(weights)(ids)
    assert {type(block) for block in own_model.trf_blocks} == {TransformerBlock}
    assert (found - expected).norm() < (0.3 if weights == "int4" else 0.05) * expected.norm()


def test_a_plain_block_is_fused(own_model: GPT2) -> None:
    own_model.quantize("int8")
    assert {type(block) for block in own_model.trf_blocks} == {QuantizedBlock}


def test_a_head_that_scales_its_output_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, own_model: GPT2
) -> None:
    plain = TiedHead.forward
    monkeypatch.setattr(TiedHead, "forward", lambda self, hidden: 1.05 * plain(self, hidden))
    assert type(own_model.quantize("int8").out_head) is TiedHead
