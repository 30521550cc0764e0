"""Data held out: no text and no prompt on both sides, near the share, the same each time."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_data
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini import Tokenizer
from gpt2mini.classification.labeled import (
    LabeledTexts,
    count_overlap,
    read_labeled,
    stratified_split,
)
from gpt2mini.cli.data import holds_records, read_split, shorten, split_by_prompt, warn_of_overlap
from gpt2mini.cli.text_data import intersection, split_text, training_and_held_out_files
from gpt2mini.data.instructions import Exchange, read_exchanges
from gpt2mini.data.records import read_records
from gpt2mini.data.splitting import connected, hold_out_groups, split_groups

SHARES = (0.7, 0.1, 0.2)


@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=60), seed=st.integers(0, 99))
def test_groups_stay_together_near_the_shares(sizes: list[int], seed: int) -> None:
    ends = np.cumsum(sizes).tolist()
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    parts = split_groups(groups, SHARES, np.random.default_rng(seed))
    assert sorted(i for part in parts for i in part) == list(range(ends[-1]))
    for group in groups:
        assert sum(bool(set(group) & set(part)) for part in parts) == 1
    for part, share in zip(parts, SHARES, strict=True):
        assert part and abs(len(part) - share * ends[-1]) <= 2 * max(sizes)


# items of 30 to 60 groups, each of which has one to three
repeated = st.lists(st.integers(1, 3), min_size=30, max_size=60).flatmap(
    lambda counts: st.permutations([i for i, n in enumerate(counts) for _ in range(n)])
)


@given(texts=repeated, seed=st.integers(0, 99))
def test_no_text_is_learned_and_tested(texts: list[int], seed: int) -> None:
    """In other letters neither, and not with another label."""
    spelled = [f"Text {n}" if i % 2 else f"text  {n}\u200b" for i, n in enumerate(texts)]
    data = LabeledTexts(spelled, [i % 2 for i in range(len(texts))], ["a", "b"])
    training, validation, test = stratified_split(data, SHARES, seed)
    assert len(training) + len(validation) + len(test) == len(data)
    for one, other in ((training, validation), (training, test), (validation, test)):
        assert count_overlap(one, other) == 0


def test_no_message_of_the_sms_collection_is_learned_and_tested() -> None:
    """Split by row, 24 of the 149 spam messages of the test set were."""
    data = read_labeled(shared_data("sms-spam/SMSSpamCollection"))
    training, validation, test = stratified_split(data, SHARES, seed=0)
    assert count_overlap(training, test) == count_overlap(training, validation) == 0
    for part, share in ((training, 0.7), (validation, 0.1), (test, 0.2)):
        for name, count in data.counts().items():
            assert abs(part.counts()[name] - share * count) <= 2


# ---- prompts


@given(prompts=repeated, seed=st.integers(0, 99))
def test_no_prompt_is_learned_and_held_out(prompts: list[int], seed: int) -> None:
    keys = [[[prompt] for prompt in prompts], [[i] for i in range(len(prompts))]]
    found = hold_out_groups(keys, 0.2, seed)
    training, held_out = ({prompts[i] for i in part} for part in found)
    assert not training & held_out
    assert sorted(i for part in found for i in part) == list(range(len(prompts)))
    assert 0.5 <= len(found[1]) / (0.2 * len(prompts)) <= 2
    assert found == hold_out_groups(keys, 0.2, seed)


def test_one_prompt_for_all_is_divided_by_answers(caplog: pytest.LogCaptureFixture) -> None:
    training, held_out = hold_out_groups([[["p"]] * 50, [[i] for i in range(50)]], 0.1, 0)
    assert (len(training), len(held_out)) == (45, 5)
    assert "form 1 groups, too few to hold out whole ones" in caplog.text
    with pytest.raises(ValueError, match="all 3 items are the same"):
        hold_out_groups([[["p"]] * 3, [["a"]] * 3], 0.5, 0)


@pytest.mark.parametrize("answer", ["Hello.", "Hello, {}."])
def test_dialogues_that_begin_alike_stay_whole(answer: str) -> None:
    """Whether what they have in common is the first question, or its answer too."""
    turns = [
        Exchange(prompt, completion.format(number), f"line {number}")
        for number in range(40)
        for prompt, completion in (("Hi", answer), (f"Hi ... Why {number}?", "So {}."))
    ]
    training, held_out = split_by_prompt(turns, 0.1, 0, lambda turn: turn.prompt)
    assert len(held_out) == 8
    assert not {turn.place for turn in training} & {turn.place for turn in held_out}


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), max_size=20))
def test_items_that_share_a_key_are_connected(keys: list[list[int]]) -> None:
    """Also through others: groups have no key in common, and cannot be divided so that it stays."""
    groups = connected(keys)
    assert sorted(i for group in groups for i in group) == list(range(len(keys)))
    of_groups = [{key for i in group for key in keys[i]} for group in groups]
    assert sum(map(len, of_groups)) == len({key for one in keys for key in one})
    for group in groups:
        reached, size = set(keys[group[0]]), 0
        while len(reached) > size:
            size = len(reached)
            reached |= {k for i in group if reached & set(keys[i]) for k in keys[i]}
        assert reached == {key for i in group for key in keys[i]}


def test_the_turns_of_a_dialogue_stay_together() -> None:
    turns = [Exchange(f"{i} turn {t}", "x", f"line {i}") for i in range(40) for t in range(3)]
    training, held_out = split_by_prompt(turns, 0.2, 0, lambda one: one.prompt)
    assert len(held_out) == 24
    assert not {one.place for one in training} & {one.place for one in held_out}


def exchanges(source: str) -> list[Exchange]:
    lines = Path(source).read_text(encoding="utf-8").split()
    return [Exchange(*line.split(":")) for line in lines]


def split(data: Path, held_out: Path | None, share: float = 0.25) -> tuple[list, list, str]:
    file = str(held_out) if held_out else None
    return read_split(exchanges, str(data), file, lambda one: one.prompt, 1.0, share, 0)


def test_held_out_is_the_file_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    data.write_text("a:1 b:2 c:3 d:4", encoding="utf-8")
    other.write_text("e:5 f:6", encoding="utf-8")
    training, held_out, where = split(data, other)
    assert sorted(one.prompt for one in training) == ["a", "b", "c", "d"]
    assert [one.prompt for one in held_out] == ["e", "f"] and where == "other.jsonl"
    assert not caplog.text
    other.write_text("a:9 f:6", encoding="utf-8")
    split(data, other)
    assert "1 of 2 prompts held out are learned from too" in caplog.text


def test_an_overlap_of_whole_records_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    seen = [Exchange("a", "1"), Exchange("b", "2")]
    warn_of_overlap(seen, [seen[0], Exchange("b", "3")], lambda one: one.prompt)
    assert caplog.messages == ["1 of 2 records held out are learned from too: their loss says less"]


def test_records_without_a_prompt_are_apart(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(" ".join(f":{i}" for i in range(40)), encoding="utf-8")
    training, held_out, where = split(data, None)
    assert (len(training), len(held_out), where) == (30, 10, "25% of the data")


@pytest.mark.parametrize(("share", "message"), [(0.0, "must lie in"), (0.99, "holds out all of")])
def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path, share: float, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("a:1 b:2", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        split(data, None, share)


# ---- text


def test_records_of_texts_alone_are_text(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text('{"text": "Once upon a time"}', encoding="utf-8")
    assert not holds_records(str(tmp_path)) and not holds_records(str(tmp_path / "dev.jsonl"))
    files = training_and_held_out_files(str(tmp_path), None)
    assert [[file.name for file in part] for part in files] == [["train.jsonl"], ["dev.jsonl"]]
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8")
    assert holds_records(str(tmp_path / "train.jsonl")) and holds_records("hf:owner/name")


ranges = st.lists(st.integers(1, 9), max_size=9).map(
    lambda lengths: [
        range(start, start + n)
        for n, start in zip(
            lengths, np.cumsum([0, *(n + 2 for n in lengths)]).tolist(), strict=False
        )
    ]
)


@given(ranges, ranges)
def test_the_intersection_of_ranges(first: list[range], second: list[range]) -> None:
    def members(of: list[range]) -> set[int]:
        return {i for one in of for i in one}

    assert members(intersection(first, second)) == members(first) & members(second)


def test_text_files_that_say_what_they_are_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    training, held_out = training_and_held_out_files(str(tmp_path), None)
    assert [file.name for file in (*training, *held_out)] == ["train.txt", "valid.txt"]
    other = tmp_path / "test.txt"
    assert training_and_held_out_files(str(tmp_path), str(other))[1] == [other]
    (tmp_path / "A Tale of Two Cities.txt").write_text("It was", encoding="utf-8")
    training, held_out = training_and_held_out_files(str(tmp_path), None)
    assert [file.stem for file in (*training, *held_out)] == ["train", "valid"]
    assert "1 file left out, by their names: A Tale of Two Cities.txt" in caplog.text
    assert training_and_held_out_files(str(other), str(tmp_path))[1] == held_out


@pytest.mark.parametrize("name", ["TinyStories-{}.txt", "wiki.{}.tokens.txt", "{}/00.txt"])
def test_a_readme_beside_divided_text_is_no_text(tmp_path: Path, name: str) -> None:
    for file in (name.format("train"), name.format("valid"), "README.md", "LICENSE.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file, encoding="utf-8")
    training, held_out = training_and_held_out_files(str(tmp_path), None)
    assert [training, held_out] == [[tmp_path / name.format(part)] for part in ("train", "valid")]


def test_a_readme_beside_records_is_no_text(tmp_path: Path) -> None:
    """As every data set of the Hub has one."""
    for file, text in (
        ("README.md", "# About"),
        ("data/train-0.jsonl", '{"prompt": "a", "completion": "b"}'),
        ("dataset_infos.json", '{"default": {"features": []}}'),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert holds_records(str(tmp_path))
    (record,) = read_records(tmp_path)
    assert record.place == f"{tmp_path / 'data' / 'train-0.jsonl'}, line 1"


def test_of_a_folder_to_hold_out_the_part_for_that_is_read(tmp_path: Path) -> None:
    for part in ("train", "test"):
        text = f'{{"prompt": "{part}", "completion": "b"}}'
        (tmp_path / f"{part}.jsonl").write_text(text, encoding="utf-8")
    read = partial(read_exchanges, template="{prompt}")
    data, folder = str(tmp_path / "train.jsonl"), str(tmp_path)
    _, held_out, where = read_split(read, data, folder, lambda one: one.prompt, 1.0, 0.1, 0)
    assert [one.prompt for one in held_out] == ["test"] and where == "test.jsonl"


def test_equal_documents_on_both_sides_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    text = "".join(f"Story {i % 10} of ten.<|endoftext|>" for i in range(200))
    (tmp_path / "data.txt").write_text(text, encoding="utf-8")
    split_text([tmp_path / "data.txt"], [], tokenizer, tmp_path / "tokens", 1.0, 0.1, 0)
    assert "20 of 20 documents held out are learned from too" in caplog.text


def test_books_whose_titles_have_such_words_are_all_learned(tmp_path: Path) -> None:
    for name in ("The Training of a Dog.txt", "The Test.txt", "Two Cities.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    training, held_out = training_and_held_out_files(str(tmp_path), None)
    assert len(training) == 3 and not held_out


def test_records_are_what_their_columns_are_called(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("title,text\nOnce,upon a time\n", encoding="utf-8")
    assert not holds_records(str(table))
    assert holds_records(str(table), "prompt=title,completion=text")


document_sizes = st.lists(st.integers(2, 2000), min_size=1, max_size=300)


@given(document_sizes, st.integers(2, 100_000))
def test_of_many_documents_some_are_scored_and_not_the_first_words_of_all(
    sizes: list[int], tokens: int
) -> None:
    starts = np.cumsum([0, *sizes]).tolist()
    documents = [range(start, start + n) for start, n in zip(starts, sizes, strict=False)]
    chosen = shorten(documents, tokens)
    by_start = {document.start: document for document in documents}
    assert [one.start for one in chosen] == sorted(one.start for one in chosen)
    assert all(one == by_start[one.start][: len(one)] for one in chosen)
    assert 2 <= sum(map(len, chosen)) <= max(tokens, 2) + 1
    cut = [one for one in chosen if len(one) < min(512, len(by_start[one.start]))]
    assert len(cut) <= 1  # the last one, where the number is reached
    if tokens >= 512 * len(documents):
        assert len(chosen) == len(documents)
