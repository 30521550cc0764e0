"""What training jobs show of their figures."""

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini.cli.tables import print_rows, rows_in_terminal
from gpt2mini.preferences.comparison import SideBySide, compare_answers, end_of
from gpt2mini.training.metrics import MetricsLog

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
    assert lines == ["step 3: loss 2.25, learning rate 0.0001", "step 3: validation loss nan"]
    assert not logging.getLogger("gpt2mini.training.metrics").handlers


def test_a_long_prompt_is_shown_by_its_end() -> None:
    prompt = "word " * 500 + "Why?"
    assert end_of("Why?") == "Why?"
    assert end_of(prompt).startswith("... ") and prompt.endswith(end_of(prompt)[4:])
    found = compare_answers([prompt], ["a"], ["b"], lambda prompts, answers: [0.0] * len(answers))
    assert isinstance(found, SideBySide) and len(found.show(1)) < 400
