"""Generation: cache, ragged batches, stopping, sampling and streaming keep their promises."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete, generate
from gpt2mini.generation import stream
from gpt2mini.generation_arguments import as_texts
from gpt2mini.stop_strings import until_stop
from gpt2mini.tokenizer import END_OF_TEXT, train_tokenizer

TEXT = "The cat sat on the mat. The dog sat on the log. ¿Qué? 你好，世界! " * 3


def make_model(vocab_size: int = 211, context_length: int = 400) -> GPT2:
    """A random model with weights so large, positions above all, that its greedy choices vary."""
    torch.manual_seed(0)
    model = GPT2(
        GPT2Config(vocab_size, context_length=context_length, emb_dim=48, n_heads=6, n_layers=3)
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 if name == "pos_emb.weight" else 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> GPT2:
    return make_model(tokenizer.vocab_size)


def greedy_without_cache(model: GPT2, ids: Tensor, new: int) -> Tensor:
    """The slow and obvious way: the whole text through the model for every token."""
    text = ids[None]
    with torch.no_grad():
        for _ in range(new):
            text = torch.cat([text, model(text)[:, -1].argmax(dim=1, keepdim=True)], dim=1)
    return text[0]


def ragged_prompts() -> tuple[Tensor, Tensor]:
    """Padding on the left, on the right, on both sides, and none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 211, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 7:] = 0
    mask[2, :2] = mask[2, 9:] = 0
    return ids, mask


def test_greedy_with_cache_equals_greedy_without_over_300_tokens(model: GPT2) -> None:
    ids = torch.randint(0, 211, (1, 5), generator=torch.Generator().manual_seed(2))
    found = generate(model, ids, 300, temperature=0).token_ids[0]
    assert torch.equal(found, greedy_without_cache(model, ids[0], 300))
    assert found.unique().numel() > 30, "the text should be varied, or equality means little"


def test_rows_of_a_ragged_batch_are_greedy_as_if_alone_over_300_tokens(model: GPT2) -> None:
    """One forward pass over each finished text shows it: attention is causal, so the logits at
    every token are those that the text had when it ended there."""
    ids, mask = ragged_prompts()
    out = generate(model, ids, 300, mask, temperature=0)
    for row in range(len(ids)):
        text = out.token_ids[row][out.attention_mask[row]]
        assert torch.equal(text[:-300], ids[row][mask[row].bool()])
        with torch.no_grad():
            expected = model(text[None])[0, -301:-1].argmax(dim=1)
        assert torch.equal(text[-300:], expected)


