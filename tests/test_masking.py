"""The padding contract: padding of any ids on any side changes nothing; bad input is refused."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from conftest import TINY, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.cache import KeyValueCache
from gpt2mini.masking import build_attn_mask, pad_left, pad_right

PRECISION = 1e-5  # float32, logits of the size of 1; padded and unpadded sums differ in order only
LONGEST = 12  # tokens in a row, padding counted
N_CLASSES = 2


@dataclass
class Batch:
    """Rows of random ids; of each row only a span is text, the rest is padding of random ids."""

    token_ids: Tensor  # (batch, tokens)
    spans: list[tuple[int, int]]  # of each row: where its text starts and stops

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros_like(self.token_ids)
        for row, (start, stop) in enumerate(self.spans):
            mask[row, start:stop] = 1
        return mask

    def texts(self, outputs: Tensor | None = None) -> list[Tensor]:
        """The rows of `outputs` (the ids themselves by default) without their padding."""
        rows = self.token_ids if outputs is None else outputs
        return [row[start:stop] for row, (start, stop) in zip(rows, self.spans, strict=True)]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Padding on the left, on the right, on both sides or all over, side by side in one batch."""
    tokens = draw(st.integers(1, LONGEST))
    border = st.integers(0, tokens)
    spans = draw(st.lists(st.tuples(border, border), min_size=1, max_size=4))
    ids = random_ids(len(spans), tokens, seed=draw(st.integers(0, 1000)))
    return Batch(ids, [(min(span), max(span)) for span in spans])


def assert_padding_is_harmless(model: GPT2, batch: Batch, mask: Tensor) -> None:
    logits = model(batch.token_ids, mask)
    for text, found in zip(batch.texts(), batch.texts(logits), strict=True):
        if len(text):
            assert_close(found, model(text[None])[0], atol=PRECISION, rtol=0)


@given(batch=batches(), dtype=st.sampled_from([torch.bool, torch.int32, torch.int64]))
def test_padding_changes_no_logit_of_a_real_token(
    tiny_model: GPT2, batch: Batch, dtype: torch.dtype
) -> None:
    assert_padding_is_harmless(tiny_model, batch, batch.mask.to(dtype))


@given(batch=batches())
def test_padding_changes_no_output_of_a_class_head(tiny_model: GPT2, batch: Batch) -> None:
    classifier = deepcopy(tiny_model)
    classifier.out_head = nn.Linear(TINY.emb_dim, N_CLASSES)
    assert_padding_is_harmless(classifier, batch, batch.mask)


@given(batch=batches())
def test_padding_changes_no_gradient(tiny_model: GPT2, batch: Batch) -> None:
    parameters = list(tiny_model.parameters())
    together = batch.texts(tiny_model(batch.token_ids, batch.mask))
    alone = [tiny_model(text[None])[0] for text in batch.texts() if len(text)]
    if not alone:
        return
    found = torch.autograd.grad(torch.cat(together).square().mean(), parameters)
    expected = torch.autograd.grad(torch.cat(alone).square().mean(), parameters)
    assert_close(found, expected, atol=PRECISION, rtol=1e-4)


@given(batch=batches(), pad_seed=st.integers(1001, 2000))
def test_the_ids_of_the_padding_do_not_matter(
    tiny_model: GPT2, batch: Batch, pad_seed: int
) -> None:
    other_padding = random_ids(*batch.token_ids.shape, seed=pad_seed)
    other_ids = torch.where(batch.mask.bool(), batch.token_ids, other_padding)
    before = torch.cat(batch.texts(tiny_model(batch.token_ids, batch.mask)))
    assert torch.equal(torch.cat(batch.texts(tiny_model(other_ids, batch.mask))), before)


@given(batch=batches())
def test_a_row_of_nothing_but_padding_gives_finite_logits(tiny_model: GPT2, batch: Batch) -> None:
    batch.spans[0] = (0, 0)
    assert tiny_model(batch.token_ids, batch.mask).isfinite().all()


@given(batch=batches())
def test_a_row_of_nothing_but_padding_gives_finite_gradients(
    tiny_model: GPT2, batch: Batch
) -> None:
    batch.spans[0] = (0, 0)
    loss = tiny_model(batch.token_ids, batch.mask).square().mean()  # the padding's outputs too
    for gradient in torch.autograd.grad(loss, list(tiny_model.parameters())):
        assert gradient.isfinite().all()


@given(batch=batches())
def test_no_token_is_left_with_nothing_to_attend_to(batch: Batch) -> None:
    """Some attention kernels make NaN of a softmax over nothing; torch's own, of late, do not."""
    attn_mask = build_attn_mask(batch.token_ids, batch.mask.bool(), past=0)
    assert attn_mask is not None
    assert attn_mask.any(dim=3).all()


@pytest.mark.parametrize(("left", "right"), [(30, 0), (0, 30), (7, 23)])
def test_padding_may_exceed_the_context(tiny_model: GPT2, left: int, right: int) -> None:
    ids = random_ids(1, left + TINY.context_length + right)
    batch = Batch(ids, [(left, left + TINY.context_length)])
    assert_padding_is_harmless(tiny_model, batch, batch.mask)


def test_a_mask_of_ones_is_no_mask(tiny_model: GPT2) -> None:
    ids = random_ids(2, LONGEST)
    unmasked = tiny_model(ids)
    assert_close(tiny_model(ids, torch.ones_like(ids)), unmasked, atol=PRECISION, rtol=0)


