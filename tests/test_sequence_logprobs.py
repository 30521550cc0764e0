"""Log-probabilities of responses: those of transformers, whatever the padding, with gradients."""

import pytest
import torch
from conftest import TINY, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.losses.chunked import cross_entropy_of_each
from gpt2mini.losses.sequence_logprobs import sequence_logprobs, token_logprobs


def by_hand(model: GPT2, token_ids: Tensor, response: Tensor, mask: Tensor | None) -> Tensor:
    """log_softmax of all logits, one position at a time."""
    logprobs = model(token_ids, mask).log_softmax(dim=2)
    found = torch.zeros(token_ids.shape)
    for row, column in response.nonzero().tolist():
        found[row, column] = logprobs[row, column - 1, token_ids[row, column]]
    return found


def padded(lengths: list[tuple[int, int]], left: list[int], seed: int) -> tuple[Tensor, ...]:
    """(ids, mask, response mask) of rows with given (prompt, response) lengths and left padding."""
    width = max(p + r + pad for (p, r), pad in zip(lengths, left, strict=True))
    ids = random_ids(len(lengths), width, seed=seed)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, ((p, r), pad) in enumerate(zip(lengths, left, strict=True)):
        mask[row, pad : pad + p + r] = 1
        response[row, pad + p : pad + p + r] = True
    return ids, mask, response


rows = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4
)


@given(rows=rows, seed=st.integers(0, 1000))
def test_they_are_those_of_all_logits_on_padded_rows(
    tiny_model: GPT2, rows: list[tuple[int, int, int]], seed: int
) -> None:
    ids, mask, response = padded([row[:2] for row in rows], [row[2] for row in rows], seed)
    found = token_logprobs(tiny_model, ids, mask, response)
    assert_close(found, by_hand(tiny_model, ids, response, mask), atol=1e-4, rtol=1e-5)
    total, count = sequence_logprobs(tiny_model, ids, mask, response)
    assert_close(total, found.sum(dim=1))
    assert count.tolist() == [row[1] for row in rows]
    for row, ((prompt, length, left), logprob) in enumerate(zip(rows, total, strict=True)):
        alone = ids[row : row + 1, left : left + prompt + length]
        only = torch.arange(prompt + length)[None] >= prompt
        expected, _ = sequence_logprobs(tiny_model, alone, None, only)
        assert_close(logprob, expected[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_all_logits(
    dtype: torch.dtype, chunk_size: int | None, bias: bool
) -> None:
    """Each position gets a gradient of its own, which backward alone knows."""
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=bias, dtype=dtype)
    hidden = torch.randn(8, 6, dtype=dtype, requires_grad=True)
    targets, scale = torch.randint(11, (8,)), torch.randn(8, dtype=dtype)
    inputs = [hidden, *head.parameters()]
    found = torch.autograd.grad(
        (scale * cross_entropy_of_each(hidden, head, targets, chunk_size)).sum(), inputs
    )
    plain = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    expected = torch.autograd.grad((scale * plain).sum(), inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_gradients_reach_every_parameter_of_the_model(own_model: GPT2) -> None:
    ids, mask, response = padded([(3, 4), (5, 2)], [0, 1], seed=5)
    weights = torch.tensor([1.5, -0.5])
    parameters = list(own_model.parameters())
    total, _ = sequence_logprobs(own_model, ids, mask, response)
    found = torch.autograd.grad((total * weights).sum(), parameters)
    plain = by_hand(own_model, ids, response, mask).sum(dim=1)
    expected = torch.autograd.grad((plain * weights).sum(), parameters)
    assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_frozen_heads_get_no_gradient(own_model: GPT2) -> None:
    own_model.requires_grad_(False)
    own_model.final_norm.requires_grad_(True)
    ids, mask, response = padded([(3, 4)], [0], seed=5)
    sequence_logprobs(own_model, ids, mask, response)[0].sum().backward()
    assert own_model.tok_emb.weight.grad is None
    assert own_model.final_norm.weight.grad is not None


def test_they_are_those_of_transformers(tiny_model: GPT2, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids, mask, response = padded([(3, 4), (5, 2), (1, 9)], [0, 3, 2], seed=5)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask, position_ids=positions).logits
        found = token_logprobs(tiny_model, ids, mask, response)
    each = logits[:, :-1].log_softmax(dim=2).gather(2, ids[:, 1:, None])[..., 0]
    expected = torch.zeros(ids.shape)
    expected[:, 1:] = each * response[:, 1:]
    assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_the_logits_never_all_exist(tiny_model: GPT2) -> None:
    """2,000 positions of 211 logits would be 1.7 MB; a chunk of 64, with what backward keeps, is
    far less."""
    hidden = torch.randn(2000, TINY.emb_dim, requires_grad=True)
    targets = torch.randint(TINY.vocab_size, (2000,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.ndim == 2 and len(result) != TINY.vocab_size:
                largest = max(largest, result.numel() if result.shape[1] > TINY.emb_dim else 0)
            return result

    with Watch():
        cross_entropy_of_each(hidden, tiny_model.out_head, targets, 64).sum().backward()
    assert 0 < largest <= 64 * TINY.vocab_size


@pytest.mark.parametrize(
    ("mask", "response", "message"),
    [
        (None, [[1, 1, 0]], "no real token before it"),
        ([[0, 1, 1]], [[0, 1, 1]], "no real token before it"),
        ([[1, 1, 0]], [[0, 0, 1]], "no real token before it"),
        ([[1, 1, 2]], [[0, 0, 1]], "no real token before it"),
        (None, [[0, 1]], r"of bool and the shape \(1, 3\)"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_a_response_that_nothing_predicts_is_refused(
    tiny_model: GPT2, mask: list | None, response: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_logprobs(
            tiny_model,
            random_ids(1, 3),
            None if mask is None else torch.tensor(mask),
            torch.tensor(response).bool(),
        )


def test_a_head_over_classes_knows_no_tokens(own_model: GPT2) -> None:
    own_model.out_head = torch.nn.Linear(TINY.emb_dim, 2)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="output head has 2 outputs"):
        sequence_logprobs(own_model, ids, None, torch.tensor([[False, True, True, True]]))
