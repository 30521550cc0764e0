"""Which device to use, which dtype weights may have, and which precision is fastest."""

from contextlib import AbstractContextManager, nullcontext, suppress

import torch

# The dtypes that weights may have, and the names by which they are asked for.
WEIGHT_DTYPES = {
    torch.float32: ("float32", "fp32", "float"),
    torch.float16: ("float16", "fp16", "half"),
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float64: ("float64", "fp64", "double"),
}


def weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that a name stands for. Raises ValueError for one that weights cannot have, such
    as an integer or a complex one."""
    name = str(dtype).removeprefix("torch.")
    for found, names in WEIGHT_DTYPES.items():
        if name in names:
            return found
    expected = ", ".join(names[0] for names in WEIGHT_DTYPES.values())
    raise ValueError(
        f"weights cannot be of dtype {dtype!r}: expected one of {expected}, as a name or a "
        "torch.dtype (for int8: model.quantize('int8'), after loading)"
    )


def pick_device(device: torch.device | str | int = "auto") -> torch.device:
    """The device of that name or number, or with "auto" the best available: CUDA, then Apple's
    MPS, then the CPU. A number is that of an accelerator, as in torch; a torch.device is taken as
    it is. Raises ValueError for a device that is not available."""
    if isinstance(device, torch.device):
        return device
    here = available_devices()
    if device == "auto":
        return torch.device(here[0])
    with suppress(RuntimeError, TypeError):  # torch's, for names and numbers that it does not know
        found = torch.device(device)
        name = str(found).removesuffix(":0")  # cuda:0 is cuda
        if name in here and not isinstance(device, bool):
            return found
    raise ValueError(
        f"there is no device {device!r} to compute on: take {' or '.join(['auto', *here])}"
    )


def weight_device(device: torch.device | str | int) -> torch.device:
    """The device of that name or number that weights may lie on: `pick_device`'s, and "meta", for
    weights without numbers."""
    return torch.device("meta") if device == "meta" else pick_device(device)


def available_devices() -> list[str]:
    """Names of the devices here, the best first."""
    here = []
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(1, torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here += ["mps"]
    return [*here, "cpu"]


def emulates_bfloat16(device: torch.device) -> bool:
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and not (features.get("amx_bf16") or features.get("avx512_bf16"))


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; emulation is much slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not emulates_bfloat16(device)


def best_precision(device: torch.device, precision: str = "auto") -> str:
    """What "auto" stands for: bf16 where the device gains from it, fp16 on older CUDA cards (T4,
    P100), fp32 anywhere else. Any other name stands for itself."""
    if precision not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"precision must be auto, bf16, fp16 or fp32, not {precision!r}")
    if precision != "auto":
        return precision
    if gains_from_bfloat16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """A context in which matrix products run in the precision given (see `best_precision`).
    Weights, norms, losses and optimizer states stay in float32."""
    best = best_precision(device, precision)
    if best == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if best == "bf16" else torch.float16)


def gradient_scaler(device: torch.device, precision: str = "auto") -> torch.amp.GradScaler:
    """For fp16, whose smallest number is 6e-8: the loss is multiplied so that small gradients
    survive, and steps whose gradients overflow are left out (Micikevicius et al. 2018). For any
    other precision it does nothing."""
    # 2**16 is usual for a mean loss; ours is a sum over a few thousand targets
    enabled = best_precision(device, precision) == "fp16"
    return torch.amp.GradScaler(device.type, init_scale=2.0**5, enabled=enabled)
