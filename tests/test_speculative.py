"""Speculative decoding changes the speed and nothing else: the same tokens at temperature 0, the
same distribution at any other."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from test_generation import TEXT, make_model, ragged_prompts
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete, generate
from gpt2mini.generation import stream
from gpt2mini.responses import DraftCounts, Generated
from gpt2mini.sampling import Sampling
from gpt2mini.surgery import first_blocks
from gpt2mini.tokenizer import train_tokenizer
from gpt2mini.valid_utf8 import ValidUTF8


@pytest.fixture(autouse=True)
def fast(no_shape_checks: None) -> None:
    """Thousands of forward passes: without the checks of their shapes, which test_generation.py
    makes."""


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model()


def disturbed(model: GPT2, amount: float) -> GPT2:
    """A draft that is right as often as `amount` is small."""
    draft = deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return draft


@pytest.fixture(scope="module")
def draft(model: GPT2) -> GPT2:
    return disturbed(model, 0.01)


def assert_same(found: Generated, plain: Generated) -> None:
    assert torch.equal(found.token_ids, plain.token_ids)
    assert torch.equal(found.attention_mask, plain.attention_mask)
    assert torch.equal(found.response_mask, plain.response_mask)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sampling_logprobs, plain.sampling_logprobs, atol=1e-4, rtol=0)


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a stop token that comes early in some rows": {"stop_ids": list(range(0, 200, 9))},
    "two samples": {"num_samples": 2},
    "one token": {"max_new_tokens": 1},
    "forbidden ids": {"forbidden_ids": list(range(100))},
    "a penalty": {"repetition_penalty": 1.3},
    "no pair of tokens twice": {"no_repeat_ngram_size": 2},
    "drafts of one": {"draft_tokens": 1},
    "long drafts": {"draft_tokens": 9},
}


@pytest.mark.parametrize("kind", ["draft", "poor draft", "lookup"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
def test_greedy_tokens_of_a_ragged_batch_are_those_without_a_draft(
    model: GPT2, draft: GPT2, kind: str, request_: dict[str, Any]
) -> None:
    drafts: dict[str, dict[str, Any]] = {
        "draft": {"draft": draft},
        "poor draft": {"draft": disturbed(model, 0.3)},
        "lookup": {"lookup": 2},
    }
    ids, mask = ragged_prompts()
    options = {"max_new_tokens": 60, "temperature": 0} | request_
    found = generate(model, ids, attention_mask=mask, **drafts[kind], **options)
    options.pop("draft_tokens", None)
    assert_same(found, generate(model, ids, attention_mask=mask, **options))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context", [24, 40])
def test_windows_slide_at_the_same_tokens(rows: int, context: int) -> None:
    """Rows outgrow the context at different rounds, each at the token at which it would alone."""
    model = make_model(context_length=context)
    ids, mask = ragged_prompts()
    options: dict[str, Any] = {"temperature": 0, "overflow": "slide", "max_new_tokens": 90}
    plain = generate(model, ids[:rows], attention_mask=mask[:rows], **options)
    for drafting in ({"draft": disturbed(model, 0.01)}, {"draft": model}, {"lookup": 1}):
        found = generate(model, ids[:rows], attention_mask=mask[:rows], **drafting, **options)
        assert_same(found, plain)
    shorter = disturbed(make_model(context_length=16), 0.01)  # a draft of a shorter context
    assert_same(
        generate(model, ids[:rows], attention_mask=mask[:rows], draft=shorter, **options), plain
    )


@pytest.mark.parametrize(("context", "draft_tokens"), [(1, 3), (2, 2), (8, 8), (32, 30)])
def test_the_window_of_a_small_draft_slides(model: GPT2, context: int, draft_tokens: int) -> None:
    draft = disturbed(make_model(context_length=context), 1.0)
    ids, mask = ragged_prompts()
    plain = generate(model, ids, 60, mask, temperature=0)
    found = generate(model, ids, 60, mask, temperature=0, draft=draft, draft_tokens=draft_tokens)
    assert_same(found, plain)


@pytest.mark.parametrize("kind", ["draft", "the model itself", "lookup"])
def test_a_draft_may_run_out_of_tokens(model: GPT2, draft: GPT2, kind: str) -> None:
    """Each token may come once and few may at all, so a draft that goes on after the stop token,
    or where the model would have gone another way, has none left."""
    request: dict[str, Any] = {"no_repeat_ngram_size": 1, "stop_ids": [3], "temperature": 0}
    request["forbidden_ids"] = [0, *range(6, 211)]
    guesses = {"draft": {"draft": draft}, "the model itself": {"draft": model}}
    for prompt in ([[20, 21], [30, 31]], [[1, 20], [2, 30]], [[1, 2], [30, 31]]):
        plain = generate(model, prompt, 4, **request)
        assert_same(
            generate(model, prompt, 4, **request, **guesses.get(kind, {"lookup": 1})), plain
        )


def test_greedy_drafts_draw_no_random_numbers(model: GPT2, draft: GPT2) -> None:
    state = torch.random.get_rng_state()
    for guesses in ({"draft": draft}, {"lookup": 2}):
        generate(model, [1, 2, 1, 2], 10, temperature=0, **guesses)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_last_token_of_the_context_is_reached(model: GPT2, draft: GPT2) -> None:
    ids = torch.arange(40)[None]
    new = model.config.context_length - 40
    plain = generate(model, ids, new, temperature=0)
    assert_same(generate(model, ids, new, temperature=0, draft=draft), plain)
    assert_same(generate(model, ids, new, temperature=0, lookup=3), plain)


def test_an_int8_model_takes_a_float_draft() -> None:
    torch.manual_seed(0)
    target = GPT2(GPT2Config(211, context_length=400, emb_dim=64, n_heads=4, n_layers=2))
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
    draft = deepcopy(target)
    target.quantize("int8")
    ids, mask = ragged_prompts()
    plain = generate(target, ids, 60, mask, temperature=0)
    found = generate(target, ids, 60, mask, temperature=0, draft=draft)
    assert torch.equal(found.token_ids, plain.token_ids)
    assert found.drafts.rate > 0.5


def test_a_draft_that_is_the_model_is_always_accepted(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    for temperature in (0, 1.3):
        out = generate(
            model, ids, 60, mask, temperature=temperature, top_k=20, draft=model, generator=3
        )
        assert out.drafts.accepted > 0.99 * out.drafts.drafted > 0


def test_whole_characters_only() -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    talker = make_model(tokenizer.vocab_size)
    rule = ValidUTF8(tokenizer, tokenizer.vocab_size)
    ids = torch.tensor([tokenizer.encode(TEXT)[:20], tokenizer.encode(TEXT[4:])[:20]])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for drafting in ({"draft": disturbed(talker, 0.01)}, {"lookup": 2}):
        options: dict[str, Any] = {"valid_utf8": rule, "stop_ids": [tokenizer.eos_id]}
        plain = generate(talker, ids, 60, mask, temperature=0, **options)
        assert_same(generate(talker, ids, 60, mask, temperature=0, **options, **drafting), plain)
        drawn = generate(talker, ids, 60, mask, temperature=2.0, generator=1, **options, **drafting)
        for row, is_new in zip(drawn.token_ids, drawn.response_mask, strict=True):
            new = [i for i in row[is_new].tolist() if i != tokenizer.eos_id]
            assert "\ufffd" not in tokenizer.decode(new)


# ---- the distribution


VOCAB, NEW = 5, 3


def exact_distribution(model: GPT2, prompt: Tensor, sampling: Sampling) -> Tensor:
    """The probability of each of the VOCAB ** NEW continuations, from the model's own logits."""
    continuations = torch.tensor(list(product(range(VOCAB), repeat=NEW)))
    text = torch.cat([prompt.expand(len(continuations), -1), continuations], dim=1)
    with torch.no_grad():
        logits = model(text)
    total = torch.zeros(len(continuations), dtype=torch.float64)
    is_real = torch.ones_like(text, dtype=torch.bool)
    for i in range(prompt.shape[1], text.shape[1]):
        allowed = sampling.apply(logits[:, i - 1], text[:, :i], is_real[:, :i])
        total += allowed.double().log_softmax(dim=1).gather(1, text[:, i, None])[:, 0]
    return total.exp()


