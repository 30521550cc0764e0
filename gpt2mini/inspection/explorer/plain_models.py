"""Which models the page's engine computes as they are: GPT-2 in the package's own layers.

The engine (engine.js) is GPT-2 as model.py has it. A block of your own, a hook or another forward
function computes something else, so such a model is shown with stored numbers. (model.py itself may
have been edited: the page finds that out when it starts, from logits computed by Python.)
"""

import torch
from torch import nn

from gpt2mini.checkpoints.build import Unfilled
from gpt2mini.inspection.compare import effective_weights
from gpt2mini.lora import LoRALinear
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock
from gpt2mini.modes import has_hooks

EPSILON = 1e-5  # of the layer norms, in model.py and in engine.js
CONTAINERS = (nn.ModuleList, nn.Dropout)  # a Dropout of an adapter does nothing in eval mode


def why_not_live(model: GPT2) -> str | None:
    """What the page's engine cannot compute in this model, for a message; None if all of it."""
    if type(model) is not GPT2:
        return f"the model is a {type(model).__name__}, not a GPT2"
    for path, module in model.named_modules():
        where = path or "the model"
        if has_hooks(module):
            return f"{where} has forward hooks"
        if replaced := replaced_methods(module):
            return f"{where} has a {replaced[0]} of its own"
        if why := why_not_plain(path, module, model):
            return why
    return other_shapes(model)


def other_shapes(model: GPT2) -> str | None:
    """A weight that is missing, or has another shape than in a new model of this config."""
    with Unfilled(torch.float32):
        new = {name: p.shape for name, p in GPT2(model.config).named_parameters()}
    found = {name: weight.shape for name, weight in effective_weights(model).items()}
    for name in {**new, **found}:
        if not name.startswith("out_head.") and new.get(name) != found.get(name):
            return f"{name} is not as the config says: {shown(found.get(name))}"
    return None


def shown(shape: torch.Size | None) -> str:
    return "it is missing" if shape is None else f"its shape is {tuple(shape)}"


def why_not_plain(path: str, module: nn.Module, model: GPT2) -> str | None:
    """The same for one module: its class, and the settings that its class takes."""
    expected = expected_classes(path)
    if type(module) not in expected:
        return f"{path} is a {type(module).__name__}, not a {expected[0].__name__}"
    if isinstance(module, nn.LayerNorm) and (
        module.eps != EPSILON or module.weight is None or module.bias is None
    ):
        return f"{path} has other settings than GPT-2's (eps {EPSILON}, a weight and a bias)"
    if isinstance(module, MultiHeadAttention) and module.n_heads != model.config.n_heads:
        return f"{path} has {module.n_heads} heads, and the config {model.config.n_heads}"
    if isinstance(module, MLP) and module.gelu != model.config.gelu:
        return f"{path} has gelu={module.gelu!r}, and the config {model.config.gelu!r}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"{path} has a max_norm"
    return None


def expected_classes(path: str) -> tuple[type[nn.Module], ...]:
    """The classes that a module at this place may have."""
    name = path.split(".")[-1]
    if path == "":
        return (GPT2,)
    if path == "out_head":
        return (TiedHead, nn.Linear)
    if path.startswith("trf_blocks.") and name.isdigit():
        return (TransformerBlock,)
    by_name: dict[str, type[nn.Module]] = {"attn": MultiHeadAttention, "mlp": MLP}
    by_name |= dict.fromkeys(("tok_emb", "pos_emb"), nn.Embedding)
    by_name |= dict.fromkeys(("norm1", "norm2", "final_norm"), nn.LayerNorm)
    if name in by_name:
        return (by_name[name],)
    if name in ("query", "key", "value", "attn_out", "mlp_in", "mlp_out"):
        return (nn.Linear, LoRALinear)
    return CONTAINERS


def replaced_methods(module: nn.Module) -> list[str]:
    """The names of methods that the object has of its own, in place of its class's."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]
