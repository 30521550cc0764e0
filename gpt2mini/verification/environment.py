"""Where a verification ran: versions of the libraries, and the processor."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def environment(device: torch.device | str) -> dict[str, str]:
    """Versions, and the device that computes with what torch uses of it."""
    return {
        "gpt2mini": own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(torch.device(device)),
    }


def own_version() -> str:
    try:
        return version("gpt2mini")
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "from a checkout"


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
