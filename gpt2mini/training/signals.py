"""Ctrl-C and SIGTERM: finish the step, save, and only then stop."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

from gpt2mini.training.distributed import get_world_size

logger = logging.getLogger(__name__)


class TrainingStopped(KeyboardInterrupt):
    """Training was stopped by a signal, between two steps; the message names the checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Inside, the first Ctrl-C or SIGTERM is recorded in `received`; a second acts as usual.

    Under torchrun all of them are recorded: it passes one Ctrl-C on in three ways, and kills ranks
    that have not ended after half a minute. A signal that was ignored stays ignored, as Ctrl-C is
    in a shell's background job (stop it with SIGTERM). Only the main thread can receive signals; in
    any other this does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.received = 0  # the signal's number
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if self.enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        again = ""
        if get_world_size() == 1:
            self.restore()
            again = "; a second signal stops at once, without saving"
        logger.warning("stopping after this step or evaluation%s", again)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
