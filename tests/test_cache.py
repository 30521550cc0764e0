"""The key/value cache: however a text is cut into calls, the logits are those of one call."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gpt2mini import GPT2, GPT2Config
from gpt2mini.cache import KeyValueCache, LayerCache
from gpt2mini.generation import generate

PRECISION = 1e-5  # float32, logits of the size of 1; cached and uncached sums differ in order only

chunk_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)
seeds = st.integers(0, 1000)
# Of each row: where its text starts and stops, as shares of the row. Padding stands outside.
row_spans = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3)


def mask_of(spans: list[tuple[float, float]], tokens: int) -> Tensor:
    """(batch, tokens): padding on the left, on the right, on both sides or all over."""
    places = torch.arange(tokens)
    borders = [sorted((round(a * tokens), round(b * tokens))) for a, b in spans]
    return torch.stack([(start <= places) & (places < stop) for start, stop in borders])


def assert_rows_equal_unpadded(model: GPT2, ids: Tensor, mask: Tensor, logits: Tensor) -> None:
    for row_ids, row_mask, row_logits in zip(ids, mask, logits, strict=True):
        if row_mask.any():
            unpadded = model(row_ids[row_mask][None])[0]
            assert_close(row_logits[row_mask], unpadded, atol=PRECISION, rtol=0)


@given(sizes=chunk_sizes, rows=st.integers(1, 3), spare=st.integers(0, 5), seed=seeds)
def test_cached_equals_uncached_for_any_split(
    tiny_model: GPT2, sizes: list[int], rows: int, spare: int, seed: int
) -> None:
    ids = random_ids(rows, sum(sizes), seed=seed)
    cache = KeyValueCache(TINY, rows, sum(sizes) + spare)
    logits = torch.cat([tiny_model(chunk, cache=cache) for chunk in ids.split(sizes, 1)], dim=1)
    assert_close(logits, tiny_model(ids), atol=PRECISION, rtol=0)


def test_cached_equals_uncached_one_token_at_a_time(tiny_model: GPT2) -> None:
    ids = random_ids(2, TINY.context_length)
    cache = KeyValueCache(TINY, 2, TINY.context_length)
    logits = torch.cat([tiny_model(token, cache=cache) for token in ids.split(1, 1)], dim=1)
    assert_close(logits, tiny_model(ids), atol=PRECISION, rtol=0)


class GroupedQueryAttention(nn.Module):
    """Two heads of keys and values for four of queries (Ainslie et al. 2023)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        emb, self.head_dim = config.emb_dim, config.head_dim
        self.query, self.attn_out = nn.Linear(emb, emb), nn.Linear(emb, emb)
        self.key, self.value = nn.Linear(emb, emb // 2), nn.Linear(emb, emb // 2)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (self.split_heads(layer(x)) for layer in layers)
        if cache is not None:
            key, value = cache.append(key, value)
        is_causal = attn_mask is None and query.shape[2] == key.shape[2]
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=True
        )
        return self.attn_out(context.transpose(1, 2).flatten(2))


def test_keys_and_values_may_have_fewer_heads() -> None:
    torch.manual_seed(0)
    model = GPT2(replace(TINY, emb_dim=32, n_heads=4)).eval()
    for block in model.trf_blocks:
        block.attn = GroupedQueryAttention(model.config)
    ids = random_ids(2, 5)
    cache = KeyValueCache(model.config, 2, 5)
    logits = torch.cat([model(chunk, cache=cache) for chunk in ids.split([3, 1, 1], 1)], dim=1)
    assert_close(logits, model(ids), atol=PRECISION, rtol=0)
    assert cache.layers[0].keys.shape == (2, 2, 5, 8)
    text = ids
    for _ in range(4):
        text = torch.cat([text, model(text)[:, -1:].argmax(dim=2)], dim=1)
    found = generate(model, ids, 4, temperature=0, num_samples=2)
    assert found.token_ids.tolist() == text.repeat_interleave(2, dim=0).tolist()


