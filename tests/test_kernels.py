"""Kernels that stand in for torch's functions give the same result."""

import pytest
import torch
from conftest import random_ids
from torch import nn

from gpt2mini import GPT2
from gpt2mini.kernels import FewRowsLinear, decoding_kernels


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 48), (8, 1, 48), (4, 8, 48), (33, 48)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_rows_linear_is_a_linear_layer(
    shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype
) -> None:
    layer = nn.Linear(48, 70, bias=has_bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
        with FewRowsLinear():
            found = layer(x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


@pytest.mark.parametrize("rows", [2, 32])
def test_logits_of_few_rows_are_the_models(own_model: GPT2, rows: int) -> None:
    ids = random_ids(rows, 1)
    with torch.no_grad():
        expected = own_model(ids)
        with decoding_kernels(own_model, rows):
            found = own_model(ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_product_with_gradients_is_a_linear_layer_too() -> None:
    layer, x = nn.Linear(48, 70), torch.randn(3, 48, requires_grad=True)
    layer(x).square().sum().backward()
    expected = (x.grad, layer.weight.grad, layer.bias.grad)
    x.grad = layer.weight.grad = layer.bias.grad = None
    with FewRowsLinear():
        layer(x).square().sum().backward()
    for found, one in zip((x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_a_product_with_a_vector_is_torchs_own() -> None:
    x, vector = torch.randn(2, 5, 7), torch.randn(7)
    with FewRowsLinear():
        assert torch.equal(nn.functional.linear(x, vector), x @ vector)
