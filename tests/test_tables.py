"""What jobs show in the terminal: figures while they train, tables, colors."""

import io
import logging
import math
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini.classification.labeled import LabeledTexts
from gpt2mini.classification.report import ClassificationReport
from gpt2mini.cli.classify import Parts, print_mistakes
from gpt2mini.cli.tables import print_rows, rows_in_terminal
from gpt2mini.evaluation.forgetting import Change, Forgetting
from gpt2mini.evaluation.perplexity import Perplexity
from gpt2mini.evaluation.table import PAPER, Row, Table
from gpt2mini.inspection import comparison_table, surprise_text
from gpt2mini.inspection.compare import Difference
from gpt2mini.inspection.comparison_table import in_one_format, layer_of, shown_name
from gpt2mini.inspection.drawing import luminance
from gpt2mini.inspection.lens import DEGREES, Piece
from gpt2mini.preferences.comparison import SideBySide, compare_answers, end_of
from gpt2mini.preferences.reward_model import RewardReport
from gpt2mini.training.metrics import MetricsLog, in_words

PPO = ["reward", "kl", "entropy", "clip_fraction", "value_loss", "response_length"]


def test_the_table_of_ppo_fits_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 4 * i, **dict.fromkeys(PPO, 10.0 * i)} for i in range(1, 9)]
    print_rows(rows, PPO)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(sum(name in line for line in lines) == 1 for name in PPO)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_column_has_one_number_of_decimals(values: list[float]) -> None:
    from gpt2mini.cli.tables import column

    texts = column("value", [{"value": value} for value in values])[1:]
    assert len({len(text.partition(".")[2]) for text in texts}) == 1
    assert len(set(map(len, texts))) == 1


def test_a_validation_loss_between_two_logged_rows_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"step": 10 * i, "loss": 2.0} for i in range(1, 100)]
    rows += [{"step": 7 * i, "validation_loss": 100 + i} for i in range(10)]
    print_rows(rows, ["loss", "validation_loss"])
    shown = capsys.readouterr().out
    assert all(f"{100 + i:.2f}" in shown for i in range(10))
    assert len(shown.splitlines()) < 30


def test_each_logged_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(None)
    with rows_in_terminal():
        log.write({"step": 3, "loss": 2.25, "learning_rate": 1e-4, "grad_norm": 1.0})
        log.write({"step": 3, "validation_loss": math.nan})
    log.write({"step": 4, "loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 3: loss 2.250, lr 0.0001", "step 3: validation loss nan"]
    assert not logging.getLogger("gpt2mini.training.metrics").handlers


def test_a_long_prompt_is_shown_by_its_end() -> None:
    prompt = "word " * 500 + "Why?"
    assert end_of("Why?") == "Why?"
    assert end_of(prompt).startswith("... ") and prompt.endswith(end_of(prompt)[4:])
    found = compare_answers([prompt], ["a"], ["b"], lambda prompts, answers: [0.0] * len(answers))
    assert isinstance(found, SideBySide) and len(found.show(1)) < 400


# ---- every table within 80 columns, of the widest values

HUGE = [0.0, -1.0, 1e-7, 3.14159, -123.456, 99_999.5, 1e12, math.inf, math.nan]
values = st.sampled_from(HUGE)


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@given(st.lists(st.tuples(*[values] * 7), min_size=1, max_size=6), st.integers(0, 10**9))
def test_figures_by_step_fit_in_80_columns(rows: list[tuple[float, ...]], step: int) -> None:
    names = [*PPO, "learning_rate_of_muon_and_adamw"]
    shown = io.StringIO()
    with redirect_stdout(shown):
        print_rows([{"step": step, **dict(zip(names, row, strict=True))} for row in rows], names)
    assert widest(shown.getvalue()) <= 80


def test_a_wide_terminal_gets_no_wider_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_rows([{"step": 1, **dict.fromkeys(PPO, 1234.5)}], PPO)
    assert widest(capsys.readouterr().out) <= 80
    monkeypatch.setenv("COLUMNS", "40")
    print_rows([{"step": 1, **dict.fromkeys(PPO, 1234.5)}], PPO)
    assert widest(capsys.readouterr().out) <= 40


def test_figures_that_no_row_has_get_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"step": 1, "loss": 2.0}], ["loss", "validation_loss"])
    assert "validation_loss" not in capsys.readouterr().out


def test_a_row_while_training_fits_in_80_columns() -> None:
    row = {"step": 99_999, "loss": -0.0071234, "tokens_per_second": 123_456.7, "grad_norm": 1.0}
    row |= {"learning_rate": 0.00092861, "reward": -0.10771, "kl": 13.71951, "entropy": 1.0}
    shown = f"step {row['step']}: {in_words(row)}"
    assert shown.endswith("kl 13.720, lr 0.000929, 123,457 tokens/s") and len(shown) <= 80


def difference(name: str, value: float, rank: float | None) -> Difference:
    mean = maximum = deviation = distance = relative = value
    sizes = (mean, maximum, deviation, -0.123456, distance, relative)
    return Difference(name, "layer", (1,), *sizes, rank)


