"""Tests check the shapes that a signature names, and wrap no other function."""

import pytest
import torch
from jaxtyping import TypeCheckError

from gpt2mini import GPT2
from gpt2mini.kernels import FewRowsLinear
from gpt2mini.losses import next_token_loss


def test_a_shape_that_differs_from_the_signature_is_an_error(tiny_model: GPT2) -> None:
    logits = torch.zeros(2, 5, 211)
    next_token_loss(logits, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TypeCheckError, match="labels"):
        next_token_loss(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(TypeCheckError, match="token_ids"):
        tiny_model(torch.zeros(5, dtype=torch.long))


@pytest.mark.usefixtures("no_shape_checks")
def test_the_checks_can_be_switched_off(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="token_ids"):
        tiny_model(torch.zeros(5, dtype=torch.long))


def test_a_function_that_names_no_shape_is_called_as_it_is() -> None:
    assert not hasattr(FewRowsLinear.__torch_function__, "__wrapped__")
    assert hasattr(GPT2.forward, "__wrapped__")
