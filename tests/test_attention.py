"""Attention by plain products is that of torch, in any pattern, forward and backward."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import TINY, random_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from gpt2mini import GPT2
from gpt2mini.data.text import Batch
from gpt2mini.masking import build_attn_mask
from gpt2mini.training import Settings, attention, loop, train
from gpt2mini.training.attention import (
    Bfloat16CPUAttention,
    attention_by_products,
    is_fit,
    query_tiles,
)

Options = dict[str, Tensor | bool]


def random_heads(batch: int, heads: int, tokens: int, head_dim: int = 8) -> list[Tensor]:
    """Query, key, value and the gradient of the result, as the model lays them out."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in range(4)]


def mask_of(*rows: list[int]) -> Tensor:
    """The attention mask of rows of segment ids, one id for every 10 tokens."""
    segments = torch.tensor(rows).repeat_interleave(10, dim=1)
    mask = build_attn_mask(segments, segments, past=0)
    assert mask is not None
    return mask


def result_and_gradients(
    attend: Callable[..., Tensor], heads: list[Tensor], options: Options
) -> list[Tensor]:
    inputs = [head.detach().requires_grad_() for head in heads[:3]]
    result = attend(*inputs, **options)
    result.backward(heads[3].to(result.dtype))
    return [result.detach(), *(head.grad for head in inputs if head.grad is not None)]


# (batch, heads, tokens): one block of queries; several, the last one shorter; several texts
@pytest.mark.parametrize("shape", [(1, 2, 70), (2, 12, 300), (3, 5, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_exact_attention(
    shape: tuple[int, int, int], causal: bool
) -> None:
    heads = random_heads(*shape)
    check_against_exact(heads, {"is_causal": causal})


@pytest.mark.parametrize(
    "mask",
    [
        mask_of([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]),  # padding
        mask_of([1, 1, 2, 2, 2, 3, 0]),  # several texts in a row, the same in every row
    ],
)
def test_masks_on_either_side_and_several_texts_in_a_row(mask: Tensor) -> None:
    check_against_exact(random_heads(3, 2, 70), {"attn_mask": mask})


def check_against_exact(heads: list[Tensor], options: Options) -> None:
    exact = result_and_gradients(
        F.scaled_dot_product_attention, [head.double() for head in heads], options
    )
    with Bfloat16CPUAttention():
        found = result_and_gradients(F.scaled_dot_product_attention, heads, options)
    torchs = result_and_gradients(F.scaled_dot_product_attention, heads, options)
    assert not all(map(torch.equal, found, torchs))  # it was not torch's own that was measured
    for ours, right in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - right).norm() < 0.01 * right.norm()  # bfloat16 rounds to 0.004


class OwnAttention(nn.Module):
    """An attention that knows nothing of the library's, with a cosine for a score."""

    def __init__(self, emb_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.projections = n_heads, nn.Linear(emb_dim, 3 * emb_dim)

    def forward(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        parts = self.projections(x).chunk(3, dim=2)
        query, key, value = (
            part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in parts
        )
        query, key = (F.normalize(heads, dim=3).to(value.dtype) for heads in (query, key))
        return (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries that `attention_by_products` gets."""
    shapes = []

    def counting(query: Tensor, *args: Any) -> Tensor:
        shapes.append(query.shape)
        return attention_by_products(query, *args)

    monkeypatch.setattr(attention, "attention_by_products", counting)
    return shapes


def train_a_step(model: GPT2, **changes: Any) -> Tensor:
    """All weights after one step in bfloat16, in one row."""
    ids = random_ids(2, 64)
    settings = Settings(1, lambda step: 1.0, precision="bf16", progress=False, **changes)
    train(model, [Batch(ids, ids)], [SGD(model.parameters(), lr=1.0)], settings)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("own", [False, True], ids=["gpt2", "own attention"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_training_uses_it_where_the_processor_has_bfloat16(
    has_bfloat16: bool,
    own: bool,
    own_model: GPT2,
    calls: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if own:
        for block in own_model.trf_blocks:
            block.register_module("attn", OwnAttention(TINY.emb_dim, TINY.n_heads))
    monkeypatch.setattr(loop, "gains_from_bfloat16", lambda device: has_bfloat16)
    train_a_step(own_model)
    shape = (2, TINY.n_heads, 64, TINY.emb_dim // TINY.n_heads)
    assert calls == ([shape] * TINY.n_layers if has_bfloat16 else [])


@pytest.mark.parametrize("own", [False, True], ids=["gpt2", "own attention"])
def test_recomputed_blocks_use_it_in_backward_too(
    own: bool, own_model: GPT2, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        for block in own_model.trf_blocks:
            block.register_module("attn", OwnAttention(TINY.emb_dim, TINY.n_heads))
    monkeypatch.setattr(loop, "gains_from_bfloat16", lambda device: True)
    expected = train_a_step(deepcopy(own_model), recompute=False)
    assert len(calls) == TINY.n_layers
    found = train_a_step(own_model, activation_checkpointing=True)
    assert len(calls) == 3 * TINY.n_layers
    assert torch.equal(found, expected)


def test_joining_the_heads_of_the_result_copies_nothing() -> None:
    query, key, value, _ = random_heads(2, 3, 64)
    context = attention_by_products(query, key, value, is_causal=True)
    joined = context.transpose(1, 2).flatten(2)
    assert joined.data_ptr() == context.data_ptr()


def test_causal_tiles_cover_every_query_and_only_the_keys_before() -> None:
    query = torch.empty(1, 12, 300, 8)
    rows = [row for some, _ in query_tiles(query, True) for row in range(300)[some]]
    assert rows == list(range(300))
    assert [seen.stop for _, seen in query_tiles(query, True)] == [128, 256, 300]
    assert {seen.stop for _, seen in query_tiles(query, False)} == {300}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"tokens": 63},
        {"options": {"dropout_p": 0.1}},
        {"options": {"scale": 0.5}},
        {"options": {"attn_mask": torch.zeros(64, 64, dtype=torch.bfloat16)}},
        {"keys": 65},
    ],
    ids=str,
)
def test_any_other_call_is_left_to_torch(change: dict) -> None:
    dtype, tokens = change.get("dtype", torch.bfloat16), change.get("tokens", 64)
    query = torch.zeros(1, 2, tokens, 8, dtype=dtype)
    key = torch.zeros(1, 2, change.get("keys", tokens), 8, dtype=dtype)
    assert is_fit(*[torch.zeros(1, 2, 64, 8, dtype=torch.bfloat16)] * 3)
    assert not is_fit(query, key, key, **change.get("options", {}))
    with Bfloat16CPUAttention():
        result = F.scaled_dot_product_attention(query, key, key, **change.get("options", {}))
    assert result.shape == query.shape and result.dtype == dtype
