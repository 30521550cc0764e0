"""A device that computes on the CPU and behaves like a GPU: it refuses what CUDA or Apple's MPS
would. So code for GPUs can be run, and its results compared, where there is none.

Its tensors say that they are on the device "pretended". An operation on them and on a tensor of
the CPU is refused (a single number may come from there); so is float64, which MPS lacks. Whenever
the program asks for a value, or copies to the CPU, a GPU would first have to finish all that it has
been asked for: such waits are counted, with the line of gpt2mini that waits.

    with pretended() as device:
        model.to(device)(token_ids.to(device)).cpu()

It rests on parts of torch that are not public, and which older versions do not have. Once it is
set up, it stays for as long as the process: see `test_devices.py`. What it does not show is what
GPUs do differently: their kernels, their rounding, autocast, their random numbers.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PACKAGE = str(Path(__file__).parents[1] / "gpt2mini")

# Operations for which the program waits; and those that take tensors of any device.
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXES |= {aten._index_put_impl_.default}

waits: Counter[str] = Counter()  # which line of gpt2mini has waited, how often


class OnDevice(Tensor):
    """A tensor on the device; `held` are its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("pretended:0"),
        )
        tensor.held = held
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # mypy reads of torch's as if of an instance
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


class Creating(TorchDispatchMode):
    """For what makes tensors out of nothing, `torch.zeros(3, device="pretended")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Converting(TorchFunctionMode):
    """For what torch does in C++ between Python's objects and tensors, which only its own devices
    can do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if isinstance(args[0] if args else None, OnDevice):
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            if func is Tensor.numpy:
                raise TypeError("a tensor of a GPU cannot become an array: .cpu() first")
            if func is Tensor.__getitem__ and isinstance(args[1], list):
                return args[0][torch.tensor(args[1]).to(args[0].device)]
        return func(*args, **kwargs)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU, and back to where a GPU would have its result."""
    there: list[OnDevice] = []
    here: list[Tensor] = []

    def held(x: Tensor) -> Tensor:
        if isinstance(x, OnDevice):
            there.append(x)
            return x.held
        here.append(x)
        return x

    on_cpu, options = each(held, args), {name: each(held, x) for name, x in kwargs.items()}
    wanted = kwargs.get("device")
    stays = bool(there) if wanted is None else torch.device(wanted).type == "pretended"
    strange = [x for x in here if x.ndim > 0]
    if there and strange and func not in MOVES | INDEXES:
        raise RuntimeError(f"{func}: tensors on the device, and on the CPU {strange[0].shape}")
    if there and is_waited_for(func, args, stays):
        waits[place()] += 1
    if stays and wanted is not None:
        options["device"] = torch.device("cpu")
    result = func(*on_cpu, **options)
    if func is aten.copy_.default:
        return args[0]
    known = {id(x.held): x for x in there}  # what is changed in place stays what it is

    def outside(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError(f"{func}: Apple's GPUs have no float64")
        return known[id(x)] if id(x) in known else OnDevice(x)

    return each(outside, result) if stays else result


def each(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """`x` with every tensor in it changed."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(each(change, part) for part in x) if isinstance(x, tuple | list) else x


def is_waited_for(func: Any, args: Any, stays: bool) -> bool:
    if func in INDEXES:  # how many places a mask chooses is not known before
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    to_cpu = func is aten.copy_.default and not isinstance(args[0], OnDevice)
    return func in WAITS or to_cpu or not stays


def place() -> str:
    """The line of gpt2mini that is being computed."""
    for frame, line in traceback.walk_stack(None):
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{line}"
    return "elsewhere"


class Generator(torch.Generator):
    """Of any device by its word; its numbers are the CPU's."""

    of: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        found = super().__new__(cls)
        found.of = torch.device(device)
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.of


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's own module, `torch.cuda` or `torch.mps`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    current_stream = stream = synchronize = MagicMock()  # which checkpoints ask for


def set_up() -> None:
    """Once a process."""
    if not hasattr(torch, "pretended"):
        setup = backend_registration._setup_privateuseone_for_python_backend
        setup("pretended", backend_module=Backend())


@contextmanager
def pretended() -> Iterator[torch.device]:
    set_up()
    with Creating(), Converting(), patch.object(torch, "Generator", Generator):
        yield torch.device("pretended:0")
