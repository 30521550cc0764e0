"""Which device to use, and which number format it is fastest in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or with "auto" the best one here: CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware. Others emulate it, many times
    slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    return False


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """A context in which matrix products run in bfloat16. precision: "auto" (if the device gains
    from it), "bf16" or "fp32". Weights, norms, losses and optimizer states stay in float32."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision must be auto, bf16 or fp32, not {precision!r}")
    if precision == "bf16" or (precision == "auto" and gains_from_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
