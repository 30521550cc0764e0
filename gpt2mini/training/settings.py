"""What the training loop needs to know beyond model, loss, batches and optimizers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How `train` is to train; see each field."""

    steps: int
    schedule: Callable[[int], float]  # step -> share of each optimizer's peak learning rate
    accumulate: int = 1  # micro-batches per step, in each process
    max_grad_norm: float = 1.0
    precision: str = "auto"  # auto | bf16 | fp16 | fp32
    log_every: int = 10
    evaluate_every: int = 0  # 0: only at the end
    save_every: int = 0  # steps between two checkpoints; 0: none, but when a signal stops the run
    keep_last: int = 2  # checkpoints
    on_bad_step: str = "stop"  # or "skip": a loss or gradient that is no number, or a spike
    spike: float = 0.0  # a loss so many times the usual one is a bad step; 0: none is
    progress: bool = True
    unit: str = "tokens"  # what the loss function counts, for the log: tokens, or texts
    recompute: bool = True  # a third less memory for a few percent of the time
    activation_checkpointing: bool = False  # far less memory for a third more time
    compile: bool = False  # each block by torch.compile: a minute's wait; gains little on CPUs

    def __post_init__(self) -> None:
        if self.on_bad_step not in ("stop", "skip"):
            raise ValueError(f"on_bad_step must be 'stop' or 'skip', not {self.on_bad_step!r}")
        if self.spike != 0 and not self.spike > 1:
            raise ValueError(f"spike must be above 1, or 0 for none, not {self.spike}")
        for name in ("steps", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