def test_masks_and_shapes(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    out = generate(model, ids, 6, mask, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.token_ids[:, :12], ids)
    assert out.token_ids.shape == out.response_mask.shape == out.logprobs.shape == (4, 18)
    assert not out.response_mask[:, :12].any() and out.response_mask[:, 12:].all()
    assert torch.equal(out.attention_mask[:, :12], mask.bool())


def test_rows_stop_independently_and_keep_their_stop_token(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    free = generate(model, ids, 40, mask, temperature=0)
    stop = int(free.token_ids[0, 12 + 30])  # what row 0 says at its 31st token, or before
    out = generate(model, ids, 40, mask, temperature=0, stop_ids=[stop])
    for row in range(len(ids)):
        spoken = free.token_ids[row, 12:].tolist()
        length = spoken.index(stop) + 1 if stop in spoken else 40
        response = out.token_ids[row][out.response_mask[row]].tolist()
        assert response == spoken[:length]
        assert (out.logprobs[row, 12 + length :] == 0).all()
    assert out.response_mask.sum(dim=1).unique().numel() > 1, (
        "the rows should end at different times"
    )


def test_generation_ends_when_every_row_has_ended(model: GPT2) -> None:
    ids = torch.tensor([[3, 4]])
    first = int(generate(model, ids, 1, temperature=0).token_ids[0, -1])
    assert generate(model, ids, 50, temperature=0, stop_ids=[first]).token_ids.shape == (1, 3)


def test_logprobs_are_those_of_a_forward_pass(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    out = generate(
        model, ids, 20, mask, temperature=1.0, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        logits = model(out.token_ids[:, :-1], attention_mask=out.attention_mask[:, :-1])
    expected = logits.log_softmax(-1).gather(2, out.token_ids[:, 1:, None])[..., 0]
    generated = out.response_mask[:, 1:]
    # A response's first token is predicted by the prompt's last real token, wherever that stands.
    generated = generated & (torch.arange(generated.shape[1]) >= 12)
    torch.testing.assert_close(
        out.logprobs[:, 1:][generated], expected[generated], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(out.logprobs, out.sampling_logprobs)  # nothing was truncated


def test_sampling_logprobs_are_of_the_truncated_distribution(model: GPT2) -> None:
    ids, _ = ragged_prompts()
    out = generate(
        model, ids, 5, temperature=0.5, top_k=1, generator=torch.Generator().manual_seed(0)
    )
    assert (out.sampling_logprobs == 0).all()  # one token left: certain
    assert (out.logprobs[:, 12:] < 0).all()


def test_same_seed_same_text_and_another_seed_another(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    first, again, other = (
        generate(model, ids, 30, mask, generator=torch.Generator().manual_seed(seed)).token_ids
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generator_leaves_the_global_random_state_alone(model: GPT2) -> None:
    before = torch.get_rng_state()
    generate(model, torch.tensor([[1]]), 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_samples_of_a_prompt_are_neighbors_and_differ(model: GPT2) -> None:
    ids, mask = ragged_prompts()
    out = generate(model, ids, 10, mask, num_samples=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.token_ids[:, :12], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in out.token_ids[:3]}) == 3


@pytest.mark.parametrize("options", [{}, {"overflow": "slide"}, {"lookup": 2}])
def test_samples_of_a_prompt_read_it_once(options: dict[str, Any]) -> None:
    """And are those of the prompt written down as often."""
    model = make_model(context_length=24 if "overflow" in options else 400)
    ids, mask = ragged_prompts()
    read: list[tuple[int, int]] = []
    model.trf_blocks[0].register_forward_pre_hook(lambda _, x: read.append(x[0].shape[:2]))
    found = generate(model, ids, 30, mask, num_samples=3, generator=0, **options)
    assert read[0] == (4, 12) and {rows for rows, _ in read[1:]} == {12}
    repeated = (part.repeat_interleave(3, dim=0) for part in (ids, mask))
    expected = generate(model, next(repeated), 30, next(repeated), generator=0, **options)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def test_no_ngram_appears_twice(model: GPT2) -> None:
    out = generate(model, torch.tensor([[1, 2, 3]]), 150, temperature=0, no_repeat_ngram_size=2)
    pairs = list(zip(out.token_ids[0].tolist(), out.token_ids[0, 1:].tolist(), strict=False))
    assert len(pairs) == len(set(pairs))


def test_model_mode_and_gradients_are_as_before(model: GPT2) -> None:
    model = make_model()
    model.train()
    model.trf_blocks[1].eval()
    modes = [module.training for module in model.modules()]
    generate(model, torch.tensor([[1]]), 3)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_generating() -> None:
    config = GPT2Config(50, context_length=40, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5)
    model = GPT2(config).train()
    ids = torch.tensor([[1, 2]])
    first, second = (generate(model, ids, 20, temperature=0).token_ids for _ in range(2))
    assert torch.equal(first, second)


def test_overflow_is_an_error_before_anything_is_generated(model: GPT2) -> None:
    ids = torch.zeros(1, 390, dtype=torch.long)
    with pytest.raises(ValueError, match=r"390 tokens and 11 new .* context of 400.*at most 10"):
        generate(model, ids, 11)
    assert generate(model, ids, 10).token_ids.shape == (1, 400)


def test_sliding_goes_on_past_the_context() -> None:
    model = make_model(context_length=32)
    ids = torch.randint(0, 211, (2, 10), generator=torch.Generator().manual_seed(0))
    out = generate(model, ids, 100, temperature=0, overflow="slide")
    assert out.token_ids.shape == (2, 110)
    inside = generate(model, ids, 22, temperature=0)
    assert torch.equal(out.token_ids[:, :32], inside.token_ids)


def test_sliding_rereads_the_newer_half() -> None:
    """After a slide the model has seen the last half of the context and nothing else."""
    model = make_model(context_length=32)
    ids = torch.randint(0, 211, (1, 10), generator=torch.Generator().manual_seed(0))
    text = generate(model, ids, 40, temperature=0, overflow="slide").token_ids[0]
    # The cache fills up after 32 tokens are read; the 33rd was predicted from all 32 of them.
    expected = greedy_without_cache(model, text[33 - 16 : 33], 16)
    assert torch.equal(text[17:49], expected)


def test_a_prompt_longer_than_the_context_slides_too() -> None:
    model = make_model(context_length=32)
    ids = torch.randint(0, 211, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    assert generate(model, ids, 5, mask, overflow="slide").token_ids.shape == (2, 55)


@pytest.mark.parametrize(("context_length", "new"), [(33, 300), (1, 20)])
@pytest.mark.usefixtures("no_shape_checks")
def test_padding_changes_nothing_when_sliding(context_length: int, new: int) -> None:
    """Rows that reach the context at different steps, or before the start: each is as if alone."""
    model = make_model(context_length=context_length)
    ids = torch.randint(0, 211, (5, 80), generator=torch.Generator().manual_seed(4))
    mask = torch.zeros_like(ids)
    mask[0, :10] = 1  # padding on the right
    mask[1, -12:] = 1  # on the left
    mask[2, 40:73] = 1  # on both sides of 33 tokens
    mask[3, ::5] = 1  # between
    mask[4] = 1
    out = generate(model, ids, new, mask, temperature=0, overflow="slide")
    for row, real in enumerate(mask.bool()):
        alone = generate(model, ids[row][real][None], new, temperature=0, overflow="slide")
        assert torch.equal(out.token_ids[row][out.attention_mask[row]], alone.token_ids[0])
        torch.testing.assert_close(
            out.logprobs[row, -new:], alone.logprobs[0, -new:], atol=1e-3, rtol=0
        )


@pytest.mark.parametrize(("left", "right"), [(50, 0), (0, 50), (0, 90), (20, 30)])
def test_padding_does_not_make_a_row_slide(left: int, right: int) -> None:
    model = make_model(context_length=64)
    prompt = torch.randint(0, 211, (1, 10), generator=torch.Generator().manual_seed(0))
    expected = generate(model, prompt, 54, temperature=0).token_ids[0, 10:]
    padded = nn.functional.pad(prompt, (left, right))
    mask = nn.functional.pad(torch.ones_like(prompt), (left, right))
    out = generate(model, padded, 54, mask, temperature=0, overflow="slide")
    assert torch.equal(out.token_ids[0, padded.shape[1] :], expected)


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 1e-320])
def test_a_tiny_temperature_is_greedy(model: GPT2, temperature: float) -> None:
    ids, mask = ragged_prompts()
    rules: dict[str, Any] = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2}
    found = generate(model, ids, 30, mask, temperature=temperature, **rules)
    greedy = generate(model, ids, 30, mask, temperature=0, **rules)
    assert torch.equal(found.token_ids, greedy.token_ids)
    assert (found.sampling_logprobs == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"num_samples": 0}, "num_samples"),
        ({"overflow": "wrap"}, "overflow"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_senseless_settings_are_refused(model: GPT2, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1]]), **{"max_new_tokens": 3, **settings})


def test_senseless_prompts_are_refused(model: GPT2) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="nothing but padding"):
        generate(model, torch.ones(2, 2, dtype=torch.long), 3, torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        generate(model, torch.tensor([[999]]), 3)


def test_a_classifier_cannot_generate() -> None:
    model = make_model()
    model.out_head = nn.Linear(48, 2)
    with pytest.raises(ValueError, match="output head has 2 outputs"):
        generate(model, torch.tensor([[1]]), 3)


def test_complete_is_prompt_and_stream(talker: GPT2, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 20}
    text = complete(
        talker, tokenizer, "The cat", 40, generator=torch.Generator().manual_seed(0), **options
    )
    pieces = stream(
        talker, tokenizer, "The cat", 40, generator=torch.Generator().manual_seed(0), **options
    )
    assert text == "The cat" + "".join(pieces)


def test_complete_equals_generate(talker: GPT2, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("The dog")])
    out = generate(talker, ids, 30, temperature=0, stop_ids=[tokenizer.eos_id])
    new = [i for i in out.token_ids[out.response_mask].tolist() if i != tokenizer.eos_id]
    text = complete(talker, tokenizer, "The dog", 30, temperature=0)
    assert text == "The dog" + tokenizer.decode(new)


def test_stop_strings_end_the_text_before_them(talker: GPT2, tokenizer: Tokenizer) -> None:
    free = complete(talker, tokenizer, "The", 60, temperature=0)
    stop = free[20:23]
    cut = complete(talker, tokenizer, "The", 60, temperature=0, stop_strings=[stop])
    assert cut == "The" + free[3:].split(stop)[0]


def test_stop_ids_end_the_text_before_them(talker: GPT2, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("The dog")])
    new = generate(talker, ids, 30, temperature=0).token_ids[0, ids.shape[1] :].tolist()
    stop = new[12]
    text = complete(talker, tokenizer, "The dog", 30, temperature=0, stop_ids=[stop])
    assert text == "The dog" + tokenizer.decode(new[: new.index(stop)])


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["ab", "cd", "ef"], ["cde"], "ab"),  # over the border of two pieces
        (["abc", "abd"], ["abd"], "abc"),  # a false start, then the true one
        (["aab"], ["ab"], "a"),
        (["xy"], ["yz"], "xy"),  # begun, never finished: given out at the end
        (["one", "two"], ["w", "t"], "one"),  # the first in the text counts
        (["bbaba"], ["baba", "a"], "bb"),  # the one that is complete first,
        (["bb", "a", "ba"], ["baba", "a"], "bb"),  # however the text is cut
        (["abc"], [""], "abc"),
        (["abc"], [], "abc"),
        (["the old", " sea"], "sea", "the old "),  # one string: one stop, not one a character
        (["abc"], "", "abc"),
    ],
)
def test_stop_strings_are_found_wherever_they_are_cut(pieces, stops, text) -> None:
    assert "".join(until_stop(iter(pieces), as_texts("stop_strings", stops))) == text


