"""The explorer's page in a real browser: it is used as a person would, and what it then shows is
compared with what Python computes with the same weights."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from browser import Browser
from command import run_apart
from explorer_expected import TEXT, InPython, percents, shows
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from gpt2mini.data.samples import sample
from gpt2mini.inspection import trace
from gpt2mini.inspection.ablation import head_effects, mean_activations
from gpt2mini.inspection.tracing import Patch, patched
from gpt2mini.sampling import divide_by_temperature, keep_top_k, keep_top_p

pytest_plugins = "explorer_pages"

LAST = 12  # index of the last token of TEXT, "er" of "keeper"


@pytest.fixture
def page(browser: Browser, nano_page: Path, small_page: Path) -> Iterator[Browser]:
    """gpt2-nano's page as it first shows itself; afterwards nothing was complained about."""
    browser.visit(nano_page)
    yield browser
    assert browser.complaints() == []
    assert set(browser.requests()) <= {nano_page.as_uri(), small_page.as_uri()}


def tab(page: Browser, name: str) -> None:
    page.click(page.button(name, "[role=tablist]"))


def token(page: Browser, i: int) -> WebElement:
    return page.all("#tokens .token")[i]


def token_texts(page: Browser) -> list[str]:
    return page.script(
        "return [...document.querySelectorAll('#tokens .token')].map((e) => e.textContent)"
    )


def next_tokens(page: Browser) -> dict[str, str]:
    """What the list of next tokens says of each, the most likely first."""
    rows = page.script(
        "return [...document.querySelectorAll('#next .next-tokens tr')]"
        ".map((row) => [row.children[1].innerText, row.children[3].innerText])"
    )
    return dict(rows)


def shows_next(page: Browser, python: InPython, probabilities: torch.Tensor, n: int = 10) -> bool:
    expected = python.likeliest(probabilities, n)
    seen = list(next_tokens(page).items())[:n]
    return [label for label, _ in seen] == [label for label, _ in expected] and all(
        shows(said, p) for (_, said), (_, p) in zip(seen, expected, strict=True)
    )


# ---- the text and its tokens


def test_a_typed_text_is_read(page: Browser, nano: InPython) -> None:
    text = "She took her hat and her"
    page.type_into("#text", text)
    assert token_texts(page) == nano.labels(text)
    assert shows_next(page, nano, nano.probabilities(text))
    ids = nano.ids(text)[0]
    for t in range(1, len(ids)):
        said = token(page, t).get_attribute("aria-label")
        assert said is not None and shows(said, nano.probabilities(text, t - 1)[ids[t]])
    page.press(Keys.BACKSPACE, "s")  # "hes": in the middle of a word, at the end of the text
    assert shows_next(page, nano, nano.probabilities(text[:-1] + "s"))


def test_a_token_is_chosen_with_the_mouse_and_with_the_keys(page: Browser, nano: InPython) -> None:
    page.click(token(page, 4))
    assert page.text("#token-said").startswith("Token 4 ")
    assert shows(page.text("#token-said"), nano.probabilities(TEXT, 3)[nano.id(" lit")])
    assert shows_next(page, nano, nano.probabilities(TEXT, 4))
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert page.focused.get_attribute("aria-label").startswith("er, token 3")  # type: ignore[union-attr]
    assert "er" in page.text("#diagram-title")
    assert shows_next(page, nano, nano.probabilities(TEXT, 3))
    assert next_tokens(page)["\u2423lit"]
    page.press(Keys.END)
    assert page.text("#token-said").startswith(f"Token {LAST} ")


def test_text_of_any_script_is_shown_in_whole_characters(page: Browser, nano: InPython) -> None:
    text = "\u4eba\u5de5\u667a\u80fd caf\u00e9 "
    page.type_into("#text", text)
    page.driver.execute_cdp_cmd("Input.insertText", {"text": "\U0001f642"})
    assert page.one("#text").get_property("value") == text + "\U0001f642"
    assert "".join(token_texts(page)) == (text + "\U0001f642").replace(" ", "\u2423")
    assert token_texts(page)[:4] == list("\u4eba\u5de5\u667a\u80fd")
    ids = nano.ids(text + "\U0001f642")
    assert page.text("#token-said").startswith(f"Token {ids.shape[1] - 1} (counted from 0, ")
    assert shows_next(page, nano, nano.probabilities(text + "\U0001f642"), n=3)


