"""Each sampling rule against probabilities worked out by hand, and against `transformers`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process

from gpt2mini.sampling import (
    draw,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample_by_inverse_cdf,
)

# Probabilities that are easy to add up: 0.5, 0.25, 0.15, 0.1, in no particular order.
PROBABILITIES = torch.tensor([[0.15, 0.5, 0.1, 0.25]])
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("k", "tokens"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_likeliest(k: int, tokens: list[int]) -> None:
    assert kept(keep_top_k(LOGITS, k)) == tokens


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (0.4, [1]),
        (0.6, [1, 3]),
        (0.8, [0, 1, 3]),
        (0.95, [0, 1, 2, 3]),
        (1e-9, [1]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_add_up_to_p(p: float, tokens: list[int]) -> None:
    assert kept(keep_top_p(LOGITS, p)) == tokens


def test_top_p_of_1_forbids_nothing_where_the_sum_is_rounded_to_1() -> None:
    logits = torch.tensor([[20.0, 0.0, 1.0, 0.0]])  # in fp32 the first probability is 1
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_kept_tokens_keep_their_proportions() -> None:
    probabilities = keep_top_k(LOGITS, 2).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))


def test_rules_treat_each_row_alone() -> None:
    rows = torch.cat([LOGITS, LOGITS.flip(1)])
    for rule in (lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.6)):
        together = rule(rows)
        apart = torch.cat([rule(rows[:1]), rule(rows[1:])])
        assert torch.equal(together, apart)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    text, real = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    penalized = penalize_repetition(logits, text, real, 2.0)
    assert penalized.tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_repetition_penalty_does_not_see_padding() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    text, real = torch.tensor([[2, 0]]), torch.tensor([[False, True]])
    assert penalize_repetition(logits, text, real, 2.0).tolist() == [[1.0, -2.0, 3.0, -3.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_forbidden_ngrams_are_those_of_transformers(size: int) -> None:
    torch.manual_seed(size)
    text = torch.randint(0, 5, (6, 12))
    logits = torch.randn(6, 5)
    ours = forbid_repeated_ngrams(logits, text, torch.ones_like(text, dtype=torch.bool), size)
    theirs = logits_process.NoRepeatNGramLogitsProcessor(size)(text, logits)
    assert torch.equal(ours, theirs)


def test_forbidden_ngrams_ignore_padding() -> None:
    text = torch.tensor([[1, 9, 2, 1]])
    real = torch.tensor([[True, False, True, True]])
    forbidden = torch.isinf(forbid_repeated_ngrams(torch.zeros(1, 10), text, real, 2))
    assert forbidden.nonzero().tolist() == [[0, 2]]  # "1 2" is there; "1 9" is not: 9 is padding


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x, text: keep_top_k(x, 7), logits_process.TopKLogitsWarper(7)),
        (lambda x, text: keep_top_p(x, 0.7), logits_process.TopPLogitsWarper(0.7)),
        (
            lambda x, text: penalize_repetition(
                x, text, torch.ones_like(text, dtype=torch.bool), 1.3
            ),
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        ),
    ],
)
def test_rules_agree_with_transformers(ours, theirs) -> None:
    torch.manual_seed(0)
    logits, text = torch.randn(8, 50) * 3, torch.randint(0, 50, (8, 10))
    torch.testing.assert_close(ours(logits, text), theirs(text, logits.clone()))


def test_temperature_zero_takes_the_likeliest() -> None:
    token_ids, logprobs = draw(LOGITS, 0.0, None)
    assert token_ids.tolist() == [1]
    assert logprobs.tolist() == [0.0]


def test_drawn_frequencies_follow_the_probabilities() -> None:
    """Within four standard deviations of a binomial, for a fixed seed."""
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    token_ids, _ = draw(LOGITS.expand(draws, -1), 1.0, generator)
    shares = torch.bincount(token_ids, minlength=4) / draws
    for share, p in zip(shares.tolist(), PROBABILITIES[0].tolist(), strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / draws)


@given(
    weights=st.lists(
        st.sampled_from([0.0, 0.0, 1e-12, 1e-3, 1.0]) | st.floats(0, 1, width=32),
        min_size=1,
        max_size=40,
    ).filter(any),
    point=st.sampled_from([0.0, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_a_token_without_probability_is_never_drawn(weights: list[float], point: float) -> None:
    """Wherever the dart hits, the edges included."""
    probabilities = torch.tensor([weights])
    with pytest.MonkeyPatch.context() as patch:
        drawn = torch.tensor([[point]], dtype=torch.float64)
        patch.setattr(torch, "rand", lambda *size, **named: drawn)
        token = int(sample_by_inverse_cdf(probabilities, None))
    assert weights[token] > 0
    before, reach = math.fsum(weights[:token]), math.fsum(weights[: token + 1])
    assert before - 1e-9 <= point * math.fsum(weights) <= reach + 1e-9


def test_sharp_distributions_and_forbidden_tokens_are_obeyed() -> None:
    logits = torch.full((5_000, 211), float("-inf"))
    logits[:, 7], logits[:, 210] = 0.0, -3.0
    token_ids, _ = draw(logits, 1.0, torch.Generator().manual_seed(0))
    assert token_ids.unique().tolist() == [7, 210]


def test_logprobs_are_those_of_the_drawn_tokens() -> None:
    token_ids, logprobs = draw(LOGITS.expand(50, -1), 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(logprobs, LOGITS[0, token_ids])


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0]])
    with pytest.raises(ValueError, match="the logits contain NaN"):
        draw(logits, 1.0, None)
