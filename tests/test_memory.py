"""Recomputing cheap activations changes memory and nothing else."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, random_ids
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.losses import chunked_next_token_loss
from gpt2mini.training import activation_checkpointing, memory, recompute_activations
from gpt2mini.training.attention import bfloat16_cpu_attention


def gradients(model: GPT2, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss_sum, _ = chunked_next_token_loss(model.hidden_states(ids), model.out_head, ids)
    loss_sum.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_the_same_bit_for_bit(own_model: GPT2) -> None:
    ids = random_ids(3, 20)
    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    with recompute_activations(own_model):
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
        with recompute_activations(own_model):
            lean = own_model.hidden_states(ids)
    assert plain.shape == lean.shape
    emb, blocks = TINY.emb_dim, TINY.n_layers
    # norm1 and norm2 give emb numbers a token, gelu 4 emb: none of them is kept inside the linears.
    saved = ids.numel() * blocks * (1 + 1 + 4) * emb * 4
    assert sum(kept.values()) <= without - saved


def test_nothing_else_holds_on_to_what_is_not_kept(own_model: GPT2) -> None:
    outputs = []

    def note(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        outputs.append(weakref.ref(output))

    for part in ("norm1", "norm2", "mlp.gelu"):
        with_hooks(own_model, part, note)
    with recompute_activations(own_model):
        hidden = own_model.hidden_states(random_ids(3, 20))
    assert hidden.requires_grad and len(outputs) == 3 * TINY.n_layers
    assert not any(output() is not None for output in outputs)


def test_in_half_precision_no_copy_is_kept_for_query_key_and_value(
    own_model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast would make three copies of the norm's output, and keep them all."""
    ids, kept = random_ids(3, 20), []

    def noting(keep: Callable, restore: Callable) -> saved_tensors_hooks:
        def note(tensor: Tensor) -> object:
            found = keep(tensor)
            if found is tensor and not isinstance(tensor, torch.nn.Parameter):
                kept.append(tuple(tensor.shape))
            return found

        return saved_tensors_hooks(note, restore)

    monkeypatch.setattr(memory, "saved_tensors_hooks", noting)
    reference = [gradient.clone() for gradient in gradients(own_model, ids)]
    with torch.autocast("cpu", torch.bfloat16):
        with recompute_activations(own_model):
            hidden = own_model.hidden_states(ids)
        flat = (ids.numel(), TINY.emb_dim)  # what a linear layer would keep of its input
        assert kept.count(flat) == TINY.n_layers  # the heads' output, which nothing can give again
        own_model.zero_grad()
        chunked_next_token_loss(hidden, own_model.out_head, ids)[0].backward()
    for (name, p), exact in zip(own_model.named_parameters(), reference, strict=True):
        if not name.endswith("key.bias"):  # which changes nothing: its gradient is rounding alone
            assert p.grad is not None
            assert (p.grad - exact).norm() < 0.05 * exact.norm(), name


CONTEXTS = [recompute_activations, activation_checkpointing, bfloat16_cpu_attention]


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_model_is_given_back_as_it_was(context: Callable, own_model: GPT2) -> None:
    attn = own_model.get_submodule("trf_blocks.0.attn")
    vars(attn)["forward"] = partial(attn.forward)
    before = [dict(vars(module)) for module in own_model.modules()]
    with context(own_model):
        assert any("forward" in vars(m) for m in own_model.trf_blocks[1].modules())
    assert before == [vars(module) for module in own_model.modules()]


@pytest.mark.parametrize("context", CONTEXTS)
def test_ctrl_c_inside_leaves_nothing_behind(context: Callable, own_model: GPT2) -> None:
    """torch calls no hook that is always to be called for a KeyboardInterrupt."""
    ids, attn = random_ids(1, 8), own_model.trf_blocks[1].attn

    def interrupted(x: Tensor) -> None:
        raise KeyboardInterrupt

    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    vars(attn)["project"] = interrupted
    with pytest.raises(KeyboardInterrupt), context(own_model):
        own_model(ids)
    del vars(attn)["project"]
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(own_model, ids), strict=True))


def louder(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output * 1.5


def louder_in_place(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output.mul_(1.5)


class Transposed(nn.Module):
    """A linear layer that looks at its input from another side."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.mT, self.weight[:, :, None], self.bias).mT


def with_dropout(model: GPT2) -> None:
    for block in model.trf_blocks:
        own = nn.Sequential(nn.GELU(approximate="tanh"), nn.Dropout(0.3))
        block.get_submodule("mlp").register_module("gelu", own)


def with_transposed(model: GPT2) -> None:
    for block in model.trf_blocks:
        linear = block.get_submodule("mlp.mlp_in")
        assert isinstance(linear, nn.Linear)
        block.get_submodule("mlp").register_module("mlp_in", Transposed(linear))


def with_hooks(model: GPT2, part: str, hook: Callable) -> None:
    for block in model.trf_blocks:
        block.get_submodule(part).register_forward_hook(hook)


OWN = {
    "dropout": with_dropout,
    "transposed": with_transposed,
    "hook on norm": partial(with_hooks, part="norm1", hook=louder),
    "hook on gelu": partial(with_hooks, part="mlp.gelu", hook=louder),
    "in place": partial(with_hooks, part="norm2", hook=louder_in_place),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", OWN.values(), ids=OWN.keys())
def test_what_is_your_own_gets_its_gradients(
    change: Callable, inside: bool, own_model: GPT2
) -> None:
    """Changed before, or while some of the norms' and GELUs' outputs are not kept."""
    changed = deepcopy(own_model)
    change(changed)
    torch.manual_seed(0)
    expected = gradients(changed, random_ids(2, 12))
    if not inside:
        change(own_model)
    with recompute_activations(own_model):
        if inside:
            change(own_model)
        torch.manual_seed(0)
        found = gradients(own_model, random_ids(2, 12))
    for a, b in zip(expected, found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_copy_made_inside_computes_with_its_own_weights(
    context: Callable, own_model: GPT2
) -> None:
    ids = random_ids(2, 12)
    with context(own_model):
        gradients(own_model, ids)
        copy = deepcopy(own_model)
        for parameter in own_model.parameters():
            parameter.data.zero_()
        assert copy(ids).abs().max() > 0


def test_an_error_inside_leaves_nothing_behind(own_model: GPT2) -> None:
    ids = random_ids(1, 8)
    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    broken = own_model.get_submodule("trf_blocks.1.mlp.mlp_out").register_forward_hook(
        lambda *_: 1 / 0
    )
    try:
        with recompute_activations(own_model):
            own_model(ids)
    except ZeroDivisionError:
        pass
    broken.remove()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(own_model, ids), strict=True))


def test_frozen_blocks_and_no_grad_work(own_model: GPT2) -> None:
    for parameter in own_model.parameters():
        parameter.requires_grad = False
    for parameter in own_model.trf_blocks[-1].parameters():
        parameter.requires_grad = True
    ids = random_ids(2, 9)
    expected = [gradient.clone() for gradient in gradients(own_model, ids)]
    with recompute_activations(own_model):
        found = gradients(own_model, ids)
        with torch.no_grad():
            own_model(ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_blocks_computed_again_give_the_same_gradients() -> None:
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