def test_stream_gives_text_as_soon_as_it_is_known(talker: GPT2, tokenizer: Tokenizer) -> None:
    pieces = list(stream(talker, tokenizer, "The", 20, temperature=0))
    assert len(pieces) > 5


@pytest.mark.parametrize("prompt", ["", END_OF_TEXT])
def test_an_empty_prompt_begins_a_text(prompt: str, talker: GPT2, tokenizer: Tokenizer) -> None:
    """As OpenAI's generate_unconditional_samples.py: at <|endoftext|>."""
    text = complete(talker, tokenizer, prompt, 30, temperature=0)
    out = generate(talker, [[tokenizer.eos_id]], 30, temperature=0, stop_ids=tokenizer.eos_id)
    new = [i for i in out.token_ids[0, 1:].tolist() if i != tokenizer.eos_id]
    assert text == prompt + tokenizer.decode(new) != prompt


@pytest.mark.parametrize("stop", [-1, 50_256])
def test_a_stop_id_outside_the_vocabulary_is_refused(stop: int, model: GPT2) -> None:
    with pytest.raises(ValueError, match=f"stop id {stop} is outside the vocabulary"):
        generate(model, torch.tensor([[1, 2, 3]]), 4, stop_ids=[stop])


# Arguments as people give them


def test_one_text_and_lists_are_taken(model: GPT2) -> None:
    expected = generate(model, torch.tensor([[1, 2, 3]]), 4, temperature=0).token_ids
    for ids in ([[1, 2, 3]], [1, 2, 3], torch.tensor([1, 2, 3]), np.array([[1, 2, 3]])):
        assert torch.equal(generate(model, ids, 4, temperature=0).token_ids, expected)
    masked = generate(model, [[0, 1, 2, 3]], 4, [[0, 1, 1, 1]], temperature=0)
    assert torch.equal(masked.token_ids[:, 1:], expected)


