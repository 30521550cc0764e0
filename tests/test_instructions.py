"""Records of any form become exchanges, exchanges become token ids with labels, and rows that
several of them share give each the logits that it has alone."""

import csv
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY, random_ids, shared_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from gpt2mini import GPT2, Tokenizer, generate
from gpt2mini.data import tables
from gpt2mini.data.instructions import (
    ALPACA,
    EncodedExchange,
    Exchange,
    ExchangeBatches,
    encode_exchanges,
    fill,
    pack,
    read_exchanges,
)
from gpt2mini.data.records import read_records
from gpt2mini.losses import IGNORED, next_token_loss
from gpt2mini.preferences.pairs import read_preferences
from gpt2mini.training import Settings, adamw, train

QUESTION, ANSWER = "Is it far — 遠い?", "No, {not} [far]."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("gpt2-nano")


def write(path: Path, contents: str | bytes) -> Path:
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


# ---- records


ROW = {"prompt": QUESTION, "completion": ANSWER}
FORMS = {
    "a.jsonl": json.dumps(ROW) + "\n\n",
    "b.jsonl": "\ufeff" + json.dumps(ROW, ensure_ascii=False) + "\r\n",
    "a.json": json.dumps([ROW], indent=2),
    "lines.json": json.dumps(ROW),
    "a.csv": f'id,Prompt,Completion\n7,"{QUESTION}","{ANSWER}"\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_is_read_alike(tmp_path: Path, name: str) -> None:
    found = read_exchanges(write(tmp_path / name, FORMS[name]), template="{prompt}")
    assert found == [Exchange(QUESTION, ANSWER)]


def test_a_column_that_was_chosen_comes_before_the_usual_ones(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"prompt": "SYSTEM", "q": "Wo?", "a": "Hier.", "Answer": "?"}'
    )
    columns = {"instruction": "q", "completion": "a"}
    assert read_exchanges(path, "{prompt}", columns) == [Exchange("Wo?", "Hier.")]
    with pytest.raises(ValueError, match="'promt' is not a known field: prompt, instr"):
        read_exchanges(path, "{prompt}", {"promt": "q"})


def test_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "frage,antwort\nWo?,Hier.\n")
    columns = {"prompt": "frage", "completion": "antwort"}
    assert read_exchanges(path, "{prompt}", columns) == [Exchange("Wo?", "Hier.")]
    with pytest.raises(ValueError, match="line 2: there is no column 'x', only frage, antwort"):
        read_exchanges(path, "{prompt}", {"prompt": "x"})


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the `datasets` package, whose one function that is used stands in for it here."""
    package, asked = ModuleType("datasets"), []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [{"question": QUESTION, "answer": ANSWER, "tags": ["x"]}]

    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    for source in ("hf:someone/questions", "hf:someone/questions:test"):
        assert read_exchanges(source, "{prompt}") == [Exchange(QUESTION, ANSWER)]
    assert asked == [("someone/questions", "train"), ("someone/questions", "test")]


def test_without_the_package_the_user_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf:someone/questions needs .*gpt2mini\[datasets\]"):
        list(read_records("hf:someone/questions"))


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", "", "has no record"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n{"prompt": "x"}', "line 2: expected 'com"),
        ("a.jsonl", '{"completion": "y"}', "line 1: expected 'prompt'.*found completion"),
        ("a.jsonl", '{"prompt": "x", "completion": " "}', "all records are left out"),
        ("a.jsonl", '{"prompt": ', "line 1: not valid JSON"),
        ("a.jsonl", "[1]", "record 1: expected an object with named fields"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n\xff', "line 2: not UTF-8"),
        ("a.jsonl", '{"chosen": "Human: hello"}', "line 1: the dialogue has no"),
        ("a.json", '[{"prompt": "x", "completion": "y"}, 3]', "record 2: expected an object"),
        ("a.json", "[{]", "not valid JSON"),
        ("a.csv", "prompt,completion\nx\n", "line 2: expected the 2 of prompt, completion"),
        ("a.jsonl", '{"prompt": ' + "1" * 5000 + "}\n", "line 1: not valid JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("a.txt", "x", r"ends in \.jsonl, \.ndjson, \.json, \.csv"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_exchanges(write(tmp_path / name, contents))


def test_a_field_of_csv_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, question = csv.field_size_limit(), "why? " * 30_000
    path = write(tmp_path / "a.CSV", f"prompt,completion\n{question},So.\n")
    assert read_exchanges(path, "{prompt}") == [Exchange(question.rstrip(), " So.")]
    monkeypatch.setattr(tables, "LARGEST_FIELD", 100)
    with pytest.raises(ValueError, match=r"line 2: not valid CSV .*field larger"):
        read_exchanges(path, "{prompt}")
    assert csv.field_size_limit() == limit


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        read_exchanges(tmp_path / "nothing.jsonl")


def test_dialogues_are_split_before_the_last_answer(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Good bye."
    path = write(tmp_path / "a.jsonl", json.dumps({"chosen": dialogue, "rejected": "x"}))
    expected = "Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    assert read_exchanges(path) == [Exchange(expected, " Good bye.")]


@pytest.mark.parametrize("name", ["chosen", "response"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_answer_beside_a_dialogue_is_learned(
    tmp_path: Path, name: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """ShareGPT's preferences; some repeat the dialogue before the answer."""
    asked = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
    ]
    answer = {"from": "gpt", "value": "Good bye."}
    row = {"conversations": asked, name: [*asked, answer] if whole else answer}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    expected = "Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    assert read_exchanges(path) == [Exchange(expected, " Good bye.")]
    assert not caplog.records


