"""What most tests share: a tiny GPT-2, a network that refuses, and the data that lies beside us."""

import os
import signal
import socket
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings
from torch import nn

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.surgery import resize_vocab

if "PYTEST_XDIST_WORKER" in os.environ:
    # side by side, a thread for each core in every worker would be more threads than cores, which
    # wait for one another: tests of tiny models take five times as long
    torch.set_num_threads(1)

# One profile for every property: enough examples to find a mistake, no clock on a busy machine.
settings.register_profile("gpt2mini", deadline=None, max_examples=25)
settings.load_profile("gpt2mini")

# Every number differs from every other (head_dim is 8), so that no two axes can be mixed up unseen.
TINY = GPT2Config(vocab_size=211, context_length=64, emb_dim=48, n_heads=6, n_layers=3)


@torch.no_grad()
def enlarge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add Normal(0, 0.2) to every parameter, the biases and the norms too.

    A fresh GPT-2 has weights of 0.02, zeros and ones: errors in it drown, or cannot show at all.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the tiny vocabulary, the same ones for the same seed."""
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def shared_data(name: str) -> Path:
    """A file or folder of ../shared/data, which is no part of the project; skips where absent."""
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return path


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Also in a suite that a script has started with `&`, which has Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_config() -> GPT2Config:
    return TINY


@pytest.fixture(scope="session")
def tiny_model() -> GPT2:
    """One model for all tests, in eval mode: read it, do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # or the weights would depend on the tests before
        model = GPT2(TINY)
    enlarge(model)
    return model.eval()


@pytest.fixture
def own_model(tiny_model: GPT2) -> GPT2:
    """A copy of the tiny model that a test may change."""
    return deepcopy(tiny_model)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """gpt2-nano's."""
    return Tokenizer.from_pretrained("gpt2-nano")


@pytest.fixture(scope="session")
def word_model(tokenizer: Tokenizer) -> GPT2:
    """Small and random, with gpt2-nano's vocabulary: read it, do not change it."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(tokenizer.vocab_size, 64, emb_dim=16, n_heads=2, n_layers=3))
    enlarge(model)
    return model.eval()


@pytest.fixture(scope="session")
def padded_model(word_model: GPT2) -> GPT2:
    """The word model with 47 more ids for which there is no token, most of them likelier than all
    others: read it, do not change it."""
    model = deepcopy(word_model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        resize_vocab(model, model.config.vocab_size + 47)
        model.final_norm.bias.copy_(model.tok_emb.weight[5])
        model.tok_emb.weight[-47:] = 3 * model.tok_emb.weight[5] + torch.randn(
            47, model.config.emb_dim
        )
    return model


@pytest.fixture(scope="session")
def word_folder(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as a folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    word_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """What users have: no jaxtyping checks, which only the tests switch on (pyproject.toml)."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def socket_attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every socket and every name look-up raise. Returns the (growing) list of attempts."""
    attempts: list[str] = []

    class RefusingSocket(socket.socket):
        def __init__(self, *args: object, **kwargs: object) -> None:
            attempts.append(f"socket{args}")
            raise OSError("this test has no network")

    def refuse_lookup(*args: object, **kwargs: object) -> None:
        attempts.append(f"getaddrinfo{args}")
        raise OSError("this test has no network")

    monkeypatch.setattr(socket, "socket", RefusingSocket)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_lookup)
    return attempts