@pytest.mark.usefixtures("no_shape_checks")
def test_arguments_of_a_natural_kind_are_taken(model: GPT2) -> None:
    ids = torch.tensor([[1, 2, 3]])
    free = generate(model, ids, 20, temperature=0).token_ids[0, 3:]
    stop = int(free[7])
    expected = generate(model, ids, 20, temperature=0, stop_ids=[stop]).token_ids
    for stops in (
        stop,
        (stop,),
        torch.tensor([stop]),
        torch.tensor(stop),
        np.array([stop]),
        {stop},
    ):
        assert torch.equal(
            generate(model, ids, 20, temperature=0, stop_ids=stops).token_ids, expected
        )
    seeded = generate(model, ids, 20, generator=torch.Generator().manual_seed(42)).token_ids
    assert torch.equal(generate(model, ids, 20, generator=42).token_ids, seeded)
    assert torch.equal(generate(model, ids, 20, generator=np.int64(42)).token_ids, seeded)
    numbers: Any = {"max_new_tokens": 5.0, "top_k": 50.0, "num_samples": 2.0}
    first = generate(model, ids, **numbers, generator=0).token_ids
    again = generate(model, ids, 5, top_k=50, num_samples=2, generator=0).token_ids
    assert torch.equal(first, again)
    guesses: Any = {"lookup": 2.0, "draft_tokens": 3.0}
    assert torch.equal(
        generate(model, ids, 20, generator=42, temperature=0, **guesses).token_ids,
        generate(model, ids, 20, temperature=0).token_ids,
    )
    off = generate(model, ids, 20, top_k=0, top_p=1, stop_ids=None, generator=42).token_ids
    assert torch.equal(off, seeded)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_wrapped_model_generates_as_the_model(model: GPT2) -> None:
    expected = generate(model, [1, 2], 5, temperature=0).token_ids
    wrapped: Any = nn.DataParallel(model)
    assert torch.equal(generate(wrapped, [1, 2], 5, temperature=0).token_ids, expected)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"token_ids": "The cat"}, ValueError, "complete.model, tokenizer, prompt. takes text"),
        ({"token_ids": [[1, 2], [3]]}, ValueError, "of one length; masking.pad_left"),
        ({"token_ids": [[["a"]]]}, ValueError, "token_ids must be a tensor of the shape"),
        ({"token_ids": [[1.5]]}, ValueError, "token_ids must be torch.long"),
        ({"temperature": None}, TypeError, "temperature must be a number, not None"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": 2.5}, ValueError, "top_k must be a whole number, not 2.5"),
        ({"top_k": True}, TypeError, "top_k must be a number, not True"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens must be a number"),
        ({"stop_ids": "."}, TypeError, "stop_ids must be token ids"),
        ({"stop_ids": [1.5]}, TypeError, "stop_ids must be token ids"),
        ({"forbidden_ids": [999]}, ValueError, "forbidden id 999 is outside the vocabulary"),
        ({"generator": "42"}, TypeError, "a torch.Generator or a seed, not '42'"),
        ({"do_sample": False}, TypeError, "no argument do_sample; write temperature=0"),
        ({"max_length": 9}, TypeError, "no argument max_length; write max_new_tokens"),
        ({"eos_token_id": 9}, TypeError, "no argument eos_token_id; write stop_ids"),
        ({"seed": 9}, TypeError, "no argument seed; write generator=SEED"),
        ({"temprature": 9}, TypeError, "no argument temprature; did you mean temperature"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a GPT2 of gpt2mini, not a Linear"),
        ({"draft": "gpt2-nano"}, TypeError, "draft must be a GPT2 of gpt2mini, not a str"),
        ({"lookup": 2.5}, ValueError, "lookup must be a whole number"),
        ({"others": 1}, TypeError, "no argument others; there are model, .*"),
    ],
    ids=str,
)
def test_other_arguments_are_refused_in_words(
    model: GPT2, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    usual = {"model": model, "token_ids": [[1, 2, 3]], "max_new_tokens": 3}
    with pytest.raises(kind, match=message):
        generate(**{**usual, **arguments})


@pytest.mark.usefixtures("no_shape_checks")
def test_arguments_of_complete(talker: GPT2, tokenizer: Tokenizer) -> None:
    text = complete(talker, tokenizer, "The", 20, temperature=0)
    for none in (None, "", [], [""]):
        assert complete(talker, tokenizer, "The", 20, temperature=0, stop_strings=none) == text
    stop = tokenizer.encode(text)[9]
    cut = complete(talker, tokenizer, "The", 20, temperature=0, stop_ids=stop)
    assert cut == complete(talker, tokenizer, "The", 20, temperature=0, stop_ids=[stop])
    for arguments, message in (
        ({"do_sample": False}, "no argument do_sample; write temperature=0"),
        ({"streamer": 1}, "no argument streamer; write stream"),
        ({"top_n": 3}, "no argument top_n; did you mean top_"),
        ({"sampling": 3}, "no argument sampling; there are "),
        ({"stop_strings": [3]}, "stop_strings must be text, not 3"),
        ({"stop_strings": 3}, "stop_strings must be text, not 3"),
    ):
        with pytest.raises(TypeError, match=message):
            stream(talker, tokenizer, "The", **arguments)
    several: Any = ["The", "A"]
    with pytest.raises(TypeError, match=r"encode takes one text.*\[tokenizer.encode"):
        stream(talker, tokenizer, several)


@pytest.mark.parametrize("given", [True, False, "yes"])
@pytest.mark.usefixtures("no_shape_checks")
def test_valid_utf8_of_generate_needs_the_tokenizer(model: GPT2, given: Any) -> None:
    with pytest.raises(TypeError, match=r"must be ValidUTF8\(tokenizer, model.config.vocab_size\)"):
        generate(model, [1, 2], 3, valid_utf8=given)


@pytest.mark.parametrize("options", [{}, {"lookup": 2}, {"stop_ids": [3]}], ids=str)
def test_token_ids_are_int64_whatever_is_given(model: GPT2, options: dict[str, Any]) -> None:
    ids = torch.tensor([[1, 2, 1, 2]], dtype=torch.int32)
    assert generate(model, ids, 3, **options).token_ids.dtype == torch.int64


def test_a_row_that_has_ended_has_no_logprob_even_of_an_impossible_token() -> None:
    """A model that never repeats a token; an ended row repeats its last one."""

    def none_twice(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits.scatter(2, inputs[0][:, -logits.shape[1] :, None], -torch.inf)

    model = make_model()
    model.register_forward_hook(none_twice)
    out = generate(model, [[1, 2], [5, 3]], 8, stop_ids=range(0, 211, 3), generator=0)
    assert not out.response_mask.all()
    assert out.logprobs.isfinite().all() and out.sampling_logprobs.isfinite().all()


# Masks, numbers that are none, padded vocabularies


@pytest.mark.parametrize("options", [{}, {"lookup": 1}, {"temperature": 0}], ids=str)
def test_a_row_that_has_ended_needs_no_token_any_more(model: GPT2, options: dict[str, Any]) -> None:
    """The second row writes 1, 2 and 3; of those the first has only 3 left, which ends it."""
    rows, others = torch.tensor([[1, 2, 9, 10], [20, 21, 9, 10]]), [0, *range(4, 211)]
    request: dict[str, Any] = {"no_repeat_ngram_size": 1, "forbidden_ids": others, "stop_ids": [3]}
    for seed in range(5):
        found = generate(model, rows, 3, generator=seed, **request, **options)
        assert found.token_ids[0, 4] == 3
        real = found.token_ids[1, 4:][found.response_mask[1, 4:]].tolist()
        assert real[-1] == 3 and len(set(real)) == len(real)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0.0, -10000.0, 0.0]]), "must be integers or booleans"),
        (torch.tensor([[1.0, 1.0, 0.0]]), "must be integers or booleans"),
        (torch.tensor([[1, -1, 1]]), "holds -1; expected 0 for padding"),
        (torch.tensor([[1, 1, 2]]), "holds 2: expected one text in each row"),
        (torch.tensor([[1, 1]]), "has the shape"),
        (torch.tensor([[0, 0, 0]]), "nothing but padding"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_shape_checks")
def test_masks_that_the_model_refuses_are_refused(model: GPT2, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2, 3]], 3, mask)


