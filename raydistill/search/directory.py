"""The identities of a search and a comparison, and what changed since the previous search."""

from __future__ import annotations

import difflib
import json
from typing import Any

from raydistill.config import RunConfig
from raydistill.data.sources.listing import list_images
from raydistill.escaping import shortened
from raydistill.identity import stage_directory
from raydistill.runtime.progress import Progress
from raydistill.search.distribution import Distribution
from raydistill.search.space import Space
from raydistill.secrets import redacted_tree, without_secrets
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import needed_state

_MOST_LINES, _MOST_COMPARED = 50, 2000  # of what changed, and of the identities, which may be untrusted


def trained_settings(config: RunConfig) -> Any:
    """The part of the config that can change what is trained or measured, without secrets."""
    left_out = {"workspace", "cluster", "tracking", "name", "export", "compare", "tune"}
    views = config.views.identity | {"store": config.views.store}
    return redacted_tree(config.model_dump(mode="json", exclude=left_out) | {"views": views}, without_secrets)


def tune_directory(config: RunConfig, space: Space, progress: Progress) -> StageDirectory:
    """A new space, sampler or objective makes a new search. It reuses the trained students of equal trials."""
    settings = config.tune.model_dump(include={"sampler", "pruner", "grace_epochs", "objectives"})
    identity = {
        "config": trained_settings(config),
        "files": list_images(config.images).fingerprint,
        "space": [[key, _identity(entry)] for key, entry in space.entries.items()],
        "tune": settings,
    }
    directory = stage_directory(config, "tune", identity)
    if not directory.started():
        for line in _differences(config, directory):
            progress.line(line)
    return directory


def _identity(entry: Distribution) -> dict[str, Any]:
    """As lists, because the order of keys and labels changes what a sampler draws."""
    dump = entry.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(entry.categorical, dict):
        dump["categorical"] = [[label, value] for label, value in entry.categorical.items()]
    return dump


def _differences(config: RunConfig, directory: StageDirectory) -> list[str]:
    """The differences of a new search of a job from its latest one."""
    fs, mine = directory.fs, json.loads(directory.identity)
    root = directory.place.rpartition("/")[0]
    names = [name for name in fs.names(root) if name.startswith("tune-")]
    paths = [path for name in names if fs.exists(path := f"{root}/{name}/identity.json")]
    for path in sorted(paths, key=fs.modified, reverse=True):
        other = needed_state(f"{directory.path.rpartition('/')[0]}{path.removeprefix(root)}", dict[str, Any])
        if (other.get("config"), other.get("files")) == (mine["config"], mine["files"]):
            before, after = (
                json.dumps({k: t.get(k) for k in ("format", "space", "tune")}, indent=1).splitlines()[:_MOST_COMPARED]
                for t in (other, mine)
            )
            changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
            shown = [line for line in changes if not line.startswith("@@")]
            if len(shown) > _MOST_LINES:
                shown = [*shown[:_MOST_LINES], f"and {len(shown) - _MOST_LINES:,} more lines"]
            return [f"tune: a new search, since this changed from the one in {path.rpartition('/')[0]}:",
                    *(f"  {shortened(line, 500)}" for line in shown)]  # fmt: skip
    return []
