"""Evaluation: every figure equals what a plainer computation over all logits gives."""

import gzip
import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from conftest import enlarge, shared_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.data.instructions import Exchange, ExchangeBatches, encode_exchanges
from gpt2mini.evaluation import forgetting, generation_quality, perplexity, zero_shot
from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.evaluation.detokenizers import (
    count_wikitext_tokens,
    detokenize_penn,
    detokenize_wikitext,
    tokenize_wikitext,
)
from gpt2mini.evaluation.forgetting import change_beyond, compare_predictions
from gpt2mini.evaluation.generation_quality import distinct_n, repetition_rate, script_shares
from gpt2mini.evaluation.lambada import read_passages, stop_word_ids
from gpt2mini.evaluation.multiple_choice import read_childrens_books, read_hellaswag
from gpt2mini.evaluation.windows import rolling_windows
from gpt2mini.lora import add_lora, lora_layers, save_adapter
from gpt2mini.model import MultiHeadAttention
from gpt2mini.training import evaluate_loss

ENGLISH = (
    "The old man mended nets. He had no boat, only a chair, a needle and the whole harbour to talk "
    "to; and when the wind was in the north he talked to that.\n\n" * 4
)
CHINESE = "却说那日天色已晚，众人都散了。他独自坐在灯下，看了半夜的书，忽听得门外有人叩门。\n" * 2


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2:
    """A tiny model with a real vocabulary: read it, do not change it."""
    config = GPT2Config(tokenizer.vocab_size, context_length=64, emb_dim=48, n_heads=6, n_layers=2)
    torch.manual_seed(0)
    model = GPT2(config)
    enlarge(model)
    return model.eval()


@pytest.fixture(scope="module")
def theirs(model: GPT2, tmp_path_factory: pytest.TempPathFactory):
    """The same model, as transformers opens it."""
    import transformers

    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


# ---- perplexity


def recipe(theirs, ids: Tensor, context_length: int, stride: int) -> tuple[float, int]:
    """(mean loss, targets): the sliding window of transformers' own documentation, one window at a
    time, full logits, labels of -100 for what an earlier window has scored."""
    nats, count, previous_end = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + context_length, len(ids))
        labels = ids[start:end].clone()
        labels[: previous_end - start] = -100
        with torch.no_grad():
            logits = theirs(ids[None, start:end]).logits[0]
        nats += F.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
        previous_end = end
        if end == len(ids):
            break
    return nats / count, count


def by_one_token_at_a_time(theirs, ids: list[int], context_length: int) -> float:
    """Nats of all ids after the first, by lm-eval's definition of rolling windows: each block of
    `context_length` ids is predicted in one pass over the `context_length` ids before its last."""
    nats = 0.0
    for block in range(1, len(ids), context_length):
        end = min(block + context_length, len(ids))
        inputs = ids[max(0, end - 1 - context_length) : end - 1]
        with torch.no_grad():
            logprobs = theirs(torch.tensor([inputs])).logits[0].double().log_softmax(dim=1)
        for place in range(block, end):
            nats -= float(logprobs[place - end, ids[place]])
    return nats


@pytest.mark.parametrize(
    ("text", "context_length", "score_first"),
    [
        (ENGLISH, 64, True),
        (CHINESE, 64, False),
        (ENGLISH, 37, False),
        (CHINESE, 16, True),
        (ENGLISH[:100], 2, True),
        (CHINESE[:20], 1, True),
    ],
)
def test_rolling_windows_are_those_of_lm_eval(
    model: GPT2, theirs, tokenizer: Tokenizer, text: str, context_length: int, score_first: bool
) -> None:
    ids = tokenizer.encode(text)
    found = perplexity(model, tokenizer, text, context_length, score_first=score_first)
    row = [tokenizer.eos_id, *ids] if score_first else ids
    expected = by_one_token_at_a_time(theirs, row, context_length) / (len(row) - 1)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert (found.scored, found.tokens) == (len(row) - 1, len(ids))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9))
