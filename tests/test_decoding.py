"""Reading one token a row without modules: the same numbers, and nobody who listens is passed over.

The bits are those of the modules for a single row and in half precision; several rows of float32
are multiplied the other way around, which rounds differently.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, enlarge, random_ids
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config, generate
from gpt2mini.cache import KeyValueCache
from gpt2mini.decoding import Decoder, does_only_its_work, multiply
from gpt2mini.generation import cache_dtype
from gpt2mini.lora import add_lora
from gpt2mini.model import MLP, MultiHeadAttention, TransformerBlock
from gpt2mini.modes import evaluating
from gpt2mini.training import activation_checkpointing

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LAYERS = {
    "trf_blocks.1": "a block",
    "trf_blocks.1.norm1": "a norm",
    "trf_blocks.1.attn": "attention",
    "trf_blocks.1.attn.query": "a projection",
    "trf_blocks.1.attn.attn_out": "another",
    "trf_blocks.1.drop": "dropout",
    "trf_blocks.1.mlp": "the MLP",
    "trf_blocks.1.mlp.mlp_in": "its first half",
    "trf_blocks.1.mlp.gelu": "its middle",
    "trf_blocks.1.mlp.mlp_out": "its second half",
    "tok_emb": "an embedding",
    "drop_emb": "its dropout",
    "final_norm": "the last norm",
}
each_layer = pytest.mark.parametrize("name", LAYERS, ids=LAYERS.values())


def read(model: GPT2, mask: Tensor | None, by: str, rows: int = 3, steps: int = 6) -> Tensor:
    """The hidden states of a few tokens after a prompt, (steps, rows, emb), read one by one."""
    ids = random_ids(3, 5 + steps)[:rows]
    weight = model.tok_emb.weight
    cache = KeyValueCache(model.config, rows, 20, dtype=cache_dtype(weight))
    with evaluating(model):
        model.hidden_states(ids[:, :5], None if mask is None else mask[:rows], cache=cache)
        decoder = Decoder(model)
        found = []
        for step in range(5, 5 + steps):
            token = ids[:, step : step + 1]
            if by == "decoder":
                found.append(decoder.hidden_states(token, cache))
            else:
                found.append(model.hidden_states(token, cache=cache)[:, 0])
    return torch.stack(found)


def assert_same_numbers(model: GPT2, mask: Tensor | None = MASK) -> None:
    torch.testing.assert_close(
        read(model, mask, "decoder"), read(model, mask, "modules"), rtol=1e-5, atol=1e-5
    )
    one_row = read(model, mask, "modules", rows=1)
    assert torch.equal(read(model, mask, "decoder", rows=1), one_row)


def with_adapters(model: GPT2) -> None:
    add_lora(model, rank=4, targets=("query", "value", "mlp_out"))
    enlarge(model)


class OwnLinear(nn.Module):
    """A layer such as people write for themselves, for the shape that they know."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, emb = x.shape
        return self.base(x.reshape(batch * tokens, emb)).view(batch, tokens, -1) + 1


class OwnAttention(MultiHeadAttention):
    def forward(self, x: Tensor, attn_mask: Any = None, cache: Any = None) -> Tensor:
        return 2 * super().forward(x, attn_mask, cache)


def with_own_layers(model: GPT2) -> None:
    block = model.trf_blocks[0]
    assert isinstance(block, TransformerBlock)
    block.mlp.mlp_out = OwnLinear(block.mlp.mlp_out)  # type: ignore[assignment]
    model.trf_blocks[1].attn = OwnAttention(TINY)
    model.trf_blocks[2].norm1 = nn.RMSNorm(TINY.emb_dim)


KINDS: dict[str, Callable[[GPT2], Any]] = {
    "as it is": lambda model: None,
    "int8": lambda model: model.quantize("int8"),
    "fp16": lambda model: model.quantize("fp16"),
    "bf16": lambda model: model.quantize("bf16"),
    "in bfloat16": lambda model: model.to(torch.bfloat16),
    "in bfloat16, int8": lambda model: model.to(torch.bfloat16).quantize("int8"),
    "with adapters": with_adapters,
    "with layers of one's own": with_own_layers,
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_modules(
    own_model: GPT2, kind: str, mask: Tensor | None
) -> None:
    KINDS[kind](own_model)
    assert_same_numbers(own_model, mask)


def test_the_numbers_are_those_of_the_modules_under_autocast(own_model: GPT2) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_numbers(own_model)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32, 33])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_that_of_a_linear_layer(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 70, bias=has_bias, dtype=dtype)
    x = torch.randn(rows, 48, dtype=dtype)
    with torch.no_grad():
        found = multiply(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(x))
    assert found.is_contiguous()


def test_heads_of_every_kind(own_model: GPT2) -> None:
    hidden = torch.randn(3, TINY.emb_dim)

    def assert_same_logits() -> None:
        with evaluating(own_model):
            torch.testing.assert_close(Decoder(own_model).head(hidden), own_model.out_head(hidden))

    assert_same_logits()
    seen = []
    hook = own_model.out_head.register_forward_hook(lambda m, arguments, output: seen.append(1))
    assert_same_logits()
    assert len(seen) == 2
    hook.remove()
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size)
    assert_same_logits()
    own_model.out_head = nn.Sequential(nn.Linear(TINY.emb_dim, TINY.vocab_size), nn.Tanh())
    assert_same_logits()


