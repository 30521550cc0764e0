"""Preferences and rewards: pairs, losses by hand, the reference, rollouts, advantages, learning."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, enlarge, random_ids, shared_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2ForSequenceClassification

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import read_class_names
from gpt2mini.data.instructions import ALPACA, EncodedExchange
from gpt2mini.device import autocast
from gpt2mini.evaluation.intervals import bootstrap_interval, wilson_interval
from gpt2mini.inspection import plot_calibration, plot_figures
from gpt2mini.lora import add_lora, lora_layers, merge_lora, save_adapter
from gpt2mini.losses import (
    dpo_loss,
    kl_from_samples,
    pairwise_reward_loss,
    ppo_loss,
    value_loss,
)
from gpt2mini.losses.sequence_logprobs import sequence_logprobs, token_logprobs
from gpt2mini.masking import pad_left
from gpt2mini.preferences.comparison import answer_prompts, best_of_n, compare_answers
from gpt2mini.preferences.dpo import (
    dpo_step,
    evaluate_dpo,
    pair_logprobs,
    reward_figures,
    with_reference,
)
from gpt2mini.preferences.grpo import group_advantages, grpo_batches, grpo_step
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.on_policy import OnPolicyBatches
from gpt2mini.preferences.pairs import (
    EncodedPreference,
    Preference,
    PreferenceBatch,
    PreferenceBatches,
    encode_preferences,
    pad_pairs,
    read_preferences,
)
from gpt2mini.preferences.ppo import (
    ActorCritic,
    KLController,
    PPOSettings,
    generalized_advantages,
    ppo_batches,
    ppo_experience,
    ppo_step,
    token_rewards,
    whiten,
)
from gpt2mini.preferences.reference import check_reference, using_reference
from gpt2mini.preferences.reward_functions import call_reward, positive_share
from gpt2mini.preferences.reward_model import (
    CLASS_NAMES,
    RewardReport,
    calibration,
    evaluate_rewards,
    give_reward_head,
    reward_step,
    score_with_reward,
)
from gpt2mini.preferences.reward_scale import measure_reward_scale
from gpt2mini.preferences.rollouts import (
    Experience,
    Rollout,
    RolloutSettings,
    response_texts,
    roll_out,
)
from gpt2mini.surgery import resize_vocab
from gpt2mini.tokenizer import END_OF_TEXT, byte_characters
from gpt2mini.training import Figures, Settings, adamw, recompute_activations, train

PRECISION = 1e-4  # float32, log-probabilities of whole answers of an enlarged model
EXACT = 1e-10  # float64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token for each byte, and <|endoftext|>: few enough for a tiny policy to explore."""
    vocab = byte_characters()
    return Tokenizer({**vocab, END_OF_TEXT: len(vocab)}, [])


@pytest.fixture
def text_model(tokenizer: Tokenizer) -> GPT2:
    """A tiny random model with that vocabulary."""
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, emb_dim=24, n_heads=3, n_layers=2)
    return GPT2(config).eval()


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ---- records


HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
DIALOGUE = f"{HUMAN}Hello{ASSISTANT}Hi!{HUMAN}How are you?{ASSISTANT}"


def test_every_form_of_record_is_a_preference(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "Why?", "chosen": "Because.", "rejected": " No. \n"},
        {"instruction": "Add", "input": "1 2", "output": "3", "rejected": "4"},
        {"chosen": f"{DIALOGUE}Well.", "rejected": f"{DIALOGUE}Bad."},
    )
    before = f"{DIALOGUE.strip()}"
    assert read_preferences(path) == [
        Preference("Question: Why?\nAnswer:", " Because.", " No. \n"),
        Preference("Question: Add\n1 2\nAnswer:", " 3", " 4"),
        Preference(before, " Well.", " Bad."),
    ]
    assert "### Input:\n1 2\n\n### Response:\n" in read_preferences(path, ALPACA)[1].prompt


ASKED = {"from": "human", "value": "Why?"}
GOOD, BAD = ({"from": "gpt", "value": text} for text in ("So.", "No."))


@pytest.mark.parametrize(
    "asked", [{"conversations": [ASKED]}, {"messages": ASKED}, {"input": ASKED}]
)
@pytest.mark.parametrize(("chosen", "rejected"), [(GOOD, BAD), ([GOOD], BAD), ("So.", [BAD])])
def test_a_message_is_a_list_of_one(
    tmp_path: Path, asked: dict, chosen: object, rejected: object
) -> None:
    """And the question may stand in any of the usual columns."""
    path = write_lines(tmp_path / "a.jsonl", {**asked, "chosen": chosen, "rejected": rejected})
    assert read_preferences(path) == [Preference("Human: Why?\n\nAssistant:", " So.", " No.")]


def test_the_earlier_turns_of_a_conversation_are_part_of_the_prompt(tmp_path: Path) -> None:
    turns = [ASKED, {"from": "gpt", "value": "Hm?"}, {"from": "human", "value": "Why not?"}]
    row = {"system": "Hi.", "conversations": turns, "chosen": GOOD, "rejected": BAD}
    before = "Hi.\n\nHuman: Why?\n\nAssistant: Hm?\n\nHuman: Why not?\n\nAssistant:"
    found = read_preferences(write_lines(tmp_path / "a.jsonl", row))
    assert found == [Preference(before, " So.", " No.")]