SAMPLINGS = {
    "temperature 1": Sampling(),
    "temperature 0.6": Sampling(temperature=0.6),
    "top-k": Sampling(temperature=1.5, top_k=4),
    "top-p": Sampling(top_p=0.9),
    "all rules": Sampling(1.2, 3, 0.9, 6, 0.9),
}


@pytest.mark.parametrize("kind", ["draft", "lookup"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_sampled_texts_have_the_models_distribution(sampling: Sampling, kind: str) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(VOCAB, context_length=16, emb_dim=8, n_heads=2, n_layers=1)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    drafting: dict[str, Any] = (
        {"lookup": 1} if kind == "lookup" else {"draft": disturbed(model, 0.5)}
    )
    prompt, rows = torch.tensor([[1, 4, 1, 2, 4]]), 500
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = vars(sampling) | drafting | {"generator": generator}
    # One text at a time: of many in a batch the one that accepts the fewest would always accept 0.
    found = [generate(model, prompt, NEW, **options) for _ in range(rows)]
    assert 0 < sum(out.drafts.rate for out in found) / rows < 0.98
    new_ids = torch.cat([out.token_ids[:, -NEW:] for out in found])
    places = new_ids @ torch.tensor([VOCAB**2, VOCAB, 1])
    counts = torch.bincount(places, minlength=VOCAB**NEW).double()
    expected = rows * exact_distribution(model, prompt, sampling)
    assert counts[expected == 0].sum() == 0
    # Pearson's chi-square over the continuations that are expected often enough, others together.
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum().clamp(min=1e-9)[None]])
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(observed) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_logprobs_are_of_the_model_and_of_the_distribution_drawn_from(
    model: GPT2, draft: GPT2
) -> None:
    ids, mask = (prompts[[0, 3]] for prompts in ragged_prompts())  # padded on the left, and not
    out = generate(model, ids, 40, mask, temperature=0.7, top_k=9, draft=draft, generator=2)
    with torch.no_grad():
        logits = model(out.token_ids, out.attention_mask)[:, :-1]
    following = out.token_ids[:, 1:, None]
    is_new = out.response_mask[:, 1:]
    expected = logits.log_softmax(dim=2).gather(2, following)[..., 0]
    torch.testing.assert_close(out.logprobs[:, 1:][is_new], expected[is_new], atol=1e-4, rtol=0)
    for column in range(is_new.shape[1]):
        drawn = Sampling(temperature=0.7, top_k=9).apply(logits[:, column], ids, mask.bool())
        expected[:, column] = drawn.log_softmax(dim=1).gather(1, following[:, column])[:, 0]
    found = out.sampling_logprobs[:, 1:][is_new]
    torch.testing.assert_close(found, expected[is_new], atol=1e-4, rtol=0)


