"""The explorer's page of gpt2-nano in chromium: size, how soon it is ready, a keystroke, memory.

python tests/benchmarks/explorer_page.py [--page page.html]
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.explorer import write_page

sys.path.append(str(Path(__file__).parents[1]))
from browser import Browser, browsing

TOKENS = 32
TEXT = (
    "The old keeper lit the lamp. Then the old keeper went down to the sea and looked at the boat."
)
MILLISECONDS_OF_START = """
new MutationObserver((_, observer) => {
  if (document.documentElement?.dataset.ready !== "true") return;
  window.readyAt = performance.now(); // since the page was asked for
  observer.disconnect();
}).observe(document, { subtree: true, attributes: true, childList: true });
"""
# One change of the text, from the event to the end of the drawing, the layout included; and until
# the browser has shown it.
MILLISECONDS_OF_KEYSTROKES = """
const [texts, done] = arguments;
(async () => {
const box = document.getElementById("text"), times = [];
const shown = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go, 0)));
for (const text of texts) {
  await shown();
  const began = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
  document.body.getBoundingClientRect();
  const drawn = performance.now() - began;
  await shown();
  times.push([drawn, performance.now() - began]);
}
done(times);
})();
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, help="a live page; by default gpt2-nano's is written")
    parser.add_argument("--runs", type=int, default=5, help="starts, and keystrokes / 4")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    with tempfile.TemporaryDirectory() as folder:
        page = args.page
        if page is None:
            page = Path(folder) / "page.html"
            write_page(GPT2.from_pretrained("gpt2-nano"), tokenizer, TEXT, page, "gpt2-nano")
        with browsing(Path(folder)) as browser:
            measure(browser, page.resolve(), tokenizer, args.runs)
            row("memory of the page's process", f"{memory_of_page(Path(folder)):.0f} MB")


def measure(browser: Browser, page: Path, tokenizer: Tokenizer, runs: int) -> None:
    row("size of the file", f"{page.stat().st_size / 1e6:.1f} MB")
    code = {"source": MILLISECONDS_OF_START}
    browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", code)
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.look()
    starts = []
    for _ in range(1 + runs):
        browser.open(page)
        starts.append(browser.script("return window.readyAt"))
    row("ready", f"{statistics.median(starts[1:]) / 1000:.2f} s after it is opened")

    text = text_of(tokenizer, TOKENS)
    browser.open(page, "#text=" + quote(text))
    middle = len(text) // 2
    changes = {
        "keystroke at the end": [text + " lamp"[:n] for n in (1, 2, 3, 4)],
        "keystroke in the middle": [
            text[:middle] + letter + text[middle:] for letter in ("x", "y", "z", "")
        ],
        "drawing alone (the text stays)": [text] * 4,
    }
    browser.script("document.getElementById('text').focus()")
    for name, texts in changes.items():
        began = processor_seconds(browser)
        times = browser.driver.execute_async_script(MILLISECONDS_OF_KEYSTROKES, texts * runs)
        worked = 1000 * (processor_seconds(browser) - began) / len(times)
        drawn, shown = (statistics.median(times_of) for times_of in zip(*times, strict=True))
        row(
            f"{name}, {TOKENS} tokens",
            f"{drawn:.0f} ms, on the screen after {shown:.0f} ms; {worked:.0f} ms of the processor",
        )


def processor_seconds(browser: Browser) -> float:
    """That the page's main thread has worked, whatever else the machine does."""
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def memory_of_page(folder: Path) -> float:
    """Megabytes of the process that shows the page (Linux)."""
    sizes = [0]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            command = (process / "cmdline").read_text(encoding="utf-8", errors="replace")
            if str(folder) in command and "--type=renderer" in command:
                pages = int((process / "statm").read_text(encoding="utf-8").split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return max(sizes) / 1e6


def text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """A text of so many tokens."""
    ids = tokenizer.encode(TEXT * 4)[:tokens]
    text = tokenizer.decode(ids)
    assert len(tokenizer.encode(text)) == tokens
    return text


def row(name: str, value: str) -> None:
    print(f"{name:42} {value}")


if __name__ == "__main__":
    main()
