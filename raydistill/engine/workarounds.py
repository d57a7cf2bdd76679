"""Workarounds where libraries have no public interface. Each function names the version that it was seen in, and has a
test that fails when it no longer works."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# Parameters of `mallopt` in glibc 2.36's malloc.h, and their values: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
_MALLOC = ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**28))


def keep_freed_memory() -> None:
    """Keep the memory that tensors free in this process, for the next step. glibc returns large blocks to the system,
    which then maps and zeroes ten thousand pages in every step: the demo's teacher saw 480 views/s so, and 640 with
    this. Python and torch have no setting for it. Other C libraries stay unchanged."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOC:
            mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


def trainer_without_signal_handler() -> type[TorchTrainer]:
    """Ray Train 2.60 replaces the SIGINT handler of the process, which then exits with code 1, or 0 at the third press.
    Commands have their own exit codes for signals. Ray Tune can switch its handler off; Ray Train cannot."""
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    return Trainer