def test_text_that_is_html_stays_text(page: Browser, nano: InPython) -> None:
    text = "a </script><b id=x>&amp;"
    page.type_into("#text", text)
    assert "".join(token_texts(page)) == text.replace(" ", "\u2423")
    assert page.all("#x") == []
    page.driver.refresh()  # the address holds the text
    page.until(lambda: page.all("[data-ready]"), "the page to start")
    assert page.one("#text").get_property("value") == text


def test_an_example_is_chosen_from_the_list(page: Browser, nano: InPython) -> None:
    options = [option.text for option in page.all("#examples option")][1:]
    assert len(options) >= 4
    for text in options:
        page.choose(page.one("#examples"), text)
        assert page.one("#text").get_property("value") == text
        assert token_texts(page) == nano.labels(text)


def test_too_many_tokens_and_no_text_are_said(page: Browser, nano: InPython) -> None:
    page.click(page.one("#text"))
    page.press_with(Keys.CONTROL, "a")
    page.press(Keys.BACKSPACE)
    assert token_texts(page) == ["<|endoftext|>"]
    assert "the page reads <|endoftext|>, after which texts begin" in page.text("#token-said")
    assert "What is written follows <|endoftext|>" in page.text("#next .writing + p")
    page.driver.execute_cdp_cmd("Input.insertText", {"text": "the lamp " * 70})
    assert len(token_texts(page)) == 128
    ids = nano.ids("the lamp " * 70)
    assert f"{ids.shape[1] - 128} are left out" in page.text("#token-said")


# ---- attention


def test_a_heads_cell_shows_its_weight_and_how_it_is_made(page: Browser, nano: InPython) -> None:
    page.click(page.one('.small-head[aria-label^="head 8.2"]'))
    attention = nano.trace(TEXT)["blocks.8.attention"][0, 2]  # (tokens, tokens)
    cells = page.one(".large-cells")
    size = cells.rect["width"] / (LAST + 1)
    for query, key in [(LAST, 4), (7, 7), (10, 2), (5, 0)]:
        page.point_at(cells, (key + 0.5) * size, (query + 0.5) * size)
        said = page.text("#large-head-said")
        assert f"({query}) attends to" in said and f"({key}) with" in said
        assert shows(said, attention[query, key])
        short = page.text(".short-arithmetic")  # in view while the pointer is on the cell
        assert shows(short.split("softmax")[1], attention[query, key])
        assert page.script(
            "return document.querySelector('.short-arithmetic').getBoundingClientRect().bottom"
            " <= innerHeight"
        )
        made = page.text("#one-number")
        assert f"({query}) reads" in made and percents(made)
        assert shows(
            made.split("weight of ")[1].split(" 5. ")[0].split("Every")[0], attention[query, key]
        )
    page.click(cells, 4.5 * size, (LAST + 0.5) * size)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert shows(page.text("#large-head-said"), attention[LAST - 1, 3])
    assert "attends to" in page.script("return document.getElementById('announcer').textContent")
    page.press(Keys.ENTER)
    assert page.text("#token-said").startswith(f"Token {LAST - 1} ")


