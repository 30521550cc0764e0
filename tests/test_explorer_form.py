"""The form of the explorer's page in a real browser: contrast, keyboard, names for screen readers,
narrow screens, forced colors, print; and that it loads nothing."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SIZES, Browser
from PIL import Image
from selenium.webdriver.common.keys import Keys

pytest_plugins = "explorer_pages"

FORM = Path(__file__).with_name("page_form.js").read_text(encoding="utf-8")
MOST_TAB_STOPS = 45
LONG = "The+old+keeper+lit+the+lamp.+" * 4

# Views that together show every panel in its states, by the fragment of their address.
VIEWS = {
    "first": "",
    "long text": f"#text={LONG}&middle=step&step=3&right=off",
    "switched off": "#off=8.2,mean:mlp:3,attn:4&right=off",
    "a part": "#middle=inside&part=mlp&right=compare&token=4",
    "a block, patched": "#middle=inside&part=block&right=off&patch=3.12.1&second=a+young+cook",
    "sampling": "#off=layer:2&temperature=0.5&topK=5&topP=0.9&token=5",
    "Chinese": "#text=%E4%BA%BA%E5%B7%A5+%F0%9F%99%82&middle=step&step=7",
}
SCHEMES = ("light", "dark")
PICTURES_OF_HEADS = """
return [...document.querySelectorAll(".small-head canvas, .large-cells canvas")].map((canvas) =>
  canvas.toDataURL());
"""
FOCUS_ON_TOP = """
document.body.tabIndex = -1;
document.body.focus();
document.body.removeAttribute("tabindex");
"""


@pytest.fixture
def page(browser: Browser, nano_page: Path) -> Iterator[Browser]:
    browser.visit(nano_page)
    yield browser
    browser.look()
    assert browser.complaints() == []
    assert set(browser.requests()) <= {nano_page.as_uri()}


def measure(page: Browser, call: str) -> Any:
    """What a function of page_form.js gives."""
    return page.script(f"{FORM}\nreturn {call};")


@pytest.mark.parametrize("view", VIEWS)
def test_every_text_has_enough_contrast(page: Browser, nano_page: Path, view: str) -> None:
    page.visit(nano_page, VIEWS[view])
    for scheme in SCHEMES:
        page.look(prefers_color_scheme=scheme)
        assert (scheme, measure(page, "lowContrast()")) == (scheme, [])


def test_the_tour_and_messages_have_enough_contrast(page: Browser) -> None:
    page.click(page.one("#start-tour"))
    page.click(page.one("#copy-link"))
    page.until(lambda: page.shown("#notice"), "the message")
    for scheme in SCHEMES:
        page.look(prefers_color_scheme=scheme)
        assert (scheme, measure(page, "lowContrast()")) == (scheme, [])
    page.click(page.button("leave the tour"))


@pytest.mark.parametrize("size", SIZES)
def test_nothing_sticks_out_of_the_window(page: Browser, nano_page: Path, size: str) -> None:
    for view in VIEWS.values():
        page.visit(nano_page, view)
        page.look(size)
        assert (view, measure(page, "stickingOut()")) == (view, [])


def test_the_tab_key_reaches_every_control_in_few_stops(page: Browser, nano_page: Path) -> None:
    for view in VIEWS.values():
        page.visit(nano_page, view)
        stops = walk_by_tab(page)
        assert (view, [stop["name"] for stop in stops if not stop["outlined"]]) == (view, [])
        assert (view, [stop["name"] for stop in stops if not stop["uncovered"]]) == (view, [])
        assert len(stops) <= MOST_TAB_STOPS, view
        missed = set(measure(page, "tabStops().map(nameOf)")) - {stop["name"] for stop in stops}
        assert (view, missed) == (view, set())


def walk_by_tab(page: Browser) -> list[dict[str, Any]]:
    """What the focus looks like at each stop of the tab key, from the top of the page on."""
    page.script(FOCUS_ON_TOP)
    stops: list[dict[str, Any]] = []
    while len(stops) < 3 * MOST_TAB_STOPS:
        page.press(Keys.TAB)
        stop = measure(page, "focusSeen()")
        if stop is None or stop["name"] in [before["name"] for before in stops[:1]]:
            return stops
        stops.append(stop)
    raise AssertionError("the tab key never came to the end of the page")


def test_the_arrow_keys_reach_what_the_tab_key_does_not(page: Browser, nano_page: Path) -> None:
    groups = measure(page, "rovingGroups().length")
    assert groups >= 5
    for i in range(groups):
        page.visit(nano_page)  # for moving among tabs has changed what is seen
        members = set(measure(page, f"rovingGroups()[{i}].map(nameOf)"))
        size = measure(page, f"focusGroup({i})")
        page.press(Keys.HOME)
        reached = {measure(page, "nameOf(document.activeElement)")}
        for _ in range(size):
            page.press(Keys.ARROW_RIGHT)
            reached.add(measure(page, "nameOf(document.activeElement)"))
        assert members <= reached, members - reached


def test_every_control_and_picture_has_a_name(page: Browser, nano_page: Path) -> None:
    roles = {"button", "radio", "tab", "textbox", "combobox", "slider", "checkbox", "link"}
    roles |= {"spinbutton", "image", "application", "progressbar", "radiogroup", "tablist"}
    for view in VIEWS.values():
        page.visit(nano_page, view)
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
        ]
        assert len(named) > 20
        assert [role for role, name in named if not name.strip()] == []


def test_bars_are_seen_in_forced_colors(page: Browser, nano_page: Path) -> None:
    page.visit(nano_page, "#off=8.2")
    for scheme in SCHEMES:
        page.look(prefers_color_scheme=scheme, forced_colors="active")
        bar = page.shown("#next .bar")[0]
        page.script("arguments[0].scrollIntoView({ block: 'center' });", bar)
        box = page.script("return arguments[0].getBoundingClientRect().toJSON();", bar)
        y = int(box["y"] + box["height"] / 2)
        picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
        inside = picture.getpixel((int(box["x"] + box["width"] / 2), y))
        outside = picture.getpixel((int(box["x"]) - 3, y))
        assert isinstance(inside, tuple) and isinstance(outside, tuple)
        assert sum(abs(a - b) for a, b in zip(inside, outside, strict=True)) > 300, scheme


def test_pictures_follow_the_colors_of_the_page(page: Browser) -> None:
    colors = []
    for scheme in [*SCHEMES, *SCHEMES]:
        page.look(prefers_color_scheme=scheme)
        colors.append(page.script(PICTURES_OF_HEADS))
    assert colors[0] == colors[2] != colors[1] == colors[3]


def test_nothing_moves_for_readers_who_do_not_want_it(page: Browser) -> None:
    page.look(prefers_reduced_motion="reduce")
    assert page.script("return document.getAnimations().length") == 0
    moving = """
    return [...document.querySelectorAll("*")].filter((element) => {
      const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(element);
      return transitionDuration !== "0s" || animationName !== "none" || scrollBehavior === "smooth";
    }).length;
    """
    assert page.script(moving) == 0


def test_paper_shows_all_that_can_be_scrolled_to(page: Browser, nano_page: Path) -> None:
    for view in VIEWS.values():
        page.visit(nano_page, view)
        page.look(media="print")
        assert (view, measure(page, "cutOff()")) == (view, [])
        for part in ("#tokens", "#diagram", "#middle", "#right"):
            assert page.one(part).is_displayed(), part
