"""The files of a diffusers pipeline, in a folder or on the hub, without its weights."""

from __future__ import annotations

import contextlib
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raydistill.config import Generate
from raydistill.errors import ConfigError
from raydistill.escaping import quoted, shortened
from raydistill.models.weights import ask_hub, why_none
from raydistill.storage.filesystems import open_file
from raydistill.storage.state import read_json

# The class names by number of a class-conditional pipeline, in its folder: {"classes": [...], "null": N}. N is the
# number of "no class", for classifier-free guidance.
CLASSES_FILE = "classes.json"
# Pipelines of one network on pixels; `Generator._denoise` is their sampling loop. Old ones have no folders: the network
# and the scheduler lie at the root, under these names.
PLAIN = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
AT_ROOT = {"unet": "config.json", "scheduler": "scheduler_config.json"}
_MOST_CARD = 1 << 16  # bytes of a README.md in which the licence stands


def read_index(settings: Generate) -> tuple[dict[str, Any], Path, str | None, str]:
    """model_index.json, the folder that holds it, the commit on the hub, and the licence. Raises ConfigError: there is
    no such pipeline, or parts are missing."""
    name, what = settings.pipeline, f"generate.pipeline={settings.pipeline}"
    folder = Path(name)
    commit, licence = None, ""
    if not folder.is_dir():
        folder, commit, licence = _fetch_index(settings)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ConfigError(f"{what}: the folder has no model_index.json, so it is not a diffusers pipeline")
    try:
        index = read_json(index_file, dict[str, Any], any_form=True)
        parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0]}
        plain = index["_class_name"] in PLAIN
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{what}: its model_index.json cannot be read ({error})") from None
    if foreign := {part: str(library) for part, (library, _) in parts.items() if str(library) not in _library_names()}:
        part, library = min(foreign.items())
        reason = f"is of the library {quoted(shortened(library))}, whose code is not run"
        raise ConfigError(f"{what}: its {quoted(shortened(part))} {reason}; name another pipeline")
    if Path(name).is_dir():
        at_root = {part for part, file in AT_ROOT.items() if plain and (folder / file).is_file()}
        if lacking := sorted(part for part in parts if not (folder / part).is_dir() and part not in at_root):
            raise ConfigError(f"{what}: the folder lacks {', '.join(lacking)}; save or fetch the pipeline again")
        licence = _licence_of(folder)
    return index, folder, commit, licence


@functools.cache
def _library_names() -> set[str]:
    """Where a pipeline's classes may come from: libraries, and the modules of diffusers' pipelines."""
    found = find_spec("diffusers")  # does not load it
    folders = found.submodule_search_locations or () if found is not None else ()
    modules = [file.stem for folder in folders for file in Path(folder, "pipelines").iterdir()]
    return {"diffusers", "transformers", *modules}


def known_classes(folder: Path) -> tuple[list[tuple[str, int]], int | None]:
    """The class names and numbers in the folder, and the number of no class."""
    if not (folder / CLASSES_FILE).is_file():
        return [], None
    try:
        told = read_json(folder / CLASSES_FILE, dict[str, Any])
        null = told.get("null")
        return [(str(name), k) for k, name in enumerate(told["classes"])], None if null is None else int(null)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{folder / CLASSES_FILE} cannot be read ({error}); it holds {{"classes": [names], "null": number}}'
        ) from None


def read_part(folder: Path, part: str, file: str) -> dict[str, Any]:
    """The config of a part; {} if it has none. Old pipelines of one network have it at the root."""
    place = folder / part / file
    if not (folder / part).is_dir() and AT_ROOT.get(part) == file:
        place = folder / file
    try:
        return read_json(place, dict[str, Any], any_form=True) if place.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place} cannot be read ({error}); save or fetch the pipeline again") from None


def working_side(folder: Path) -> int:
    """The network's side times the scale of the autoencoder."""
    vae = read_part(folder, "vae", "config.json").get("block_out_channels") or [0]
    for network in (read_part(folder, part, "config.json") for part in ("transformer", "unet")):
        if network:
            side = network.get("sample_size")
            return side << (len(vae) - 1) if isinstance(side, int) else 512
    return 512


def _fetch_index(settings: Generate) -> tuple[Path, str | None, str]:
    from huggingface_hub import model_info, snapshot_download

    ask_hub()
    try:
        found = model_info(settings.pipeline, revision=settings.revision)
        folder = snapshot_download(
            settings.pipeline, revision=found.sha, allow_patterns=["model_index.json", "*config.json", CLASSES_FILE]
        )
    except Exception as error:  # network, name and permission errors come from three libraries
        raise ConfigError(
            f"generate.pipeline={settings.pipeline}: no such folder, and the download from the hub failed "
            f"({why_none(error)}); check the name, or give a local folder"
        ) from None
    licence = str(getattr(found.card_data, "license", None) or "not stated")
    return Path(folder), found.sha, licence


def _licence_of(folder: Path) -> str:
    card = folder / "README.md"
    lines = list[str]()
    with contextlib.suppress(OSError), open_file(str(card)) as file:
        lines = file.read(_MOST_CARD).decode(errors="replace").splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.lower().startswith("license:")), "") or "not stated"