def test_the_keys_move_among_all_heads(page: Browser) -> None:
    page.click(page.one('.small-head[aria-label^="head 8.2"]'))
    page.press(Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.text("#all-heads h3").startswith("Head 7.3")
    page.press("o")
    assert page.text("#all-heads h3") == "Head 7.3 (off)"
    assert (page.focused.get_attribute("aria-label") or "").endswith(", switched off")
    page.press("o")
    assert page.text("#all-heads h3") == "Head 7.3"


def test_a_block_step_by_step(page: Browser, nano: InPython) -> None:
    tab(page, "Step by step")
    layer = 8
    vectors = nano.trace(TEXT)
    for step in range(1, 9):
        assert page.text("#step h3").startswith(f"{step} of 8")
        if step < 8:
            page.click(page.button("next", "#step"))
    before, after = (nano.lens(TEXT, n) for n in (layer, layer + 1))
    said = page.text("#step h3 + p")
    assert before[0] in said and after[0] in said and shows(said, before[1], after[1])
    stream = vectors[f"blocks.{layer}.stream"][0, LAST]
    numbers = page.script(
        "return [...document.querySelectorAll('#step figure:last-of-type li')]"
        ".map((e) => e.textContent.replace('\\u2212', '-'))"
    )
    assert len(numbers) == 16
    assert torch.tensor([float(x) for x in numbers]).sub(stream[:16]).abs().max() < 0.5
    assert f"length {stream.norm():.1f}" in page.text("#step figure:last-of-type figcaption")
    assert "return x" in page.text("#step .sources")
    page.press(Keys.ARROW_LEFT)
    assert page.text("#step h3").startswith("7 of 8")


def test_the_diagram_shows_lengths_and_the_lens_and_opens_a_part(
    page: Browser, nano: InPython
) -> None:
    page.click(token(page, 4))
    flow = page.script("return document.querySelector('#diagram .flow').innerText")
    for layer in (1, 6, 12):
        label, p = nano.lens(TEXT, layer, 4)
        assert f"{label} {100 * p:.{1 if p >= 0.1 else 2}f}" in flow.replace("\u00a0", " ")
    norm = nano.trace(TEXT)["blocks.3.mlp_out"][0, 4].norm()
    mlp = page.one('#diagram [aria-label^="block 3, MLP"]')
    assert f"length {norm:.{3 if norm < 1 else 2 if norm < 10 else 1}f}" in (
        mlp.get_attribute("aria-label") or ""
    )
    page.click(mlp)
    inside = page.text("#inside")
    assert "(256, 1024)" in inside or "(1024, 256)" in inside
    assert "self.mlp_out(" in inside and "model.py" in inside


# ---- interventions


def shows_before_and_after(page: Browser, python: InPython, patches: Mapping[str, Patch]) -> bool:
    """Whether the list of next tokens has both probabilities, by the order of those after."""
    before, after = python.probabilities(TEXT), python.probabilities(TEXT, patches=patches)
    seen = list(next_tokens(page).items())[:10]
    labels = [label for label, _ in python.likeliest(after, 10)]
    ids = after.topk(10).indices
    return [label for label, _ in seen] == labels and all(
        shows(said, after[i], before[i]) for (_, said), i in zip(seen, ids, strict=True)
    )


def test_a_head_is_switched_off_and_on(page: Browser, nano: InPython) -> None:
    lit = nano.id(" lit")
    before = nano.probabilities(TEXT)[lit]
    after = nano.probabilities(TEXT, patches={"blocks.8.head.2": 0})[lit]
    assert 0.06 < before < 0.07 and after < 0.005
    page.click(page.button("switch off", "#all-heads"))
    assert shows_before_and_after(page, nano, {"blocks.8.head.2": 0})
    tab(page, "Switch off")
    assert shows(page.text("#off .before-after"), before, after)
    page.click(page.button("remove: head 8.2 off"))
    assert "Every part is on." in page.text("#off")
    tab(page, "Next token")
    assert shows(next_tokens(page)["\u2423lit"], before)


def test_numbers_inside_the_model_are_shown_before_and_after(page: Browser, nano: InPython) -> None:
    patches: Mapping[str, Patch] = {"blocks.8.head.2": 0}
    page.click(page.button("switch off", "#all-heads"))
    page.click(page.one('.small-head[aria-label^="head 9.2"]'))
    with patched(nano.model, patches):
        with_patch = trace(nano.model, nano.ids(TEXT)).activations
    after, before = with_patch["blocks.9.attention"], nano.trace(TEXT)["blocks.9.attention"]
    key = int(after[0, 2, LAST].argmax())
    both = (after[0, 2, LAST, key], before[0, 2, LAST, key])
    assert shows(page.text(".short-arithmetic").split("softmax")[1], *both)
    weight = page.text("#one-number").split("weight of ")[1].split("Every")[0]
    assert shows(weight, *both) and "before:" in weight
    tab(page, "Step by step")
    page.click(page.button("4 weights", "#step"))
    assert shows(page.text("#step table tr:nth-child(2) td:nth-child(3)"), *both)
    page.choose(page.one("#step select[aria-label=block]"), "block 8")
    page.click(page.button("6 add", "#step"))
    lengths = [x["blocks.8.attn_out"][0, LAST].norm() for x in (with_patch, nano.trace(TEXT))]
    said = f"length {lengths[0]:.1f}, before: {lengths[1]:.1f}"
    assert said in page.text("#step figure.attention figcaption")
    tab(page, "A part and its code")
    assert said in page.text("#inside .facts")
    assert "head 8.2 (off)" in page.text("#inside .head-reads")


def test_parts_give_their_mean_instead(page: Browser, nano: InPython) -> None:
    general = nano.tokenizer.encode(sample("general.txt").read_text(encoding="utf-8"))
    rows = torch.tensor(general[: 16 * 128]).view(16, 128)
    names = ["blocks.8.head.2", "blocks.3.mlp_out"]
    means = mean_activations(nano.model, rows, names)
    tab(page, "Switch off")
    [part, block, head, replaced] = page.all("#off form select")
    page.choose(replaced, "by its mean")
    page.click(page.button("switch off", "#off"))
    page.choose(part, "MLP")
    page.choose(block, "3")
    assert not head.is_displayed()
    page.click(page.button("switch off", "#off"))
    lit = nano.id(" lit")
    before, after = nano.probabilities(TEXT)[lit], nano.probabilities(TEXT, patches=means)[lit]
    assert shows(page.text("#off .before-after"), before, after)
    tab(page, "Next token")
    assert shows_before_and_after(page, nano, means)


def test_a_position_is_patched_from_a_second_text(page: Browser, nano: InPython) -> None:
    second = "The young sailor opened"
    [stream] = trace(nano.model, nano.ids(second), names=["blocks.5.stream"]).activations.values()

    def edit(own: torch.Tensor) -> torch.Tensor:
        own = own.clone()
        own[0, LAST] = stream[0, 3]
        return own

    tab(page, "Switch off")
    page.click(page.one("#off summary"))
    page.type_into("#off details input", second)
    page.click(page.all("#off details .token")[3])
    layer, position = page.all("#off details select")
    page.choose(layer, "5")
    page.choose(position, f"{LAST} er")
    page.click(page.button("patch", "#off"))
    lit = nano.id(" lit")
    after = nano.probabilities(TEXT, patches={"blocks.5.stream": edit})[lit]
    assert shows(page.text("#off .before-after"), nano.probabilities(TEXT)[lit], after)
    page.click(page.button("remove the patch"))
    assert page.focused.text == "patch"  # still unfolded, to patch again
    page.press(Keys.ENTER)
    page.click(page.button("all on again"))
    assert "Every part is on." in page.text("#off")


def test_all_heads_are_ranked(page: Browser, nano: InPython) -> None:
    tab(page, "Switch off")
    page.click(page.button("rank all heads"))
    page.until(lambda: page.shown("#off .ranking tr"), "the ranking")
    effects = head_effects(nano.model, nano.ids(TEXT), target=nano.id(" lit"))
    rows = [" ".join(row.text.split()) for row in page.shown("#off .ranking tr")]
    expected = effects.strongest(len(rows))
    assert len(rows) == 12
    for row, (layer, head, p) in zip(rows, expected, strict=True):
        assert row.startswith(f"head {layer}.{head} ") and shows(row.split("(")[0], p)
    page.click(page.button("switch off head 8.2"))
    assert percents(page.text("#off .before-after"))[1] == pytest.approx(expected[0][2], abs=1e-4)
    page.click(page.button("look at head 8.2"))
    assert page.text("#all-heads h3") == "Head 8.2 (off)"


# ---- the next token, writing


def test_temperature_top_k_and_top_p(page: Browser, nano: InPython) -> None:
    logits = nano.trace(TEXT)["logits"][:, -1]  # (1, vocab)
    page.click(page.one("#next-temperature"), 1, 1)  # its left end
    page.press(*[Keys.ARROW_RIGHT] * 14)
    assert page.one("#next-temperature").get_property("value") == "0.7"
    warm = divide_by_temperature(logits, 0.7)
    assert shows(next_tokens(page)["\u2423lit"], *(x.softmax(dim=1).max() for x in (warm, logits)))
    for name, value in [("top-k", "5"), ("top-p", "0.6")]:
        page.type_into(f'#next input[aria-label="{name}"]', value)
        page.press(Keys.ENTER)
    kept = keep_top_p(keep_top_k(warm, 5), 0.6).softmax(dim=1)[0]  # (vocab)
    seen = next_tokens(page)
    assert sum("removed" in said for said in seen.values()) == len(seen) - int((kept > 0).sum())
    for label, p in nano.likeliest(kept, int((kept > 0).sum())):
        assert shows(seen[label].split("model")[0], p)


def written(page: Browser) -> str:
    """What is in the text box after the model has written."""
    page.until(lambda: "write 30" in page.text("#next .writing"), "the writing to end")
    return str(page.one("#text").get_property("value"))


def test_the_model_writes_the_same_text_for_the_same_seed(page: Browser, small_page: Path) -> None:
    page.visit(small_page)
    page.click(page.button("add one"))
    assert written(page).startswith(TEXT) and len(token_texts(page)) == LAST + 2
    page.click(page.one("#undo"))
    texts = []
    for seed in ["3", "3", "4"]:
        page.type_into("#next label input", seed)
        page.press(Keys.ENTER)
        page.click(page.button("write 30"))
        texts.append(written(page))
        page.click(page.one("#undo"))
        assert written(page) == TEXT
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(TEXT) and len(text) > len(TEXT) + 40 for text in texts)


