"""What libraries offer no public way to do. Each function names the version it was seen in, and has a test that fails
when it no longer works."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# Parameters of `mallopt` in glibc 2.36's malloc.h, and their values: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
_MALLOC = ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**28))


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, for the next step. glibc returns large blocks to the
    system, and every step then has its pages zeroed and mapped anew: ten thousand of them, and 4 % of the CPU time of
    the demo. Other C libraries are left as they are. Python and torch have no setting for it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOC:
            mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


def trainer_without_signal_handler() -> type[TorchTrainer]:
    """Ray Train 2.60 takes over SIGINT for as long as the process lives: it ends with code 1, or 0 at the third press.
    A command has its own codes for signals. Ray Tune can switch its handler off; Ray Train cannot."""
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    return Trainer
