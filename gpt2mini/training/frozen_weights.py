"""Under autocast: cast a frozen weight once in a run, not once in every forward pass.

Autocast keeps the cast of a weight that is trained until its context ends, and no cast of a frozen
one (`cached_cast` in aten/src/ATen/autocast_mode.cpp asks for `requires_grad`). With LoRA nearly
all weights are frozen: each forward pass would read 4 bytes and write 2 for every one of them, and
each generated token of a rollout too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Cast:
    """A weight in autocast's dtype, and by what is seen that the weight has changed since."""

    weight: Tensor
    version: int  # of the weight that was cast: each in-place operation adds one
    address: int  # of its numbers: `weight.data = ...` changes it

    def is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        is_current = (self.version, self.address) == (weight._version, weight.data_ptr())
        return is_current and self.weight.dtype == dtype


class frozen_weights_cast_once(TorchFunctionMode):  # a context manager, as torch.no_grad
    """Inside, `F.linear` takes the model's frozen float32 weights in autocast's dtype from the
    casts made before: the results are the same, bit for bit. Costs 2 bytes for each frozen weight
    of a linear layer.

    A weight that is changed in place is cast anew, and one that is trained again is left to
    autocast. (A change through `weight.data`, which torch does not count, is not seen.)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.frozen = {id(p): p for p in model.parameters() if is_frozen_float32(p)}
        self.casts: dict[int, Cast] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1 and id(args[1]) in self.frozen:
            input, weight, *bias = args
            device = weight.device.type
            if torch.is_autocast_enabled(device) and is_frozen_float32(weight):
                args = (input, self.cast(weight, torch.get_autocast_dtype(device)), *bias)
        return func(*args, **(kwargs or {}))

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        found = self.casts.get(id(weight))
        if found is None or not found.is_of(weight, dtype):
            found = Cast(weight.detach().to(dtype), weight._version, weight.data_ptr())
            self.casts[id(weight)] = found
        return found.weight


def is_frozen_float32(weight: Tensor) -> bool:
    return not weight.requires_grad and weight.dtype == torch.float32 and not weight.is_inference()