def test_the_most_likely_text_is_that_of_greedy_generation(page: Browser, nano: InPython) -> None:
    page.type_into('#next input[aria-label="temperature"]', "0")
    page.press(Keys.ENTER)
    page.click(page.button("write 30"))
    text = TEXT
    for _ in range(30):
        text += nano.tokenizer.decode([int(nano.probabilities(text).argmax())])
    assert written(page) == text


def test_writing_stops_where_the_text_is_full(page: Browser, small_page: Path) -> None:
    page.visit(small_page, "#text=" + "+the+lamp" * 25)
    page.click(page.button("write 30"))
    written(page)
    assert int(re.findall(r"the last is (\d+)", page.text("#token-said"))[0]) == 63  # its context
    assert "No more tokens fit" in page.text("#next")
    assert page.focused.text == "write 30"  # the keyboard goes on from there
    for name in ("write 30", "add one"):
        assert page.button(name).get_attribute("aria-disabled") == "true"
        page.click(page.button(name))
    assert len(token_texts(page)) == 64


STOP_AFTER_A_FEW_TOKENS = """
const button = (name) => [...document.querySelectorAll("#next .writing button")]
  .find((one) => one.textContent === name);
const tokens = document.getElementById("tokens"), enough = tokens.children.length + 3;
new MutationObserver((_, observer) => {
  if (tokens.children.length < enough) return;
  observer.disconnect();
  window.whileWriting = button("add one").getAttribute("aria-disabled");
  button("stop").click();
}).observe(tokens, { childList: true });
"""


