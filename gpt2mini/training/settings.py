"""How `train` trains: the settings of a run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How `train` trains."""

    steps: int
    schedule: Callable[[int], float]  # step -> learning-rate multiplier, of each optimizer's peak
    accumulate: int = 1  # micro-batches per step, on each rank
    max_grad_norm: float = 1.0  # of all gradients together; math.inf: no clipping
    precision: str = "auto"  # auto | bf16 | fp16 | fp32
    log_every: int = 10
    evaluate_every: int = 0  # 0: only at the end
    patience: int = 0  # evaluations without a lower loss, after which to stop; 0: never stop early
    save_every: int = 0  # steps between two checkpoints; 0: only when a signal stops the run
    keep_last: int = 2  # checkpoints
    on_bad_step: str = "stop"  # or "skip": a loss or gradient that is not finite, or a spike
    spike: float = 0.0  # a loss this many times its moving average is a bad step; 0: none is
    progress: bool = True  # show a progress bar
    unit: str = "tokens"  # what the loss function counts, for the log: tokens, or texts
    recompute: bool = True  # norms and GELUs in backward: a third less memory, a few % slower
    activation_checkpointing: bool = False  # whole blocks: far less memory, a third slower
    compile: bool = False  # torch.compile each block: a minute at the start; gains little on CPUs

    def __post_init__(self) -> None:
        if self.on_bad_step not in ("stop", "skip"):
            raise ValueError(f"on_bad_step must be 'stop' or 'skip', not {self.on_bad_step!r}")
        if self.spike != 0 and not self.spike > 1:
            raise ValueError(f"spike must be above 1, or 0 for none, not {self.spike}")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be above 0 (math.inf: no clipping), not {self.max_grad_norm}"
            )
        for name in ("steps", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("evaluate_every", "save_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing has no effect on compiled blocks, of which the compiler "
                "decides what to recompute: leave out compile to save memory"
            )
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations: set evaluate_every too")
