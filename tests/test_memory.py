"""Recomputing cheap activations changes memory and nothing else."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TINY, random_ids
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2mini import GPT2
from gpt2mini.data.text import Batch
from gpt2mini.lora import add_lora
from gpt2mini.losses import chunked_next_token_loss
from gpt2mini.training import Settings, activation_checkpointing, recompute_activations, train
from gpt2mini.training.attention import Bfloat16CPUAttention
from gpt2mini.training.frozen_weights import frozen_weights_cast_once


def gradients(model: GPT2, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss_sum, _ = chunked_next_token_loss(model.hidden_states(ids), model.out_head, ids)
    loss_sum.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_the_same_bit_for_bit(own_model: GPT2) -> None:
    ids = random_ids(3, 20)
    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    with recompute_activations():
        found = gradients(own_model, ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_more_than_a_third_of_the_activations_is_not_kept(own_model: GPT2) -> None:
    """Counted by what autograd holds on to when the forward pass is over."""
    ids = random_ids(3, 20)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        plain = own_model.hidden_states(ids)  # held, so that no address is used twice
        without = sum(kept.values())
        kept.clear()
        with recompute_activations():
            lean = own_model.hidden_states(ids)
    assert plain.shape == lean.shape
    emb, blocks = TINY.emb_dim, TINY.n_layers
    # norm1 and norm2 give emb numbers a token, gelu 4 emb: none of them is kept inside the linears.
    saved = ids.numel() * blocks * (1 + 1 + 4) * emb * 4
    assert sum(kept.values()) <= without - saved


def test_nothing_else_holds_on_to_what_is_not_kept(own_model: GPT2) -> None:
    inputs = []

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs.append(weakref.ref(arguments[0]))

    for block in own_model.trf_blocks:
        for part in ("attn.query", "mlp.mlp_in", "mlp.mlp_out"):
            block.get_submodule(part).register_forward_pre_hook(note)
    with recompute_activations():
        hidden = own_model.hidden_states(random_ids(3, 20))
    assert hidden.requires_grad and len(inputs) == 3 * TINY.n_layers
    assert not any(tensor() is not None for tensor in inputs)


class Casts(TorchDispatchMode):
    """Notes the storage of each tensor that is cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[torch.Size, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.storages.append((result.shape, StorageWeakRef(result.untyped_storage())))
        return result

    def kept(self, shape: torch.Size) -> int:
        return sum(found == shape and not storage.expired() for found, storage in self.storages)


@pytest.mark.parametrize("recompute", [False, True])
def test_in_half_precision_query_key_and_value_keep_no_casts(
    recompute: bool, own_model: GPT2
) -> None:
    """Autocast makes a copy of the norm's output for each, and autograd keeps them all."""
    context = recompute_activations() if recompute else nullcontext()
    with context, torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        hidden = own_model.hidden_states(random_ids(3, 20))
    assert casts.kept(hidden.shape) == (0 if recompute else 4 * TINY.n_layers)  # mlp_in's too


def matrices_cast(model: GPT2, casts: Casts) -> int:
    """How many of the casts have the shape of a matrix of the blocks, adapters left out."""
    shapes = {p.shape for p in model.trf_blocks.parameters() if p.ndim == 2 and min(p.shape) > 4}
    return sum(shape in shapes for shape, _ in casts.storages)


def casts_of_weights(model: GPT2, ids: Tensor) -> tuple[int, Tensor]:
    """(how many matrices of the blocks are cast to bfloat16 in a forward pass, logits)."""
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        logits = model(ids)
    return matrices_cast(model, casts), logits


def test_a_run_that_trains_adapters_casts_the_frozen_weights_once(own_model: GPT2) -> None:
    add_lora(own_model, rank=2)
    ids = random_ids(3, 20)
    optimizer = torch.optim.SGD([p for p in own_model.parameters() if p.requires_grad], lr=0.1)
    settings = Settings(steps=3, schedule=lambda step: 1.0, precision="bf16", progress=False)
    with Casts() as casts:
        train(own_model, [Batch(ids, ids)], [optimizer], settings)
    assert matrices_cast(own_model, casts) == 6 * TINY.n_layers


def test_frozen_weights_are_cast_once(own_model: GPT2) -> None:
    """With adapters: in the first forward pass alone, with the same result."""
    ids = random_ids(3, 20)
    add_lora(own_model, rank=2)
    layers = 6 * TINY.n_layers
    plain, expected = casts_of_weights(own_model, ids)
    assert plain == layers
    with frozen_weights_cast_once(own_model):
        first, second = casts_of_weights(own_model, ids), casts_of_weights(own_model, ids)
    assert (first[0], second[0]) == (layers, 0)
    assert torch.equal(first[1], expected) and torch.equal(second[1], expected)


def test_frozen_weights_that_change_are_cast_again(own_model: GPT2) -> None:
    ids = random_ids(3, 20)
    own_model.requires_grad_(False)
    layer = own_model.trf_blocks[1].get_submodule("mlp.mlp_in")
    assert isinstance(layer, nn.Linear)
    with frozen_weights_cast_once(own_model):
        casts_of_weights(own_model, ids)
        for change in (
            lambda: layer.weight.mul_(2),
            lambda: setattr(layer.weight, "data", layer.weight.data / 4),
            lambda: layer.weight.requires_grad_(),
            lambda: setattr(layer, "weight", nn.Parameter(layer.weight.detach() / 3)),
        ):
            change()
            casts, found = casts_of_weights(own_model, ids)
            assert casts == 1
            with torch.autocast("cpu", torch.bfloat16), torch._C.DisableTorchFunction():
                assert torch.equal(found, own_model(ids))


def test_gradients_of_adapters_are_the_same_with_weights_cast_once(own_model: GPT2) -> None:
    ids = random_ids(3, 20)
    add_lora(own_model, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = [gradient.clone() for gradient in gradients(own_model, ids)]
        for context in (
            nullcontext(),
            recompute_activations(),
            activation_checkpointing(own_model),
        ):
            with frozen_weights_cast_once(own_model), context:
                for _ in range(2):
                    found = gradients(own_model, ids)
                    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def contexts_of(model: GPT2) -> list[AbstractContextManager]:
    return [recompute_activations(), activation_checkpointing(model), Bfloat16CPUAttention()]


def test_the_model_is_given_back_as_it_was(own_model: GPT2) -> None:
    block = own_model.trf_blocks[1]
    vars(block)["forward"] = partial(block.forward)
    before = [dict(vars(module)) for module in own_model.modules()]
    with activation_checkpointing(own_model):
        assert before != [vars(module) for module in own_model.modules()]
    assert before == [vars(module) for module in own_model.modules()]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_inside_leaves_nothing_behind(
    which: int, error: type[BaseException], own_model: GPT2
) -> None:
    """torch calls no hook that is always to be called for a KeyboardInterrupt."""
    ids = random_ids(1, 8)

    def interrupted(*arguments: Any) -> None:
        raise error

    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    broken = own_model.trf_blocks[1].get_submodule("mlp.mlp_out").register_forward_hook(interrupted)
    with pytest.raises(error), contexts_of(own_model)[which]:
        own_model(ids)
    broken.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(own_model, ids), strict=True))