def test_writing_is_stopped_half_way(page: Browser) -> None:
    page.script(STOP_AFTER_A_FEW_TOKENS)  # by the page itself: it may write faster than we click
    page.click(page.button("write 30"))
    text = written(page)
    assert page.script("return window.whileWriting") == "true"
    assert text.startswith(TEXT) and LAST + 2 < len(token_texts(page)) < LAST + 31
    assert page.focused.text == "write 30"
    page.click(page.one("#undo"))
    assert written(page) == TEXT


def test_a_token_of_the_list_is_added(page: Browser) -> None:
    page.click(page.one('#next [aria-label^="add \u2423lit"]'))
    assert page.one("#text").get_property("value") == TEXT + " lit"
    assert page.text("#token-said").startswith(f"Token {LAST + 1} ")


# ---- the whole page


def test_undo_goes_back_step_by_step(page: Browser) -> None:
    page.click(token(page, 4))
    page.click(page.button("switch off", "#all-heads"))
    page.click(page.one("#text"))
    page.press(Keys.END, " and", " so")
    page.click(page.one("#undo"))
    assert page.one("#text").get_property("value") == TEXT  # letters count as one change
    assert page.text("#all-heads h3") == "Head 8.2 (off)"
    page.click(page.one("#diagram"), 5, 5)
    page.press_with(Keys.CONTROL, "z")
    assert page.text("#all-heads h3") == "Head 8.2"
    assert page.text("#token-said").startswith("Token 4 ")
    page.press_with(Keys.CONTROL, "z")
    assert page.text("#token-said").startswith(f"Token {LAST} ")


