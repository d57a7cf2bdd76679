"""Each workaround still works in the installed versions."""

from __future__ import annotations

import os
import platform
import signal
from types import FunctionType

import pytest

from raydistill.engine.workarounds import trainer_without_signal_handler
from tests.processes import python

# Tensors that are freed and asked for again, as in steps of training; and the page faults. glibc gives back other sizes
# in the main thread than in others, and a trial of `tune` runs in one of those. Above 32 MiB it always gives them back;
# below, that depends on what else lies on the heap.
_SIZES = {"main": 10 * [9_000_000], "thread": 3 * [9_000_000, 3_000_000, 7_000_000, 1_000_000, 8_000_000]}
_STEPS = """
import resource, sys, threading, torch
from raydistill.engine.workarounds import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def steps():
    for step in range(25):
        if step == 5:
            before = faults()
        tensors = [torch.ones(int(size)) for size in sys.argv[3:]]
        del tensors
    print(faults() - before)
thread = threading.Thread(target=steps)
steps() if sys.argv[2] == "main" else thread.start() or thread.join()
"""


def faults(how: str, where: str) -> int:
    as_ever = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(python("-c", _STEPS, how, where, *map(str, _SIZES[where]), env=as_ever).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it asks glibc")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_memory_that_is_freed_is_there_for_the_next_step(where: str) -> None:
    assert faults("keep", where) < 5_000
    if where == "main":  # in a thread it depends on where the system placed its heaps, mostly 31,252
        # Now and then the system has huge pages for all of it, and no try in a row of three.
        assert any(faults("leave", where) > 5_000 for _ in range(3))


def test_ray_train_leaves_sigint_to_the_command() -> None:
    trainer = trainer_without_signal_handler()
    methods = [f for kind in trainer.__mro__ for f in vars(kind).values() if isinstance(f, FunctionType)]
    assert any("_register_sigint_handler" in method.__code__.co_names for method in methods), "Ray Train calls it"
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(object.__new__(trainer), None)
    assert signal.getsignal(signal.SIGINT) is before
