"""Checkpoints of a running `distill`: safetensors, a `weights_only` torch file, and a JSON that is written last.

They lie in the stage directory, not with Ray Train, so that runs resume in the same way after a lost worker, after a
killed driver, and in this process.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, NonNegativeInt
from safetensors.torch import load, save_file
from torch import nn

from raydistill.errors import CheckpointError, reason_of
from raydistill.runtime.versions import installed
from raydistill.storage.filesystems import FileSystem, open_filesystem, write_bytes, write_file
from raydistill.storage.local import refuse_links
from raydistill.storage.state import read_state
from raydistill.storage.tensors import bounded

logger = logging.getLogger(__name__)
_KEPT = 2
_POINTER = "newest.json"
_STEP = re.compile(r"step-[0-9]{9,}")
_FILES = ("checkpoint.json", "weights.safetensors", "state.pt")
_FILE = re.compile(rf"({'|'.join(map(re.escape, _FILES))})(\.[0-9a-f]{{32}}\.tmp)?")
_PACKAGES = ("torch", "timm", "transformers", "raydistill")  # they decide a checkpoint's content


@dataclass(frozen=True)
class Checkpoint:
    """The state of training: of `modules` by name, of the optimizer and of the scaler. `sums` cover the steps since the
    epoch began; `record` is the last whole epoch's."""

    step: int
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: Any
    sums: dict[str, float]
    record: dict[str, float] | None


def bytes_to_write(path: str, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """The bytes of the kept checkpoints and the next one, minus the existing ones. AdamW has two moments for each
    trained number, SGD one, and both have none before the first step."""
    tensors = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    one = sum(t.nbytes for t in tensors) + moments * sum(p.nbytes for p in learning)
    return max(_KEPT + 1 - len(_whole(path)), 0) * one


class _Meta(BaseModel, extra="allow"):  # the packages' versions beside it
    """`checkpoint.json`."""

    step: NonNegativeInt
    sums: dict[str, float]
    record: dict[str, float] | None
    checksums: dict[Literal["weights.safetensors", "state.pt"], int] = {}


class CheckpointWriter:
    """Writes checkpoints in a thread while training continues; the `with` block ends when all are written.

    After each it deletes all but the last two, including damaged ones of later steps and, on a disk, half-written ones
    of a killed run. Raises CheckpointError: a link is in the way.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._weights: Any = None
        self._state: Any = None
        self.seconds = 0.0  # of the last write

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the state and start to write it. Raises the error of the previous write."""
        self.wait()
        self._began = time.monotonic()
        weights = {f"{part}.{k}": v for part, m in checkpoint.modules.items() for k, v in m.state_dict().items()}
        state = {"optimizer": checkpoint.optimizer.state_dict(), "scaler": checkpoint.scaler.state_dict()}
        # Into the same memory each time: new pages would cost more than the copy.
        self._weights, self._state = _copied(weights, self._weights), _copied(state, self._state)
        meta = {
            "step": checkpoint.step,
            "sums": dict(checkpoint.sums),
            "record": checkpoint.record,
            **installed(_PACKAGES),
        }
        self._writing = self._thread.submit(self._write, self._weights, self._state, meta)

    def wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, weights: dict[str, torch.Tensor], state: dict[str, Any], meta: dict[str, Any]) -> None:
        name = f"step-{meta['step']:09d}"
        folder = f"{self._path}/checkpoints/{name}"
        _open(self._path)
        sums: dict[str, int] = {}

        def write(file: str, save: Callable[[str], object]) -> None:
            write_file(
                f"{folder}/{file}", lambda temporary: (save(temporary), sums.update({file: _checksum(temporary)}))
            )

        write("weights.safetensors", lambda temporary: save_file(weights, temporary))
        write("state.pt", lambda temporary: torch.save(state, temporary))
        meta = {**meta, "checksums": sums}
        write_file(f"{folder}/checkpoint.json", lambda temporary: Path(temporary).write_text(json.dumps(meta)))
        self.seconds = time.monotonic() - self._began
        # A pointer file names the whole checkpoints, newest first; a listing could hold anything.
        known = _whole(self._path)
        kept = [name, *(other for other in known if other < name)][:_KEPT]
        write_bytes(f"{self._path}/checkpoints/{_POINTER}", json.dumps(kept).encode())
        drop_checkpoints(self._path, kept, known)


