"""Attention weights are those of the attention that the model has, whatever it computes."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import TINY, random_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gpt2mini import GPT2, generate
from gpt2mini.inspection import head_scores, patched, trace
from gpt2mini.model import MultiHeadAttention, TransformerBlock
from gpt2mini.training.memory import activation_checkpointing, recompute_activations

TOKENS = 9
ids = random_ids(2, TOKENS)
MASK = torch.tensor([[1] * TOKENS, [0] * 4 + [1] * 5])
PLACES = torch.arange(TOKENS)
CAUSAL = PLACES[:, None] >= PLACES  # (tokens, tokens)
NAME = "blocks.1.attention"


class OwnAttention(MultiHeadAttention):
    """Attention with changes; it also writes down its weights, computed by hand."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__(TINY)
        self.scale = 1 / math.sqrt(TINY.head_dim) if scale is None else scale
        self.by_hand = torch.empty(0)

    def forward(
        self, x: Tensor, attn_mask: Any = None, cache: Any = None, last_only: bool = False
    ) -> Tensor:
        query, key, value = (
            self.split_heads(part(x)) for part in (self.query, self.key, self.value)
        )
        causal = CAUSAL[: x.shape[1], : x.shape[1]]
        query, key, bias = self.changed(query, key, causal if attn_mask is None else attn_mask)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * self.scale
        scores = scores + bias if bias.is_floating_point() else scores.where(bias, -math.inf)
        exponentials = scores.exp()
        self.by_hand = (exponentials / exponentials.sum(dim=3, keepdim=True)).detach()
        context = self.call(query, key, value, bias)
        return self.attn_out(context.transpose(1, 2).flatten(2))

    def changed(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, mask

    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, bias, scale=self.scale)


