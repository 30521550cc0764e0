"""What records say is what is learned: exchanges and preferences, from all forms of them."""

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini import Tokenizer
from gpt2mini.data.documents import TEXT_ENDINGS
from gpt2mini.data.exchanges import (
    COMPLETION_NAMES,
    INPUT_NAMES,
    MESSAGES_NAMES,
    PROMPT_NAMES,
    SYSTEM_NAMES,
)
from gpt2mini.data.instructions import ALPACA, PLAIN, Exchange, encode_exchanges, read_exchanges
from gpt2mini.data.rows import FORMS
from gpt2mini.losses import IGNORED
from gpt2mini.preferences.pairs import Preference, encode_preferences, read_preferences

Row = dict[str, Any]


def write_lines(path: Path, *rows: Row) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def exchanges(folder: Path, *rows: Row, template: str = "{prompt}") -> list[Exchange]:
    return read_exchanges(write_lines(folder / "a.jsonl", *rows), template)


def preferences(folder: Path, *rows: Row, template: str = "{prompt}") -> list[Preference]:
    return read_preferences(write_lines(folder / "a.jsonl", *rows), template)


# ---- what is learned is what stands there


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The cat", "s sat."),
        ("def f(x):\n", "    if x:\n        return 1\n    return 2\n"),
        ("def f(x):", "\n    return x\n"),
        ("Poem:", "\n\nRoses\n"),
        ("中文：", "你好"),
        ("(", "a)"),
        ("https://", "example.org"),
        ("Why?\n\n###\n\n", " So. END"),  # OpenAI's form
    ],
)
def test_prompt_and_completion_are_learned_as_they_stand(
    tmp_path: Path, prompt: str, completion: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    assert exchanges(tmp_path, row) == [Exchange(prompt, completion)]
    pair = {"prompt": prompt, "chosen": completion, "rejected": completion + "!"}
    assert preferences(tmp_path, pair) == [Preference(prompt, completion, completion + "!")]


letters = st.text(st.sampled_from("ab \n\t\r\u3000."), max_size=6)


@given(prompt=letters, completion=letters, end=st.sampled_from(["", "\n", ":", ": ", ":  "]))
def test_the_text_is_the_template_and_the_completion(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str, end: str
) -> None:
    """But for a space of the template before a completion that begins with white space."""
    prompt, completion = f"a{prompt}", f"{completion}b"
    row = {"prompt": prompt, "completion": completion}
    (one,) = exchanges(tmp_path_factory.getbasetemp(), row, template="Q {prompt}" + end)
    end = end.rstrip(" ") if completion[0].isspace() else end
    assert one.prompt + one.completion == f"Q {prompt}{end}{completion}"
    assert not one.prompt.endswith(" ")


def test_a_space_is_there_only_if_the_template_asks_for_it(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "completion": "So."}
    assert exchanges(tmp_path, row, template="{prompt} A:") == [Exchange("Why? A:", "So.")]
    assert exchanges(tmp_path, row, template="{prompt} A: ") == [Exchange("Why? A:", " So.")]
    assert exchanges(tmp_path, row, template=PLAIN) == [Exchange("Question: Why?\nAnswer:", " So.")]
    (alpaca,) = exchanges(tmp_path, row, template=ALPACA)
    assert alpaca.prompt.endswith("### Response:\n") and alpaca.completion == "So."


def test_spaces_before_a_completion_are_tokens_as_in_running_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Else the first word would be one that the model has hardly ever seen without its space."""
    row = {"prompt": "Why is it so", "completion": "yes, it is"}
    for template in ("Question: {prompt} Answer: ", PLAIN, ALPACA, "{prompt}?  "):
        (one,) = exchanges(tmp_path, row, template=template)
        together = [*tokenizer.encode(one.prompt + one.completion), tokenizer.eos_id]
        (encoded,) = encode_exchanges([one], tokenizer, 512)
        assert encoded.token_ids.tolist() == together
    with_space, without = (
        encode_exchanges(exchanges(tmp_path, row, template=template), tokenizer, 512)
        for template in ("Answer {prompt}: ", "Answer {prompt}:")
    )
    assert with_space[0].token_ids.tolist() != without[0].token_ids.tolist()


# ---- forms of exchanges

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "\nOn."},
    {"role": "user", "content": "Thanks."},
]
SHAREGPT = [
    {
        "from": {"user": "human", "assistant": "gpt"}.get(one["role"], "system"),
        "value": one["content"],
    }
    for one in MESSAGES
]
FIRST = "Be brief.\n\nHuman: Why?\n\nAssistant:"
TURNS = [
    Exchange(FIRST, " So."),
    Exchange(FIRST + " So.\n\nHuman: And?\n\nAssistant:", "\nOn."),
]


def plain(prompt: str, completion: str) -> Exchange:
    return Exchange(f"Question: {prompt}\nAnswer:", " " + completion)


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
EXCHANGES: dict[str, tuple[Row, list[Exchange]]] = {
    "instruction and output": ({"instruction": "Add", "output": "3"}, [plain("Add", "3")]),
    "question and answer": ({"question": "Why?", "answer": "So."}, [plain("Why?", "So.")]),
    "query and response": ({"query": "Why?", "response": "So."}, [plain("Why?", "So.")]),
    "input and output": ({"input": "1 2", "output": "3"}, [plain("1 2", "3")]),
    "input": ({"instruction": "Add", "input": "1", "output": "3"}, [plain("Add\n1", "3")]),
    "context": ({"instruction": "Add", "context": "1", "response": "3"}, [plain("Add\n1", "3")]),
    "no input": ({"instruction": "Add", "input": None, "output": "3"}, [plain("Add", "3")]),
    "numbers": ({"instruction": "Add", "input": 12, "output": 3}, [plain("Add\n12", "3")]),
    "objects": ({"prompt": "Who?", "output": {"é": [1]}}, [plain("Who?", '{"é": [1]}')]),
    "system": (
        {"system": "Be kind.", "prompt": "Why?", "completion": "So."},
        [Exchange("Be kind.\n\nQuestion: Why?\nAnswer:", " So.")],
    ),
    "SQuAD": (
        {"question": "When?", "context": "In 2000.", "answers": {"text": ["2000", "In 2000"]}},
        [plain("When?\nIn 2000.", "2000")],
    ),
    "several answers": (
        {"question": "When?", "answers": ["2000", "In 2000"]},
        [plain("When?", "2000")],
    ),
    "chosen": ({"prompt": "Why?", "chosen": "So."}, [plain("Why?", "So.")]),
    "text": ({"text": " Once.\n"}, [Exchange("", " Once.\n")]),
    "messages": ({"messages": MESSAGES}, TURNS),
    "messages in parts": (
        {
            "messages": [
                {**x, "content": [{"type": "text", "text": x["content"]}]} for x in MESSAGES
            ]
        },
        TURNS,
    ),
    "weights": (
        {"messages": [*MESSAGES[:2], {**MESSAGES[2], "weight": 0}, *MESSAGES[3:]]},
        TURNS[1:],
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, TURNS),
    "ShareGPT, system apart": ({"system": "Be brief.", "conversations": SHAREGPT[1:]}, TURNS),
    "TRL": ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, TURNS[:1]),
    "TRL, several turns": ({"prompt": MESSAGES[:4], "completion": MESSAGES[4:5]}, TURNS[1:]),
    "TRL, a completion as text": ({"prompt": MESSAGES[:2], "completion": "So."}, TURNS[:1]),
    "HH": ({"chosen": HH + " Good bye."}, [Exchange(HH.strip(), " Good bye.")]),
    "chosen messages": ({"chosen": MESSAGES[:5]}, TURNS[1:]),
    "a dialogue as prompt": ({"prompt": HH, "completion": " Bye."}, [Exchange(HH, " Bye.")]),
}


@pytest.mark.parametrize("form", EXCHANGES)
def test_forms_of_exchanges(tmp_path: Path, form: str) -> None:
    row, expected = EXCHANGES[form]
    assert exchanges(tmp_path, row, template=PLAIN) == expected


def test_of_a_dialogue_the_answers_are_learned_each_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    encoded = encode_exchanges(exchanges(tmp_path, {"messages": MESSAGES}), tokenizer, 512)
    learned = [tokenizer.decode(x[x != IGNORED].tolist()) for x in (e.labels() for e in encoded)]
    assert learned == [" So.<|endoftext|>", "\nOn.<|endoftext|>"]


def test_where_the_system_prompt_stands_is_the_templates_choice(tmp_path: Path) -> None:
    row = {"system_prompt": "Be kind.", "prompt": "Why?", "completion": "So."}
    template = "[<{system}> ]{prompt}\n"
    assert exchanges(tmp_path, row, template=template) == [Exchange("<Be kind.> Why?\n", "So.")]
    del row["system_prompt"]
    assert exchanges(tmp_path, row, template=template) == [Exchange("Why?\n", "So.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a"},
            "line 2: expected 'completion' or 'output'.*found prompt.*--columns comp",
        ),
        ({"completion": "a"}, "line 2: expected 'prompt' or 'instruction'.*found completion"),
        ({"title": "a"}, "line 2: expected 'prompt'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "line 2: the role 'tool' is not read"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: the content None is not read"),
        ({"messages": ["a"]}, "line 2: expected messages with role and content"),
        ({"Prompt": "a", "prompt": "b", "completion": "c"}, r"which of \['Prompt', 'prompt'\] is"),
    ],
)
def test_a_record_that_cannot_be_learned_is_refused_with_its_line(
    tmp_path: Path, row: Row, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exchanges(tmp_path, {"prompt": "a", "completion": "b"}, row)


# ---- what is left out is named once, with a count


def test_empty_records_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"prompt": "a", "completion": "b"}
    empty = [{"prompt": "a", "completion": value} for value in ("", " \n", None, float("nan"))]
    found = exchanges(tmp_path, good, *empty, {"prompt": "", "completion": "b"}, {"messages": []})
    assert found == [Exchange("a", "b")]
    assert "4 of 7 records left out: 'completion' is empty (first: " in caplog.text
    assert "a.jsonl, line 2)" in caplog.text
    assert "1 of 7 records left out: 'prompt' is empty" in caplog.text
    assert "1 of 7 records left out: 'messages' is empty" in caplog.text
    with pytest.raises(ValueError, match="nothing to learn: all records are left out"):
        exchanges(tmp_path, *empty)


def test_turns_without_an_answer_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user, answer = MESSAGES[1], MESSAGES[2]
    empty = {**answer, "content": " "}
    rows = [{"messages": turns} for turns in ([user, answer], [user, answer, user])]
    found = exchanges(tmp_path, *rows, {"messages": [user, empty, user, answer]})
    assert len(found) == 3
    assert "2 turns in dialogues have no answer: nothing is learned of them" in caplog.text
    caplog.clear()
    exchanges(tmp_path, rows[0])
    assert not caplog.text


def test_blank_rows_of_a_table_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,prompt,completion\n1,a,b\n\n,,\n ,\n2,c,d\n", encoding="utf-8")
    assert read_exchanges(path, "{prompt}") == [Exchange("a", "b"), Exchange("c", "d")]


def test_columns_that_are_not_used_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "a", "instruction": "?", "output": "b", "id": i, "note": None} for i in range(3)
    ]
    exchanges(tmp_path, *rows)
    unused = [text for text in caplog.messages if "not used" in text]
    assert len(unused) == 1 and unused[0].endswith("number of records: instruction (3), id (3)")
    caplog.clear()
    path = write_lines(tmp_path / "a.jsonl", {"q": "a", "output": "b"})
    read_exchanges(path, "{prompt}", {"prompt": "q"})
    assert not caplog.messages


def test_carriage_returns_are_learned_as_they_stand_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "completion": x, "note": "\r"} for x in ("b\r\nc", "b\nc")]
    assert exchanges(tmp_path, *rows)[0] == Exchange("a", "b\r\nc")
    assert r"1 of 2 records hold carriage returns (\r), learned as they stand" in caplog.text


def test_completions_that_are_labeled_bad_are_not_learned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for good, bad in ((True, False), ("True", "False")):  # of JSON, and of CSV
        rows = [{"prompt": "a", "completion": str(x), "label": x} for x in (good, bad)]
        assert exchanges(tmp_path, *rows) == [Exchange("a", "True")]
        assert caplog.messages[-1].count("1 of 2 records left out: its label is false") == 1


# ---- forms of preferences

QUESTION, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
)
ASKED = Preference("Human: Why?\n\nAssistant:", " So.", " No.")
PREFERENCES: dict[str, tuple[list[Row], list[Preference]]] = {
    "texts": (
        [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
        [Preference("Question: Why?\nAnswer:", " So.", " No.")],
    ),
    "system": (
        [{"system": "Hm.", "question": "Why?", "chosen": "So.", "rejected": "No."}],
        [Preference("Hm.\n\nQuestion: Why?\nAnswer:", " So.", " No.")],
    ),
    "messages after a question": (
        [{"prompt": "Why?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}],
        [ASKED],
    ),
    "messages without a prompt": (
        [{"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}],
        [ASKED],
    ),
    "answers as messages": ([{"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]}], [ASKED]),
    "all as messages": ([{"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}], [ASKED]),
    "all as messages, and the prompt again": (
        [{"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}],
        [ASKED],
    ),
    "a prompt as messages": ([{"prompt": [QUESTION], "chosen": "So.", "rejected": "No."}], [ASKED]),
    "OpenAI": (
        [
            {
                "input": {"messages": [QUESTION], "tools": []},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            }
        ],
        [ASKED],
    ),
    "messages with a system prompt": (
        [{"system": "Hm.", "prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}],
        [Preference("Hm.\n\n" + ASKED.prompt, " So.", " No.")],
    ),
    "texts that begin alike": (
        [{"chosen": "The sky is blue.", "rejected": "The sky is black."}],
        [Preference("The sky is", " blue.", " black.")],
    ),
    "a text that goes on": (
        [{"chosen": "The sky is blue", "rejected": "The sky is"}],
        [Preference("The sky", " is blue", " is")],
    ),
    "dialogues that repeat the prompt": (
        [{"prompt": HH, "chosen": HH + " Hello.", "rejected": HH + " Go."}],
        [Preference(HH, " Hello.", " Go.")],
    ),
    "texts that repeat the prompt": (
        [{"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why?\nNo."}],
        [Preference("Question: Why?\nAnswer:", " So.", "\nNo.")],
    ),
    "labels": (
        [
            {"prompt": p, "completion": c, "label": label}
            for p, c, label in [("a", "1", True), ("b", "2", True), ("a", "3", False)]
        ],
        [Preference("Question: a\nAnswer:", " 1", " 3")],
    ),
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_forms_of_preferences(tmp_path: Path, form: str) -> None:
    rows, expected = PREFERENCES[form]
    assert preferences(tmp_path, *rows, template=PLAIN) == expected


def test_responses_that_begin_with_the_words_of_some_prompts_are_whole(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi, what?"},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    ]
    assert preferences(tmp_path, *rows)[0] == Preference("Hi", "Hi there!", "Hi, what?")


def test_labels_may_come_from_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "completion", "label"), ("a", "b", "True"), ("a", "c", "0"), ("a", "d", 1)]
        )
    assert read_preferences(tmp_path / "a.csv", "{prompt}") == [Preference("a", "b", "c")]
    assert "1 of 2 records left out: no completion of the same prompt has the other" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": 3}, "line 1: 'label' must be true or false"),
        ({"question": "a", "response_j": "b", "response_k": "c"}, "expected 'chosen'.*response_j"),
        ({"prompt": "z", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, "not part of"),
        ({"chosen": [GOOD], "rejected": [QUESTION, BAD]}, "after the same turns"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preferences(tmp_path, row)


def test_pairs_that_are_equal_after_the_cut_are_left_out(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = " the same beginning of both answers" * 20
    pairs = [
        Preference("Why?", f"{long} good end.", f"{long} bad end."),
        Preference("A long prompt " * 30 + "Why?", " Yes.", " No."),
        Preference("Why should I?", " Yes.", " No" * 100),
    ]
    with caplog.at_level(logging.WARNING):
        encoded = encode_preferences(pairs, tokenizer, 32)
    assert [tokenizer.decode(one.chosen.token_ids[-2:].tolist()) for one in encoded] == [
        ".<|endoftext|>"
    ] * 2
    assert "1 of 3 pairs are the same within 32 tokens and were left out" in caplog.text
    with pytest.raises(ValueError, match="no pair differs within 32 tokens"):
        encode_preferences(pairs[:1], tokenizer, 32)


# ---- the tables of the README

TABLES = (Path(__file__).parents[1] / "gpt2mini" / "data" / "README.md").read_text(encoding="utf-8")
EXAMPLES = [re.findall(r"`([^`]+)`", line) for line in TABLES.splitlines() if line[:3] == "| `"]


@pytest.mark.parametrize("cells", [row for row in EXAMPLES if row[0][0] == "{"], ids=lambda x: x[0])
def test_the_readme_says_what_is_learned(tmp_path: Path, cells: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text(cells[0], encoding="utf-8")
    expected = [json.loads(cell) for cell in cells[1:]]
    if len(expected) == 2:
        assert read_exchanges(tmp_path / "a.jsonl") == [Exchange(*expected)]
    else:
        assert read_preferences(tmp_path / "a.jsonl") == [Preference(*expected)]


def test_the_readme_names_every_ending_and_every_field() -> None:
    endings = {cell for row in EXAMPLES if row[0][0] == "." for cell in row if cell[0] == "."}
    assert endings == {*FORMS, *TEXT_ENDINGS}
    for name in (*PROMPT_NAMES, *INPUT_NAMES, *SYSTEM_NAMES, *COMPLETION_NAMES, *MESSAGES_NAMES):
        assert f"`{name}`" in TABLES