def test_a_message_is_a_list_of_one(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": ANSWER}
    expected = [Exchange(f"Human: {QUESTION}\n\nAssistant:", f" {ANSWER}")]
    for row in ({"prompt": QUESTION, "completion": answer}, {"prompt": QUESTION, "chosen": answer}):
        assert read_exchanges(write(tmp_path / "a.jsonl", json.dumps(row))) == expected


def test_the_real_instructions_and_dialogues() -> None:
    records = read_exchanges(shared_data("instruction/instruction-data.json"), ALPACA)
    assert len(records) == 1100
    assert sum("### Input:" in one.prompt for one in records) not in (0, 1100)
    dialogues = read_exchanges(shared_data("hh-rlhf/helpful-base.test.jsonl"))
    assert len(dialogues) == 2354
    assert all(one.prompt.endswith("\n\nAssistant:") for one in dialogues)


# ---- templates


def test_templates() -> None:
    assert fill("Question: {prompt} Answer: ", "Why?") == "Question: Why? Answer: "
    assert fill("{prompt}\n", "Add.", "1 and 2") == "Add.\n1 and 2\n"
    with_input, without = fill(ALPACA, "Add {input}.", "1"), fill(ALPACA, "Add [it].")
    assert "### Instruction:\nAdd {input}.\n\n### Input:\n1\n\n### Response:\n" in with_input
    assert without.endswith("### Instruction:\nAdd [it].\n\n### Response:\n")


@pytest.mark.parametrize(
    "template", ["Question:", "{prompt} {mood}", "{input}", "", "Instruction: {instruction}"]
)
def test_a_template_that_loses_part_of_a_record_is_refused(tmp_path: Path, template: str) -> None:
    row = {"instruction": "Add", "input": "2 and 3", "output": "5", "rejected": "6"}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    for read in (read_exchanges, read_preferences):
        with pytest.raises(ValueError, match=r"must hold \{prompt\}, or \{instruction\}"):
            read(path, template)


# ---- token ids and labels


def test_the_completion_and_the_end_behind_it_are_learned(tokenizer: Tokenizer) -> None:
    (one,) = encode_exchanges([Exchange("Why?", " So.")], tokenizer, longest=64)
    assert one.token_ids.tolist() == [
        *tokenizer.encode("Why?"), *tokenizer.encode(" So."), tokenizer.eos_id
    ]  # fmt: skip
    learned = one.labels()[one.labels() != IGNORED]
    assert learned.tolist() == [*tokenizer.encode(" So."), tokenizer.eos_id]
    everything = one.labels("all")
    assert everything[0] == IGNORED and torch.equal(everything[1:], one.token_ids[1:])


def test_a_mark_in_the_text_is_text(tokenizer: Tokenizer) -> None:
    (one,) = encode_exchanges([Exchange("a", " <|endoftext|> b")], tokenizer, longest=64)
    assert one.token_ids.tolist().count(tokenizer.eos_id) == 1


def test_special_tokens_in_a_template_are_named(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config["added_tokens_decoder"] = {
        str(tokenizer.vocab_size): {"content": "<|user|>", "special": True}
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    chat = Tokenizer.from_pretrained(tmp_path)
    for prompt in ("<|endoftext|> a", "<|user|> a"):
        encode_exchanges([Exchange(prompt, " b")], chat, longest=64)
    (message,) = caplog.messages
    assert message.startswith("the prompts hold <|user|> as text, not as the special tokens")


def test_a_text_cut_within_an_emoji_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", r'{"prompt": "\ud83d\ude00 \ud83d", "completion": " \\ud83d"}'
    )
    assert read_exchanges(path, "{prompt}") == [Exchange("\U0001f600 \ufffd", " \\ud83d")]


def test_a_long_prompt_keeps_its_tail_and_a_long_completion_its_head(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, completion = "one two three four five six seven eight", " a b c d e f g h i j k l"
    with caplog.at_level(logging.WARNING):
        (one,) = encode_exchanges([Exchange(prompt, " a b")], tokenizer, longest=6)
        (other,) = encode_exchanges([Exchange(prompt, completion)], tokenizer, longest=6)
    kept = tokenizer.encode(prompt)[-3:]
    assert one.token_ids.tolist() == [*kept, *tokenizer.encode(" a b"), tokenizer.eos_id]
    assert other.token_ids[1:].tolist() == tokenizer.encode(completion)[:5]
    assert (one.n_prompt, other.n_prompt) == (3, 1)
    assert "1 of 1 prompts did not fit 6 tokens: their tail was kept" in caplog.text
    assert "1 of 1 completions did not fit 6 tokens: their head was kept" in caplog.text


# ---- batches


def random_exchanges(n: int, seed: int, longest: int = 20) -> list[EncodedExchange]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=generator).tolist()
    return [
        EncodedExchange(random_ids(length, seed=seed + i), 1 + i % (length - 1))
        for i, length in enumerate(lengths)
    ]


@given(
    n=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_exchange_is_in_an_epoch_once(
    n: int, batch_size: int, packed: bool, seed: int
) -> None:
    encoded = random_exchanges(n, seed)
    batches = ExchangeBatches(encoded, batch_size, seed, packed=packed, longest=32)
    assert Counter(i for row in batches.rows for i in row) == Counter(range(n))
    expected = sum(int((one.labels() != IGNORED).sum()) for one in encoded)
    for epoch in (batches.in_order(), batches, batches):
        assert sum(int((batch.labels != IGNORED).sum()) for batch in epoch) == expected


@given(
    n=st.integers(1, 10), train_on=st.sampled_from(["completion", "all"]), seed=st.integers(0, 99)
)
def test_the_loss_does_not_depend_on_packing(
    tiny_model: GPT2, n: int, train_on: str, seed: int
) -> None:
    """Each exchange alone, side by side, and packed: one number."""
    encoded = random_exchanges(n, seed)

    def loss(ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> float:
        with torch.no_grad():
            return float(next_token_loss(tiny_model(ids, mask), labels)[0])

    alone = sum(loss(e.token_ids[None], e.labels(train_on)[None]) for e in encoded)
    for packed in (False, True):
        batches = ExchangeBatches(encoded, 3, seed, train_on, packed, longest=40)
        found = sum(loss(b.token_ids, b.labels, b.attention_mask) for b in batches.in_order())
        assert found == pytest.approx(alone, rel=1e-5)


def test_neighbors_in_a_row_change_no_logit(tiny_model: GPT2) -> None:
    encoded = random_exchanges(6, seed=3)
    batches = ExchangeBatches(encoded, 1, 0, packed=True, longest=64)
    for row, batch in enumerate(batches.batch([r]) for r in range(len(batches.rows))):
        logits, start = tiny_model(batch.token_ids, batch.attention_mask)[0], 0
        for i in batches.rows[row]:
            ids = encoded[i].token_ids
            alone = tiny_model(ids[None])[0]
            assert_close(logits[start : start + len(ids)], alone, atol=1e-5, rtol=0)
            start += len(ids)
    assert any(len(row) > 1 for row in batches.rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packed_rows_hold_every_text_once_and_are_full(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 50
    assert len(rows) <= 1.5 * -(-sum(lengths) // 50) + 1  # best fit decreasing: 11/9 of the least


def test_packing_wastes_less() -> None:
    encoded = random_exchanges(200, seed=0)
    packed, single = (
        ExchangeBatches(encoded, 8, 0, packed=packed, longest=64).padding_share
        for packed in (True, False)
    )
    assert 0 <= packed < 0.03 < single < 0.1  # batches by length waste little already


def test_batches_are_a_function_of_the_seed() -> None:
    encoded = random_exchanges(20, seed=1)
    first, again, other = (
        torch.cat([batch.token_ids.flatten() for batch in ExchangeBatches(encoded, 4, seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first[:40], other[:40])


def test_after_training_an_answer_ends_by_itself(own_model: GPT2) -> None:
    """Three questions of two tokens, learned by heart: answers of different lengths, each with an
    end, though no row of the batches is that short."""
    end = TINY.vocab_size - 1
    answers = {(5, 6): [20, 21, 22], (7, 8): [30], (9, 10): [40, 41, 42, 43, 44, 45]}
    encoded = [
        EncodedExchange(torch.tensor([*prompt, *completion, end]), n_prompt=2)
        for prompt, completion in answers.items()
    ]
    batches = ExchangeBatches(encoded, 1, 0, packed=True, longest=32)
    settings = Settings(steps=60, schedule=lambda step: 1.0, progress=False)
    train(own_model, batches, [adamw(own_model, lr=3e-3)], settings)
    for prompt, completion in answers.items():
        out = generate(own_model, torch.tensor([prompt]), 20, temperature=0, stop_ids=[end])
        assert out.token_ids[0].tolist() == [*prompt, *completion, end]


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="train_on must be"):
        ExchangeBatches(random_exchanges(2, seed=0), 1, 0, train_on="prompt")


@pytest.mark.parametrize("packed", [False, True])
def test_no_exchanges_are_refused(packed: bool) -> None:
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        ExchangeBatches([], 2, seed=0, packed=packed, longest=32)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    """It would swallow the rest of the file."""
    rows = [f"question {i},answer {i}\n" for i in range(50)]
    rows[20] = 'question 20,"answer 20\n'
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\n" + "".join(rows), encoding="utf-8")
    with pytest.raises(ValueError, match="not valid CSV"):
        read_exchanges(path)
