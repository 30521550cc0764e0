"""Fixtures: a browser for all tests of a process, pages of the explorer, each written once, and the
models that they show."""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from browser import Browser, browsing
from explorer_expected import HARD_TEXT, TEXT, InPython
from filelock import FileLock

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.explorer import write_page
from gpt2mini.inspection.explorer.weights import with_packed_weights
from gpt2mini.lora import add_lora

Write = Callable[[Path], object]


def written_once(factory: pytest.TempPathFactory, name: str, write: Write) -> Path:
    """A page that is written by the first process of the test run that needs it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    page = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not page.exists():
            write(page)
    return page


@pytest.fixture(scope="session")
def nano_page(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """gpt2-nano, running in the page with int8 weights."""
    model = GPT2.from_pretrained("gpt2-nano")
    write = lambda path: write_page(model, tokenizer, TEXT, path, "gpt2-nano")  # noqa: E731
    return written_once(tmp_path_factory, "nano.html", write)


@pytest.fixture(scope="session")
def small_page(
    tmp_path_factory: pytest.TempPathFactory, word_model: GPT2, tokenizer: Tokenizer
) -> Path:
    """A small random model, running in the page."""
    write = lambda path: write_page(word_model, tokenizer, TEXT, path, "small")  # noqa: E731
    return written_once(tmp_path_factory, "small.html", write)


@pytest.fixture(scope="session")
def recorded_page(
    tmp_path_factory: pytest.TempPathFactory, word_model: GPT2, tokenizer: Tokenizer
) -> Path:
    """The same small model in numbers of one text."""

    def write(path: Path) -> None:
        write_page(word_model, tokenizer, HARD_TEXT, path, "<b>small</b>", live="off")

    return written_once(tmp_path_factory, "recorded.html", write)


@pytest.fixture(scope="session")
def adapted_model(word_model: GPT2) -> GPT2:
    """The small model with an adapter that changes what it says."""
    model = deepcopy(word_model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_lora(model, rank=2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def compared_page(
    tmp_path_factory: pytest.TempPathFactory,
    word_model: GPT2,
    adapted_model: GPT2,
    tokenizer: Tokenizer,
) -> Path:
    """The small model and its adapter."""

    def write(path: Path) -> None:
        write_page(
            *(word_model, tokenizer, TEXT, path, "small"), other=adapted_model, other_name="tuned"
        )

    return written_once(tmp_path_factory, "compared.html", write)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="session")
def nano(tokenizer: Tokenizer) -> InPython:
    return InPython(with_packed_weights(GPT2.from_pretrained("gpt2-nano"), "int8"), tokenizer)


@pytest.fixture(scope="session")
def small(word_model: GPT2, tokenizer: Tokenizer) -> InPython:
    """The small model as it is, of which the recorded page has numbers."""
    return InPython(word_model, tokenizer)