# ---- text, first blocks, refusals


def test_text_is_streamed_as_without_a_draft_and_the_drafts_are_counted() -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    talker = make_model(tokenizer.vocab_size)
    plain = complete(talker, tokenizer, "The cat", 50, temperature=0)
    counts = DraftCounts()
    options: dict[str, Any] = {"temperature": 0, "draft": talker, "counts": counts}
    talker.train()
    pieces = stream(talker, tokenizer, "The cat", 50, **options)
    assert "The cat" + "".join(pieces) == plain
    assert talker.training
    assert counts.accepted == counts.drafted > 30
    assert complete(talker, tokenizer, "The cat", 50, temperature=0, lookup=2) == plain


def test_the_first_blocks_and_the_model_have_hooks_of_their_own(model: GPT2) -> None:
    deep, called = deepcopy(model), []
    first_blocks(deep, 1).register_forward_hook(lambda *call: called.append(call))
    deep(torch.tensor([[1, 2]]))
    assert not called


def test_the_first_blocks_are_a_draft(model: GPT2, tokenizer: Tokenizer) -> None:
    early = first_blocks(model, 2)
    ids, mask = ragged_prompts()
    with torch.no_grad():
        stream_after_two = model.residual_stream(ids, mask, n_blocks=2)
        torch.testing.assert_close(
            early(ids, mask), model.out_head(model.final_norm(stream_after_two))
        )
    assert early.tok_emb.weight is model.tok_emb.weight, "the weights are shared"
    plain = generate(model, ids, 40, mask, temperature=0)
    assert_same(generate(model, ids, 40, mask, temperature=0, draft=early), plain)
    for n_blocks in (0, 4):
        with pytest.raises(ValueError, match="from 1 to 3"):
            first_blocks(model, n_blocks)


def test_a_request_that_makes_no_sense_is_refused(model: GPT2, draft: GPT2) -> None:
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="a vocabulary of 50 tokens, the model of 211"):
        generate(model, ids, 3, draft=make_model(50))
    with pytest.raises(ValueError, match="not from both"):
        generate(model, ids, 3, draft=draft, lookup=2)
    with pytest.raises(ValueError, match="draft_tokens 1 or more"):
        generate(model, ids, 3, draft=draft, draft_tokens=0)
    with pytest.raises(ValueError, match="lookup must be 0"):
        generate(model, ids, 3, lookup=-1)
    classifier = deepcopy(draft)
    classifier.out_head = nn.Linear(48, 2)
    with pytest.raises(ValueError, match="the output head has 2 outputs"):
        generate(model, ids, 3, draft=classifier)
    broken = deepcopy(model)
    with torch.no_grad():
        broken.final_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(broken, ids, 3, lookup=1)