def test_messages_that_are_the_whole_dialogue_are_no_second_prompt(tmp_path: Path) -> None:
    """As in UltraFeedback."""
    row = {"messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    expected = [Preference("Human: Why?\n\nAssistant:", " So.", " No.")]
    assert read_preferences(write_lines(tmp_path / "a.jsonl", row)) == expected
    assert (
        read_preferences(write_lines(tmp_path / "a.jsonl", {**row, "prompt": "Why?"})) == expected
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": {"text": "b"}, "rejected": {"text": "c"}},
            "line 1: expected mes",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": {"text": "c"}},
            "line 1: expected messages with",
        ),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "or a text; found"),
        (
            {"messages": [ASKED, GOOD], "chosen": GOOD, "rejected": BAD},
            "line 1: expected a prompt that",
        ),
    ],
)
def test_responses_that_are_other_objects_are_refused(
    tmp_path: Path, row: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_preferences(write_lines(tmp_path / "a.jsonl", row))


@pytest.mark.parametrize("name", ["instruction", "input", "context", "system", "conversations"])
def test_only_completions_of_the_same_prompt_are_paired(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever of its parts differs: the question, its input, or the system prompt."""

    def row(i: int, completion: str, label: bool) -> dict:
        shared = (
            {} if name in ("instruction", "input", "conversations") else {"prompt": "Translate"}
        )
        part = f"part {i}"
        asked = [{"from": "human", "value": part}] if name == "conversations" else part
        return {**shared, name: asked, "completion": completion, "label": label}

    rows = [row(1, "a", True), row(2, "b", False), row(3, "c", True), row(1, "d", False)]
    (found,) = read_preferences(write_lines(tmp_path / "a.jsonl", *rows))
    assert "part 1" in found.prompt and (found.chosen, found.rejected) == (" a", " d")
    assert "2 of 3 records left out: no completion of the same prompt has the other" in caplog.text


def test_labeled_completions_have_a_prompt(tmp_path: Path) -> None:
    for asked, message in (
        ({}, "expected 'prompt' or"),
        ({"prompt": "a"}, "expected 'completion'"),
    ):
        given = {"prompt": "a", "completion": "b", "label": True}
        row = {**asked, **({} if asked else {"completion": "c"}), "label": False}
        with pytest.raises(ValueError, match=f"line 2: {message}"):
            read_preferences(write_lines(tmp_path / "a.jsonl", given, row))


def test_pairs_of_labeled_completions_keep_the_columns_assigned(tmp_path: Path) -> None:
    rows = [{"prompt": "-", "q": "Why?", "a": a, "label": a == "So."} for a in ("No.", "So.")]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    columns = {"question": "q", "completion": "a"}
    assert read_preferences(path, "{prompt}", columns) == [Preference("Why?", "So.", "No.")]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q,good,bad\nWhy?,Because.,No.\n", encoding="utf-8")
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert read_preferences(path, "{prompt}", columns) == [Preference("Why?", "Because.", "No.")]


def test_dialogues_are_split_where_they_part(tmp_path: Path) -> None:
    """One answer plays both parts and has an "Assistant:" of its own."""
    longer = f"{DIALOGUE}Well.{HUMAN}Good!{ASSISTANT}Yes."
    path = write_lines(tmp_path / "a.jsonl", {"chosen": f"{DIALOGUE}Bad.", "rejected": longer})
    assert read_preferences(path) == [
        Preference(DIALOGUE.strip(), " Bad.", f" Well.{HUMAN}Good!{ASSISTANT}Yes.")
    ]


def test_equal_and_broken_pairs_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b "},
        {"chosen": f"{DIALOGUE}Well.", "rejected": f"{DIALOGUE}Well."},
        {"chosen": f"{DIALOGUE}Well.", "rejected": DIALOGUE.rstrip()},
    )
    assert len(read_preferences(path)) == 1
    assert "2 of 4 records left out: both responses are the same" in caplog.text
    assert "1 of 4 records left out: a response is empty" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: expected 'rejected'"),
        ({"prompt": "a", "rejected": "b"}, "line 2: expected 'chosen'"),
        ({"output": "a", "rejected": "b"}, "line 2: expected 'prompt'"),
        (
            {"chosen": "b", "rejected": "c"},
            "line 2: expected a prompt, or two dialogues or texts that",
        ),
    ],
)
def test_a_bad_record_is_refused_with_the_line(tmp_path: Path, row: dict, message: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=message):
        read_preferences(write_lines(tmp_path / "a.jsonl", good, row))


def test_a_file_of_equal_pairs_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "b"})
    with pytest.raises(ValueError, match="no pair of two different responses"):
        read_preferences(path)


@pytest.mark.parametrize(
    ("name", "equal", "empty", "left"),
    [("helpful-base", 2, 4, 2348), ("helpful-rejection-sampled", 32, 0, 2717)],
)
def test_real_dialogues(
    name: str, equal: int, empty: int, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = read_preferences(shared_data(f"hh-rlhf/{name}.test.jsonl"))
    assert len(pairs) == left
    assert f"{equal} of {equal + empty + left} records left out: both" in caplog.text
    assert (f"{empty} of" in caplog.text) == bool(empty)
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in pairs)


# ---- token ids and batches


def test_a_long_prompt_keeps_its_tail_the_same_for_both_and_is_counted(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [
        Preference("start" + " word" * 99 + " end:", " yes", " no, not at all, never"),
        Preference("a:", " b", " c"),
    ]
    with caplog.at_level(logging.WARNING):
        long, short = encode_preferences(pairs, tokenizer, 40)
    prompts = [one.token_ids[: one.n_prompt].tolist() for one in (long.chosen, long.rejected)]
    assert prompts[0] == prompts[1]
    assert tokenizer.decode(prompts[0]).endswith("word end:")
    assert max(len(long.chosen.token_ids), len(long.rejected.token_ids)) == long.length == 40
    assert "1 of 2 pairs did not fit 40 tokens: the tail of the prompt was kept" in caplog.text
    for pair in (long, short):
        assert pair.chosen.token_ids[-1] == pair.rejected.token_ids[-1] == tokenizer.eos_id
    answer = short.rejected.token_ids[short.rejected.n_prompt :].tolist()
    assert tokenizer.decode(answer) == " c<|endoftext|>"


def test_an_answer_that_alone_is_too_long_keeps_its_head_and_its_pair_counts_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (one,) = encode_preferences([Preference("a b c", " x" * 9, " y" * 9)], tokenizer, 6)
    last = tokenizer.encode("a b c")[-1:]
    assert one.chosen.token_ids.tolist() == last + tokenizer.encode(" x" * 9)[:5]
    assert one.rejected.token_ids.tolist() == last + tokenizer.encode(" y" * 9)[:5]
    assert "1 of 1 pairs did not fit 6 tokens: the head of a response was kept" in caplog.text


def random_pairs(n: int, seed: int = 0) -> list[EncodedPreference]:
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> Tensor:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return torch.randint(TINY.vocab_size, (length,), generator=generator)

    pairs = []
    for _ in range(n):
        prompt = ids(1, 6)
        chosen, rejected = (
            EncodedExchange(torch.cat([prompt, ids(1, 9)]), len(prompt)) for _ in range(2)
        )
        pairs.append(EncodedPreference(chosen, rejected))
    return pairs


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_batch_holds_all_chosen_answers_then_all_rejected(n: int, seed: int) -> None:
    pairs = random_pairs(n, seed)
    batch = pad_pairs(pairs)
    expected = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    for i, one in enumerate(expected):
        real = slice(0, len(one.token_ids))
        assert batch.token_ids[i, real].equal(one.token_ids)
        answer = torch.zeros(batch.token_ids.shape[1], dtype=torch.bool)
        answer[one.n_prompt : len(one.token_ids)] = True
        assert batch.response_mask[i].equal(answer)
        if batch.attention_mask is not None:
            assert batch.attention_mask[i].sum() == len(one.token_ids)
    assert batch.reference_logprobs is None


def test_reference_log_probabilities_travel_with_their_pairs() -> None:
    pairs = [replace(p, reference=(float(-i), -10.0 - i)) for i, p in enumerate(random_pairs(3))]
    found = pad_pairs(pairs).reference_logprobs
    assert found is not None and found.tolist() == [0, -1, -2, -10, -11, -12]


def test_batches_hold_every_pair_once_an_epoch_and_follow_the_seed() -> None:
    def epochs(seed: int, n: int) -> list[list[int]]:
        batches = PreferenceBatches(random_pairs(10), 4, seed)
        return [b.token_ids.tolist() for _ in range(n) for b in batches]

    assert sum(len(batch) for batch in epochs(0, 2)) == 2 * 2 * 10
    assert epochs(0, 2) == epochs(0, 2) != epochs(1, 2)


# ---- the losses, their gradients worked out by hand in float64


def numbers(n: int, low: float = -4.0, high: float = 4.0) -> st.SearchStrategy[np.ndarray]:
    one = st.floats(low, high, allow_subnormal=False)
    return st.lists(one, min_size=n, max_size=n).map(np.array)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def check_gradients(
    loss: Callable[..., tuple[Tensor, Tensor | int]],
    arguments: Sequence[np.ndarray],
    expected_loss: float,
    expected_gradients: Sequence[np.ndarray],
) -> None:
    """The loss and its gradient with respect to the first arguments."""
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
    loss_sum, _ = loss(*tensors)
    assert_close(float(loss_sum.detach()), float(expected_loss), atol=EXACT, rtol=EXACT)
    found = torch.autograd.grad(loss_sum, tensors[: len(expected_gradients)])
    for one, expected in zip(found, expected_gradients, strict=True):
        assert_close(one, torch.tensor(expected), atol=EXACT, rtol=EXACT)


@given(numbers(3), numbers(3))
def test_the_reward_loss_by_hand(chosen: np.ndarray, rejected: np.ndarray) -> None:
    margin = chosen - rejected
    slope = -sigmoid(-margin)
    check_gradients(
        pairwise_reward_loss, [chosen, rejected], np.log1p(np.exp(-margin)).sum(), [slope, -slope]
    )


@given(*(numbers(3) for _ in range(4)), st.floats(0.05, 2), st.floats(0, 0.45))
def test_the_dpo_loss_by_hand(
    pc: np.ndarray, pr: np.ndarray, rc: np.ndarray, rr: np.ndarray, beta: float, smoothing: float
) -> None:
    z = beta * ((pc - pr) - (rc - rr))
    loss = (1 - smoothing) * np.log1p(np.exp(-z)) + smoothing * np.log1p(np.exp(z))
    slope = beta * (smoothing * sigmoid(z) - (1 - smoothing) * sigmoid(-z))
    check_gradients(
        partial(dpo_loss, beta=beta, label_smoothing=smoothing),
        [pc, pr, rc, rr],
        loss.sum(),
        [slope, -slope],
    )
    z = beta * (pc - pr)  # reference-free
    slope = -beta * sigmoid(-z)
    check_gradients(
        partial(dpo_loss, beta=beta), [pc, pr], np.log1p(np.exp(-z)).sum(), [slope, -slope]
    )


@given(*(numbers(3) for _ in range(4)), st.floats(0.05, 2))
def test_the_ipo_loss_by_hand(
    pc: np.ndarray, pr: np.ndarray, rc: np.ndarray, rr: np.ndarray, beta: float
) -> None:
    distance = (pc - pr) - (rc - rr) - 1 / (2 * beta)
    check_gradients(
        partial(dpo_loss, beta=beta, variant="ipo"),
        [pc, pr, rc, rr],
        (distance**2).sum(),
        [2 * distance, -2 * distance],
    )


MASK = torch.tensor([[False, True, True], [False, True, False]])


@given(numbers(6, -1, 1), numbers(6, -1, 1), numbers(6), st.floats(0.05, 0.5))
def test_the_ppo_loss_by_hand(
    new: np.ndarray, old: np.ndarray, advantages: np.ndarray, clip: float
) -> None:
    new, old, advantages = (x.reshape(2, 3) for x in (new, old, advantages))
    mask = MASK.numpy()
    ratio = np.exp(new - old)
    gain = np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages)
    # Beyond the clip in the direction that pays, nothing more is to be had.
    held = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    slope = np.where(mask & ~held, -ratio * advantages, 0.0)
    check_gradients(
        lambda logprobs, before, gains: ppo_loss(logprobs, before, gains, MASK, clip),
        [new, old, advantages],
        -gain[mask].sum(),
        [slope],
    )


@given(numbers(6), numbers(6), numbers(6), st.floats(0.05, 0.5))
def test_the_value_loss_by_hand(
    new: np.ndarray, old: np.ndarray, returns: np.ndarray, clip: float
) -> None:
    new, old, returns = (x.reshape(2, 3) for x in (new, old, returns))
    mask = MASK.numpy()
    near = old + np.clip(new - old, -clip, clip)
    plain, clipped = (new - returns) ** 2, (near - returns) ** 2
    inside = np.abs(new - old) < clip
    slope = np.where(mask & (inside | (plain > clipped)), new - returns, 0.0)
    values, *rest = (torch.tensor(x, requires_grad=True) for x in (new, old, returns))
    loss_sum, count = value_loss(values, rest[0], rest[1], MASK, clip)
    assert int(count) == 3
    assert_close(float(loss_sum.detach()), np.maximum(plain, clipped)[mask].sum() / 2)
    (found,) = torch.autograd.grad(loss_sum, values)
    even = np.isclose(plain, clipped) & ~inside  # torch halves the slope at a tie
    assert_close(found[torch.tensor(~even)], torch.tensor(slope[~even]), atol=EXACT, rtol=EXACT)


# ---- DPO


def batch_of(pairs: list[EncodedPreference], model: GPT2) -> PreferenceBatch:
    return pad_pairs(with_reference(pairs, model, precision="fp32"))


def test_the_first_loss_is_ln_2_and_its_gradient_is_not_zero(own_model: GPT2) -> None:
    batch = batch_of(random_pairs(5), own_model)
    loss_sum, count = dpo_step(own_model, batch)
    assert count == 5
    assert_close(float(loss_sum.detach()) / count, math.log(2), atol=1e-5, rtol=0)
    loss_sum.backward()
    gradients = [p.grad for p in own_model.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


def test_padding_on_either_side_changes_no_dpo_loss(tiny_model: GPT2) -> None:
    pairs = with_reference(random_pairs(4), tiny_model, precision="fp32")
    policy = enlarge(deepcopy(tiny_model), seed=1)
    assert isinstance(policy, GPT2)
    alone = sum(float(dpo_step(policy, pad_pairs([pair]))[0].detach()) for pair in pairs)
    right = pad_pairs(pairs)
    assert_close(float(dpo_step(policy, right)[0].detach()), alone, atol=PRECISION, rtol=PRECISION)
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    token_ids, is_real = pad_left([row.token_ids for row in rows])
    answers = [torch.arange(len(row.token_ids)) >= row.n_prompt for row in rows]
    response_mask = pad_left([a.long() for a in answers])[0].bool()
    left = PreferenceBatch(token_ids, response_mask, is_real, right.reference_logprobs)
    assert_close(float(dpo_step(policy, left)[0].detach()), alone, atol=PRECISION, rtol=PRECISION)


def test_reference_free_needs_no_reference_and_dpo_does(tiny_model: GPT2) -> None:
    batch = pad_pairs(random_pairs(3))
    with pytest.raises(ValueError, match="no log-probabilities of a reference"):
        dpo_step(tiny_model, batch)
    with pytest.raises(ValueError, match="no log-probabilities of a reference"):
        evaluate_dpo(tiny_model, random_pairs(3))
    found, _ = dpo_step(tiny_model, batch, beta=0.3, reference_free=True)
    sums, _ = sequence_logprobs(
        tiny_model, batch.token_ids, batch.attention_mask, batch.response_mask
    )
    margin = 0.3 * (sums[:3] - sums[3:])
    assert_close(found, -torch.nn.functional.logsigmoid(margin).sum())


def test_smoothing_and_ipo_reach_the_loss(tiny_model: GPT2) -> None:
    batch = batch_of(random_pairs(3), tiny_model)
    loss, _ = dpo_step(tiny_model, batch, beta=0.5, variant="ipo")
    assert_close(float(loss.detach()), 3 * (1 / (2 * 0.5)) ** 2, atol=1e-4, rtol=0)
    free = partial(dpo_step, tiny_model, batch, beta=1.0, reference_free=True)
    assert free(label_smoothing=0.3)[0] != free()[0]
    with pytest.raises(ValueError, match="variant must be 'dpo' or 'ipo'"):
        dpo_step(tiny_model, batch, variant="kto")
    with pytest.raises(ValueError, match="'ipo' has no label smoothing"):
        dpo_step(tiny_model, batch, variant="ipo", label_smoothing=0.1)


def test_length_normalized_ipo_is_that_of_trl(tiny_model: GPT2) -> None:
    """trl divides the log-probability of each answer by its number of tokens, in policy and
    reference (DPOTrainer, loss_type "ipo")."""
    batch = batch_of(random_pairs(5), tiny_model)
    reference = torch.randn(10, generator=torch.Generator().manual_seed(0)) * 10
    batch = replace(batch, reference_logprobs=reference)
    sums, lengths = sequence_logprobs(
        tiny_model, batch.token_ids, batch.attention_mask, batch.response_mask
    )
    ratios = (sums - reference) / lengths
    expected = ((ratios[:5] - ratios[5:] - 1 / (2 * 0.1)) ** 2).sum()
    found, count = dpo_step(tiny_model, batch, variant="ipo", length_normalized=True)
    assert_close(found, expected)
    assert count == 5 and len(set(lengths.tolist())) > 1


@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "ipo"},
        {"variant": "ipo", "length_normalized": True},
        {"label_smoothing": 0.3},
    ],
)
def test_the_validation_loss_is_that_of_training(
    options: dict, reference_free: bool, own_model: GPT2
) -> None:
    pairs = with_reference(random_pairs(5), own_model, precision="fp32")
    enlarge(own_model, seed=1)
    options = {"beta": 0.5, "reference_free": reference_free, **options}
    loss_sum, count = dpo_step(own_model, pad_pairs(pairs), **options)
    report = evaluate_dpo(own_model, pairs, **options, precision="fp32")
    expected = float(loss_sum.detach()) / count
    assert_close(report.loss, expected, atol=PRECISION, rtol=PRECISION)
    assert f"loss {expected:.3f}" in str(report)
    assert report.summary()["held_out_loss"] == report.loss


def test_a_tie_is_half_right_in_training_as_in_the_report() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 0.0, 3.0])
    accuracy = reward_figures(chosen, rejected)["accuracy"].float().mean()
    assert float(accuracy) == RewardReport(chosen, rejected).accuracy == 0.5
    (unsure,) = calibration(torch.zeros(3))
    assert unsure.correct == 0.5


@torch.no_grad()
def move_adapters(model: GPT2) -> None:
    """As if they had been trained."""
    for layer in lora_layers(model).values():
        layer.lora_B.normal_(std=0.5, generator=torch.Generator().manual_seed(0))


def test_the_reference_without_adapters_is_the_base_bit_for_bit(own_model: GPT2) -> None:
    base = deepcopy(own_model)
    add_lora(own_model, targets=("query", "value", "mlp_in"))
    move_adapters(own_model)
    pairs = random_pairs(6)
    disabled = with_reference(pairs, own_model)
    copied = with_reference(pairs, own_model, reference=base)
    assert [pair.reference for pair in disabled] == [pair.reference for pair in copied]
    assert disabled[0].reference != tuple(pair_logprobs(own_model, pairs)[0].tolist())


def test_a_reference_that_is_not_the_base_is_refused(own_model: GPT2) -> None:
    base = deepcopy(own_model)
    with pytest.raises(ValueError, match="no adapters to disable"):
        check_reference(own_model, None)
    with pytest.raises(ValueError, match="the policy itself"):
        check_reference(own_model, own_model)
    check_reference(own_model, base)
    with pytest.raises(ValueError, match="the reference is another model"):
        check_reference(own_model, GPT2(replace(TINY, n_layers=2)))
    add_lora(own_model)
    check_reference(own_model, base)
    other = enlarge(deepcopy(base))
    assert isinstance(other, GPT2)
    with (
        pytest.raises(ValueError, match="not the base of the adapter"),
        using_reference(own_model, other),
    ):
        pass
    with pytest.raises(ValueError, match="not the base of the adapter"):
        with_reference(random_pairs(1), own_model, other)


@pytest.mark.parametrize("kind", ["copy", "merged copy", "merged and reloaded"])
def test_the_policy_with_its_adapters_can_be_the_reference(
    kind: str, own_model: GPT2, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DPO after supervised fine-tuning with adapters starts at a loss of ln 2."""
    add_lora(own_model, targets=("query", "mlp_out"))
    move_adapters(own_model)
    reference = deepcopy(own_model)
    if kind != "copy":
        merge_lora(reference)
    if kind == "merged and reloaded":
        reference.save_pretrained(tmp_path)
        reference = GPT2.from_pretrained(tmp_path)
    pairs = with_reference(random_pairs(6), own_model, reference, precision="fp32")
    assert caplog.text == ""
    assert evaluate_dpo(own_model, pairs, precision="fp32").loss == pytest.approx(
        math.log(2), abs=1e-4
    )


def test_a_reference_without_the_trained_adapters_is_warned_of(
    own_model: GPT2,
    text_model: GPT2,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for model in (own_model, text_model):
        add_lora(model)
    with_reference(random_pairs(2), own_model)
    small_batches(ActorCritic(text_model), tokenizer, None, Figures())
    assert caplog.text == ""
    for model in (own_model, text_model):
        move_adapters(model)
    with_reference(random_pairs(2), own_model)
    assert "the reference is the base model without the adapters" in caplog.text
    caplog.clear()
    small_batches(ActorCritic(text_model), tokenizer, None, Figures())
    assert "reference=deepcopy(policy)" in caplog.text


def test_dpo_learns_and_logs_its_figures(own_model: GPT2, tmp_path: Path) -> None:
    add_lora(own_model)
    pairs = with_reference(random_pairs(12), own_model)
    figures = Figures()
    rows = train(
        own_model,
        PreferenceBatches(pairs, 4, seed=0),
        [adamw(own_model, lr=1e-2)],
        Settings(steps=15, schedule=lambda step: 1.0, log_every=3, progress=False),
        loss_function=partial(dpo_step, figures=figures),
        out=tmp_path,
        figures=figures,
    )
    assert rows[-1]["loss"] < 0.5 * math.log(2)
    assert rows[-1]["chosen_reward"] - rows[-1]["rejected_reward"] == pytest.approx(
        rows[-1]["margin"], abs=1e-4
    )
    assert evaluate_dpo(own_model, pairs).accuracy > 0.9
    names = ["chosen_reward", "accuracy", "no such figure"]
    plot_figures(tmp_path / "metrics.jsonl", names, tmp_path / "figures.png", "DPO")
    assert (tmp_path / "figures.png").stat().st_size > 1000


# ---- the reward model


def test_the_reward_is_read_at_the_end_of_text(text_model: GPT2, tokenizer: Tokenizer) -> None:
    give_reward_head(text_model, torch.Generator().manual_seed(0))
    prompts = ["Question: Why?\nAnswer:", "Hm."]
    found = score_with_reward(text_model, tokenizer, prompts, [" Because it is so.", " No."])
    ids = tokenizer.encode(prompts[0]) + tokenizer.encode(" Because it is so.")
    expected = text_model(torch.tensor([[*ids, tokenizer.eos_id]]))[0, -1, 0]
    assert_close(found[0], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 prompts for 1 responses"):
        score_with_reward(text_model, tokenizer, prompts, ["x"])


@given(st.text(alphabet=" \n\tYes.", max_size=20), st.sampled_from(["Why?\nAnswer:", "Hm. ", ""]))
def test_the_reward_is_that_of_the_response_as_it_is(response: str, prompt: str) -> None:
    vocab = byte_characters()
    tokenizer = Tokenizer({**vocab, END_OF_TEXT: len(vocab)}, [])
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, emb_dim=24, n_heads=3, n_layers=1)
    model = GPT2(config).eval()
    give_reward_head(model, torch.Generator().manual_seed(0))
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    whole = torch.tensor([[*ids, *tokenizer.encode(response), tokenizer.eos_id]])
    found = score_with_reward(model, tokenizer, [prompt], [response])
    assert_close(found, model(whole)[:, -1, 0].detach(), atol=1e-5, rtol=0)


def test_only_a_reward_model_gives_rewards(text_model: GPT2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no reward model"):
        score_with_reward(text_model, tokenizer, ["a"], ["b"])
    with pytest.raises(ValueError, match="no reward model"):
        ActorCritic(text_model, deepcopy(text_model))


def test_the_reward_model_learns_and_comes_back_from_its_folder(
    own_model: GPT2, tmp_path: Path
) -> None:
    """The better answer is the one that holds token 7."""
    pairs = random_pairs(24)
    for pair in pairs:
        pair.chosen.token_ids[pair.chosen.n_prompt] = 7
        pair.rejected.token_ids[pair.rejected.n_prompt :].clamp_(min=8)
    give_reward_head(own_model, torch.Generator().manual_seed(0))
    figures = Figures()
    rows = train(
        own_model,
        PreferenceBatches(pairs, 8, seed=0),
        [adamw(own_model, lr=2e-3)],
        Settings(steps=40, schedule=lambda step: 1.0, progress=False),
        loss_function=partial(reward_step, figures=figures),
        figures=figures,
    )
    assert rows[-1]["loss"] < 0.2 and rows[-1]["accuracy"] > 0.9
    report = evaluate_rewards(own_model, pairs)
    assert report.accuracy > 0.9 and report.interval[0] > 0.6
    own_model.save_pretrained(tmp_path, class_names=CLASS_NAMES)
    loaded = GPT2.from_pretrained(tmp_path)
    assert read_class_names(tmp_path) == ["reward"]
    assert torch.equal(evaluate_rewards(loaded, pairs).chosen, report.chosen)


def test_transformers_opens_a_reward_model(own_model: GPT2, tmp_path: Path) -> None:
    """The same score for the same text: at its last token, which without padding both agree on."""
    give_reward_head(own_model, torch.Generator().manual_seed(0))
    own_model.save_pretrained(tmp_path, class_names=CLASS_NAMES)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.num_labels == 1
    token_ids = torch.randint(own_model.config.vocab_size, (3, 12))
    with torch.no_grad():
        ours = own_model(token_ids)[:, -1]
        for row, score in zip(token_ids, ours, strict=True):
            assert_close(theirs(row[None]).logits[0], score, atol=1e-5, rtol=0)


def test_the_report_by_hand() -> None:
    report = RewardReport(torch.tensor([2.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert report.accuracy == pytest.approx(2.5 / 4)
    expected = sum(math.log1p(math.exp(-m)) for m in (2, -1, 1, 0)) / 4
    assert report.loss == pytest.approx(expected)
    assert "accuracy 0.625" in str(report) and "4 pairs" in str(report)


def test_calibration_groups_pairs_by_confidence(tmp_path: Path) -> None:
    margins = torch.tensor([0.1, -0.1, 3.0, 3.0, -3.0, 9.0])
    unsure, sure, certain = calibration(margins, bins=5)[0], *calibration(margins, bins=20)[-2:]
    assert (unsure.correct, unsure.pairs) == (0.5, 2)
    assert (sure.correct, sure.pairs) == (pytest.approx(2 / 3), 3)
    assert sure.confidence == pytest.approx(1 / (1 + math.exp(-3)))
    assert certain.pairs == 1 and sum(b.pairs for b in calibration(margins)) == 6
    picture = tmp_path / "calibration.png"
    plot_calibration(calibration(margins), picture)
    assert picture.stat().st_size > 1000


# ---- reward functions


def test_the_toy_counts_cheerful_words() -> None:
    texts = [
        "A good day to you, and all",
        "",
        "I hate it",
        "glad glad glad " * 5,
        "A glad, GOOD day",
    ]
    found = positive_share([""] * 5, texts)
    assert found == pytest.approx([3 / 7, 0, 0, 1 / 5, 1])


def raises_at_b(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    if "b" in responses:
        raise RuntimeError("no b")
    return [0.0] * len(responses)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises_at_b, "raised RuntimeError: no b, for the response 'b' to the prompt 'q'"),
        (lambda p, r: [1.0], "returned 1 values; expected 2 numbers"),
        (lambda p, r: [0.0, float("nan")], "returned nan for the response 'b' to the prompt 'q'"),
        (lambda p, r: [0.0, None], "returned None for the response 'b'"),
        (lambda p, r: torch.tensor([float("inf"), 0.0]), "for the response 'a' to the prompt 'p'"),
        (lambda p, r: [0.0, 1e39], "returned 1e\\+39 for the response 'b' .* finite in float32"),
        (lambda p, r: [0.0, 10**400], "returned 1000.*000 for the response 'b' to the prompt 'q'"),
        (lambda p, r: torch.zeros(2, 2), "returned tensor.* for the response 'a'"),
        (lambda p, r: None, "the reward function returned None; expected 2 numbers"),
        (lambda p, r: 0.5, "the reward function returned 0.5; expected 2 numbers"),
        (lambda p, r: torch.tensor(0.5), r"returned tensor\(0.5.*\); expected 2 numbers"),
        (lambda p, r: (raises_at_b(p, r)[i] for i in range(2)), "raised RuntimeError: no b"),
    ],
)
def test_a_bad_reward_function_is_named_with_what_it_choked_on(
    reward: Callable, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call_reward(reward, ["p", "q"], ["a", "b"])


def test_one_base_is_policy_reference_and_reward(
    text_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    alone = deepcopy(text_model)
    add_lora(alone, rank=2, targets=("query",))
    give_reward_head(alone, torch.Generator().manual_seed(0))
    enlarge(alone.out_head)
    for layer in lora_layers(alone).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(alone, tmp_path)
    tokenizer.save_pretrained(tmp_path)

    base = text_model
    addresses = {p.data_ptr() for p in base.parameters()}
    reward = find_reward(str(tmp_path), base=base)
    add_lora(base, rank=2, targets=("value",))  # the policy; without it, the reference
    expected = score_with_reward(alone, tokenizer, ["a"], ["b"])
    assert_close(call_reward(reward, ["a"], ["b"]), expected)

    model = reward.args[0]  # type: ignore[attr-defined]
    for one in (base, model):
        assert addresses <= {p.data_ptr() for p in one.parameters()}
    with pytest.raises(ValueError, match="holds an adapter: give the base"):
        find_reward(str(tmp_path))


def test_rewards_are_found_by_name(
    text_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_reward("toy") is positive_share
    assert find_reward("gpt2mini.preferences.reward_functions:positive_share") is positive_share
    give_reward_head(text_model)
    text_model.save_pretrained(tmp_path, class_names=CLASS_NAMES)
    tokenizer.save_pretrained(tmp_path)
    expected = score_with_reward(text_model, tokenizer, ["a"], ["b"])
    assert_close(call_reward(find_reward(str(tmp_path)), ["a"], ["b"]), expected)
    (tmp_path / "badly_written_reward.py").write_text("def f(:", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("tyo", "neither 'toy' nor a folder"),
        ("no_such_module:f", "no reward function"),
        ("gpt2mini.preferences.reward_functions:nothing", "no reward function"),
        ("os:sep", "the reward 'os:sep' is .*; expected a function"),
        ("badly_written_reward:f", "no reward function .*: SyntaxError"),
    ):
        with pytest.raises(ValueError, match=message):
            find_reward(name)


# ---- rollouts


PROMPTS = ["Question: Why?\nAnswer:", "Hm.", "Once upon a time there was a"]
SMALL = RolloutSettings(rows=6, minibatch_rows=3, epochs=2, max_new_tokens=6, precision="fp32")


def small_rollout(
    policy: GPT2, tokenizer: Tokenizer, reference: GPT2 | None = None, seed: int = 0
) -> Rollout:
    prompts = [torch.tensor(tokenizer.encode(prompt)) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(seed)
    settings = replace(SMALL, num_samples=2)
    return roll_out(policy, prompts, tokenizer.eos_id, settings, reference, generator)


@torch.no_grad()
def make_likely(model: GPT2, token_id: int, strength: float) -> None:
    """Let every hidden state point at a token."""
    model.final_norm.bias.copy_(strength * model.tok_emb.weight[token_id])


def test_ids_without_a_token_are_never_sampled(text_model: GPT2, tokenizer: Tokenizer) -> None:
    """Of a padded vocabulary; one of them is likelier than any token."""
    policy = deepcopy(text_model)
    resize_vocab(policy, tokenizer.vocab_size + 47)
    make_likely(policy, tokenizer.vocab_size + 5, 700.0)
    assert len(answer_prompts(policy, tokenizer, PROMPTS, 6)) == 3
    batches = OnPolicyBatches(
        policy,
        tokenizer,
        PROMPTS,
        positive_share,
        lambda rollout, rewards: Experience(**vars(rollout), advantages=rollout.logprobs),
        SMALL,
        torch.Generator().manual_seed(0),
        reference=deepcopy(policy),
    )
    assert all(batch.token_ids.max() < tokenizer.vocab_size for batch in batches)


def test_a_response_goes_up_to_and_including_the_end_of_text(
    text_model: GPT2, tokenizer: Tokenizer
) -> None:
    make_likely(text_model, tokenizer.eos_id, 700.0)
    rollout = small_rollout(text_model, tokenizer, deepcopy(text_model))
    begin = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    ended = 0
    for ids, is_response, real in zip(
        rollout.token_ids, rollout.response_mask, rollout.attention_mask, strict=True
    ):
        new = ids[begin:].tolist()
        stop = tokenizer.eos_id in new
        length = new.index(tokenizer.eos_id) + 1 if stop else SMALL.max_new_tokens
        expected = torch.zeros(len(ids), dtype=torch.bool)
        expected[begin : begin + length] = True
        assert is_response.equal(expected)
        assert not real[begin + length :].any()
        ended += stop and length < SMALL.max_new_tokens
    assert ended > 0
    texts = response_texts(rollout, tokenizer)
    assert len(texts) == 6 and not any("endoftext" in text for text in texts)


def test_log_probabilities_of_a_rollout_are_those_of_each_row_alone(
    text_model: GPT2, tokenizer: Tokenizer
) -> None:
    rollout = small_rollout(text_model, tokenizer, deepcopy(text_model))
    for i in range(len(rollout.token_ids)):
        real = rollout.attention_mask[i]
        ids, is_response = rollout.token_ids[i, real][None], rollout.response_mask[i, real][None]
        alone = token_logprobs(text_model, ids, None, is_response)
        assert_close(rollout.logprobs[i, real][None], alone.detach(), atol=PRECISION, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adapters", "copy"])
@pytest.mark.parametrize("critic", ["shared", "apart"])
def test_the_first_ratio_is_1_and_the_first_kl_0_exactly(
    text_model: GPT2, tokenizer: Tokenizer, kind: str, critic: str, precision: str
) -> None:
    reference = deepcopy(text_model) if kind == "copy" else None
    value_model = None
    if critic == "apart":
        value_model = deepcopy(text_model)
        give_reward_head(value_model)
    if kind == "adapters":
        add_lora(text_model, targets=("query", "value", "mlp_in"))
    model = ActorCritic(text_model, value_model)
    asked = True if precision == "fp32" else None  # in half precision that is the default
    rollouts = replace(SMALL, precision=precision, read_again=asked)
    batches = small_batches(model, tokenizer, reference, Figures(), rollouts=rollouts)
    model.train()
    with recompute_activations(), autocast(torch.device("cpu"), precision):  # as training does
        batch = next(iter(batches))
        logprobs, values = model(batch.token_ids, batch.attention_mask, batch.response_mask)
    assert torch.equal((logprobs - batch.logprobs).exp(), torch.ones_like(logprobs))
    assert batch.values is not None and torch.equal(values, batch.values)
    kl = kl_from_samples(batch.logprobs, batch.reference_logprobs)
    assert torch.equal(kl, torch.zeros_like(kl)) and float(batch.kl.abs().sum()) == 0


@pytest.mark.parametrize("read_again", [None, True])
def test_in_float32_generation_knows_the_log_probabilities(
    read_again: bool | None, own_model: GPT2
) -> None:
    """Near enough to those of training, for a first ratio of 1 and a KL of 0; without a forward
    pass of the policy over whole rows."""
    settings = replace(SMALL, read_again=read_again)
    prompts = [random_ids(n, seed=n) for n in (3, 9, 4, 5, 7, 6)]
    widths: list[int] = []
    reference = deepcopy(own_model)
    own_model.tok_emb.register_forward_hook(lambda module, ids, out: widths.append(out.shape[1]))
    generator = torch.Generator().manual_seed(0)
    rollout = roll_out(own_model, prompts, 0, settings, reference, generator)
    columns = rollout.token_ids.shape[1]
    sampling = [9, *[1] * (columns - 9 - 1)]  # the prompts, then token after token
    assert widths == [*sampling, *[columns] * (2 if read_again else 0)]  # in two minibatches
    rows = rollout.token_ids, rollout.attention_mask, rollout.response_mask
    ratio = (token_logprobs(own_model, *rows) - rollout.logprobs).exp()
    assert_close(ratio, torch.ones_like(ratio), atol=PRECISION, rtol=0)
    assert_close(rollout.kl, torch.zeros_like(rollout.kl), atol=PRECISION, rtol=0)


def small_batches(
    model: ActorCritic,
    tokenizer: Tokenizer,
    reference: GPT2 | None,
    figures: Figures,
    reward: Callable = positive_share,
    rollouts: RolloutSettings = SMALL,
    seed: int = 0,
) -> OnPolicyBatches:
    generator = torch.Generator().manual_seed(seed)
    return ppo_batches(
        model, tokenizer, PROMPTS, reward, rollouts, PPOSettings(), KLController(0.05), generator,
        reference, figures,
    )  # fmt: skip


def test_dropout_is_refused(text_model: GPT2, tokenizer: Tokenizer) -> None:
    add_lora(text_model, dropout=0.1)
    with pytest.raises(ValueError, match=r"with dropout \(0.1\)"):
        small_batches(ActorCritic(text_model), tokenizer, None, Figures())


def test_iterating_is_one_rollout_and_goes_on_after_an_interruption(
    text_model: GPT2, tokenizer: Tokenizer
) -> None:
    first, other = (
        small_batches(ActorCritic(text_model), tokenizer, deepcopy(text_model), Figures())
        for _ in range(2)
    )
    expected = [batch.token_ids for _ in range(2) for batch in first]
    assert len(expected) == 2 * len(first) == 2 * SMALL.updates
    found = [next(iter(other)).token_ids for _ in expected]  # each time one that was left
    assert all(map(torch.equal, found, expected))


def test_no_prompts_are_refused(text_model: GPT2, tokenizer: Tokenizer) -> None:
    arguments = PPOSettings(), KLController(0.05), torch.Generator()
    with pytest.raises(ValueError, match="no prompts"):
        ppo_batches(ActorCritic(text_model), tokenizer, [], positive_share, SMALL, *arguments)


def test_rows_must_divide_evenly() -> None:
    with pytest.raises(ValueError, match="must be a multiple"):
        RolloutSettings(rows=10, minibatch_rows=4)
    with pytest.raises(ValueError, match="at least 1"):
        RolloutSettings(epochs=0)


def test_an_answer_must_leave_room_for_a_prompt(text_model: GPT2, tokenizer: Tokenizer) -> None:
    context = text_model.config.context_length
    message = rf"max_new_tokens \({context}\) leaves no room for a prompt in the context"
    with pytest.raises(ValueError, match=message):
        answer_prompts(text_model, tokenizer, PROMPTS, context)
    settings = replace(SMALL, max_new_tokens=context)
    with pytest.raises(ValueError, match=message):
        small_batches(ActorCritic(text_model), tokenizer, None, Figures(), rollouts=settings)


# ---- from rewards to advantages


def slow_advantages(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float, t: int = 0
) -> float:
    """The definition, one token after another, of the advantage of token t."""
    if t == len(rewards):
        return 0.0
    next_value = values[t + 1] if t + 1 < len(values) else 0.0
    delta = rewards[t] + gamma * next_value - values[t]
    return delta + gamma * gae_lambda * slow_advantages(rewards, values, gamma, gae_lambda, t + 1)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=4),
    st.floats(0.5, 1),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_advantages_are_those_of_the_definition(
    spans: list[tuple[int, int]], gamma: float, gae_lambda: float, seed: int
) -> None:
    """Responses of several lengths that begin in several columns; what stands beside is noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(spans), 10)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.zeros(shape, dtype=torch.bool)
    expected = torch.zeros(shape, dtype=torch.float64)
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
        r, v = (x[row, start : start + length].tolist() for x in (rewards, values))
        for t in range(length):
            expected[row, start + t] = slow_advantages(r, v, gamma, gae_lambda, t)
    found = generalized_advantages(rewards, values, mask, gamma, gae_lambda)
    assert_close(found, expected, atol=EXACT, rtol=EXACT)


def test_each_token_pays_for_its_kl_and_the_last_gets_the_reward() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, 0.0]])
    of_reference = torch.tensor([[0.0, -1.5, -1.0], [0.0, -1.0, 0.0]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    rollout = Rollout(ids, torch.ones(2, 3, dtype=torch.bool), MASK, logprobs, of_reference)
    found = token_rewards(rollout, torch.tensor([10.0, 20.0]), kl_coefficient=0.1)
    assert_close(found, torch.tensor([[0.0, -0.05, 10.1], [0.0, 20.0, 0.0]]))
    # k3 is r - 1 - log r, where log r is -0.5 and 1
    k3 = token_rewards(rollout, torch.tensor([10.0, 20.0]), 0.1, kl_estimator="k3")
    costs = [0.1 * (math.exp(-0.5) - 1 + 0.5), 0.1 * (math.exp(1) - 1 - 1)]
    assert_close(k3, torch.tensor([[0.0, -costs[0], 10 - costs[1]], [0.0, 20.0, 0.0]]))


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_a_whole_answer_pays_for_its_kl(
    kl_estimator: str, text_model: GPT2, tokenizer: Tokenizer
) -> None:
    other = enlarge(deepcopy(text_model), seed=1)
    assert isinstance(other, GPT2)
    rollout = small_rollout(text_model, tokenizer, other)
    rewards = torch.zeros(len(rollout.token_ids))
    settings = PPOSettings(gae_lambda=1.0, kl_estimator=kl_estimator)
    critic = ActorCritic(text_model)  # its values are 0
    found = ppo_experience(rollout, rewards, critic, KLController(2.0), settings, rollouts=SMALL)
    assert found.returns is not None
    first = found.returns[:, rollout.response_mask[0].long().argmax()]
    k1 = (rollout.logprobs - rollout.reference_logprobs).sum(dim=1)
    assert_close(first, -2 * (k1 if kl_estimator == "k1" else rollout.kl), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"kl_estimator": "k2"}, {"clip": 0.0}, {"gamma": 2.0}, {"gae_lambda": -0.1}]
)
def test_bad_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PPOSettings(**wrong)


def test_a_critic_learns_beside_a_policy_that_is_frozen_in_half_precision(
    text_model: GPT2,
) -> None:
    """Adapters do, and are float32 as well."""
    policy = GPT2(text_model.config).bfloat16()
    add_lora(policy, rank=2, targets=("query",))
    critic = ActorCritic(policy)
    optimizer = adamw(critic, lr=0.1)
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        _, values = critic(ids, torch.ones_like(ids).bool(), ids > 1)
        values.sum().backward()
        optimizer.step()
    assert float(values.detach()[0, 1]) != 0


def test_a_policy_needs_a_language_head(text_model: GPT2) -> None:
    text_model.out_head = torch.nn.Linear(text_model.config.emb_dim, 2)
    with pytest.raises(ValueError, match="the output head has 2 outputs"):
        ActorCritic(text_model)


def test_a_reference_without_dropout_is_the_same_model(text_model: GPT2) -> None:
    policy = GPT2(replace(text_model.config, drop_rate=0.1))
    policy.load_state_dict(text_model.state_dict())
    with using_reference(policy, text_model) as reference:
        assert reference is text_model


def test_nothing_to_evaluate_or_to_sample_is_said(text_model: GPT2, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no pairs to evaluate on"):
        evaluate_dpo(text_model, [], reference_free=True)
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        answer_prompts(text_model, tokenizer, ["a"], num_samples=0)
    ends = answer_prompts(text_model, tokenizer, ["a"], 4, stop_ids=range(256), temperature=0.0)
    assert len(tokenizer.encode(ends[0])) <= 1


def test_a_kl_that_rewards_straying_is_refused(text_model: GPT2) -> None:
    ids, mask, logprobs = torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.zeros(1, 2)
    rollout = Experience(ids, mask, mask, logprobs, logprobs, advantages=logprobs)
    with pytest.raises(ValueError, match="kl_coefficient must be at least 0"):
        grpo_step(text_model, rollout, kl_coefficient=-0.1)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    x = torch.randn(2, 3, dtype=torch.float64) * 5 + 3
    white = whiten(x, MASK)
    assert_close(float(white[MASK].mean()), 0.0, atol=1e-7, rtol=0)
    assert_close(float(white[MASK].var(correction=0)), 1.0, atol=1e-6, rtol=0)
    assert not white[~MASK].any()
    assert_close(whiten(x, MASK, keep_mean=True)[MASK].mean(), x[MASK].mean())


def test_the_kl_coefficient_follows_its_target() -> None:
    fixed, adaptive = KLController(0.2), KLController(0.2, target=6.0)
    for controller in (fixed, adaptive):
        controller.update(6.6)
    assert fixed.coefficient == 0.2
    assert adaptive.coefficient == pytest.approx(0.2 * 1.01)
    adaptive.update(1000.0)
    assert adaptive.coefficient == pytest.approx(0.2 * 1.01 * 1.02)
    adaptive.update(0.0)
    assert adaptive.coefficient == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    with pytest.raises(ValueError, match="KL coefficient"):
        KLController(-1)
    with pytest.raises(ValueError, match=r"with a target.* both must be above 0"):
        KLController(0.0, target=6.0)


def test_a_fixed_kl_coefficient_is_the_one_given_also_after_a_resume() -> None:
    fixed, limited = KLController(0.2), KLController(0.3, target=6.0, floor=0.3)
    for controller in (fixed, limited):
        controller.load_state_dict(KLController(0.1).state_dict())
    assert (fixed.coefficient, limited.coefficient) == (0.2, 0.3)
    limited.load_state_dict(KLController(0.7).state_dict())
    assert limited.coefficient == 0.7


def test_a_target_can_be_a_limit_that_acts_within_a_few_rollouts() -> None:
    controller = KLController(0.3, target=6.0, gain=1.0, floor=0.3)
    for kl in (0.0, 0.1, 3.0):  # at the start the penalty is not given up
        controller.update(kl)
    assert controller.coefficient == 0.3
    for _ in range(5):
        controller.update(60.0)
    assert controller.coefficient == pytest.approx(0.3 * 1.2**5)
    controller.update(3.0)
    assert controller.coefficient == pytest.approx(0.3 * 1.2**5 * 0.8)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (50.0, -1000.0)])
def test_ppo_on_a_normalized_reward_does_not_depend_on_its_scale(
    scale: float, shift: float, text_model: GPT2, tokenizer: Tokenizer
) -> None:
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [scale * value + shift for value in share_of_ascii(prompts, responses)]

    generator = torch.Generator().manual_seed(0)
    found = measure_reward_scale(reward, text_model, tokenizer, PROMPTS, 6, generator, n=30)
    generator = torch.Generator().manual_seed(0)
    answers = answer_prompts(text_model, tokenizer, PROMPTS, 6, 10, generator)
    expected = torch.tensor(share_of_ascii([], answers)).double()
    assert found.mean == pytest.approx(float(expected.mean()) * scale + shift)
    assert found.deviation == pytest.approx(float(expected.std()) * scale, rel=1e-4)

    rollout = small_rollout(text_model, tokenizer, deepcopy(text_model))
    plain = torch.tensor(share_of_ascii([], response_texts(rollout, tokenizer)))
    critic, settings = ActorCritic(text_model), PPOSettings(gae_lambda=1.0)
    experience = ppo_experience(
        rollout,
        plain * scale + shift,
        critic,
        KLController(0.1),
        settings,
        SMALL,
        reward_scale=found,
    )
    assert experience.returns is not None  # undiscounted, from the first token: the reward
    first = experience.returns[:, rollout.response_mask[0].long().argmax()]
    normalized = (plain.double() - expected.mean()) / expected.std()
    assert_close(first.double(), normalized, atol=1e-3, rtol=1e-3)


def test_equal_rewards_have_a_scale(text_model: GPT2, tokenizer: Tokenizer) -> None:
    arguments = (text_model, tokenizer, PROMPTS, 3, torch.Generator().manual_seed(0))
    found = measure_reward_scale(lambda p, r: [1000.1] * len(r), *arguments)
    assert found.deviation == 1.0 and found.mean == pytest.approx(1000.1)
    with pytest.raises(ValueError, match="0 prompts"):
        measure_reward_scale(lambda p, r: [1.0] * len(r), *arguments[:2], [], *arguments[3:])


def test_a_policy_far_from_its_reference_is_warned_of_once(
    text_model: GPT2, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = deepcopy(text_model), deepcopy(text_model)
    make_likely(far, tokenizer.encode("x")[0], 700.0)
    for policy in (near, far):
        batches = small_batches(ActorCritic(policy), tokenizer, text_model, Figures())
        list(batches), list(batches)
        said = "tokens away from its reference: rewards may rise while the text turns to nonsense"
        assert caplog.text.count(said) == (policy is far)


float32 = st.floats(-1e6, 1e6, width=32)


@given(
    float32, st.integers(2, 16), st.integers(1, 4), st.sampled_from([torch.float32, torch.float64])
)
def test_equal_rewards_teach_nothing(
    reward: float, num_samples: int, prompts: int, dtype: torch.dtype
) -> None:
    """Exactly: a mean of rounded numbers is rounded too."""
    reward = reward / 7 if dtype == torch.float64 else reward
    rewards = torch.full((prompts * num_samples,), reward, dtype=dtype)
    assert not group_advantages(rewards, num_samples).any()
    mask = torch.ones(prompts, num_samples, dtype=torch.bool)
    assert not whiten(rewards.view(prompts, num_samples), mask).any()
    kept = whiten(rewards.view(prompts, num_samples), mask, keep_mean=True)
    assert torch.equal(kept.flatten(), rewards)


@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    st.sampled_from([0.0, 1000.1]),
)
def test_group_advantages_are_those_of_float64(
    groups: list[list[float]], scale: float, shift: float
) -> None:
    rewards = torch.tensor(groups).flatten() * scale + shift  # float32
    exact = rewards.double().view(-1, 4)
    mean, deviation = exact.mean(dim=1, keepdim=True), exact.std(dim=1, keepdim=True)
    expected = (exact - mean) / (deviation + 1e-4)
    assert_close(group_advantages(rewards, 4), expected.flatten().float(), atol=1e-5, rtol=1e-5)


def test_a_batch_of_equal_rewards_moves_no_weight(text_model: GPT2, tokenizer: Tokenizer) -> None:
    before, settings = deepcopy(text_model), replace(ON_POLICY, num_samples=4)
    generator = torch.Generator().manual_seed(0)
    batches = grpo_batches(
        text_model, tokenizer, PROMPTS, lambda p, r: [1000.1] * len(r), settings, generator, before
    )
    train(
        text_model,
        batches,
        [adamw(text_model, lr=1e-2, weight_decay=0.0)],
        Settings(steps=4, schedule=lambda step: 1.0, progress=False),
        partial(grpo_step, kl_coefficient=0.0),
    )
    assert_close(text_model.state_dict(), before.state_dict(), atol=0, rtol=0)


def test_group_advantages_by_hand() -> None:
    found = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), num_samples=2)
    expected = torch.tensor([-1, 1, 0, 0]) / (math.sqrt(2) + 1e-4)
    assert_close(found, expected)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.tensor([1.0, 2.0]), num_samples=1)


# ---- learning


def share_of_ascii(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [sum(map(str.isascii, text)) / max(1, len(text)) for text in responses]


ON_POLICY = RolloutSettings(rows=24, minibatch_rows=12, epochs=2, max_new_tokens=6)


def learn_ascii(
    method: str, policy: GPT2, tokenizer: Tokenizer, rollouts: int, seed: int = 0
) -> list[dict]:
    """Train on a reward that half of all tokens give."""
    reference, figures = deepcopy(policy), Figures()
    model: torch.nn.Module = policy
    settings = ON_POLICY if method == "ppo" else replace(ON_POLICY, num_samples=4)
    if method == "ppo":
        model = critic = ActorCritic(policy)
        batches = small_batches(
            critic, tokenizer, reference, figures, share_of_ascii, settings, seed
        )
        step: Callable = partial(ppo_step, settings=PPOSettings(), figures=figures)
    else:
        generator = torch.Generator().manual_seed(seed)
        batches = grpo_batches(
            policy, tokenizer, PROMPTS, share_of_ascii, settings, generator, reference, figures
        )
        step = partial(grpo_step, figures=figures)
    return train(
        model,
        batches,
        [adamw(model, lr=1e-2, weight_decay=0.0)],
        Settings(
            steps=rollouts * settings.updates,
            schedule=lambda step: 1.0,
            log_every=settings.updates,
            progress=False,
        ),
        loss_function=step,
        figures=figures,
    )


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_reward_rises(method: str, text_model: GPT2, tokenizer: Tokenizer) -> None:
    rows = learn_ascii(method, text_model, tokenizer, rollouts=12)
    first = sum(row["reward"] for row in rows[:3]) / 3
    last = sum(row["reward"] for row in rows[-3:]) / 3
    assert last > 1.3 * first
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 1e-3
    figures = {"reward", "kl", "entropy", "response_length", "clip_fraction", "policy_loss"}
    assert figures <= rows[0].keys()
    if method == "ppo":
        assert {"value_loss", "kl_coefficient"} <= rows[0].keys()


# Another method is a function from rewards to advantages, and one from a minibatch to a loss:
# REINFORCE with a leave-one-out baseline (RLOO, Ahmadian et al. 2024, section 2.2).


def rloo_experience(rollout: Rollout, rewards: Tensor) -> Experience:
    groups = rewards.view(-1, 4)  # (prompts, samples)
    others = (groups.sum(dim=1, keepdim=True) - groups) / 3  # mean reward of the other samples
    advantages = (groups - others).flatten()[:, None] * rollout.response_mask
    return Experience(**vars(rollout), advantages=advantages)


def rloo_step(model: GPT2, batch: Experience) -> tuple[Tensor, Tensor]:
    mask = batch.response_mask
    logprobs = token_logprobs(model, batch.token_ids, batch.attention_mask, mask)
    return -(batch.advantages * logprobs).sum(), mask.sum()


def test_a_method_of_your_own_is_two_functions(text_model: GPT2, tokenizer: Tokenizer) -> None:
    """The baseline of a group by hand; and the reward rises."""
    rollout = small_rollout(text_model, tokenizer, deepcopy(text_model))  # 6 rows; take 4
    rows = Rollout(**{name: tensor[:4] for name, tensor in vars(rollout).items()})
    found = rloo_experience(rows, torch.tensor([1.0, 2.0, 3.0, 6.0])).advantages
    expected = torch.tensor([1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2])[:, None]
    assert_close(found, expected * rows.response_mask)

    reference, figures = deepcopy(text_model), Figures()
    settings = replace(ON_POLICY, num_samples=4, epochs=1)
    generator = torch.Generator().manual_seed(0)
    batches = OnPolicyBatches(
        text_model, tokenizer, PROMPTS, share_of_ascii, rloo_experience, settings, generator,
        reference, figures,
    )  # fmt: skip
    schedule = Settings(
        steps=40, schedule=lambda step: 1.0, log_every=settings.updates, progress=False
    )
    optimizers = [adamw(text_model, lr=1e-2, weight_decay=0.0)]
    rows_logged = train(text_model, batches, optimizers, schedule, rloo_step, figures=figures)
    rewards = [row["reward"] for row in rows_logged]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])


def test_seeds_reproduce(text_model: GPT2, tokenizer: Tokenizer) -> None:
    def rewards(seed: int) -> list[float]:
        rows = learn_ascii("ppo", deepcopy(text_model), tokenizer, rollouts=2, seed=seed)
        return [row[name] for row in rows for name in ("reward", "kl", "entropy", "grad_norm")]

    torch.manual_seed(1)
    first = rewards(0)
    torch.manual_seed(2)  # the global generator plays no part
    assert first == rewards(0) != rewards(1)


@pytest.mark.parametrize("target_kl", [None, 0.5])
def test_a_stopped_run_goes_on_in_the_middle_of_a_rollout(
    target_kl: float | None, text_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Answers that are being learned from, prompts that wait, the coefficient that moves."""

    def run(
        steps: int, out: Path | None, resume: bool = False, prompts: Sequence[str] = PROMPTS
    ) -> tuple[dict, list[dict]]:
        policy, figures = deepcopy(text_model), Figures()
        critic, controller = ActorCritic(policy), KLController(0.05, target_kl)
        rollouts = RolloutSettings(rows=8, minibatch_rows=4, epochs=2, max_new_tokens=4)
        generator = torch.Generator().manual_seed(0)
        batches = ppo_batches(
            critic, tokenizer, prompts, share_of_ascii, rollouts, PPOSettings(), controller,
            generator, deepcopy(text_model), figures,
        )  # fmt: skip
        settings = Settings(
            steps=steps,
            schedule=lambda step: 1.0,
            log_every=4,
            save_every=6 if out else 0,
            progress=False,
        )
        step = partial(ppo_step, settings=PPOSettings(), figures=figures)
        optimizer = adamw(critic, lr=1e-2)
        rows = train(
            critic, batches, [optimizer], settings, step, out=out, resume=resume, figures=figures
        )
        return {name: p.detach() for name, p in critic.named_parameters()}, rows

    weights, rows = run(12, out=None)
    run(6, out=tmp_path)  # two steps into the second rollout, of four
    with pytest.raises(ValueError, match="started with other data"):
        run(12, out=tmp_path, resume=True, prompts=PROMPTS[1:])
    found, more = run(12, out=tmp_path, resume=True)
    assert_close(found, weights, atol=0, rtol=0)
    names = ("reward", "kl", "kl_coefficient", "loss")
    assert [[row[n] for n in names] for row in more[-1:]] == [
        [row[n] for n in names] for row in rows[-1:]
    ]


# ---- before and after


def test_answers_side_by_side(text_model: GPT2, tokenizer: Tokenizer) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    answers = answer_prompts(text_model, tokenizer, PROMPTS, 5, generator=generator())
    assert answers == answer_prompts(text_model, tokenizer, PROMPTS, 5, generator=generator())
    found = compare_answers(["a", "b", "c"], ["x", "glad", "x"], ["good", "x", "x"], positive_share)
    assert (found.mean_before, found.mean_after) == pytest.approx((1 / 3, 1 / 3))
    assert found.win_rate == pytest.approx(0.5)
    low, high = found.difference_interval
    assert low < 0 < high and "not significant" in str(found)
    with pytest.raises(ValueError, match="two responses to each prompt"):
        compare_answers(["a"], [], ["x"], positive_share)


def test_the_best_of_many_is_better_than_one(text_model: GPT2, tokenizer: Tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = (text_model, tokenizer, PROMPTS, share_of_ascii)
    one = best_of_n(*arguments, n=1, max_new_tokens=5, generator=generator)
    many, rewards = best_of_n(*arguments, n=16, max_new_tokens=5, generator=generator)
    assert rewards.mean() > one[1].mean()
    assert_close(rewards, torch.tensor(share_of_ascii(PROMPTS, many)))


def test_intervals() -> None:
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.1)
    for nothing in (lambda: wilson_interval(0.5, 0), lambda: bootstrap_interval([])):
        with pytest.raises(ValueError, match="no interval"):
            nothing()
    assert all(map(math.isnan, bootstrap_interval([2.0])))