NAMES = [
    "trf_blocks.47.attn.attn_out.weight",
    "blocks.47.attn_out",
    "tok_emb.weight",
    "trf_blocks.10.a_module_of_ones_own.with_a_long_name.weight",
]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(HUGE).map(abs)), min_size=1))
def test_a_comparison_fits_in_80_columns(rows: list[tuple[str, float]]) -> None:
    for rank in (1599.9, None):
        rows_of_rank = [difference(name, value, rank) for name, value in rows]
        shown = comparison_table.table("layer (all weights)", rows_of_rank)
        assert widest(shown) <= 80
        assert ("rank" in shown) == (rank is not None)


def test_a_block_is_called_by_its_number() -> None:
    assert shown_name("trf_blocks.9.attn.query.weight") == "block 9 query.weight"
    assert shown_name("trf_blocks.9.norm1.scale") == "block 9 norm1.scale"
    assert shown_name("blocks.9.stream") == "block 9 stream"
    assert shown_name("block 9") == "block 9"
    assert shown_name("final_norm.weight") == "final_norm.weight"
    assert [layer_of(name) for name in ("embedding", "blocks.9.stream")] == ["embedding", "block 9"]


@given(st.lists(st.floats(0, 1e12) | st.sampled_from(HUGE), min_size=1))
def test_a_column_of_changes_has_one_number_of_decimals(values: list[float]) -> None:
    texts = in_one_format([abs(value) for value in values])
    finite = [text for text in texts if text not in ("inf", "nan")]
    assert len({len(text.partition("e")[0].partition(".")[2]) for text in finite}) <= 1
    assert len({"e" in text for text in finite}) <= 1
    assert max(map(len, texts)) <= 8


@pytest.mark.parametrize("n", [2, 3, 12, 40, 150])
def test_a_report_of_many_classes_fits_in_80_columns(n: int) -> None:
    names = [f"a class whose name is as long as this, the number {i}" for i in range(n)]
    report = ClassificationReport(names, np.arange(n * n).reshape(n, n) + 99_000)
    assert widest(str(report)) <= 80
    assert len({line.split("  ")[0] for line in str(report).splitlines()[1 : n + 1]}) == n


def test_frequent_confusions_are_the_largest_beside_the_diagonal() -> None:
    confusion = np.zeros((60, 60), dtype=np.int64)
    confusion[3, 3], confusion[7, 2], confusion[1, 9] = 500, 40, 60
    shown = str(ClassificationReport([f"class {i}" for i in range(60)], confusion))
    assert shown.endswith("   60  class 1 taken for class 9\n   40  class 7 taken for class 2")


def test_the_table_of_an_evaluation_fits_in_80_columns() -> None:
    setting = "log p of the word and of the rest of its sentence, de-tokenized, context 1024"
    metrics = ["perplexity per token", "bits per character", "normalized acc. %"]
    for paper in (PAPER["LAMBADA perplexity"], None):
        rows = [
            Row("LAMBADA, original", metric, value, 12_345_678, "characters", setting, paper)
            for metric in metrics
            for value in (1.0, 9_999.99, 1e12, math.inf)
        ]
        assert widest(str(Table(rows))) <= 80


def test_what_was_forgotten_fits_in_80_columns() -> None:
    small, large = (Perplexity.of(loss, ["word"], 1, 1) for loss in (0.01, 99.999))
    shown = str(Forgetting(Change(small, large, 99.0), Change(large, small, 0.0)))
    assert widest(shown) <= 80


def test_a_report_on_pairs_fits_in_80_columns() -> None:
    report = RewardReport(torch.full((99_999,), -1000.0), torch.full((99_999,), 1000.0))
    assert widest(f"held out: {report}") <= 80


def test_many_classes_are_listed_in_80_columns() -> None:
    labels = list(range(99))
    names = [f"class number {i}" for i in labels]
    some = LabeledTexts(["text"] * len(labels), labels, names)
    assert widest(str(Parts(some, some, some, "test.csv"))) <= 80


def test_mistakes_are_shown_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    mistake = {"truth": "a" * 90, "predicted": "b" * 90, "probability": 0.5, "text": "c" * 900}
    print_mistakes([mistake])
    assert widest(capsys.readouterr().out) <= 80


# ---- colors of the terminal


def of_256(color: int) -> list[float]:
    """Red, green and blue of the color cube of xterm's 256 colors."""
    assert 16 <= color < 232, "the colors below are the terminal's own, those above are grays"
    levels = [0, 95, 135, 175, 215, 255]
    parts = divmod(color - 16, 36)[0], (color - 16) // 6 % 6, (color - 16) % 6
    return [levels[part] / 255 for part in parts]


def test_likely_tokens_have_the_terminal_s_own_colors_and_others_can_be_read() -> None:
    (_, _, likely), *others = DEGREES
    assert likely == "" and "\x1b" not in surprise_text([Piece("likely", [0], -0.1)])
    lightness = []
    for _, _, code in others:
        found = re.fullmatch(r"38;5;(\d+);48;5;(\d+)", code)
        assert found
        text, background = (luminance(of_256(int(color))) for color in found.groups())
        lighter, darker = max(text, background), min(text, background)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5
        lightness.append(background)
    assert lightness == sorted(lightness, reverse=True)  # less likely is darker