def louder(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output * 1.5


def louder_in_place(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output.mul_(1.5)


def louder_input_in_place(module: nn.Module, arguments: tuple[Tensor]) -> None:
    arguments[0].mul_(1.5)


class Transposed(nn.Module):
    """A linear layer that looks at its input from another side."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.mT, self.weight[:, :, None], self.bias).mT


class SquaredReLU(nn.Module):
    """An MLP of one's own (So et al. 2021, "Primer")."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp_in, self.mlp_out = mlp.mlp_in, mlp.mlp_out

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)).square())


class Normalized(nn.Module):
    """Attention between other functions, and no part of it is the library's."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.queries, self.others = attn.query, nn.ModuleList([attn.key, attn.value])
        self.n_heads = TINY.n_heads

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.queries, *self.others)
        )
        query = F.layer_norm(query, query.shape[-1:])
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return context.transpose(1, 2).flatten(2)


def with_parts(model: GPT2, part: str, make: Callable[[Any], nn.Module]) -> None:
    for block in model.trf_blocks:
        parent, _, name = part.rpartition(".")
        block.get_submodule(parent).register_module(name, make(block.get_submodule(part)))


def dropping(mlp: Any) -> nn.Module:
    return nn.Sequential(
        mlp.mlp_in, nn.GELU(approximate="tanh"), nn.Dropout(0.3), mlp.mlp_out
    ).train()


def with_hooks(model: GPT2, part: str, hook: Callable) -> None:
    for block in model.trf_blocks:
        block.get_submodule(part).register_forward_hook(hook)


def with_input_hooks(model: GPT2, part: str, hook: Callable) -> None:
    for block in model.trf_blocks:
        block.get_submodule(part).register_forward_pre_hook(hook)


def with_lora(model: GPT2) -> None:
    add_lora(model, rank=2, alpha=4, dropout=0.2, targets=("query", "value", "mlp_in", "mlp_out"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # B begins as zeros, and A gets no gradient
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    model.train()


OWN: dict[str, Callable[[GPT2], None]] = {
    "nothing": lambda model: None,
    "lora": with_lora,
    "dropout": partial(with_parts, part="mlp", make=dropping),
    "squared relu": partial(with_parts, part="mlp", make=SquaredReLU),
    "attention": partial(with_parts, part="attn", make=Normalized),
    "transposed": partial(with_parts, part="mlp.mlp_in", make=Transposed),
    "hook on norm": partial(with_hooks, part="norm1", hook=louder),
    "hook on block": partial(with_hooks, part="", hook=louder),
    "in place": partial(with_hooks, part="norm2", hook=louder_in_place),
    "input in place": partial(with_input_hooks, part="mlp.mlp_in", hook=louder_input_in_place),
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("context", [0, 1], ids=["recomputed", "checkpointed"])
@pytest.mark.parametrize("change", OWN.values(), ids=OWN.keys())
def test_what_is_your_own_gets_its_gradients_bit_for_bit(
    change: Callable[[GPT2], None], context: int, half: bool, own_model: GPT2
) -> None:
    change(own_model)
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        with contexts_of(own_model)[context] if inside else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                hidden = own_model.hidden_states(random_ids(2, 12))
            own_model.zero_grad()
            hidden.square().sum().backward()
        found.append([p.grad for p in own_model.parameters() if p.grad is not None])
    assert len(found[0]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_that_was_modified_since_is_refused() -> None:
    """Nothing else would notice, where the norm is frozen."""
    norm, linear, x = nn.LayerNorm(4).requires_grad_(False), nn.Linear(4, 2), torch.rand(3, 4)
    with recompute_activations():
        y = linear(norm(x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        y.sum().backward()


def test_a_copy_made_inside_computes_with_its_own_weights(own_model: GPT2) -> None:
    ids = random_ids(2, 12)
    with activation_checkpointing(own_model):
        gradients(own_model, ids)
        copy = deepcopy(own_model)
        for parameter in own_model.parameters():
            parameter.data.zero_()
        assert copy(ids).abs().max() > 0


def test_frozen_blocks_and_no_grad_work(own_model: GPT2) -> None:
    for parameter in own_model.parameters():
        parameter.requires_grad = False
    for parameter in own_model.trf_blocks[-1].parameters():
        parameter.requires_grad = True
    ids = random_ids(2, 9)
    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    with recompute_activations():
        found = gradients(own_model, ids)
        with torch.no_grad():
            own_model(ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    """With dropout too: what was dropped is dropped again."""
    model, ids = GPT2(replace(TINY, drop_rate=0.3)), random_ids(3, 20)
    torch.manual_seed(5)
    expected = [gradient.clone() for gradient in gradients(model, ids)]
    torch.manual_seed(5)
    with activation_checkpointing(model):
        found = gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_of_a_block_only_the_input_is_kept(own_model: GPT2) -> None:
    ids, sizes = random_ids(3, 20), []

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with activation_checkpointing(own_model), saved_tensors_hooks(note, lambda tensor: tensor):
        own_model.hidden_states(ids)
    stream = ids.numel() * TINY.emb_dim
    # each block's input, the final norm's, and what the embeddings and norms need besides
    assert sum(sizes) <= (TINY.n_layers + 1) * stream + 10 * ids.numel()
