"""Weights as tools save them: read without running code, unwrapped, and checked against the network."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import pathlib
import pickle
import re
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from raydistill.errors import ConfigError, reason_of
from raydistill.examples import weights_path
from raydistill.models.weight_shards import NAMES, weight_files
from raydistill.storage.tensors import header_bytes

log = logging.getLogger(__name__)
State = dict[str, torch.Tensor]
# The parts that torch.compile, FSDP and activation checkpoints add to the names of a module that they wrap.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?<![^\W_])(ema|swa|averaged?|shadow)(?![^\W_])", re.IGNORECASE)
# Plain data that training scripts save with their weights. A pickle may hold only these types.
_PLAIN: list[Any] = [
    argparse.Namespace, pathlib.PosixPath, np.dtype, *(type(np.dtype(c)) for c in "?bBhHiIlLqQefd"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]  # fmt: skip
_SOME = 5


class _Reading(NamedTuple):
    """One way to read a file: the tensors below a place and a prefix, by the rest of their names."""

    where: str
    state: State
    others: list[str]  # the tensors without the prefix


def read_weights(weights: str, key: str) -> Mapping[str, Any]:
    """Read .safetensors, torch files, or shards of either: a mapping with tensors as values, at any depth.

    Raises ConfigError. It refuses a pickle with anything but tensors and plain data, and does not run it.
    """
    files = [weights_path(weights.removeprefix("example:"))] if weights.startswith("example:") else None
    tree: dict[str, Any] = {}
    for path in files or weight_files(weights, key):
        found = _read(path, key)
        if not isinstance(found, Mapping):
            raise ConfigError(f"{key}={path}: not a state dict (a mapping from names to tensors)")
        tree |= found
    if not any(True for _ in _state_dicts(tree)):
        raise ConfigError(f"{key}={weights}: not a state dict (a mapping from names to tensors)")
    return tree


def sizes_of(folder: Path | None) -> list[int] | None:
    """The number of numbers of each tensor of a folder's weights, from their headers; None without weights.

    Raises ConfigError: weights cannot be read, or an index names files outside the folder.
    """
    if folder is None or not any((folder / name).is_file() for name in NAMES):
        return None
    files = weight_files(str(folder), "weights")
    return sizes_in(files) if all(path.suffix == ".safetensors" for path in files) else None


def sizes_in(files: Iterable[Path]) -> list[int]:
    """The number of numbers of each tensor of safetensors files, from their headers. Raises ConfigError."""
    sizes: list[int] = []
    for path in files:
        try:
            refuse_long_header(path)
            with safe_open(path, "pt") as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a plain file of tensors ({reason_of(error)})") from None
    return sizes


def refuse_long_header(path: Path) -> None:
    """Raises ValueError if a safetensors file has the header of a million tensors."""
    with path.open("rb") as file:
        header_bytes(file.read(8))


@contextlib.contextmanager
def keep_default_dtype() -> Iterator[None]:
    """diffusers 0.42 makes the wanted dtype torch's default while it builds a network, and leaves it there if that
    fails: all later tensors of the process would be of it."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def no_larger_than(sizes: Sequence[int] | None, what: str, num_classes: int | None = None) -> Iterator[None]:
    """Within the block, building a network with far more weights than those of `sizes` and a classifier for
    `num_classes` raises ConfigError at the first weight too many: a few words in a config can name a network that takes
    all memory. Without sizes, as for random weights, the limit is 2**29 weights."""
    left = [1000 + 4 * len(sizes), 2**22 + 2 * sum(sizes)] if sizes is not None else [100_000, 2**29]
    left[1] += (num_classes or 0) * 8192
    mine = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == mine:
            left[0], left[1] = left[0] - 1, left[1] - parameter.numel()
            if min(left) < 0:
                held = "a student may have" if sizes is None else "its files hold"
                raise ConfigError(
                    f"{what}: its config names a network of many more weights than {held}; it is not built"
                )

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with keep_default_dtype():
            yield
    finally:
        hook.remove()


