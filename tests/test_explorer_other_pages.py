"""Pages of the explorer besides gpt2-nano's, in a real browser: two models beside each other,
recorded numbers, and pages whose engine does not compute what the model computes."""

import base64
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser
from explorer_expected import HARD_TEXT, TEXT, InPython, percents, shows
from selenium.webdriver.common.keys import Keys

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.ablation import head_effects
from gpt2mini.inspection.explorer import write_page
from gpt2mini.inspection.explorer.weights import (
    packed_difference,
    packed_model,
    plain_model,
    with_packed_weights,
)
from gpt2mini.model import MLP

pytest_plugins = "explorer_pages"


def next_tokens(page: Browser) -> list[tuple[str, list[float]]]:
    rows = page.script(
        "return [...document.querySelectorAll('#next .next-tokens tr')]"
        ".map((row) => [row.children[1].innerText, row.children[3].innerText])"
    )
    return [(label, percents(said)) for label, said in rows]


def finish(page: Browser, path: Path) -> None:
    assert page.complaints() == []
    assert set(page.requests()) <= {path.as_uri()}


# ---- two models


def test_a_model_and_its_adapter_side_by_side(
    browser: Browser,
    compared_page: Path,
    word_model: GPT2,
    adapted_model: GPT2,
    tokenizer: Tokenizer,
) -> None:
    first = packed_model(word_model, "int8")
    second = packed_difference(word_model, first, adapted_model, "int8")
    models = [
        InPython(with_packed_weights(word_model, "int8"), tokenizer),
        InPython(plain_model(adapted_model, second.weights), tokenizer),
    ]
    before, after = (model.probabilities(TEXT) for model in models)
    assert (after / before).log().abs().max() > 1  # or there is nothing to compare
    browser.visit(compared_page, "#right=compare")
    ids = models[0].ids(TEXT)[0]
    rows = browser.script(
        "return [...document.querySelectorAll('#compare table')].map((table) =>"
        " [...table.rows].slice(1).map((row) => [...row.cells].map((cell) => cell.innerText)))"
    )
    for label, *shares in rows[0]:  # each token of the text
        t = int(re.findall(r"\((\d+)\)$", label)[0])
        of_token = [model.probabilities(TEXT, t - 1)[ids[t]] for model in models]
        assert shows(" ".join(shares), *of_token)
    best = models[0].likeliest(before, 1)[0][0], models[1].likeliest(after, 1)[0][0]
    assert {row[0] for row in rows[1]} >= set(best)
    for label, *said in rows[1]:  # the next token
        token = models[0].id(label.replace("\u2423", " "))
        assert shows(" ".join(said[:2]), before[token], after[token])
    for layer, (_, *said) in enumerate(row[:3] for row in rows[2]):  # the lens
        for model, text in zip(models, said, strict=True):
            label, p = model.lens(TEXT, layer)
            assert text.startswith(label) and shows(text, p)
    browser.visit(compared_page)
    browser.choose(browser.one("#model"), "tuned")
    label, shares = next_tokens(browser)[0]
    assert (label, shares) == (best[1], [pytest.approx(after.max().item(), abs=0.001)])
    finish(browser, compared_page)


# ---- recorded numbers


