"""The config: the published sizes are right, and an impossible shape is refused with a reason."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini import GPT2, GPT2Config

# name, OpenAI's name, and the number of parameters of the published checkpoint of that name.
PUBLISHED = [
    ("gpt2", "124M", 124_439_808),
    ("gpt2-medium", "355M", 354_823_168),
    ("gpt2-large", "774M", 774_030_080),
    ("gpt2-xl", "1558M", 1_557_611_200),
]


@pytest.mark.parametrize(("name", "openai_name", "_"), PUBLISHED)
def test_both_names_of_a_published_size_mean_the_same(name: str, openai_name: str, _: int) -> None:
    assert GPT2Config.from_name(name) == GPT2Config.from_name(openai_name)


@pytest.mark.parametrize(("name", "_", "n_parameters"), PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(
    name: str, _: str, n_parameters: int
) -> None:
    with torch.device("meta"):  # shapes only, no memory
        model = GPT2(GPT2Config.from_name(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters


def test_the_default_is_the_smallest_published_model() -> None:
    assert GPT2Config() == GPT2Config.from_name("gpt2")


@pytest.mark.parametrize("name", [name for row in PUBLISHED for name in row[:2]])
def test_published_heads_are_64_wide(name: str) -> None:
    assert GPT2Config.from_name(name).head_dim == 64  # in all four sizes


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'gpt3'.*gpt2, gpt2-medium.*1558M"):
        GPT2Config.from_name("gpt3")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        GPT2Config().n_layers = 3  # type: ignore[misc]


@given(emb_dim=st.integers(1, 100), n_heads=st.integers(1, 20))
def test_heads_must_share_the_embedding_out_evenly(emb_dim: int, n_heads: int) -> None:
    if emb_dim % n_heads == 0:
        assert replace(TINY, emb_dim=emb_dim, n_heads=n_heads).head_dim * n_heads == emb_dim
    else:
        with pytest.raises(ValueError, match=f"emb_dim {emb_dim} .* {n_heads} heads"):
            replace(TINY, emb_dim=emb_dim, n_heads=n_heads)


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"])
@pytest.mark.parametrize("number", [0, -1, 1.5, "12", True])
@pytest.mark.usefixtures("no_shape_checks")
def test_sizes_must_be_whole_and_positive(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        replace(TINY, **{name: number})


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0, float("nan")])
def test_drop_rate_must_leave_something(drop_rate: float) -> None:
    with pytest.raises(ValueError, match="drop_rate must be a number in"):
        replace(TINY, drop_rate=drop_rate)


@pytest.mark.parametrize(
    ("name", "value"), [("eos_id", 1.5), ("eos_id", "1"), ("qkv_bias", "no"), ("drop_rate", "0.1")]
)
@pytest.mark.usefixtures("no_shape_checks")
def test_fields_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(TINY, **{name: value})