def _refuse_bomb(path: Path) -> None:
    """torch never compresses what it saves, so a compressed file may be a zip bomb."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")


def _read(path: Path, key: str) -> Any:
    try:
        _refuse_bomb(path)
        with open(path, "rb") as file:
            is_safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
        if is_safetensors:
            refuse_long_header(path)
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises many kinds of errors
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):  # torch advises to run it
            held = re.search(r"(?<=GLOBAL )\S+|TorchScript", str(error))
            raise ConfigError(
                f"{key}={path}: a damaged file, or one that holds {held[0] if held else 'more than tensors'}, which "
                "could run code, so it is not opened; save only model.state_dict() where you trained the model"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}={path}: not a plain file of tensors ({reason})") from None


def fitting(tree: Mapping[str, Any], expected: Mapping[str, torch.Tensor], optional: Sequence[str], what: str) -> State:
    """The tensors that a network with the `expected` state needs, by its names, without containers and prefixes.
    It includes tensors under `optional`, the classifier's, if they exist.

    Of several sets that fit it takes an averaged one, or else the first; a warning names the others. `load_strictly`
    refuses what does not fit.
    """
    readings = [reading for place, state in _state_dicts(tree) for reading in _readings(place, state, expected)]

    def faults(reading: _Reading) -> tuple[int, int]:
        shapes = {name: tensor.shape for name, tensor in reading.state.items() if not name.startswith(tuple(optional))}
        wrong = sum(shapes.get(name) != tensor.shape for name, tensor in expected.items() if not _is_count(name))
        return wrong, len(shapes.keys() - expected.keys())

    fewest = min(map(faults, readings))
    best = [reading for reading in readings if faults(reading) == fewest]
    averaged = [reading for reading in best if _AVERAGED.search(reading.where)]
    chosen = (averaged or best)[0]
    if fewest[0] > len(expected) / 2:  # another model's, so the message has to show the file's own names
        return max((state for _, state in _state_dicts(tree)), key=len)
    if others := [reading.where for reading in best if reading is not chosen]:
        log.warning(
            "%s: %s fits, and %s too; using the %s", what, chosen.where, " and ".join(others[:_SOME]),
            "average over training" if averaged else "first",
        )  # fmt: skip
    elif chosen.others:
        log.warning(
            "%s: %d tensors beside %s are ignored: %s", what, len(chosen.others), chosen.where, _some(chosen.others)
        )
    fresh = {name: tensor for name, tensor in expected.items() if _is_count(name)}  # torch before 0.4.1 had none
    return {**fresh, **chosen.state}


def _is_count(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _state_dicts(tree: Mapping[Any, Any], place: str = "", depth: int = 4) -> Iterator[tuple[str, State]]:
    """Every mapping with tensors, and its place in the tree."""
    tensors = {name: x for name, x in tree.items() if isinstance(name, str) and isinstance(x, torch.Tensor)}
    if tensors:
        yield place, tensors
    for name, inner in tree.items():
        if isinstance(inner, Mapping) and isinstance(name, str) and depth:
            yield from _state_dicts(inner, f"{place}{name}/", depth - 1)


def _readings(place: str, state: State, expected: Mapping[str, Any]) -> Iterator[_Reading]:
    """The tensors for each prefix that makes names match, most matches first."""
    state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if not any("module." in name for name in expected):
        # DataParallel's, around the whole or around a part.
        state = {re.sub(r"\.module\.", ".", name): tensor for name, tensor in state.items()}
    prefixes = Counter({"": 0})
    for name in state:
        parts = name.split(".")
        ends = [".".join(parts[at:]) for at in range(len(parts))]
        prefixes.update(name.removesuffix(end) for end in ends if end in expected)
    for prefix, _ in prefixes.most_common(_SOME):
        inside = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        outside = [name for name in state if not name.startswith(prefix)]
        where = f"{place}{prefix}".rstrip("/.")
        yield _Reading(repr(where) if where else "the file's top", inside, outside)


def load_strictly(network: nn.Module, state: State, tree: Mapping[str, Any], what: str, name: str) -> None:
    """Load all weights. Raises ConfigError: names or shapes do not fit (with examples), or values are not finite."""
    expected = network.state_dict()
    problems = []
    for title, keys in (
        ("missing", expected.keys() - state.keys()),
        ("unexpected", state.keys() - expected.keys()),
        ("of another shape", {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape}),
    ):
        if keys:
            problems.append(f"{len(keys)} {title} ({_some(sorted(keys))})")
    if problems:
        places = [place.rstrip("/") for place, _ in _state_dicts(tree) if place]
        tried = f"in {_some(places)} and " if places else ""
        raise ConfigError(
            f"{what} does not fit timm:{name}: {'; '.join(problems)}; tried {tried}without any prefix of their names"
        )
    network.load_state_dict(state, strict=True)
    refuse_not_finite(network, what)


def refuse_not_finite(network: nn.Module, what: str) -> None:
    """Raises ConfigError: a weight or a running statistic is NaN or infinite. Other buffers, such as masks, may be."""
    named = [*network.named_parameters(), *((name, x) for name, x in network.named_buffers() if "running_" in name)]
    if bad := [name for name, tensor in named if not torch.isfinite(tensor).all()]:
        raise ConfigError(
            f"{what}: NaN or infinite values in {len(bad)} of its tensors ({_some(bad)}); its training diverged, so "
            "use an earlier checkpoint"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SOME]) + (" …" if len(names) > _SOME else "")