def test_a_page_of_recorded_numbers_can_be_explored(
    browser: Browser, recorded_page: Path, small: InPython
) -> None:
    browser.visit(recorded_page)
    assert browser.text("#name") == "<b>small</b>"
    assert "recorded" in browser.text("#status")
    tokens = [token.text for token in browser.all("#tokens .token")]
    assert "".join(tokens) == HARD_TEXT.replace(" ", "\u2423")
    assert browser.one("#text").get_attribute("readonly") and not browser.shown("#examples")

    browser.click(browser.all("#tokens .token")[4])
    position = int(re.findall(r"Token (\d+) ", browser.text("#token-said"))[0])
    probabilities = small.probabilities(HARD_TEXT, position)
    expected = small.likeliest(probabilities, 5)
    for (label, shares), (its_label, p) in zip(next_tokens(browser), expected, strict=False):
        assert label == its_label and shares == [pytest.approx(p, abs=0.002)]
    browser.type_into('#next input[aria-label="temperature"]', "0.5")
    browser.press(Keys.ENTER)
    logits = small.trace(HARD_TEXT)["logits"][0, position]
    half = (logits / 0.5).softmax(dim=0).max().item()
    assert next_tokens(browser)[0][1][0] == pytest.approx(half, abs=0.005)

    browser.click(browser.one('.small-head[aria-label^="head 1.1"]'))
    cells = browser.one(".large-cells")
    size = cells.rect["width"] / small.ids(HARD_TEXT).shape[1]
    browser.point_at(cells, 2.5 * size, 5.5 * size)
    attention = small.trace(HARD_TEXT)["blocks.1.attention"][0, 1]
    assert shows(browser.text("#large-head-said"), attention[5, 2])

    for tab in browser.all("[role=tab]"):
        browser.click(tab)
        panel = browser.one("#" + (tab.get_attribute("aria-controls") or ""))
        assert panel.is_displayed() and len(panel.text) > 40
    for name in ("switch off", "add one", "write 30", "patch"):
        with pytest.raises(LookupError):
            browser.button(name)
    finish(browser, recorded_page)


def test_recorded_effects_rank_the_heads(
    browser: Browser, recorded_page: Path, small: InPython
) -> None:
    position = 4
    browser.visit(recorded_page, f"#token={position}&right=off")
    browser.click(browser.button("rank all heads"))
    browser.until(lambda: browser.shown("#off .ranking tr"), "the ranking")
    ids = small.ids(HARD_TEXT)
    effects = head_effects(small.model, ids, position, target=int(ids[0, position + 1]))
    rows = [row.text for row in browser.shown("#off .ranking tr")]
    for row, (layer, head, p) in zip(rows, effects.strongest(3), strict=False):
        assert row.startswith(f"head {layer}.{head}")
        assert percents(row)[0] == pytest.approx(p, abs=0.001)
    finish(browser, recorded_page)


# ---- pages that do not compute what the model computes


def shows_recorded_numbers_and_says_so(
    page: Browser, path: Path, expected: list[tuple[str, float]]
) -> None:
    page.visit(path)
    assert "does not compute" in page.text("#notice")
    assert "recorded" in page.text("#status")
    assert page.one("#text").get_attribute("readonly")
    for (label, shares), (its_label, p) in zip(next_tokens(page), expected, strict=False):
        assert label == its_label and shares == [pytest.approx(p, abs=0.002)]
    finish(page, path)


def test_a_page_with_damaged_weights_shows_recorded_numbers(
    browser: Browser, small_page: Path, word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    page = small_page.read_text(encoding="utf-8")
    found = re.search(r'(id="weights-0">)([^<]+)', page)
    assert found is not None
    weights = np.frombuffer(bytearray(gzip.decompress(base64.b64decode(found[2]))), np.int8).copy()
    weights[1000:2000] = 100
    damaged = base64.b64encode(gzip.compress(weights.tobytes())).decode()
    path = tmp_path / "damaged.html"
    path.write_text(page.replace(found[2], damaged), encoding="utf-8")
    python = InPython(with_packed_weights(word_model, "int8"), tokenizer)
    expected = python.likeliest(python.probabilities(TEXT), 5)
    shows_recorded_numbers_and_says_so(browser, path, expected)
    refusal = browser.text("#notice")
    browser.click(browser.one("#copy-link"))
    browser.until(lambda: "copied" in browser.text("#notice"), "the link to be copied")
    browser.click(browser.all("#tokens .token")[1])
    assert browser.text("#notice") == refusal


def test_a_page_of_an_edited_model_shows_its_own_numbers(
    browser: Browser,
    word_model: GPT2,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """model.py was edited, and the engine of the page was not."""
    original = MLP.forward

    def edited(self: MLP, x: torch.Tensor) -> torch.Tensor:
        return 2 * original(self, x)

    monkeypatch.setattr(MLP, "forward", edited)
    path = tmp_path / "edited.html"
    write_page(word_model, tokenizer, TEXT, path, live="int8")
    python = InPython(with_packed_weights(word_model, "int8"), tokenizer)
    expected = python.likeliest(python.probabilities(TEXT), 5)
    shows_recorded_numbers_and_says_so(browser, path, expected)