def test_rolling_windows_score_each_token_once_and_are_full(
    lengths: list[int], context_length: int
) -> None:
    texts = [100 * number + torch.arange(length) for number, length in enumerate(lengths)]
    rows = rolling_windows(texts, context_length)
    scored = [int(token) for row in rows for token in row.token_ids[row.n_context :]]
    assert sorted(scored) == torch.cat([ids[1:] for ids in texts]).tolist()
    for row in rows:
        whole = len(texts[int(row.token_ids[0]) // 100])
        assert len(row.token_ids) == min(context_length + 1, whole)
        assert row.n_context >= 1 and row.n_scored >= 1
        assert (torch.as_tensor(row.token_ids).diff() == 1).all()


def test_the_model_reads_its_whole_context_and_no_more(
    model: GPT2, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions predict 64 tokens: the last token of a window is never read."""
    text = "net " * 200
    tokens, read = len(tokenizer.encode(text)), []
    forward = GPT2.forward

    def noting(self, token_ids, *arguments, **named):
        read.append(token_ids.shape)
        return forward(self, token_ids, *arguments, **named)

    monkeypatch.setattr(GPT2, "forward", noting)
    perplexity(model, tokenizer, text, batch_size=1)
    assert read == [(1, 64)] * -(-tokens // 64)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize(
    ("context_length", "stride"), [(64, 32), (64, 64), (24, 3), (37, 13), (16, 15), (2, 1)]
)
def test_perplexity_is_that_of_transformers(
    model: GPT2, theirs, tokenizer: Tokenizer, text: str, context_length: int, stride: int
) -> None:
    ids = torch.tensor(tokenizer.encode(text))
    found = perplexity(model, tokenizer, text, context_length, stride, score_first=False)
    mean, count = recipe(theirs, ids, context_length, stride)
    assert found.per_token == pytest.approx(math.exp(mean), rel=1e-4)
    assert (found.scored, found.tokens) == (count, len(ids))

    with_first = perplexity(model, tokenizer, text, context_length, stride)
    mean, count = recipe(theirs, F.pad(ids, (1, 0), value=tokenizer.eos_id), context_length, stride)
    assert with_first.per_token == pytest.approx(math.exp(mean), rel=1e-4)
    assert with_first.scored == count
    assert count == len(ids) or stride == context_length


@pytest.mark.parametrize("score_first", [True, False])
def test_normalisations_are_of_the_original_text(
    model: GPT2, tokenizer: Tokenizer, score_first: bool
) -> None:
    found = perplexity(model, tokenizer, CHINESE + ENGLISH, score_first=score_first)
    assert found.bytes == len((CHINESE + ENGLISH).encode())
    assert found.words == len((CHINESE + ENGLISH).split())
    nats = math.log(found.per_token) * found.tokens
    assert found.per_word == pytest.approx(math.exp(nats / found.words))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes)
    assert "per token" in str(found)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_does_not_depend_on_the_batch_size(
    model: GPT2, tokenizer: Tokenizer, batch_size: int
) -> None:
    texts = [ENGLISH, CHINESE, "Two words"]
    expected = perplexity(model, tokenizer, texts, 40, 17)
    found = perplexity(model, tokenizer, texts, 40, 17, batch_size=batch_size)
    assert found.per_token == pytest.approx(expected.per_token, rel=1e-5)


def test_several_texts_do_not_see_each_other(model: GPT2, tokenizer: Tokenizer) -> None:
    alone = [perplexity(model, tokenizer, text) for text in (ENGLISH, CHINESE)]
    together = perplexity(model, tokenizer, [ENGLISH, CHINESE])
    assert together.nats == pytest.approx(sum(one.nats for one in alone), rel=1e-5)
    assert together.tokens == sum(one.tokens for one in alone)


def test_bfloat16_moves_perplexity_a_little(model: GPT2, tokenizer: Tokenizer) -> None:
    exact, rough = (
        perplexity(model, tokenizer, ENGLISH[:200], precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert 0 < abs(rough.loss - exact.loss) < 0.02 * exact.loss


def test_the_model_is_given_back_as_it_was(model: GPT2, tokenizer: Tokenizer) -> None:
    own = deepcopy(model).train()
    state = torch.get_rng_state()
    perplexity(own, tokenizer, "Two words")
    forgetting(own, own, tokenizer, "Two words", "and more")
    score_continuations(own, [Continuation([1], [2])])
    assert all(module.training for module in own.modules())
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "text 1 is empty"),
        ("a", {}, "one token only"),
        (["fine text", ""], {}, "text 2 is empty"),
        ([], {}, "no text to score"),
        (ENGLISH, {"stride": 65}, r"stride \(65\) <= context_length \(64\)"),
        (ENGLISH, {"context_length": 8, "stride": 9}, r"stride \(9\) <= context_length \(8\)"),
        (ENGLISH, {"context_length": 65}, "to the model's 64"),
        (ENGLISH, {"context_length": 0}, r"context_length \(0\), which lies in 1"),
        (ENGLISH, {"context_length": 1, "stride": 1}, "context_length must be at least 2"),
        (ENGLISH, {"stride": 0}, r"1 <= stride \(0\)"),
        (ENGLISH, {"precision": "fp8"}, "precision must be"),
    ],
)
def test_perplexity_refuses(
    model: GPT2, tokenizer: Tokenizer, text, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, text, **arguments)


@pytest.fixture
def broken(model: GPT2) -> GPT2:
    """The same model after a training that has failed: one weight is NaN, and so every logit."""
    broken = deepcopy(model)
    with torch.no_grad():
        broken.final_norm.weight[0] = math.nan
    return broken


def test_nan_is_no_perplexity(broken: GPT2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = perplexity(broken, tokenizer, ENGLISH)
    assert math.isnan(found.per_token) and math.isnan(found.per_word)
    (tmp_path / "a.txt").write_text(ENGLISH)
    table = zero_shot(broken, tokenizer, {"text": tmp_path / "a.txt"})
    assert all(math.isnan(row.value) for row in table.rows) and str(table).count(" nan") == 4


def test_nan_chooses_no_ending(broken: GPT2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    questions = [{"ctx": "The cat", "endings": ["sat.", "ran."], "label": 0}]
    file = write_lines(tmp_path / "h.jsonl", questions)
    with pytest.raises(ValueError, match=r"contain NaN: check the model's weights"):
        zero_shot(broken, tokenizer, {"hellaswag": file})


def test_a_classifier_is_refused(model: GPT2, tokenizer: Tokenizer) -> None:
    classifier = deepcopy(model)
    classifier.out_head = nn.Linear(model.config.emb_dim, 2)
    for score in (
        lambda: perplexity(classifier, tokenizer, ENGLISH),
        lambda: forgetting(model, classifier, tokenizer, ENGLISH, ENGLISH),
        lambda: score_continuations(classifier, [Continuation([1], [2])]),
    ):
        with pytest.raises(ValueError, match=r"head has 2 outputs; expected 8192.* classifier"):
            score()


# ---- continuations, against every logit


def dense(model: GPT2, context: list[int], ids: list[int]) -> Tensor:
    """log p of the whole vocabulary at each token of a continuation, (tokens, vocab)."""
    row = (context + ids)[:-1][-model.config.context_length :]
    with torch.no_grad():
        return model(torch.tensor([row]))[0, -len(ids) :].log_softmax(dim=1)


def test_continuations_are_scored_as_by_brute_force(model: GPT2) -> None:
    generator = torch.Generator().manual_seed(1)
    continuations = []
    for n_context, n_ids in [
        (1, 1),
        (5, 3),
        (63, 1),
        (64, 1),
        (200, 4),
        (30, 34),
        (7, 63),
        (1, 64),
        (9, 64),
    ]:
        ids = torch.randint(8192, (n_context + n_ids,), generator=generator).tolist()
        continuations.append(Continuation(ids[:n_context], ids[n_context:]))
    # one whose tokens are the likeliest ones
    context = continuations[1].context
    best = int(dense(model, context, [0])[0].argmax())
    continuations.append(Continuation(context, [best]))
    scores = score_continuations(model, continuations, excluded={best})
    for one, score in zip(continuations, scores, strict=True):
        every = dense(model, one.context, one.ids)
        targets = torch.tensor(one.ids)
        torch.testing.assert_close(
            score.logprobs, every.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=1e-5
        )
        assert score.is_likeliest == (every.argmax(dim=1) == targets).tolist()
        every[0, best] = -torch.inf
        assert score.first_is_likeliest_allowed == (int(every[0].argmax()) == one.ids[0])
    assert scores[-1].is_likeliest == [True] and not scores[-1].first_is_likeliest_allowed


def multiple_choice(seed: int, questions: int) -> list[Continuation]:
    """Contexts and endings of all lengths; a context that leaves no room for its longest ending."""
    random = torch.Generator().manual_seed(seed)

    def some(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=random))
        return torch.randint(8192, (length,), generator=random).tolist()

    contexts = [*(some(40) for _ in range(questions)), [1], some(8) * 64]
    return [Continuation(context, some(24)) for context in contexts for _ in range(len(some(4)))]


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_a_context_in_common_changes_no_score(model: GPT2, seed: int, questions: int) -> None:
    continuations = multiple_choice(seed, questions)
    together = score_continuations(model, continuations, excluded={5, 6})
    for one, score in zip(continuations, together, strict=True):
        (alone,) = score_continuations(model, [one], excluded={5, 6})
        torch.testing.assert_close(score.logprobs, alone.logprobs, atol=1e-4, rtol=1e-5)
        assert len(score.is_likeliest) == len(one.ids)


def tokens_read(model: GPT2, continuations: list[Continuation]) -> int:
    read = 0

    def count(_: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal read
        read += arguments[0].numel()

    hook = model.tok_emb.register_forward_pre_hook(count)
    score_continuations(model, continuations)
    hook.remove()
    return read


def test_a_context_in_common_is_read_once(model: GPT2) -> None:
    context, endings = list(range(1, 40)), [[7, 8, 9], [4, 5, 6], [1, 2, 3], [3, 2, 1]]
    questions = [[first, *context] for first in range(100)]
    rows = [Continuation(context, ids) for context in questions for ids in endings]
    once, each = 100 * (39 + 4 * 3), 100 * 4 * (40 + 2)
    assert once <= tokens_read(model, rows) < 1.1 * once < each / 2


class SeesTheTokenBefore(nn.Module):
    """A layer whose output at a token depends on the token before, which no cache keeps for it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class TakesNoCache(GPT2):
    def forward(self, token_ids: Any, attention_mask: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(token_ids, attention_mask)


def see_the_token_before(model: GPT2) -> None:
    block: Any = model.trf_blocks[0]
    block.mlp = SeesTheTokenBefore(block.mlp)


def take_no_cache(model: GPT2) -> None:
    model.__class__ = TakesNoCache


@pytest.mark.parametrize("change", [see_the_token_before, take_no_cache])
def test_a_model_that_cannot_go_on_from_a_cache_reads_whole_rows(
    model: GPT2, change: Callable[[GPT2], None]
) -> None:
    changed = deepcopy(model)
    change(changed)
    continuations = multiple_choice(seed=0, questions=4)
    for one, score in zip(continuations, score_continuations(changed, continuations), strict=True):
        (alone,) = score_continuations(changed, [one])
        torch.testing.assert_close(score.logprobs, alone.logprobs, atol=1e-4, rtol=1e-5)


class SeesTheLastEight(MultiHeadAttention):
    """Attention to the last 8 tokens, of which a mask for cached keys has the wrong ones: it takes
    the queries for the first tokens of the text."""

    def forward(self, x: Tensor, attn_mask: Any = None, cache: Any = None, last_only: Any = False):
        q, k, v = map(self.split_heads, self.project(x, False))
        if cache is not None:
            k, v = cache.append(k, v)
        n, total = q.shape[2], k.shape[2]
        near = torch.ones(n, total, dtype=torch.bool).tril(total - n).triu(-7)
        near = near if attn_mask is None else near & attn_mask
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.attn_out(context.transpose(1, 2).flatten(2))


def test_a_cache_that_fails_after_a_long_context_alone_is_not_used(model: GPT2) -> None:
    changed = deepcopy(model)
    for block in changed.trf_blocks:
        attention: Any = block.attn
        attention.__class__ = SeesTheLastEight
    contexts, endings = [[1, 2, 3], list(range(40))], [[7, 8, 9], [4, 5, 6]]
    rows = [Continuation(context, ids) for context in contexts for ids in endings]
    for one, score in zip(rows, score_continuations(changed, rows), strict=True):
        (alone,) = score_continuations(changed, [one])
        torch.testing.assert_close(score.logprobs, alone.logprobs, atol=1e-4, rtol=1e-5)


def test_contexts_in_common_are_read_in_bfloat16_too(model: GPT2) -> None:
    continuations = multiple_choice(seed=1, questions=4)
    for precision, half in (("bf16", model), ("fp32", deepcopy(model).bfloat16())):
        exact = score_continuations(model, continuations)
        rounded = score_continuations(half, continuations, precision=precision)
        for one, other in zip(exact, rounded, strict=True):
            assert abs(one.logprob - other.logprob) < 0.02 * abs(one.logprob) + 0.2


@pytest.mark.parametrize("length", [0, 65])
def test_a_continuation_must_have_tokens_and_fit(model: GPT2, length: int) -> None:
    with pytest.raises(ValueError, match=f"continuation of {length} tokens.* 1 to 64"):
        score_continuations(model, [Continuation([1], [2] * length)])


def test_a_continuation_is_predicted_from_something(model: GPT2) -> None:
    with pytest.raises(ValueError, match=r"context of a continuation is empty.*endoftext"):
        score_continuations(model, [Continuation([], [2])])


def write_lines(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_lambada_is_that_of_brute_force(model: GPT2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = deepcopy(model)
    him, man = (tokenizer.encode(word)[0] for word in (" him", " man"))
    model.out_head = torch.nn.Linear(48, tokenizer.vocab_size)
    with torch.no_grad():  # " him" is always the likeliest, a stop word; " man" always the second
        model.out_head.bias[him], model.out_head.bias[man] = 30, 25
    prompts = ["She looked at the man and his", "It was late, and in the harbour the"] * 2
    words = ["him", "lighthouse", "man", "him"]
    texts = [f"{prompt} {word}" for prompt, word in zip(prompts, words, strict=True)]
    file = write_lines(tmp_path / "passages.jsonl", [{"text": text} for text in texts])
    rows = zero_shot(model, tokenizer, {"lambada": file}).rows
    nats, last = [], []
    for prompt, word in zip(prompts, words, strict=True):
        ids = tokenizer.encode(" " + word)
        every = dense(model, tokenizer.encode(prompt), ids)
        nats.append(-sum(float(every[i, token]) for i, token in enumerate(ids)))
        last.append(-float(every[-1, ids[-1]]))
    found = [row.value for row in rows]
    expected = [math.exp(sum(nats) / 4), math.exp(sum(last) / 4), 50, 25]
    assert found == pytest.approx(expected, rel=1e-4)
    assert rows[0].paper == (35.13, 15.60, 10.87, 8.63)
    assert "stop-word filter" in rows[3].setting

    packed = tmp_path / "passages.JSON.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert zero_shot(model, tokenizer, {"lambada": packed}).rows == rows

    plain = write_lines(tmp_path / "plain.txt", list(texts))
    again = zero_shot(model, tokenizer, {"lambada-original": plain}).rows
    assert [row.value for row in again] == pytest.approx(found)
    assert again[0].task == "LAMBADA, original"


def test_stop_words_are_whole_tokens(tokenizer: Tokenizer) -> None:
    words = {tokenizer.decode([i]) for i in stop_word_ids(tokenizer)}
    assert {" the", " The", " him"} <= words
    assert all(word.startswith(" ") for word in words)


def test_hellaswag_is_that_of_brute_force(
    model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    endings = ["sits.", "extraordinarily long", "he is at it as is my old cat", "goes home now"]
    records, by_sum = [], []
    for person in ("A man", "The woman", "A child", "The cat", "A dog"):
        context = f"Fishing: {person} opens the door. {person}"
        sums = []
        for ending in endings:
            ids = tokenizer.encode(" " + ending)
            every = dense(model, tokenizer.encode(context), ids)
            sums.append(sum(float(every[i, token]) for i, token in enumerate(ids)))
        per_character = [s / len(e) for s, e in zip(sums, endings, strict=True)]
        right = per_character.index(max(per_character))
        records.append({"ctx": context, "endings": endings, "label": right})
        by_sum.append(sums.index(max(sums)) == right)
    file = write_lines(tmp_path / "h.jsonl", records)
    rows = zero_shot(model, tokenizer, {"hellaswag": file}).rows
    assert [row.value for row in rows] == [20 * sum(by_sum), 100]
    assert not all(by_sum) and rows[0].paper is None


def test_hellaswag_as_published_is_read_as_by_the_harness(tmp_path: Path) -> None:
    record = {
        "activity_label": "Removing ice", "ctx_a": "A man [header] scrapes.", "ctx_b": "then he",
        "ctx": "A man scrapes. then he", "endings": ["[step] rests."], "label": "0",
    }  # fmt: skip
    (question,) = read_hellaswag(write_lines(tmp_path / "h.jsonl", [record]))
    assert question.context == "Removing ice: A man scrapes. Then he"
    assert question.endings == ["  rests."]  # the space after the mark stays


def test_white_space_at_the_end_of_a_context_is_the_continuation_s(tokenizer: Tokenizer) -> None:
    """As lm-eval's `_encode_pair`."""
    found = Continuation.of(tokenizer, "the man ", " and his")
    assert found == Continuation.of(tokenizer, "the man", "  and his")
    assert Continuation.of(tokenizer, " ", "man").context == [tokenizer.eos_id]


def test_empty_rows_of_a_task_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = {"ctx": "A man rests.", "endings": ["He sleeps.", "He runs."], "label": 0}
    rows = [question, {**question, "ctx": ""}, {**question, "endings": ["", "He runs."]}]
    assert len(read_hellaswag(write_lines(tmp_path / "h.jsonl", rows))) == 1
    assert "1 of 3 records left out: 'ctx' is empty" in caplog.text
    assert "1 of 3 records left out: 'endings' has an empty text" in caplog.text
    passages = [{"text": "the torn net", "id": 1}, {"text": None, "id": 2}]
    assert read_passages(write_lines(tmp_path / "l.jsonl", passages)) == [("the torn", " net")]
    assert "1 of 2 records left out: 'text' is empty" in caplog.text
    assert "not used" not in caplog.text


def childrens_book(query: str, answer: str, candidates: list[str]) -> list[str]:
    lines = [f"{i} the boat was old , number {i} ." for i in range(1, 21)]
    return [*lines, f"21 {query}\t{answer}\t\t{'|'.join(candidates)}", ""]


def test_childrens_books_are_scored_by_word_and_rest(
    model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    candidates = ["net", "boat", "door", "man", "sea", "lamp", "cat", "bread", "wind", "chair"]
    lines = childrens_book("`` He took the XXXXX , '' she said .", "door", candidates)
    file = write_lines(tmp_path / "cbt.txt", lines * 2)
    questions = read_childrens_books(file)
    assert questions[0].context.endswith('20. "He took the')
    assert questions[0].endings[0] == ' net," she said.'
    sums = []
    for ending in questions[0].endings:
        ids = tokenizer.encode(ending)
        every = dense(model, tokenizer.encode(questions[0].context), ids)
        sums.append(sum(float(every[i, token]) for i, token in enumerate(ids)))
    (row,) = zero_shot(model, tokenizer, {"cbt-cn": file}).rows
    assert row.value == 100 * (sums.index(max(sums)) == candidates.index("door"))
    assert (row.task, row.count) == ("CBT-CN", 2)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("lambada", [{"text": "one"}], "line 1: a passage needs a word before its last"),
        ("lambada", [{"word": "one"}], "line 1: expected 'text'; found word"),
        ("lambada", ["{"], "line 1: not valid JSON"),
        ("hellaswag", [{"ctx": "a", "endings": ["b"], "label": 1}], "'label' must be 0 to 0"),
        ("hellaswag", [{"ctx": "a", "endings": "b", "label": 0}], "'endings' must be a list"),
        ("cbt-ne", ["1 a", "3 b"], "line 2: expected sentence 2 of 21"),
        ("cbt-ne", ["1 a"], "ends after sentence 1 of 21"),
        ("cbt-ne", childrens_book("no gap", "a", ["a", "b"]), "expected one XXXXX"),
        ("cbt-ne", childrens_book("XXXXX .", "c", ["a", "b"]), "expected one XXXXX"),
        ("cbt-ne", ["1 XXXXX", *childrens_book("XXXXX .", "a", ["a", "b"])[1:]], "expected one XX"),
        ("lambada", [{"text": " "}], "all records are left out: 'text' is empty"),
        ("enwik8", [""], "there is no text in"),
    ],
)
def test_zero_shot_names_what_is_wrong_in_a_file(
    model: GPT2, tokenizer: Tokenizer, tmp_path: Path, task: str, rows: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot(model, tokenizer, {task: write_lines(tmp_path / "file.jsonl", rows)})


def test_raw_wikitext_is_read_as_in_the_documentation_of_transformers(
    model: GPT2, theirs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The page's script on the rows of the data set, which keep their line ends; blank ones are
    empty."""
    raw = tmp_path / "raw.txt"
    raw.write_text(
        " \n = Nets = \n \n The net , 2 @.@ 5 m long , was old . \n" * 4, encoding="utf-8"
    )
    with raw.open(encoding="utf-8") as lines:
        rows = [line if line.strip() else "" for line in lines]
    ids = torch.tensor(tokenizer.encode("\n\n".join(rows)))
    for stride in (64, 32):
        (row,) = zero_shot(model, tokenizer, {"wikitext-2-raw": raw}, stride=stride).rows
        assert row.value == pytest.approx(math.exp(recipe(theirs, ids, 64, stride)[0]), rel=1e-4)
        assert row.count == len(ids) > 64


def test_zero_shot_refuses_before_it_begins(
    model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="there is no task 'lambda': choose among lambada"):
        zero_shot(model, tokenizer, {"lambda": "x"})
    with pytest.raises(FileNotFoundError, match=r"there is no file .* for the task text"):
        zero_shot(model, tokenizer, {"text": tmp_path / "no.txt"})
    with pytest.raises(ValueError, match="limit must be at least 1"):
        zero_shot(model, tokenizer, {}, limit=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        zero_shot(model, tokenizer, {}, batch_size=0)
    with pytest.raises(ValueError, match="stride"):
        zero_shot(model, tokenizer, {}, context_length=16, stride=17)
    with pytest.raises(ValueError, match=r"context_length \(65\).* to the model's 64"):
        zero_shot(model, tokenizer, {}, context_length=65)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"there is no text in .*empty.txt"):
        zero_shot(model, tokenizer, {"text": empty})


def test_running_texts_and_the_table(model: GPT2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    wikitext = " \n = Nets = \n \n The net , 2 @.@ 5 m long , was <unk> . \n"
    wiki = tmp_path / "wiki.txt"
    wiki.write_text(wikitext, encoding="utf-8")
    plain = tmp_path / "plain.txt"
    plain.write_bytes(CHINESE.encode() + "门".encode()[:2])  # cut in the middle of a character
    whole_file = tmp_path / "whole.txt"
    whole_file.write_text(CHINESE, encoding="utf-8")
    files = {"wikitext-2": wiki, "enwik8": plain, "text8": plain, "text": whole_file}
    table = zero_shot(model, tokenizer, files, context_length=32, stride=8)
    values = {(row.task, row.metric): row.value for row in table.rows}
    prose = perplexity(model, tokenizer, detokenize_wikitext(wikitext), 32, 8)
    assert count_wikitext_tokens(wikitext) == 1 + 4 + 1 + 13
    assert values["WikiText-2", "perplexity"] == pytest.approx(math.exp(prose.nats / 19))
    whole = perplexity(model, tokenizer, CHINESE, 32, 8)
    assert values["enwik8", "bits per byte"] == pytest.approx(whole.bits_per_byte)
    bits = whole.nats / math.log(2)
    assert values["text8", "bits per character"] == pytest.approx(bits / len(CHINESE))
    assert values["whole.txt", "perplexity per word"] == pytest.approx(whole.per_word)
    shown = str(table)
    assert "context 32, stride 8" in shown and "29.41" in shown and "1542M" in shown
    first = json.loads(json.dumps(table.as_dicts()))[0]
    assert first["paper"]["1542M"] == 18.34


def test_a_text_is_measured_alike_in_every_form_of_file(
    model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "The net was torn.\nShe mended it.\n\nIt held.\n"
    windows = text.replace("\n", "\r\n")
    forms = {
        "plain.txt": text.encode(),
        "windows.txt": b"\xef\xbb\xbf" + windows.encode(),
        "utf16.txt": windows.encode("utf-16"),
        "packed.txt.gz": gzip.compress(text.encode()),
    }
    figures = set()
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        table = zero_shot(model, tokenizer, {"text": tmp_path / name})
        assert "1542M" not in str(table)  # the paper has no figures for it
        figures.add(tuple((row.metric, row.value, row.count) for row in table.rows))
    assert len(figures) == 1
    (tmp_path / "old.txt").write_bytes("torn.\ncaf\xe9".encode("latin1"))
    with pytest.raises(ValueError, match=r"old.txt, line 2: not UTF-8"):
        zero_shot(model, tokenizer, {"text": tmp_path / "old.txt"})
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"text": text}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"records.jsonl holds records: write the texts"):
        zero_shot(model, tokenizer, {"text": records})


# ---- de-tokenizers


word = st.sampled_from(["net", "Harbour", "<unk>", "1890", "it", "Mr.", "U.S.", "°", "girls '"])
joined = st.lists(st.sampled_from(["net", "mend", "x1"]), min_size=1, max_size=3).map(" @-@ ".join)
number = st.tuples(st.integers(0, 99), st.sampled_from(".,"), st.integers(100, 999)).map(
    lambda parts: f"{parts[0]} @{parts[1]}@ {parts[2]}"
)
possessive = st.sampled_from(["cat 's", "don 't", "O 'Neil", "<unk> 's", "we 've"])
plain_words = st.lists(word | joined | number | possessive, min_size=1, max_size=6).map(" ".join)
phrase = plain_words | plain_words.map("( {} )".format) | plain_words.map('" {} "'.format)
sentence = st.lists(phrase, min_size=1, max_size=4).map(lambda parts: " , ".join(parts) + " end .")
heading = st.integers(1, 3).map(lambda depth: f"{'= ' * depth}A net {'= ' * depth}".strip())


@given(st.lists(sentence | heading, min_size=1, max_size=4))
def test_wikitext_prose_is_cut_into_the_same_words_again(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert tokenize_wikitext(detokenize_wikitext(text)) == text


def test_detokenised_wikitext_is_prose() -> None:
    line = (
        " The \" old \" man 's net ( 2 @.@ 5 m , 1 @,@ 000 lb ) was $ 5 ; it didn 't tear @-@ up . "
    )
    prose = "The \"old\" man's net (2.5 m, 1,000 lb) was $5; it didn't tear-up."
    assert detokenize_wikitext(line) == prose
    assert detokenize_wikitext(" the girls ' school ") == "the girls' school"
    assert detokenize_wikitext(" = = Early life = = ") == "== Early life =="


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
@pytest.mark.parametrize("part", ["test", "valid"])
def test_real_wikitext_survives(name: str, part: str) -> None:
    """Over 98 % of the lines with text in them come back; the rest ask for more than prose says."""
    text = shared_data(f"eval/{name}.{part}.txt").read_text(encoding="utf-8")
    if part == "test":
        assert count_wikitext_tokens(text) == 245_569  # as published
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()][::7]
    again = tokenize_wikitext(detokenize_wikitext("\n".join(lines))).split("\n")
    same = sum(a == b for a, b in zip(lines, again, strict=True))
    assert same / len(lines) > 0.98


def test_penn_marks_are_undone() -> None:
    text = "`` I ca n't , '' he said -LRB- it 's late -RRB- ; `` the girls ' net ! ''"
    assert detokenize_penn(text) == '"I can\'t," he said (it\'s late); "the girls\' net!"'


# ---- forgetting


def test_equal_models_have_forgotten_nothing(model: GPT2, tokenizer: Tokenizer) -> None:
    found = forgetting(model, deepcopy(model), tokenizer, ENGLISH, CHINESE)
    for change in (found.general, found.new):
        assert change.kl == pytest.approx(0, abs=1e-6)
        assert change.loss_change == pytest.approx(0, abs=1e-6)
    expected = perplexity(model, tokenizer, ENGLISH)
    assert found.general.base.per_token == pytest.approx(expected.per_token, rel=1e-5)


@pytest.fixture
def tuned(model: GPT2) -> GPT2:
    tuned = deepcopy(model)
    enlarge(tuned, seed=5)
    return tuned


def test_forgetting_is_that_of_dense_softmaxes(
    model: GPT2, tuned: GPT2, tokenizer: Tokenizer
) -> None:
    text = "The old man mended nets, and the wind was in the north."
    found = forgetting(model, tuned, tokenizer, text, ENGLISH, batch_size=3)
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        log_base, log_tuned = (one(ids)[0, :-1].double().log_softmax(1) for one in (model, tuned))
    kl = (log_tuned.exp() * (log_tuned - log_base)).sum(dim=1).mean()
    assert found.general.kl == pytest.approx(float(kl), rel=1e-4)
    loss = F.nll_loss(log_tuned, ids[0, 1:])
    assert found.general.tuned.loss == pytest.approx(float(loss), rel=1e-5)
    one_by_one = forgetting(model, tuned, tokenizer, text, ENGLISH, batch_size=1)
    assert found.new.kl == pytest.approx(one_by_one.new.kl, rel=1e-5)
    assert "KL(tuned, base)" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["new"]["loss_change"] == found.new.loss_change


def test_forgetting_counts_the_labels_of_batches_alone(
    model: GPT2, tuned: GPT2, tokenizer: Tokenizer
) -> None:
    """Answers, and the <|endoftext|> after each, packed or not; not the prompts."""
    exchanges = [Exchange("Why? " * n, " So " * (5 - n)) for n in range(1, 5)]
    encoded = encode_exchanges(exchanges, tokenizer, longest=60)
    losses = []
    for one in encoded:
        with torch.no_grad():
            logprobs = tuned(one.token_ids[None])[0].double().log_softmax(dim=1)
        losses += [-logprobs[i - 1, t] for i, t in enumerate(one.token_ids) if i >= one.n_prompt]
    for packed in (False, True):
        batches = ExchangeBatches(encoded, batch_size=3, seed=0, packed=packed, longest=60)
        found = forgetting(model, tuned, tokenizer, ENGLISH, batches.in_order()).new
        assert found.tuned.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        assert found.tuned.loss == pytest.approx(evaluate_loss(tuned, batches.in_order()), rel=1e-5)
        assert found.tuned.scored == found.base.tokens == len(losses)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        forgetting(model, tuned, tokenizer, ENGLISH, [])


def test_what_lies_beyond_the_trained_length_is_measured_by_itself(
    model: GPT2, tokenizer: Tokenizer
) -> None:
    """A model whose later positions are spoiled is as good as before up to them, and no further."""
    spoiled = deepcopy(model)
    with torch.no_grad():
        spoiled.pos_emb.weight[20:] *= -20
    found = forgetting(model, spoiled, tokenizer, ENGLISH, CHINESE, context_length=20)
    assert found.general.kl == pytest.approx(0, abs=1e-6) == found.new.kl
    beyond = change_beyond(model, spoiled, tokenizer, ENGLISH, 20)
    assert beyond is not None and beyond.kl > 0.01
    ids = [tokenizer.eos_id, *tokenizer.encode(ENGLISH)]
    nats = []
    for first in range(0, len(ids) - 1, 64):  # rolling windows of 64, read from their 21st token on
        end = min(first + 65, len(ids))
        start = max(0, end - 65)
        with torch.no_grad():
            logprobs = spoiled(torch.tensor([ids[start : end - 1]]))[0].log_softmax(dim=1)
        places = range(max(first + 1, start + 21), end)
        nats += [-float(logprobs[place - start - 1, ids[place]]) for place in places]
    assert beyond.tuned.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert change_beyond(model, spoiled, tokenizer, "Two words", 20) is None
    assert change_beyond(model, spoiled, tokenizer, ENGLISH, 64) is None


def test_compare_predictions_do_not_depend_on_the_chunk(model: GPT2, tuned: GPT2) -> None:
    hidden = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20)
    heads = (model.out_head, tuned.out_head)
    with torch.no_grad():
        whole, pieces = (
            compare_predictions((hidden[0], hidden[1]), heads, targets, chunk_size)
            for chunk_size in (64, 3)
        )
    # sums of float32 in another order
    torch.testing.assert_close(whole, pieces, rtol=1e-6, atol=1e-5)


def test_the_base_of_a_lora_model_needs_no_copy(model: GPT2, tokenizer: Tokenizer) -> None:
    tuned = deepcopy(model)
    add_lora(tuned, rank=2)
    for layer in lora_layers(tuned).values():
        torch.nn.init.normal_(layer.lora_B)
    found = forgetting(None, tuned, tokenizer, ENGLISH, CHINESE)
    expected = forgetting(model, tuned, tokenizer, ENGLISH, CHINESE)
    assert found.new.kl == pytest.approx(expected.new.kl, rel=1e-5)
    assert found.new.kl > 1e-3
    assert found.general.base.loss == pytest.approx(expected.general.base.loss, rel=1e-6)
    assert all(layer.enabled for layer in lora_layers(tuned).values())


def test_forgetting_refuses(model: GPT2, tiny_model: GPT2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="vocabularies of 211 and 8192"):
        forgetting(tiny_model, model, tokenizer, ENGLISH, CHINESE)
    with pytest.raises(ValueError, match="text 1 is empty"):
        forgetting(model, model, tokenizer, ENGLISH, "")
    with pytest.raises(ValueError, match="an adapter that is not there"):
        forgetting(None, model, tokenizer, ENGLISH, CHINESE)


# ---- generation quality


def test_distinct_and_repetition_count_n_grams() -> None:
    assert distinct_n(["abab", "abc"], 1) == 3 / 7
    assert distinct_n(["abab", "abc"], 2) == 3 / 5  # ab ba ab, ab bc
    assert repetition_rate(["abab", "abc"], 2) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition_rate(["ab"]) == distinct_n(["ab"], 3) == distinct_n([], 1) == 0
    with pytest.raises(ValueError, match="n must be at least 1"):
        distinct_n(["ab"], 0)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=30))
def test_of_one_text_repetition_is_what_is_not_distinct(tokens: list[int]) -> None:
    assert repetition_rate([tokens], 4) == pytest.approx(1 - distinct_n([tokens], 4))


def test_scripts_are_told_apart() -> None:
    text = "net 网々 сеть δίχτυ شبكة あみアミー 그물 12,！ ｎ ก\u200b"
    found = script_shares(text)
    n = sum(not character.isspace() for character in text)
    counts = {name: round(share * n) for name, share in found.items()}
    assert counts == {
        "CJK": 2, "Kana": 5, "Hangul": 2, "Latin": 4, "Cyrillic": 4, "Greek": 5, "Arabic": 4,
        "digits, signs": 4, "other": 2,
    }  # fmt: skip
    assert sum(found.values()) == pytest.approx(1)
    assert sum(script_shares(" ").values()) == 0


@given(st.text(min_size=1))
def test_shares_add_up_for_any_text(text: str) -> None:
    assert sum(script_shares(text).values()) == pytest.approx(0 if not text.strip() else 1)


def test_generation_quality_has_it_all(model: GPT2, tokenizer: Tokenizer) -> None:
    texts = ["round and round and round and round and round we go", "门外有人叩门。"]
    found = generation_quality(model, tokenizer, texts)
    assert found.self_perplexity == perplexity(model, tokenizer, texts).per_token
    assert found.distinct[1] == distinct_n([tokenizer.encode(text) for text in texts], 1)
    assert found.repetition > 0.1
    assert "CJK" in str(found) and json.dumps(found.as_dict())


# ---- the command


def test_the_command_runs_offline_without_flags(tmp_path: Path) -> None:
    done = run("evaluate", "--out", tmp_path, "--samples", "2", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "general.txt: context 512, rolling windows\nperplexity per token" in done.stdout
    assert "perplexity per word" in done.stdout and "distinct-2" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["rows"]) == 4 and len(summary["texts"]) == 2


def test_the_command_finds_files_and_says_what_is_missing(
    word_folder: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "lambada_test.jsonl", [{"text": "She went down to the sea"}] * 3)
    done = run(
        "evaluate", "--model", word_folder, "--out", tmp_path / "out", "--data", tmp_path,
        "--limit", "2", "--tasks", "lambada",
    )  # fmt: skip
    assert "2 passages" in done.stdout, done.stderr
    done = run(
        "evaluate",
        "--model",
        word_folder,
        "--out",
        tmp_path / "out",
        "--data",
        tmp_path,
        "--tasks",
        "text8",
    )
    assert "the task text8 needs a file: give text8=path" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_refuses_texts_and_windows_before_the_first_figure(
    word_folder: Path, tmp_path: Path
) -> None:
    good, empty, missing = (tmp_path / f"{name}.txt" for name in ("good", "empty", "missing"))
    good.write_text(ENGLISH, encoding="utf-8")
    empty.touch()
    records = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    for bad, message in (
        (missing, f"there is no file {missing} to measure"),
        (empty, f"there is no text in {empty}"),
        (records, "holds records"),
    ):
        flags = ["--out", tmp_path / "out", "--text", good, bad]
        done = run("evaluate", "--model", tmp_path / "no-model", *flags)
        assert done.returncode and message in done.stderr
    flags = ["--out", tmp_path / "out", "--text", good, "--context-length", "1"]
    done = run("evaluate", "--model", word_folder, *flags)
    assert "context_length must be at least 2, not 1" in done.stderr
    assert "perplexity:" not in done.stderr  # no progress was made


def test_the_command_measures_texts_in_both_kinds_of_windows_with_an_adapter(
    word_folder: Path, tmp_path: Path
) -> None:
    model = GPT2.from_pretrained(word_folder)
    add_lora(model, rank=2)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter")
    files = [tmp_path / "english.txt", tmp_path / "chinese.txt"]
    for file, text in zip(files, (ENGLISH, CHINESE), strict=True):
        file.write_text(text, encoding="utf-8")
    done = run(
        "evaluate", "--model", word_folder, "--adapter", tmp_path / "adapter", "--out", tmp_path,
        "--context-length", "24", "--text", *files,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"with the adapter {tmp_path / 'adapter'}" in done.stdout
    rows = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["rows"]
    tokenizer = Tokenizer.from_pretrained(word_folder)
    expected = [
        (file.name, windows, perplexity(model, tokenizer, text, 24, stride).per_token)
        for file, text in zip(files, (ENGLISH, CHINESE), strict=True)
        for windows, stride in (("rolling windows", None), ("stride 12", 12))
    ]
    found = [row for row in rows if row["metric"] == "perplexity per token"]
    for row, (name, windows, value) in zip(found, expected, strict=True):
        assert (row["task"], row["setting"]) == (name, f"context 24, {windows}")
        assert row["value"] == pytest.approx(value, rel=1e-4)
