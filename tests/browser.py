"""A real browser that tests drive as a person does: Debian's chromium without a window, offline.

    with browsing(folder) as browser:
        browser.open(page)
        browser.click(browser.button("undo"))

Nothing waits for the clock: `until` waits for what the page shows, and gives up where the console
says that something went wrong.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import HANGS
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

FLAGS = [
    "--headless",
    "--no-sandbox",  # which a container's root has no right to
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # offline
    "--force-device-scale-factor=1",
]
SIZES = {"large": (1440, 900), "phone": (390, 844), "narrow": (320, 640)}


class Browser:
    """What a person does and sees."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.console: list[str] = []

    # ---- where it looks

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a page anew, and wait until it says that it is ready or that it cannot be."""
        self.driver.get("about:blank")  # or only the fragment would change
        self.driver.get(page.as_uri() + fragment)
        self.until(lambda: self.script(READY_OR_REFUSED), "the page to start")

    def visit(self, page: Path, fragment: str = "") -> None:
        """The view of a link, in light colors on a large screen. A page that is open stays open."""
        self.look()
        if self.driver.current_url.split("#")[0] != page.as_uri():
            return self.open(page, fragment)
        self.script("document.activeElement.blur(); scrollTo(0, 0);")
        self.driver.execute_async_script(FOLLOW_LINK, fragment)

    def open_tab(self) -> None:
        self.driver.switch_to.new_window("tab")

    def close_tab(self) -> None:
        self.driver.close()
        self.driver.switch_to.window(self.driver.window_handles[-1])

    def look(self, size: str = "large", media: str = "", **features: str) -> None:
        """The size of the window, the medium ("print"), and what a reader has asked the system for:
        `prefers_color_scheme="dark"`, `forced_colors="active"`, ..."""
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        asked = {"prefers_color_scheme": "light"} | features
        pairs = [{"name": n.replace("_", "-"), "value": value} for n, value in asked.items()]
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": pairs}
        )
        self.driver.execute_async_script(NEXT_FRAMES)  # the page draws anew

    # ---- what is seen

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def shown(self, selector: str) -> list[WebElement]:
        return self.script(SHOWN, selector)

    def text(self, selector: str) -> str:
        """The text that can be seen, each run of white space as one space."""
        return " ".join(self.script("return arguments[0].innerText", self.one(selector)).split())

    def button(self, name: str, within: str = "body") -> WebElement:
        """The visible button of this text or label."""
        for button in self.script(NAMED_BUTTONS, f"{within} button", name):
            return button
        raise LookupError(f"no button {name!r} in {within}")

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the condition is true, or the console says that something went wrong."""

        def met(_: Chrome) -> Any:
            now = condition()
            assert now or not self.read_console(), f"waiting for {what}: {self.console}"
            return now

        wait = WebDriverWait(self.driver, HANGS, poll_frequency=0.1)
        return wait.until(met, f"waited for {what}")

    def copied(self) -> str:
        """What lies in the clipboard."""
        allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
        read = "navigator.clipboard.readText().then(arguments[0]);"
        return str(self.driver.execute_async_script(read))

    @property
    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    # ---- what is done

    def press(self, *keys: str) -> None:
        """Keys, one after another, wherever the focus is."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def press_with(self, modifier: str, key: str) -> None:
        keys = ActionChains(self.driver, duration=0).key_down(modifier).send_keys(key)
        keys.key_up(modifier).perform()

    def type_into(self, selector: str, text: str) -> None:
        """In place of what a text box holds."""
        self.click(self.one(selector))
        self.press_with(Keys.CONTROL, "a")
        self.press(text)

    def choose(self, select: WebElement, text: str) -> None:
        """An option of a list, by its text."""
        Select(select).select_by_visible_text(text)

    def point_at(self, element: WebElement, x: float | None = None, y: float | None = None) -> None:
        """Move the mouse to a point of an element, counted from its upper left corner; by default
        to its middle. The element is scrolled into the middle of what is seen first."""
        self.script("arguments[0].scrollIntoView({ block: 'center', inline: 'center' });", element)
        size = element.rect
        dx = 0 if x is None else round(x - size["width"] / 2)
        dy = 0 if y is None else round(y - size["height"] / 2)
        move = ActionChains(self.driver, duration=0)
        move.move_to_element_with_offset(element, dx, dy).perform()

    def click(self, element: WebElement, x: float | None = None, y: float | None = None) -> None:
        self.point_at(element, x, y)
        ActionChains(self.driver, duration=0).click().perform()

    # ---- what it complained about, and what it loaded

    def read_console(self) -> list[str]:
        self.console += [entry["message"] for entry in self.driver.get_log("browser")]
        return self.console

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        found, self.console = self.read_console(), []
        return found

    def requests(self) -> list[str]:
        """The addresses asked for since the last call, without data: and the browser's own."""
        events = (json.loads(entry["message"]) for entry in self.driver.get_log("performance"))
        sent = (e["message"]["params"] for e in events if e["message"]["method"] == REQUEST)
        addresses = [p["request"]["url"] for p in sent]
        return [url for url in addresses if not url.startswith(("data:", "chrome:", "about:"))]


REQUEST = "Network.requestWillBeSent"
READY_OR_REFUSED = """
const refusal = document.getElementById("notice");
return document.documentElement.dataset.ready === "true" || (refusal && !refusal.hidden);
"""
SHOWN = """
return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility());
"""
NAMED_BUTTONS = """
const [selector, name] = arguments;
return [...document.querySelectorAll(selector)].filter((button) => button.checkVisibility() &&
  [button.innerText, button.getAttribute("aria-label")].includes(name));
"""
NEXT_FRAMES = """
const [done] = arguments;
requestAnimationFrame(() => requestAnimationFrame(() => done()));
"""
FOLLOW_LINK = """
const [fragment, done] = arguments;
if (new URL(fragment || "#", location.href).hash === location.hash) done();
else {
  addEventListener("hashchange", () => done(), { once: true });
  location.hash = fragment;
}
"""


def start_chromium(folder: Path) -> Chrome:
    """A browser whose files all lie in the folder. Skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With both paths given selenium looks for nothing, so it downloads nothing.
    surroundings = {**os.environ, "HOME": str(folder), "SE_OFFLINE": "true"}
    return Chrome(options, Service(driver, env=surroundings))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    driver = start_chromium(folder)
    try:
        assert not isinstance(driver.command_executor, str)  # which it may be in a remote browser
        driver.command_executor.client_config.timeout = HANGS
        driver.set_page_load_timeout(HANGS)
        driver.set_script_timeout(HANGS)
        yield Browser(driver)
    finally:
        driver.quit()
