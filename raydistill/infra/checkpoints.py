"""Checkpoints of a running `distill`: safetensors, a `weights_only` torch file, and a JSON that is written last.

They lie in the stage directory, not with Ray Train, so that a lost worker, a killed driver and a run in this process
all resume in one way.
"""

from __future__ import annotations

import io
import json
import logging
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


def save_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write a whole checkpoint, then drop all but it and the one before it: what a killed run left half-written, and
    damaged ones of later steps that this run did not start from, among them."""
    name = f"step-{checkpoint.step:09d}"
    folder = f"{path}/checkpoints/{name}"
    weights = {f"model.{k}": v for k, v in checkpoint.model.state_dict().items()}
    if checkpoint.ema is not None:
        weights |= {f"ema.{k}": v for k, v in checkpoint.ema.module.state_dict().items()}
    write_bytes(f"{folder}/weights.safetensors", save({k: v.cpu().contiguous() for k, v in weights.items()}))
    sink = io.BytesIO()
    torch.save({"optimizer": checkpoint.optimizer.state_dict(), "scaler": checkpoint.scaler.state_dict()}, sink)
    write_bytes(f"{folder}/state.pt", sink.getvalue())
    meta = {"step": checkpoint.step, "sums": checkpoint.sums, "record": checkpoint.record, "torch": torch.__version__}
    write_bytes(f"{folder}/checkpoint.json", json.dumps(meta).encode())
    fs, _ = url_to_fs(path)
    folders = _folders(path)
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
