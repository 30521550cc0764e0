"""The page as one HTML file: template, style, modules, data and weights put together.

    gpt2mini explore --text "The old keeper lit the lamp" --out page.html

The page loads nothing. What it holds besides the frame is JSON (page_data) and, in base64, gzipped
blocks of bytes: the tokenizer, the weights of a live model, the WebAssembly kernel.
"""

import base64
import html
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2mini.files import local_path, write_text
from gpt2mini.inspection.ablation import Progress
from gpt2mini.inspection.explorer.contents import Contents, Origin, page_contents, well_formed
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
START = "view.js"  # the module that imports all others
IMPORT = re.compile(r'^import \{[^}]*\} from "(\.[\w./]+)";\n', re.M)
EXPORT = re.compile(r"^export (?=(async )?function|const|let|class)", re.M)


@dataclass(frozen=True)
class WrittenPage:
    """What `write_page` has written."""

    path: Path
    size: int  # bytes
    precision: str | None  # of the weights in the page, "int8" or "float16"; None: it is not live
    why_not_live: str | None


def write_page(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    path: str | Path,
    name: str = "GPT-2",
    *,
    other: GPT2 | None = None,
    other_name: str = "other",
    live: str = "auto",
    progress: Progress | None = None,
    origins: Sequence[Origin] = (),
) -> WrittenPage:
    """Write the page of a model, called `name`, on a text.

    other: a second model of the same shape, such as a tuned one or one with an adapter.
    live: "int8" or "fp16" puts the weights into the page, in which the model then runs on any text;
        "off" stores the numbers of this text alone; "auto": int8 below 50 million parameters.
    progress: is told how many passes for the effects of heads are done, and how many there are.
    origins: of each model, what the page's Python is to load it from; by default its name.
    Raises ValueError for an empty text, one of more than 128 tokens or than the context has, a
    classifier, numbers that are not finite, a second model of another shape, a model whose
    activations `trace` cannot observe, and `live` for one that the page cannot compute;
    IsADirectoryError for a path that is a folder.
    """
    path = local_path(path)
    refuse_folder(path)
    contents = page_contents(
        model, tokenizer, text, name, other, other_name, live, progress, origins
    )
    write_text(path, page(contents, name))
    size = path.stat().st_size
    return WrittenPage(path, size, contents.precision, contents.why_not_live)


def refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; the page is one file: name it, as in {path / 'page.html'}"
        )


def page(contents: Contents, name: str) -> str:
    """The text of the HTML file."""
    parts = {
        "title": html.escape(f"{well_formed(name)}: inside a GPT-2"),
        "style": read("style.css"),
        "script": bundle(),
        "data": json_in_html(contents.data),
        "blobs": "\n".join(blob(key, data) for key, data in blobs(contents).items()),
    }
    frame = read("template.html").replace("<html", f"{notice()}\n<html", 1)
    # In one pass, so that nothing is looked for in what was put in.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def notice() -> str:
    """The license of what the page holds, as a comment."""
    return f"<!--\ngpt2mini, explorer page\n\n{read('LICENSE.txt').strip()}\n-->"


def json_in_html(data: dict[str, Any]) -> str:
    """JSON in ASCII; no text in it can end the script element that holds it, or begin a comment.

    Raises ValueError for a number that is not finite.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def blobs(contents: Contents) -> dict[str, bytes]:
    """Blocks of bytes by the ids of the elements that hold them."""
    found = {"tokenizer": contents.tokenizer}
    found |= {f"weights-{i}": weights for i, weights in enumerate(contents.weights)}
    if contents.weights:
        found["kernel"] = (FOLDER / "model" / "kernel.wasm").read_bytes()
    return found


def blob(key: str, data: bytes) -> str:
    return f'<script type="text/plain" id="{key}">{base64.b64encode(data).decode()}</script>'


def bundle() -> str:
    """All modules as one, without imports and exports. Their top-level names differ."""
    return "\n".join(EXPORT.sub("", IMPORT.sub("", read(name))) for name in modules(START))


def modules(name: str, before: tuple[str, ...] = ()) -> list[str]:
    """The modules that a module needs, itself last: what they define at their top level is there
    when it is used."""
    found = list(before)
    for imported in IMPORT.findall(read(name)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), imported))
        if path not in found:
            found = modules(path, tuple(found))
    return [*found, name]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