@pytest.mark.parametrize("temperature", [0, 1e-7, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("value", "message"),
    [("nan", "contain NaN"), ("inf", "contain NaN or infinity"), ("-inf", "no token is left")],
)
def test_logits_that_are_no_numbers_are_refused_before_the_choice(
    model: GPT2, temperature: float, options: dict[str, Any], value: str, message: str
) -> None:
    model = make_model(vocab_size=20)
    model.out_head.register_forward_hook(lambda *_: torch.full((1, 1, 20), float(value)))
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], 2, temperature=temperature, generator=0, **options)


def test_nan_weights_are_refused_by_greedy_choice() -> None:
    model = make_model(vocab_size=20)
    model.final_norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="the logits contain NaN"):
        generate(model, [[1, 2]], 2, temperature=0)


@pytest.mark.parametrize("temperature", [0, 1.0, 5.0])
def test_forbidden_ids_are_never_generated(model: GPT2, temperature: float) -> None:
    free = generate(model, [[1, 2]] * 3, 30, temperature=temperature, generator=0)
    forbidden = free.token_ids[:, 2:].unique().tolist()[::2]
    out = generate(
        *(model, [[1, 2]] * 3, 30),
        temperature=temperature,
        generator=0,
        forbidden_ids=forbidden,
        repetition_penalty=1.1,
        top_k=3,
    )
    assert not torch.isin(out.token_ids[:, 2:], torch.tensor(forbidden)).any()
    with pytest.raises(ValueError, match="no token is left to choose"):
        generate(model, [[1, 2]], 3, forbidden_ids=range(211))


