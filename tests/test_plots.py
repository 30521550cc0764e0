"""Pictures, by what is drawn: marks, ticks, texts, colors and sizes."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection import (
    HeadScores,
    Lens,
    plot_attention,
    plot_calibration,
    plot_confusion,
    plot_figures,
    plot_head_scores,
    plot_lens,
    plot_losses,
    plot_runs,
    plot_trace,
    trace,
)
from gpt2mini.inspection.attention_plots import largest_of_cells
from gpt2mini.inspection.drawing import DOTS_PER_INCH, luminance, text_color
from gpt2mini.preferences.reward_model import calibration, calibration_table

pytest.importorskip("matplotlib")
READABLE = 4.5  # contrast of text, WCAG 2.2 level AA


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test would save: to look at them, they need not be painted."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    return saved


def write_metrics(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def pixels(figure: Any) -> tuple[float, float]:
    return tuple(DOTS_PER_INCH * figure.get_size_inches())


def contrast(color: Sequence[float], background: Sequence[float]) -> float:
    lighter, darker = sorted((luminance(color), luminance(background)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def assert_readable(axes: Any) -> None:
    """Each text in the cells of an image, on the color that is there."""
    from matplotlib.colors import to_rgb

    (image,) = axes.images
    colors = image.to_rgba(image.get_array())
    assert axes.texts
    for text in axes.texts:
        column, row = map(round, text.get_position())
        background = colors[row, column].tolist()
        assert contrast(to_rgb(text.get_color()), background) >= READABLE


# ---- colors


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_text_can_be_read_on_any_color(background: tuple[float, float, float]) -> None:
    color = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}[text_color(background)]
    assert contrast(color, background) >= 4.58 - 0.01


def test_the_luminance_of_known_colors() -> None:
    assert luminance((1, 1, 1)) == pytest.approx(1)
    assert luminance((0, 0, 0)) == 0
    gray = 0x77 / 255  # of the grays on white the lightest whose contrast is about 4.5
    assert contrast((gray,) * 3, (1, 1, 1)) == pytest.approx(4.48, abs=0.01)


# ---- runs


@pytest.mark.parametrize("step", [1, 7, 12_000_000])
def test_one_logged_row_is_a_marked_point(step: int, tmp_path: Path, figures: list[Any]) -> None:
    metrics = write_metrics(tmp_path, {"step": step, "loss": 3.0, "reward": 0.5})
    plot_losses(metrics, tmp_path / "loss.png", "one")
    plot_figures(metrics, ["reward"], tmp_path / "figures.png", "one")
    plot_runs({"run": metrics}, tmp_path / "runs.png", "one")
    for figure in figures:
        (axes,) = figure.axes
        (line,) = axes.lines
        assert line.get_marker() == "o"
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert step in ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("steps", [range(1, 4), range(1, 40), range(0, 9_000_000, 300_000)])
def test_steps_are_whole_numbers(steps: range, tmp_path: Path, figures: list[Any]) -> None:
    metrics = write_metrics(tmp_path, *({"step": i, "loss": 1.0} for i in steps))
    plot_losses(metrics, tmp_path / "loss.png", "constant")
    (axes,) = figures[0].axes
    assert all(tick == round(tick) for tick in axes.get_xticks())
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert not any("e" in label or "." in label for label in labels)


def test_values_that_are_missing_leave_their_neighbors_marked(
    tmp_path: Path, figures: list[Any]
) -> None:
    rows = [{"step": i, "loss": None if i % 2 else 1.0, "kl": None} for i in range(100)]
    metrics = write_metrics(tmp_path, *rows)
    plot_losses(metrics, tmp_path / "loss.png", "every other")
    assert figures[0].axes[0].lines[0].get_marker() == "o"
    plot_runs({"run": metrics}, tmp_path / "runs.png", "every other")
    assert figures[1].axes[0].lines[0].get_markevery() == 1
    plot_figures(metrics, ["kl"], tmp_path / "figures.png", "none")
    plot_losses(write_metrics(tmp_path), tmp_path / "loss.png", "no row")
    for figure in figures[2:]:
        assert [text.get_text() for text in figure.axes[0].texts] == ["no finite number was logged"]


def test_the_kept_checkpoint_is_marked(tmp_path: Path, figures: list[Any]) -> None:
    """As `Run.validate` keeps it: the first of the lowest finite losses."""
    losses = [3.0, None, 2.5, 2.0, 2.0, 2.6]
    rows = [{"step": 1000 * i, "validation_loss": loss} for i, loss in enumerate(losses)]
    plot_losses(write_metrics(tmp_path, *rows), tmp_path / "loss.png", "kept")
    *_, ring = figures[0].axes[0].lines
    assert (ring.get_xdata(), ring.get_ydata()) == ([3000], [2.0])
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert "kept in best/: step 3,000, loss 2.000" in texts
    for loss in ({"loss": 2.0}, {"validation_loss": None, "loss": 2.0}):
        metrics = write_metrics(tmp_path, *({"step": i, **loss} for i in range(3)))
        plot_losses(metrics, tmp_path / "loss.png", "none kept")
        assert "best" not in str(figures[-1].axes[0].get_legend().get_texts())


# ---- what was learned


def test_a_confusion_matrix_is_shaded_by_the_share_of_its_row(
    tmp_path: Path, figures: list[Any]
) -> None:
    confusion = np.array([[900, 100, 0], [1, 3, 0], [0, 0, 0]])
    plot_confusion(confusion, ["often", "$seldom$", "never \u4e2d"], tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    expected = np.array([[0.9, 0.1, 0], [0.25, 0.75, 0], [0, 0, 0]])
    assert np.allclose(axes.images[0].get_array(), expected)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["900\n90%", "100\n10%"] and texts[4] == "3\n75%"
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "$seldom$"
    assert_readable(axes)


@pytest.mark.parametrize("shade", [0.0, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 1.0])
def test_the_number_in_a_cell_of_any_shade_can_be_read(
    shade: float, tmp_path: Path, figures: list[Any]
) -> None:
    n = round(1000 * shade)
    plot_confusion(np.array([[n, 1000 - n], [0, 1]]), ["a", "b"], tmp_path / "confusion.png")
    assert_readable(figures[0].axes[0])


@pytest.mark.parametrize("n", [2, 20, 77, 300])
def test_many_classes_with_long_names_fit_on_a_screen(
    n: int, tmp_path: Path, figures: list[Any]
) -> None:
    names = [f"class {i} with a name that goes on and on, to the number {i}" for i in range(n)]
    plot_confusion(np.full((n, n), 12_345), names, tmp_path / "confusion.png")
    assert max(pixels(figures[0])) <= 1700
    axes = figures[0].axes[0]
    assert len({label.get_text() for label in axes.get_yticklabels()}) == len(axes.get_yticks())
    assert all(text.get_fontsize() >= 5 for text in axes.texts)
    assert len(axes.texts) == (n * n if n <= 20 else 0)


def test_calibration_shows_how_little_one_pair_tells(tmp_path: Path, figures: list[Any]) -> None:
    bins = calibration(torch.tensor([0.1, 0.1, -0.1, 9.0]))
    plot_calibration(bins, tmp_path / "calibration.png")
    (bars,) = figures[0].axes[0].containers
    spans = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert spans == [pytest.approx(one.interval) for one in bins]
    # Wilson: of one success in one trial the interval begins at 1 / (1 + 1.96^2)
    assert bins[-1].interval == pytest.approx((1 / (1 + 1.96**2), 1))
    assert bins[-1].summary()["interval"] == bins[-1].interval
    heading, *lines = calibration_table(bins).splitlines()
    assert "95 % interval" in heading and lines[-1].split() == ["1.000", "1", "1.000", "0.207",
                                                                 "to", "1.000"]  # fmt: skip


# ---- activations


def random_attention(heads: int, tokens: int) -> Tensor:
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(2)


def test_small_attention_weights_are_visible(tmp_path: Path, figures: list[Any]) -> None:
    plot_attention(random_attention(2, 5), list("abcde"), tmp_path / "attention.png", "two", 8)
    first, second, bar = figures[0].axes
    assert first.images[0].norm(0.01) == pytest.approx(0.1)
    assert "square-root scale" in bar.get_ylabel()
    assert [axes.get_title() for axes in (first, second)] == ["head 8.0", "head 8.1"]


@pytest.mark.parametrize(("heads", "tokens"), [(1, 3), (4, 80)])
def test_attention_to_a_long_text_fits_on_a_screen(
    heads: int, tokens: int, tmp_path: Path, figures: list[Any]
) -> None:
    labels = [f"\u2423word{i}" for i in range(tokens)]
    plot_attention(random_attention(heads, tokens), labels, tmp_path / "attention.png", "long")
    assert pixels(figures[0])[0] <= 1600
    axes = figures[0].axes[0]
    figures[0].canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    for above, below in pairwise(boxes):
        assert below.y1 <= above.y0 + 1.5  # no label on another
    assert axes.get_yticklabels()[0].get_text().endswith("\u2423word0")


def test_a_large_weight_is_not_lost_between_pixels() -> None:
    weights = torch.zeros(1, 1000, 1000)
    weights[0, 901, 3] = 0.9
    pooled, size = largest_of_cells(weights, most=300)
    assert size == 4 and pooled.shape == (1, 250, 250)
    assert pooled[0, 901 // 4, 0] == pytest.approx(0.9)


@pytest.mark.parametrize(("layers", "heads"), [(3, 2), (12, 12), (24, 25)])
def test_scores_of_all_heads_can_be_read(
    layers: int, heads: int, tmp_path: Path, figures: list[Any]
) -> None:
    kinds = [field.name for field in fields(HeadScores)]
    scores = HeadScores(*(torch.rand(layers, heads) for _ in kinds))
    plot_head_scores(scores, tmp_path / "heads.png", "heads")
    assert pixels(figures[0])[0] <= 1700
    *panels, _ = (axes for axes in figures[0].axes if axes.axison)
    assert [axes.get_title() for axes in panels] == [
        f"{kind.replace('_', '-')} score" for kind in kinds
    ]
    for axes in panels:
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("block", "head")
        assert_readable(axes)


def lens_of(token_ids: Tensor, layers: int = 3) -> Lens:
    """One that names at each position the token that follows, in the last layer alone."""
    names = ["embedding", *(f"blocks.{i}.stream" for i in range(layers - 1))]
    ids = torch.zeros(layers, 1, len(token_ids), 1, dtype=torch.long)
    ids[-1, 0, :-1, 0] = token_ids[1:]
    return Lens(names, ids, torch.rand(ids.shape))


@pytest.mark.parametrize("tokens", [1, 16, 17, 90])
def test_the_lens_is_wrapped_and_outlines_the_true_next_token(
    tokens: int, tokenizer: Tokenizer, tmp_path: Path, figures: list[Any]
) -> None:
    token_ids = torch.tensor(tokenizer.encode("one two three four five " * 40)[:tokens])
    plot_lens(lens_of(token_ids), tokenizer, token_ids, tmp_path / "lens.png", "lens")
    *panels, _ = figures[0].axes
    shown = min(tokens, 64)
    assert pixels(figures[0])[0] <= 1600
    assert len(panels) == math.ceil(shown / 16)
    assert sum(len(axes.get_xticks()) for axes in panels) == shown
    outlined = [cell for axes in panels for cell in axes.patches]
    assert len(outlined) == shown - 1  # what follows the last token is not known
    assert all(round(cell.get_y() + 0.44) == 2 for cell in outlined)
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["embedding", "block 0", "block 1"]
    for axes in panels:
        assert_readable(axes)


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_trace_is_drawn_as_lengths_by_block(
    tokens: int, tiny_model: GPT2, tmp_path: Path, figures: list[Any]
) -> None:
    found = trace(tiny_model, torch.arange(tokens)[None])
    plot_trace(found, tmp_path / "trace.png", "lengths")
    *others, first = figures[0].axes
    assert len(others) == (tokens > 1)
    stream, attention, mlp = first.lines
    assert stream.get_xdata().tolist() == [-1, 0, 1, 2]  # the embedding, and three blocks
    assert [line.get_label() for line in first.lines[1:]] == ["attention adds", "MLP adds"]
    assert mlp.get_ydata()[2] == pytest.approx(float(found["blocks.2.mlp_out"][0, 0].norm()))
    assert attention.get_ydata()[0] == pytest.approx(float(found["blocks.0.attn_out"][0, 0].norm()))
    for axes in others:
        lengths = found["blocks.1.stream"][0, 1:].norm(dim=1).numpy()
        assert axes.lines[0].get_ydata()[2] == pytest.approx(np.median(lengths))
    labels = [label.get_text() for label in first.get_xticklabels()]
    assert labels == ["embedding", "0", "1", "2"]