def test_a_link_shows_the_same_view_in_another_tab(page: Browser, nano_page: Path) -> None:
    page.open(nano_page)  # what is unfolded, or half filled in, is no part of a link
    page.type_into("#text", "A lamp, a boat, a lamp, a \u4e2d")
    page.click(token(page, 6))
    page.click(page.one('.small-head[aria-label^="head 10.1"]'))
    page.press("o")
    tab(page, "Step by step")
    page.click(page.button("next", "#step"))
    tab(page, "Switch off")
    page.click(page.one("#copy-link"))
    page.until(lambda: "copied" in page.text("#notice"), "the link to be copied")
    address, shown = page.copied(), page.text("main")
    assert address == page.driver.current_url
    page.open_tab()
    page.open(nano_page, address.removeprefix(nano_page.as_uri()))
    assert page.text("main") == shown
    assert "Head 10.1 (off)" not in shown and "head 10.1 off" in shown
    page.close_tab()
    page.script("document.getElementById('notice').hidden = true;")


def test_the_view_as_python_gives_the_same_numbers(
    page: Browser, nano: InPython, tmp_path: Path
) -> None:
    page.click(page.button("switch off", "#all-heads"))
    page.click(page.one("#copy-python"))
    page.until(lambda: "copied" in page.text("#notice"), "the code to be copied")
    script = tmp_path / "view.py"
    script.write_text(page.copied(), encoding="utf-8")
    done = run_apart(script, launch=[sys.executable, "-W", "error"])
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "' lit' comes next" in line]
    shares = [float(line.split()[-1]) for line in said]
    tab(page, "Switch off")
    expected = percents(page.text("#off .before-after"))
    assert shares == pytest.approx(expected, abs=0.005)  # the page's weights are int8
    page.script("document.getElementById('notice').hidden = true;")


def test_the_tour_from_its_first_card_to_its_last(page: Browser, nano: InPython) -> None:
    page.click(page.one("#start-tour"))
    for card in range(1, 9):
        assert page.text("#tour h2").startswith(f"{card} of 8")
        [shown] = page.all(".toured")
        assert shown.is_displayed()
        if card < 8:
            page.press(Keys.ENTER)  # "next" has the focus
    lit = nano.id(" lit")
    before = nano.probabilities(TEXT)[lit]
    after = nano.probabilities(TEXT, patches={"blocks.8.head.2": 0})[lit]
    assert shows(page.text("#off .before-after"), before, after)
    page.click(page.button("finish", "#tour"))
    assert not page.one("#tour").is_displayed()
    assert page.focused.get_attribute("id") == "start-tour"
    page.press(Keys.ENTER)
    page.click(page.one("#text"))  # as the first card proposes
    page.press(Keys.ESCAPE)
    assert not page.one("#tour").is_displayed()


def test_numbers_near_one_are_not_shown_as_zero(page: Browser, nano_page: Path) -> None:
    page.visit(nano_page, "#layer=1&middle=step&token=8")
    shown = [one.text for one in page.all("#step .vector-numbers li")]
    assert any(text.endswith("1.0") for text in shown)
    assert not {".00", "\u2212.00"} & set(shown)


def test_a_word_of_many_tokens_is_read(page: Browser) -> None:
    page.click(page.one("#text"))
    page.press_with(Keys.CONTROL, "a")
    page.driver.execute_cdp_cmd("Input.insertText", {"text": "gattaca" * 20_000})
    assert len(token_texts(page)) == 128