def drop_checkpoints(path: str, kept: Collection[str] = (), known: Collection[str] | None = None) -> None:
    """Delete the checkpoints of a stage directory except the `kept` ones; in a bucket only the `known` ones, if given,
    so that it is not listed. If none is kept, delete the pointer file too. Other files stay."""
    fs, place = _open(path)
    if fs.is_local or known is None:
        found = [entry.removeprefix(f"{place}/").partition("/") for entry in fs.find(place, withdirs=True)]
    else:
        found = [(name, "/", file) for name in known for file in _FILES]
    for name in sorted({name for name, _, _ in found if _STEP.fullmatch(name) and name not in kept}):
        for file in sorted(file for step, _, file in found if step == name and _FILE.fullmatch(file)):
            fs.remove_file(f"{place}/{name}/{file}")  # first checkpoint.json, which marks it as whole
        fs.remove_if_empty(f"{place}/{name}")
    if not kept:
        fs.remove_file(f"{place}/{_POINTER}")
        fs.remove_if_empty(place)


def _open(path: str) -> tuple[FileSystem, str]:
    """The directory of a stage's checkpoints."""
    fs, place = open_filesystem(f"{path}/checkpoints")
    if fs.is_local:
        refuse_links(place)
    return fs, place


def _copied(value: Any, before: Any) -> Any:
    """A copy of nested tensors and numbers on the CPU; tensors reuse the memory of the previous copy if they fit."""
    if isinstance(value, dict):
        return {k: _copied(v, before.get(k) if isinstance(before, dict) else None) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v, None) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    fits = isinstance(before, torch.Tensor) and (before.shape, before.dtype) == (value.shape, value.dtype)
    return (before if fits else torch.empty(value.shape, dtype=value.dtype)).copy_(value.detach())


def latest_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]] | None:
    """Weights, optimizer state and JSON of the newest whole checkpoint. It skips damaged ones with a warning.

    Raises CheckpointError: an undamaged one does not load.
    """
    fs, place = _open(path)
    for name in _whole(path):
        folder = f"{place}/{name}"
        try:
            found = read_state(f"{path}/checkpoints/{name}/checkpoint.json", _Meta, any_float=True)
            if found is None:
                continue  # the run was killed while it wrote this one
            meta = found.model_dump()
            files = {name: fs.cat_file(f"{folder}/{name}") for name in ("weights.safetensors", "state.pt")}
            for name, checksum in found.checksums.items():
                if zlib.crc32(files[name]) != checksum:
                    raise ValueError(f"the checksum of {name} differs")
        except FileNotFoundError:
            continue  # the run was killed while it wrote this one
        except Exception as error:  # damaged JSON raises many kinds of errors
            logger.warning("%s is damaged (%s); using the previous checkpoint", folder, error)
            continue
        try:
            state = torch.load(io.BytesIO(files["state.pt"]), map_location="cpu", weights_only=True)
            return load(bounded(files["weights.safetensors"])), state, meta
        except Exception as error:  # so does a pickle of another version
            raise does_not_fit(path, meta, error) from None
    return None


def does_not_fit(path: str, meta: dict[str, Any], error: Exception) -> CheckpointError:
    """The error for a whole checkpoint that the installed packages cannot load; `meta` is its JSON."""
    here = installed(_PACKAGES)
    wrote, runs = (", ".join(f"{name} {v.get(name, 'unknown')}" for name in here) for v in (meta, here))
    return CheckpointError(
        f"{path}/checkpoints: {wrote} wrote the checkpoint of step {meta['step']}, and it does not load with {runs} "
        f"({reason_of(error)}); install those versions, or delete that folder to train from the first "
        "step"
    )


def latest_step(path: str) -> int:
    """The steps done at the checkpoint of `latest_checkpoint`; 0 without one."""
    checkpoint = latest_checkpoint(path)
    return 0 if checkpoint is None else int(checkpoint[2]["step"])


def _checksum(path: str) -> int:
    """CRC-32 of a file: neither format has a checksum, and a tensor of zeros would load."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _whole(path: str) -> list[str]:
    """The names of the whole checkpoints, newest first."""
    _open(path)
    try:
        names = read_state(f"{path}/checkpoints/{_POINTER}", list[str]) or []
        return [name for name in names[:_KEPT] if _STEP.fullmatch(name)]
    except CheckpointError:
        logger.warning("%s/checkpoints/%s is damaged; training starts from the first step", path, _POINTER)
        return []