@given(batch=batches())
def test_explicit_positions_equal_the_derived_ones(tiny_model: GPT2, batch: Batch) -> None:
    positions = torch.zeros_like(batch.token_ids)
    for row, (start, stop) in enumerate(batch.spans):
        positions[row, start:stop] = torch.arange(stop - start)
    derived = tiny_model(batch.token_ids, batch.mask)
    explicit = tiny_model(batch.token_ids, batch.mask, position_ids=positions)
    for found, expected in zip(batch.texts(explicit), batch.texts(derived), strict=True):
        assert_close(found, expected, atol=PRECISION, rtol=0)


def test_one_row_of_positions_serves_the_whole_batch(tiny_model: GPT2) -> None:
    ids = random_ids(3, LONGEST)
    explicit = tiny_model(ids, position_ids=torch.arange(LONGEST)[None])
    assert torch.equal(explicit, tiny_model(ids))


def test_positions_are_used(tiny_model: GPT2) -> None:
    ids = random_ids(1, LONGEST)
    shifted = tiny_model(ids, position_ids=torch.arange(LONGEST)[None] + 1)
    assert (shifted - tiny_model(ids)).abs().max() > 100 * PRECISION


# ---- several texts in a row


@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_texts_that_share_a_row_do_not_see_each_other(
    tiny_model: GPT2, lengths: list[list[int]], seed: int
) -> None:
    """0 to 6 tokens each, so that some rows need padding at the end, or in the place of a text."""
    tokens = max(1, max(map(sum, lengths)))
    token_ids, numbers = random_ids(len(lengths), tokens, seed=seed), []
    for row in lengths:
        row_numbers = [k for k, length in enumerate(row, start=1) for _ in range(length)]
        numbers.append(row_numbers + [0] * (tokens - len(row_numbers)))
    mask = torch.tensor(numbers)
    logits = tiny_model(token_ids, mask)
    for ids, row_mask, found in zip(token_ids, mask, logits, strict=True):
        for k in set(row_mask.tolist()) - {0}:
            alone = tiny_model(ids[row_mask == k][None])[0]
            assert_close(found[row_mask == k], alone, atol=PRECISION, rtol=0)


def test_a_cache_takes_one_text_a_row(tiny_model: GPT2) -> None:
    cache = KeyValueCache(TINY, batch_size=1, max_tokens=8)
    with pytest.raises(ValueError, match="a cache takes one text a row"):
        tiny_model(random_ids(1, 4), torch.tensor([[1, 1, 2, 2]]), cache=cache)


# ---- what bad input gets


def test_a_mask_below_zero_is_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="attention_mask holds -1; expected 0 for padding"):
        tiny_model(random_ids(1, 3), torch.tensor([[1, 1, -1]]))


def test_too_many_tokens_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        tiny_model(random_ids(1, TINY.context_length + 1))


def test_too_many_real_tokens_are_refused(tiny_model: GPT2) -> None:
    batch = Batch(random_ids(2, 80), [(0, 10), (15, 80)])
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        tiny_model(batch.token_ids, batch.mask)


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(tiny_model: GPT2, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of 211"):
        tiny_model(torch.tensor([[1, wrong, 2]]))


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (3, 4)])
@pytest.mark.usefixtures("no_shape_checks")
def test_a_mask_of_the_wrong_shape_is_refused(tiny_model: GPT2, shape: tuple[int, int]) -> None:
    message = rf"attention_mask has the shape \({shape[0]}, {shape[1]}\); expected .*\(2, 4\)"
    with pytest.raises(ValueError, match=message):
        tiny_model(random_ids(2, 4), torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.usefixtures("no_shape_checks")
def test_ids_that_are_no_integers_are_refused(tiny_model: GPT2, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"torch.long.*{dtype}"):
        tiny_model(random_ids(1, 4).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16])
@pytest.mark.usefixtures("no_shape_checks")
def test_integers_that_torch_cannot_look_up_are_refused(
    tiny_model: GPT2, dtype: torch.dtype
) -> None:
    """uint16 is how token files are stored on disk, so such ids do arrive."""
    with pytest.raises(ValueError, match=f"torch.long.*{dtype}"):
        tiny_model(random_ids(1, 4).to(dtype))


@pytest.mark.usefixtures("no_shape_checks")
def test_ids_without_a_batch_axis_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"\(batch, tokens\).*not \(4,\).*torch.tensor\(\[ids\]\)"):
        tiny_model(random_ids(4))


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_input_is_refused(tiny_model: GPT2, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        tiny_model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.usefixtures("no_shape_checks")
def test_positions_of_the_wrong_shape_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"position_ids has the shape \(2, 3\); expected \(2, 4\)"):
        tiny_model(random_ids(2, 4), position_ids=torch.zeros(2, 3, dtype=torch.long))


def test_negative_positions_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="position -1 is negative"):
        tiny_model(random_ids(1, 2), position_ids=torch.tensor([[-1, 0]]))


def test_positions_beyond_the_context_are_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        tiny_model(random_ids(1, 1), position_ids=torch.tensor([[TINY.context_length]]))


@pytest.mark.usefixtures("no_shape_checks")
def test_an_additive_mask_is_refused_instead_of_inverted(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"integers or booleans .* not torch.float32"):
        tiny_model(random_ids(1, 4), attention_mask=torch.zeros(1, 4))


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_padded_rows_and_their_mask_are_on_one_device(pad: Callable) -> None:
    rows = [torch.ones(3, device="meta"), torch.ones(5, device="meta")]
    assert {tensor.device.type for tensor in pad(rows)} == {"meta"}
