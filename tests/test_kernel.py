"""Calls from a notebook: what they show, and how they end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from tests.processes import wait_for
from tests.small_run import small_job

SHOW = """
from raydistill.api import _progress
progress = _progress(True)
progress.line("samples: two classes")
with progress.task("teach", 40, "views") as advance:
    for _ in range(40):
        advance(1)
progress.line("taught")
"""


def test_a_bar_is_one_output_that_changes_and_an_error_one_line(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(text) for text in (SHOW, "import raydistill as rd; rd.distill('nowhere')")]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), allow_errors=True, kernel_name="python3").execute()
    first, bar, last = cells[0].outputs
    assert (first.text, last.text) == ("samples: two classes\n", "taught\n")
    assert "40/40" in bar.data["text/html"]
    (error,) = cells[1].outputs
    assert error.ename == "ConfigError"
    assert len(error.traceback) == 1
    assert error.traceback[0].startswith("ConfigError: nowhere: no such file")


CALL = "import raydistill as rd; run = rd.distill('job.yaml'); print('val', run.metrics['val_accuracy'])"


class Kernel:
    """A kernel of its own, to which a user's cells, stops and restarts come as from Jupyter."""

    def __init__(self, folder: Path) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def run(self, cell: str, stop: Callable[[str], bool] = lambda said: False) -> tuple[str, list[str]]:
        """What the cell says, and its error. It is stopped once what it has said is so."""
        said, error, stopped = "", [], False
        asked = self.client.execute(cell)
        while True:
            message = self.client.get_iopub_msg(timeout=240)
            if message["parent_header"].get("msg_id") != asked:
                continue
            content = message["content"]
            said += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            error = content.get("traceback", error)
            if stop(said) and not stopped:
                stopped = True
                self.manager.interrupt_kernel()
            if content.get("execution_state") == "idle":
                return said, error

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.manager.provisioner.pid).children(recursive=True)


@pytest.fixture
def kernel(image_folder: Path, teacher_weights: Path, tmp_path: Path) -> Iterator[Kernel]:
    small_job(tmp_path, image_folder, teacher_weights)
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_ray(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return is_alive(process) and "raylet" in process.name()
    return False


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("at", ["samples:", "teach ", "distill "])
def test_a_stopped_cell_says_so_in_one_line_and_the_next_one_goes_on(kernel: Kernel, at: str) -> None:
    said, error = kernel.run(CALL, stop=lambda said: at in said)
    assert error == ["interrupted; the same call continues from here"]
    assert not list(filter(is_ray, kernel.descendants()))
    said, error = kernel.run(CALL)
    assert not error
    assert "prepare   done before" in said
    assert "val " in said


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_restarted_kernel_leaves_no_process(kernel: Kernel, how: str) -> None:
    kernel.client.execute(CALL)
    wait_for(lambda: any(map(is_ray, kernel.descendants())))
    there = kernel.descendants()
    assert len(there) > 3, "Ray has several"
    if how == "restart":
        kernel.manager.restart_kernel()
    else:
        kernel.manager.provisioner.process.kill()
    wait_for(lambda: not list(filter(is_alive, there)))
    assert [process for process in there if is_alive(process)] == []