def test_a_head_sees_the_shape_that_it_knows(own_model: GPT2) -> None:
    expected = generate(own_model, random_ids(2, 5), 6, temperature=0.0)
    shapes = []
    hook = own_model.out_head.register_forward_hook(lambda m, a, output: shapes.append(output.ndim))
    found = generate(own_model, random_ids(2, 5), 6, temperature=0.0)
    hook.remove()
    assert torch.equal(found.token_ids, expected.token_ids)
    assert shapes == [3] * 6


class AlwaysThree(GPT2):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs).index_fill(2, torch.tensor([3]), 1e4)


@pytest.mark.parametrize("how", ["class", "hook"])
def test_what_is_done_to_the_whole_model_is_done_in_generation_too(
    own_model: GPT2, how: str
) -> None:
    if how == "class":
        own_model.__class__ = AlwaysThree
    else:
        own_model.register_forward_hook(
            lambda m, a, output: output.index_fill(2, torch.tensor([3]), 1e4)
        )
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = generate(own_model, random_ids(2, 5), 4, mask, temperature=0.0)
    assert (found.token_ids[:, 5:] == 3).all()


def test_a_model_without_biases_of_query_key_and_value() -> None:
    config = GPT2Config(**vars(TINY) | {"qkv_bias": False})
    for model in (GPT2(config), GPT2(config).quantize("int8")):
        assert_same_numbers(model)


@each_layer
def test_a_hook_sees_every_token_in_the_shape_it_knows(own_model: GPT2, name: str) -> None:
    def shapes(by: str) -> list[tuple[int, ...]]:
        seen = []
        hook = own_model.get_submodule(name).register_forward_hook(
            lambda module, arguments, output: seen.append(tuple(output.shape))
        )
        read(own_model, MASK, by)
        hook.remove()
        return seen

    assert len(shapes("modules")) >= 7  # the prompt and six tokens
    assert shapes("decoder") == shapes("modules")


@each_layer
def test_what_a_hook_changes_is_changed(own_model: GPT2, name: str) -> None:
    before = read(own_model, MASK, "decoder")
    own_model.get_submodule(name).register_forward_hook(lambda m, arguments, output: output * 1.5)
    changed = read(own_model, MASK, "decoder")
    assert not torch.equal(changed, before)
    assert_same_numbers(own_model)


def test_a_hook_on_all_modules_is_called(own_model: GPT2) -> None:
    def visited(by: str) -> list[str]:
        seen: list[str] = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, arguments, output: seen.append(type(module).__name__)
        )
        read(own_model, None, by)
        hook.remove()
        return seen

    assert visited("decoder") == visited("modules")


@pytest.mark.parametrize("kind", [TransformerBlock, MultiHeadAttention, MLP, nn.Linear, nn.GELU])
def test_a_class_that_was_changed_is_obeyed(
    own_model: GPT2, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, *inputs, **named: 2 * forward(self, *inputs, **named)
    )
    assert_same_numbers(own_model)


def test_a_method_that_was_replaced_is_obeyed(
    own_model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(own_model, None, "decoder")
    mlp = own_model.trf_blocks[1].mlp
    monkeypatch.setattr(mlp, "forward", torch.zeros_like)
    assert not torch.equal(read(own_model, None, "decoder"), before)
    assert_same_numbers(own_model)

    monkeypatch.setattr(
        own_model, "hidden_states", lambda ids, *rest, **named: torch.ones(3, 1, 48)
    )
    assert (read(own_model, None, "decoder") == 1).all()


def test_blocks_that_are_recomputed_or_compiled_run_as_such(
    own_model: GPT2, no_shape_checks: None
) -> None:
    with activation_checkpointing(own_model):
        assert not does_only_its_work(own_model.trf_blocks[0])
        assert_same_numbers(own_model)
    assert does_only_its_work(own_model.trf_blocks[0])
    own_model.trf_blocks[0].compile(backend="eager")
    assert not does_only_its_work(own_model.trf_blocks[0])


def test_weights_that_change_meanwhile_are_seen(own_model: GPT2) -> None:
    with evaluating(own_model):
        decoder, token = Decoder(own_model), random_ids(1, 1)

        def first_token() -> Tensor:
            return decoder.hidden_states(token, KeyValueCache(TINY, 1, 4))

        before = first_token()
        enlarge(own_model)
        assert not torch.equal(first_token(), before)
        assert torch.equal(first_token(), own_model.hidden_states(token)[:, 0])


def test_generation_is_heard_token_by_token(own_model: GPT2) -> None:
    lengths = []
    own_model.get_submodule("trf_blocks.2.attn").register_forward_hook(
        lambda module, arguments, output: lengths.append(output.shape[1])
    )
    generate(own_model, random_ids(1, 4), 5, temperature=0)
    assert lengths == [4, 1, 1, 1, 1]
