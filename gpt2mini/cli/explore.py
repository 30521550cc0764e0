"""Write a page on which a model reading a text can be explored, in any browser.

Examples:
  gpt2mini explore
  gpt2mini explore --adapter runs/finetune/best
  gpt2mini explore --model gpt2 --text "The old keeper lit the lamp" --out page.html
"""

from dataclasses import dataclass
from pathlib import Path

from gpt2mini.cli import models
from gpt2mini.files import writable_folder
from gpt2mini.inspection.explorer import write_page


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    adapter: str | None = None  # folder of an adapter that was trained on --model
    text: str = "The old keeper lit the lamp. Then the old keeper"  # what it reads
    out: str = "page.html"  # the file to write


def run(flags: Flags) -> None:
    out = Path(flags.out)
    writable_folder(out.parent)
    model, tokenizer = models.load(flags.model, flags.adapter)
    name = models.describe(flags.model, flags.adapter)
    write_page(model, tokenizer, flags.text, out, name=name)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