def test_ids_that_the_tokenizer_lacks_are_never_generated(tokenizer: Tokenizer) -> None:
    """A vocabulary of 50257 is often padded to 50304; and one may have gaps."""
    size = tokenizer.vocab_size
    gappy = Tokenizer({**tokenizer.vocab, END_OF_TEXT: size + 10}, tokenizer.merges)
    for ours in (tokenizer, gappy):
        assert ours.missing_ids(size + 64) == sorted(
            set(range(size + 64)) - set(ours.vocab.values())
        )
        padded = make_model(size + 64)
        for seed in range(3):
            complete(padded, ours, "The", 20, generator=seed)  # used to break off in the middle


@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_that_the_config_does_not_count_are_refused_until_it_does(blocks: int) -> None:
    model = make_model()
    model.trf_blocks = nn.ModuleList([*model.trf_blocks, deepcopy(model.trf_blocks[0])][:blocks])
    with pytest.raises(ValueError, match=rf"{blocks} blocks and a config of n_layers=3.*replace"):
        generate(model, [1, 2], 3, temperature=0)
    model.config = replace(model.config, n_layers=blocks)
    found = generate(model, [1, 2], 3, temperature=0).token_ids[0]
    assert torch.equal(found, greedy_without_cache(model, torch.tensor([1, 2]), 3))