class SlidingWindow(OwnAttention):
    def changed(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, mask & (PLACES[:, None] - PLACES < 3)


class ALiBi(OwnAttention):
    def changed(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slopes = 2.0 ** -torch.arange(1, TINY.n_heads + 1)[:, None, None]  # (heads, 1, 1)
        bias = slopes * (PLACES - PLACES[:, None])  # (heads, tokens, tokens)
        return query, key, torch.zeros(()).masked_fill(~mask, -math.inf) + bias


class QueryKeyNorm(OwnAttention):
    def changed(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(query, dim=3), F.normalize(key, dim=3), mask


class IsCausal(OwnAttention):
    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query=query, key=key, value=value, is_causal=True)


class GroupedQueries(OwnAttention):
    def changed(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key[:, ::3].repeat_interleave(3, dim=1), mask

    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        arguments = (query, key[:, ::3], value[:, ::3], bias, 0.0, False)
        return F.scaled_dot_product_attention(*arguments, scale=self.scale, enable_gqa=True)


class WithoutTheFunction(OwnAttention):
    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return self.by_hand @ value


class CalledTwice(OwnAttention):
    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return super().call(query, key, super().call(query, key, value, bias), bias)


class HeadsAsBatch(OwnAttention):
    def call(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, bias).unflatten(
            0, (-1, TINY.n_heads)
        )


def with_attention(
    model: GPT2, attention: MultiHeadAttention, layer: int = 1
) -> MultiHeadAttention:
    """Put an attention of one's own into a block, with the weights of the one before."""
    block = model.trf_blocks[layer]
    assert isinstance(block, TransformerBlock)
    attention.load_state_dict(block.attn.state_dict())
    block.attn = attention.eval()
    return attention


CHANGES: dict[str, Callable[[], OwnAttention]] = {
    "unchanged": OwnAttention,
    "another scale": lambda: OwnAttention(scale=0.11),
    "sliding window": SlidingWindow,
    "ALiBi": ALiBi,
    "query-key norm": QueryKeyNorm,
    "is_causal": IsCausal,
    "grouped queries": GroupedQueries,
}


@pytest.mark.parametrize(
    ("change", "mask"),
    [(change, None) for change in CHANGES]
    + [(change, MASK) for change in CHANGES if change != "is_causal"],  # which takes no mask
)
def test_traced_weights_are_those_of_the_models_own_attention(
    own_model: GPT2, change: str, mask: Tensor | None
) -> None:
    attention = with_attention(own_model, CHANGES[change]())
    found = trace(own_model, ids, mask)
    assert isinstance(attention, OwnAttention)
    assert_close(found[NAME], attention.by_hand, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(found["logits"], own_model(ids, mask))


@pytest.mark.parametrize("change", CHANGES)
def test_patching_own_attention_with_its_own_weights_changes_nothing(
    own_model: GPT2, change: str
) -> None:
    with_attention(own_model, CHANGES[change]())
    own = trace(own_model, ids)
    with patched(own_model, {NAME: own[NAME], "blocks.1.head.2": own["blocks.1.head.2"]}):
        assert_close(own_model(ids), own["logits"], atol=1e-4, rtol=1e-5)
    with patched(own_model, {NAME: torch.eye(TOKENS)}):
        assert not torch.allclose(own_model(ids), own["logits"], atol=1e-2)


def test_a_query_without_keys_has_no_weights(own_model: GPT2) -> None:
    class FirstTokenBlind(OwnAttention):
        def changed(
            self, query: Tensor, key: Tensor, mask: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            return query, key, mask & (PLACES[:, None] > 0)

    with_attention(own_model, FirstTokenBlind())
    found = trace(own_model, ids)
    assert not found[NAME][:, :, 0].any()
    assert found[NAME].isfinite().all()
    assert not found["blocks.1.head.0"][:, 0].any()


# ---- attention that cannot be observed


@pytest.mark.parametrize("own", [WithoutTheFunction, CalledTwice, HeadsAsBatch])
def test_weights_that_cannot_be_observed_are_refused_by_name(
    own_model: GPT2, own: type[OwnAttention]
) -> None:
    with_attention(own_model, own())
    message = (
        r"blocks\.1\.{} cannot be observed: blocks\.1, a TransformerBlock, must call "
        r"F\.scaled_dot_product_attention exactly once, with a query of the shape \(batch, 6, "
    )
    for part in ("attention", "head.4"):
        name = f"blocks.1.{part}"
        with pytest.raises(ValueError, match=message.format(part)):
            trace(own_model, ids, names=[name])
        with (
            patched(own_model, {name: lambda x: 0 * x}),
            pytest.raises(ValueError, match=message.format(part)),
        ):
            own_model(ids)
    with pytest.raises(ValueError, match=message.format("attention")):
        head_scores(own_model, period=4)


def test_the_rest_of_the_trace_is_given(own_model: GPT2) -> None:
    with_attention(own_model, WithoutTheFunction())
    found = trace(own_model, ids)
    assert_close(found["logits"], own_model(ids))
    assert found["blocks.0.attention"].shape == (2, 6, TOKENS, TOKENS)
    assert len(found.of_each_block("attn_out")) == 3
    assert NAME not in found and "blocks.1.head.0" not in found
    for read in (lambda: found[NAME], lambda: found.of_each_block("attention")):
        with pytest.raises(ValueError, match=r"blocks\.1\.attention cannot be observed"):
            read()


class Parallel(nn.Module):
    """A block of one's own, with other names inside."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.mixer, self.norm, self.mlp = block.attn, block.norm1, block.mlp

    def forward(self, x: Tensor, attn_mask: Any = None, cache: Any = None) -> Tensor:
        normed = self.norm(x)
        return x + self.mixer(normed, attn_mask, cache) + F.relu(normed)


def test_a_block_without_the_usual_modules_is_refused_for_these_names_alone(
    own_model: GPT2,
) -> None:
    block = own_model.trf_blocks[1]
    assert isinstance(block, TransformerBlock)
    own_model.trf_blocks[1] = Parallel(block)
    found = trace(own_model, ids)
    assert set(found.not_observed) == {"blocks.1.attn_out", "blocks.1.mlp_out"}
    assert_close(found[NAME].sum(dim=3), torch.ones(2, 6, TOKENS))
    for part, module in (("attn_out", "attn"), ("mlp_out", "mlp")):
        message = f"blocks.1, a Parallel, must have a module '{module}' and call it exactly once"
        with pytest.raises(ValueError, match=message):
            found[f"blocks.1.{part}"]
        with (
            patched(own_model, {f"blocks.1.{part}": 0}),
            pytest.raises(ValueError, match=message),
        ):
            own_model(ids)


def test_blocks_that_run_twice_have_no_single_activation(own_model: GPT2) -> None:
    own_model.trf_blocks[1] = own_model.trf_blocks[0]
    found = trace(own_model, ids)
    with pytest.raises(ValueError, match=r"blocks\.0, a TransformerBlock, must run exactly once"):
        found["blocks.0.stream"]
    assert "blocks.2.stream" in found


# ---- where a patch holds


def test_patches_of_weights_are_applied_from_the_outside_in(tiny_model: GPT2) -> None:
    before = trace(tiny_model, ids)[NAME]
    with (
        patched(tiny_model, {NAME: lambda x: x + 1}),
        patched(tiny_model, {NAME: lambda x: 2 * x}),
    ):
        assert_close(trace(tiny_model, ids)[NAME], 2 * (before + 1))
    assert_close(trace(tiny_model, ids)[NAME], before)


def test_a_patch_is_of_one_model(own_model: GPT2, tiny_model: GPT2) -> None:
    with patched(own_model, {NAME: 0}):
        copy = deepcopy(own_model)
        assert trace(tiny_model, ids)[NAME].any()
        assert not trace(own_model, ids)[NAME].any()
        with torch.no_grad():
            copy.tok_emb.weight.zero_()
        assert not torch.equal(copy(ids), own_model(ids))
    assert trace(own_model, ids)[NAME].any()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_an_exception_inside_a_block_nothing_is_patched(
    own_model: GPT2, error: type[BaseException]
) -> None:
    before = trace(own_model, ids)

    def fail(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(error), patched(own_model, {NAME: 0, "blocks.1.mlp_out": fail}):
        own_model(ids)
    query = torch.randn(1, TINY.n_heads, 2, 8)
    assert F.scaled_dot_product_attention(query, query, query).any()
    assert_close(trace(own_model, ids)[NAME], before[NAME])


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize(
    "saving_memory", [activation_checkpointing, lambda model: recompute_activations()]
)
def test_recomputed_activations_are_patched_too(
    own_model: GPT2, saving_memory: Callable[..., Any], patched_first: bool
) -> None:
    patches: dict[str, Any] = {NAME: lambda x: x**2, "blocks.1.head.0": lambda x: 3 * x}
    gradients = []
    for model in (own_model, deepcopy(own_model)):
        contexts = [patched(model, patches)]
        if model is not own_model:
            contexts.insert(1 if patched_first else 0, saving_memory(model))
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            model(ids).square().mean().backward()
        gradients.append(model.tok_emb.weight.grad)
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_in_float32_or_better(own_model: GPT2, dtype: torch.dtype) -> None:
    own_model.to(dtype)
    attention = trace(own_model, ids)[NAME]
    assert attention.dtype == torch.promote_types(dtype, torch.float32)
    with patched(own_model, {NAME: attention}), torch.inference_mode():
        assert own_model(ids).dtype == dtype


def test_dropout_comes_after_patched_weights(own_model: GPT2) -> None:
    block = own_model.trf_blocks[1]
    assert isinstance(block, TransformerBlock)
    block.attn.drop_rate = 0.5
    block.attn.train()
    only_itself = torch.eye(TOKENS)
    dropped = []

    def note(output: Tensor) -> Tensor:
        dropped.append((output == 0).all(dim=2))  # (batch, tokens)
        return output

    with patched(own_model, {NAME: only_itself, "blocks.1.head.0": note}):
        own_model(ids)
    assert 0 < dropped[0].sum() < dropped[0].numel()


def test_traced_logits_are_what_the_model_returns(own_model: GPT2) -> None:
    class Capped(GPT2):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * torch.tanh(super().forward(*args, **kwargs) / 3)

    own_model.__class__ = Capped
    with torch.no_grad():
        assert torch.equal(trace(own_model, ids)["logits"], own_model(ids))


@pytest.mark.parametrize("name", [NAME, "blocks.2.head.3", "embedding", "logits"])
def test_generation_is_patched_like_the_model(tiny_model: GPT2, name: str) -> None:
    with patched(tiny_model, {name: lambda x: x**2}):
        found = generate(tiny_model, ids, 6, temperature=0).token_ids
        expected = ids
        for _ in range(6):
            following = tiny_model(expected)[:, -1].argmax(dim=1)
            expected = torch.cat([expected, following[:, None]], dim=1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, generate(tiny_model, ids, 6, temperature=0).token_ids)


def test_a_quantized_model_is_traced_as_it_is(own_model: GPT2) -> None:
    exact = trace(own_model, ids, MASK)
    own_model.quantize("int8")
    found = trace(own_model, ids, MASK)
    with torch.no_grad():
        assert torch.equal(found["logits"], own_model(ids, MASK))
    assert_close(found[NAME].sum(dim=3), torch.ones(2, 6, TOKENS))
    assert 0 < (found[NAME] - exact[NAME]).abs().max() < 0.2
