"""Which device to use, and which precision is fastest on it."""

from contextlib import AbstractContextManager, nullcontext

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or with "auto" the best available: CUDA, then Apple's MPS, then the CPU.
    Raises ValueError for a device that is not available."""
    here = []  # best first
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(1, torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here += ["mps"]
    here += ["cpu"]
    if name == "auto":
        return torch.device(here[0])
    if name.removesuffix(":0") not in here:  # cuda:0 is cuda
        raise ValueError(
            f"there is no device {name!r} to compute on: take {' or '.join(['auto', *here])}"
        )
    return torch.device(name)


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
