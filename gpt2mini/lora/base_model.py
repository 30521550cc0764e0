"""Which base model adapters were trained on: a few numbers of it, kept with them."""

import json

import torch
from torch import Tensor, nn

from gpt2mini.model import GPT2, TiedHead


def base_note(model: GPT2) -> str:
    """What `check_base` knows a base model by: its dtype, and samples of all but the adapters and a
    head that is saved beside them."""
    is_own = isinstance(model.out_head, nn.Linear) and not trained_head(model)
    head = sample_head(model) if is_own else {}
    return json.dumps({"dtype": str(model.tok_emb.weight.dtype), **sample(model), **head})


def sample(model: GPT2) -> dict[str, list[float]]:
    """A few numbers of every tensor of a model, but of its adapters and its head."""
    return {
        name: numbers_of(parameter)
        for name, parameter in model.named_parameters()
        if "lora_" not in name and not name.startswith("out_head.")
    }


def sample_head(model: GPT2) -> dict[str, list[float]]:
    """The same of a head that is no tied one."""
    return {f"out_head.{name}": numbers_of(p) for name, p in model.out_head.named_parameters()}


def numbers_of(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    return flat[[0, len(flat) // 2, -1]].tolist()


def check_base(model: GPT2, note: str | None) -> None:
    """Raise ValueError if the adapter was trained on other weights than the model's, as far as the
    file tells (PEFT's own do not)."""
    if note is None:
        return
    expected = json.loads(note)
    same_dtype = expected.pop("dtype") == str(model.tok_emb.weight.dtype)
    found = sample(model) | sample_head(model)
    for name, numbers in expected.items():
        if name not in found or not are_one(found[name], numbers, same_dtype):
            raise ValueError(
                f"it was trained on another base model: {name} has {found.get(name)} here and "
                f"{numbers} there"
            )


def are_one(found: list[float], expected: list[float], same_dtype: bool) -> bool:
    """Whether numbers are the same, but that the one, or the other, may have been rounded."""
    a, b = torch.tensor(found), torch.tensor(expected)
    if not same_dtype:
        return torch.allclose(a, b, rtol=1e-2, atol=1e-6)
    # loaded in float32, after it had been saved in fewer bits
    roundings = [torch.float32, torch.float16, torch.bfloat16]
    return any(
        torch.equal(a, b.to(d).float()) or torch.equal(a.to(d).float(), b) for d in roundings
    )


def trained_head(model: GPT2) -> dict[str, nn.Parameter]:
    """The parameters of a head that the base does not have: a classifier's, or a trainable one."""
    head = model.out_head
    if isinstance(head, TiedHead):
        return {}
    parameters = dict(head.named_parameters())
    of_the_base = getattr(head, "out_features", None) == model.config.vocab_size
    if of_the_base and not any(p.requires_grad for p in parameters.values()):
        return {}
    if not isinstance(head, nn.Linear) or head.in_features != model.config.emb_dim:
        raise ValueError(
            f"the output head is {head}: an adapter's files have a place for "
            f"nn.Linear({model.config.emb_dim}, classes)"
        )
    return parameters
