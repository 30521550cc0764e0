"""Write a page in which a model reading a text can be explored, in any browser.

A small model runs in the page itself: type a text, look inside, switch parts off. Of a larger one
the page holds the numbers of one text. It loads nothing and sends nothing.

Examples:
  gpt2mini explore
  gpt2mini explore --adapter runs/finetune/best
  gpt2mini explore --other runs/finetune/best --text "The old keeper"
  gpt2mini explore --model gpt2 --live off --out page.html
"""

from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import models
from gpt2mini.cli.generate import read_stdin
from gpt2mini.files import local_path, writable_folder
from gpt2mini.inspection.explorer import write_page
from gpt2mini.inspection.explorer.contents import Origin
from gpt2mini.inspection.explorer.page import refuse_folder
from gpt2mini.lora import load_adapter


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    adapter: str | None = None  # folder of an adapter that was trained on --model
    other: str | None = None  # a model of the same shape, or an adapter on --model, to compare with
    # what it reads; - reads stdin, without its last line break
    text: str = "The old keeper lit the lamp. Then the old keeper"
    # whether the model runs in the page, and with which weights; auto: int8 below 50M parameters
    live: Literal["auto", "int8", "fp16", "off"] = "auto"
    name: str | None = None  # what the page calls the model; by default the end of its path
    out: str = "page.html"  # the file to write


def run(flags: Flags) -> None:
    out = local_path(flags.out)
    refuse_folder(out)
    writable_folder(out.parent)
    text = read_stdin() if flags.text == "-" else flags.text
    model, tokenizer = models.load(flags.model, flags.adapter)
    other = load_other(flags.model, flags.other, tokenizer) if flags.other else None
    origins = origins_of(flags)
    name = flags.name or models.describe(origins[0].base, origins[0].adapter)
    with tqdm(desc="effects", unit="pass", leave=False, disable=None) as bar:

        def show(done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.refresh()

        written = write_page(
            *(model, tokenizer, text, out, name),
            other=other,
            other_name=end_of_path(flags.other or ""),
            live=flags.live,
            progress=show,
            origins=origins,
        )
    kind = f"live, {written.precision} weights"
    if written.precision is None:
        kind = f"not live, numbers of this text: {written.why_not_live}"
    print(f"{out} ({written.size / 1e6:.1f} MB; {kind})")


def load_other(model: str, other: str, tokenizer: Tokenizer) -> GPT2:
    """The second model: of its own, or an adapter on the first. Raises ValueError for another
    vocabulary."""
    if holds_adapter(local_path(other)):
        adapted = GPT2.from_pretrained(model)
        load_adapter(adapted, other)
        return adapted
    its = Tokenizer.from_pretrained(other)
    if its.vocab != tokenizer.vocab:
        raise ValueError(
            f"{other} has another vocabulary than {model}: their predictions of a text cannot be "
            "compared token by token"
        )
    return GPT2.from_pretrained(other)


def origins_of(flags: Flags) -> list[Origin]:
    """What the models are loaded from: nothing of the folders in which they lie on this machine."""
    base = end_of_path(flags.model)
    origins = [Origin(base, end_of_path(flags.adapter) if flags.adapter else None)]
    if flags.other:
        other = end_of_path(flags.other)
        is_adapter = holds_adapter(local_path(flags.other))
        origins.append(Origin(base, other) if is_adapter else Origin(other))
    return origins


def end_of_path(name_or_folder: str) -> str:
    """The last part of a path, of `runs/tuned/best` with the part before: many are called best. A
    published name (org/name) is left as it is."""
    path = local_path(name_or_folder)
    if not path.exists():
        return name_or_folder
    path = path.resolve()
    return "/".join(path.parts[-2:]) if path.name == "best" else path.name