@given(sizes=chunk_sizes, spans=row_spans, mask_covers_all=st.booleans(), seed=seeds)
def test_cached_with_padding_equals_unpadded_for_any_split(
    tiny_model: GPT2,
    sizes: list[int],
    spans: list[tuple[float, float]],
    mask_covers_all: bool,
    seed: int,
) -> None:
    """The mask may cover the new tokens alone, or all tokens so far."""
    ids = random_ids(len(spans), sum(sizes), seed=seed)
    mask = mask_of(spans, sum(sizes))
    cache = KeyValueCache(TINY, len(spans), sum(sizes))
    chunks = []
    for chunk in ids.split(sizes, 1):
        first = 0 if mask_covers_all else cache.length
        chunk_mask = mask[:, first : cache.length + chunk.shape[1]]
        chunks.append(tiny_model(chunk, chunk_mask, cache=cache))
    assert_rows_equal_unpadded(tiny_model, ids, mask, torch.cat(chunks, dim=1))


@given(prompt=st.integers(1, 12), spans=row_spans, new=st.integers(1, 6), seed=seeds)
def test_a_padded_prompt_is_remembered_without_its_mask(
    tiny_model: GPT2, prompt: int, spans: list[tuple[float, float]], new: int, seed: int
) -> None:
    """As in generation: a ragged prompt, then real tokens one at a time and no mask any more."""
    ids = random_ids(len(spans), prompt + new, seed=seed)
    mask = mask_of(spans, prompt)
    cache = KeyValueCache(TINY, len(spans), prompt + new)
    chunks = [tiny_model(ids[:, :prompt], mask, cache=cache)]
    chunks += [tiny_model(token, cache=cache) for token in ids[:, prompt:].split(1, 1)]
    mask = torch.cat([mask, torch.ones(len(spans), new, dtype=torch.bool)], dim=1)
    assert_rows_equal_unpadded(tiny_model, ids, mask, torch.cat(chunks, dim=1))


@given(sizes=chunk_sizes)
def test_a_cached_row_of_nothing_but_padding_gives_finite_logits(
    tiny_model: GPT2, sizes: list[int]
) -> None:
    cache = KeyValueCache(TINY, 1, sum(sizes))
    for chunk in random_ids(1, sum(sizes)).split(sizes, 1):
        assert tiny_model(chunk, torch.zeros_like(chunk), cache=cache).isfinite().all()


@given(sizes=chunk_sizes)
def test_length_counts_the_cached_tokens(tiny_model: GPT2, sizes: list[int]) -> None:
    cache = KeyValueCache(TINY, 1, sum(sizes))
    for size in sizes:
        before = cache.length
        tiny_model(random_ids(1, size), cache=cache)
        assert cache.length == before + size


def test_cached_padding_may_exceed_the_context(tiny_model: GPT2) -> None:
    padding, text = 30, TINY.context_length
    ids = random_ids(1, padding + text)
    mask = (torch.arange(padding + text) >= padding)[None]
    cache = KeyValueCache(TINY, 1, padding + text)
    chunks = zip(ids.split(40, 1), mask.split(40, 1), strict=True)
    logits = [tiny_model(chunk, chunk_mask, cache=cache) for chunk, chunk_mask in chunks]
    assert_rows_equal_unpadded(tiny_model, ids, mask, torch.cat(logits, dim=1))


# ---- what bad input gets


def test_a_cache_that_is_too_small_is_refused(tiny_model: GPT2) -> None:
    cache = KeyValueCache(TINY, 1, 5)
    tiny_model(random_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="at most 5 tokens and holds 3; 1 rows of 3 more"):
        tiny_model(random_ids(1, 3), cache=cache)


def test_a_cache_for_another_batch_is_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"the cache is for 2 rows .* 3 rows of 4 more do not fit"):
        tiny_model(random_ids(3, 4), cache=KeyValueCache(TINY, 2, 10))


def test_more_cached_tokens_than_the_context_are_refused(tiny_model: GPT2) -> None:
    cache = KeyValueCache(TINY, 1, 2 * TINY.context_length)
    tiny_model(random_ids(1, TINY.context_length), cache=cache)
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        tiny_model(random_ids(1, 1), cache=cache)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("known", [True, False], ids=["read with a mask", "read without a mask"])
def test_a_mask_that_newly_calls_cached_tokens_padding_is_refused(
    tiny_model: GPT2, known: bool, dtype: torch.dtype
) -> None:
    """It comes too late: what the cache holds has been computed with them as real tokens."""
    cache, mask = KeyValueCache(TINY, 2, 15), torch.ones(2, 15, dtype=dtype)
    tiny_model(random_ids(2, 14), mask[:, :14] if known else None, cache=cache)
    mask[1, 3:8] = 0
    message = "cached token in row 1, column 3 padding, but it was read as real"
    with pytest.raises(ValueError, match=message):
        tiny_model(random_ids(2, 1), mask, cache=cache)
    assert cache.length == 14


