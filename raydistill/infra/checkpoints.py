"""Checkpoints of a running `distill`: safetensors, a `weights_only` torch file, and a JSON that is written last.

They lie in the stage directory, not with Ray Train, so that a lost worker, a killed driver and a run in this process
all resume in one way.
"""

from __future__ import annotations

import copy
import io
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from fsspec.core import url_to_fs
from safetensors.torch import load, save
from torch import nn

from raydistill.infra.artifacts import write_bytes

logger = logging.getLogger(__name__)
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A moment of training. `sums` are the loss terms summed since the epoch began, `record` the last epoch's."""

    step: int
    model: nn.Module
    ema: Any
    optimizer: torch.optim.Optimizer
    scaler: Any
    sums: dict[str, float]
    record: dict[str, float] | None


class CheckpointWriter:
    """Writes checkpoints in a thread of its own while training goes on; the `with` block ends when all are written.

    Each is a whole one, after which all but it and the one before it are dropped: what a killed run left half-written,
    and damaged ones of later steps that this run did not start from, among them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the moment and begin to write it. Raises what the write before this one raised."""
        self.wait()
        parts = {"model": checkpoint.model} | ({} if checkpoint.ema is None else {"ema": checkpoint.ema.module})
        weights = {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}
        weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
        state = {"optimizer": checkpoint.optimizer.state_dict(), "scaler": checkpoint.scaler.state_dict()}
        meta = {
            "step": checkpoint.step,
            "sums": dict(checkpoint.sums),
            "record": checkpoint.record,
            "torch": torch.__version__,
        }
        self._writing = self._thread.submit(self._write, weights, copy.deepcopy(state), meta)

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, weights: dict[str, torch.Tensor], state: dict[str, Any], meta: dict[str, Any]) -> None:
        name = f"step-{meta['step']:09d}"
        folder = f"{self._path}/checkpoints/{name}"
        write_bytes(f"{folder}/weights.safetensors", save(weights))
        sink = io.BytesIO()
        torch.save(state, sink)
        write_bytes(f"{folder}/state.pt", sink.getvalue())
        write_bytes(f"{folder}/checkpoint.json", json.dumps(meta).encode())
        fs, _ = url_to_fs(self._path)
        folders = _folders(self._path)
        whole = [f for f in folders if f.rpartition("/")[2] <= name and fs.exists(f"{f}/checkpoint.json")]
        for other in set(folders) - set(whole[-_KEPT:]):
            fs.rm(other, recursive=True)


def latest_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]] | None:
    """Weights, optimizer state and JSON of the newest whole checkpoint; a damaged one is named and passed over."""
    fs, _ = url_to_fs(path)
    for folder in reversed(_folders(path)):
        try:
            meta = json.loads(fs.cat_file(f"{folder}/checkpoint.json"))
            weights = load(fs.cat_file(f"{folder}/weights.safetensors"))
            stored = io.BytesIO(fs.cat_file(f"{folder}/state.pt"))
            state = torch.load(stored, map_location="cpu", weights_only=True)
            return weights, state, meta
        except FileNotFoundError:
            continue  # the run was killed while it wrote this one
        except Exception as error:  # a damaged pickle raises nearly everything
            logger.warning("%s is damaged (%s); the checkpoint before it is used", folder, error)
    return None


def latest_step(path: str) -> int:
    """Steps done at the checkpoint that `latest_checkpoint` gives; 0 where there is none."""
    checkpoint = latest_checkpoint(path)
    return 0 if checkpoint is None else int(checkpoint[2]["step"])


def _folders(path: str) -> list[str]:
    fs, root = url_to_fs(f"{path}/checkpoints")
    return sorted(fs.ls(root, detail=False)) if fs.exists(root) else []