def test_a_mask_that_newly_calls_cached_padding_real_is_refused(tiny_model: GPT2) -> None:
    cache, mask = KeyValueCache(TINY, 1, 5), torch.tensor([[0, 1, 1, 1]])
    tiny_model(random_ids(1, 4), mask, cache=cache)
    message = "cached token in row 0, column 0 real, but it was read as padding"
    with pytest.raises(ValueError, match=message):
        tiny_model(random_ids(1, 1), torch.ones(1, 5, dtype=torch.bool), cache=cache)


def test_a_mask_for_neither_the_new_nor_all_tokens_is_refused(tiny_model: GPT2) -> None:
    cache = KeyValueCache(TINY, 1, 10)
    tiny_model(random_ids(1, 3), cache=cache)
    message = r"shape \(1, 4\); expected .*\(1, 2\), or with the cached tokens \(1, 5\)"
    with pytest.raises(ValueError, match=message):
        tiny_model(random_ids(1, 2), torch.ones(1, 4, dtype=torch.bool), cache=cache)


def test_a_refused_call_leaves_the_cache_as_it_was(tiny_model: GPT2) -> None:
    """With padding before it, so that the cache has a mask to remember."""
    ids = random_ids(1, TINY.context_length + 2)
    mask = (torch.arange(ids.shape[1]) > 0)[None]  # one token of padding
    cache = KeyValueCache(TINY, 1, ids.shape[1])
    tiny_model(ids[:, :5], mask[:, :5], cache=cache)
    with pytest.raises(ValueError, match="do not fit the context"):
        tiny_model(ids[:, 5:], cache=cache)
    found = tiny_model(ids[:, 5:6], cache=cache)
    assert_close(found[0, -1], tiny_model(ids[:, 1:6])[0, -1], atol=PRECISION, rtol=0)


def test_a_cache_that_would_miss_the_first_blocks_is_refused(tiny_model: GPT2) -> None:
    """Its length is that of block 0."""
    cache = KeyValueCache(TINY, 2, 9)
    stream = tiny_model.residual_stream(random_ids(2, 9), n_blocks=1)
    with pytest.raises(ValueError, match="filled by all 3 blocks, not by those from 1 to 3"):
        tiny_model.residual_stream(stream=stream, first_block=1, cache=cache)
    with pytest.raises(ValueError, match="filled by all 3 blocks, not by those from 0 to 1"):
        tiny_model.residual_stream(random_ids(2, 4), cache=cache, n_blocks=1)
    for first, n_blocks in ((0, 4), (0, -1), (2, 1)):
        with pytest.raises(ValueError, match=r"must lie in this order between 0 and .* 3"):
            tiny_model.residual_stream(random_ids(2, 4), first_block=first, n_blocks=n_blocks)
    assert cache.length == 0


def test_a_cache_for_another_depth_is_refused(tiny_model: GPT2) -> None:
    cache = KeyValueCache(replace(TINY, n_layers=2), 1, 8)
    with pytest.raises(ValueError, match="for 2 blocks, the model has 3"):
        tiny_model(random_ids(1, 4), cache=cache)


def test_a_cache_of_another_dtype_is_refused(own_model: GPT2) -> None:
    cache = KeyValueCache(TINY, 2, 8)
    with pytest.raises(ValueError, match=r"holds torch.float32, attention computes in torch.bf"):
        own_model.bfloat16()(random_ids(2, 3), cache=cache)
    with torch.autocast("cpu", torch.bfloat16):  # which converts what attention reads
        own_model.float()(random_ids(2, 3), cache=cache)


@pytest.mark.parametrize("part", ["trf_blocks.0", "trf_blocks.1", "trf_blocks.2.norm1"])
@torch.no_grad()
def test_a_cache_that_a_call_has_filled_in_part_is_refused(own_model: GPT2, part: str) -> None:
    def interrupt(module: nn.Module, arguments: tuple) -> None:
        raise KeyboardInterrupt

    ids, mask = random_ids(2, 5), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = KeyValueCache(own_model.config, 2, 20)
    own_model(ids, mask, cache=cache)
    hook = own_model.get_submodule(part).register_forward_pre_hook(interrupt)
    with hook, pytest.raises(KeyboardInterrupt):
        own_model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"an earlier call broke off.*a new KeyValueCache"):
        own_model(ids[:, :1], cache=cache)
