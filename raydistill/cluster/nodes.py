"""Checks of a cluster before work starts: the same packages on every node; a workspace, images and models that all
nodes see; a place for every actor. Each finding is one line that says what to do."""

from __future__ import annotations

import platform
import uuid
import zlib
from dataclasses import dataclass
from typing import Any

from raydistill.config import RunConfig
from raydistill.data.sources.entries import first_of_table
from raydistill.errors import ConfigError, first_line_of
from raydistill.escaping import counted
from raydistill.runtime.versions import PACKAGES, installed
from raydistill.secrets import redacted
from raydistill.storage.directory import workspace_root
from raydistill.storage.filesystems import open_filesystem, write_bytes
from raydistill.tracking.stores import tracking_uri

# Keys that name paths, or models that may be at one, which every node must see under the same name.
PLACES = (
    "images.path", "teacher.model", "teacher.weights", "student.model", "student.weights", "compare.student_weights",
    "generate.pipeline",
)  # fmt: skip
_SECONDS = 120
_BEGINNING = 1024**2


@dataclass(frozen=True)
class Finding:
    """One line of the table. `advice` is None if all is well."""

    about: str
    found: str
    advice: str | None = None


def check_nodes(config: RunConfig) -> list[Finding]:
    """Check every node of the cluster that Ray is connected to, and the cluster as a whole."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [*inspect_nodes(config, nodes), *_tracking(config, nodes), *_labels(config, nodes)]


def inspect_nodes(config: RunConfig, nodes: list[dict[str, Any]]) -> list[Finding]:
    """Check nodes, as `ray.nodes()` describes them, with a task on each: versions, workspace, images, models."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    root, mark, places = workspace_root(config), uuid.uuid4().hex, _places(config)
    fs, folder = open_filesystem(root)
    findings, seen = [], {}
    try:
        write_bytes(f"{root}/.seen-{mark}", mark.encode())
        look = ray.remote(num_cpus=0, max_retries=2)(_inspect)
        asked = {
            node["NodeID"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            ).remote(root, mark, node["NodeID"], places)
            for node in nodes
        }
        for node in nodes:
            try:
                seen[node["NodeID"]] = ray.get(asked[node["NodeID"]], timeout=_SECONDS)
            except Exception as error:  # Ray's errors, or any error of the worker
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                found = f"runs no task ({lines[-1] if lines else type(error).__name__})"
                advice = "install raydistill there: see its log, `ray logs cluster`"
                findings.append(Finding(_name(node), found, advice))
        findings += _versions(nodes, seen)
        findings += _workspace(config, nodes, seen, {node: fs.exists(f"{folder}/.seen-{mark}-{node}") for node in seen})
        findings += _unseen(nodes, seen, places)
    finally:
        for path in [f"{folder}/.seen-{mark}", *(f"{folder}/.seen-{mark}-{node['NodeID']}" for node in nodes)]:
            fs.remove_file(path)
    return findings


def refuse_unfit(config: RunConfig) -> None:
    """Raises ConfigError with a line for each finding that is not well."""
    if bad := [finding for finding in check_nodes(config) if finding.advice]:
        raise ConfigError("\n".join(f"cluster: {f.about}: {f.found}; {f.advice}" for f in bad))


def _places(config: RunConfig) -> dict[str, str]:
    """A file for each key that names a path that the driver sees. For a folder it is the first file inside, because a
    node may have the folder without what is mounted there. A table of images adds its first image. A path that the
    driver does not see is a name on a hub."""
    found = {}
    for key in PLACES:
        section, _, name = key.rpartition(".")
        given = getattr(getattr(config, section), name, None)
        several = given if isinstance(given, tuple) else (given,)  # of a committee
        for number, one in enumerate(several, 1):
            place = "" if one is None else one.removeprefix("hf:").removeprefix("timm:local-dir:")
            if not place or place.startswith("example:") or not _fingerprint(place):
                continue
            fs, path = open_filesystem(place)
            # The driver lists the images, and train workers use its folder; other actors have their own folders.
            if fs.is_local and not key.startswith(("teacher.", "generate.")):
                place = path
            inside = fs.names(path) if fs.isdir(path) else []
            found[key if len(several) == 1 else f"{key}, {number}"] = "/".join([place.rstrip("/"), *inside[:1]])
            if key == "images.path" and (image := first_of_table(place)) and _fingerprint(image):
                found["the first image of images.path"] = image
    return found


def _fingerprint(place: str) -> str | None:
    """`a folder`, or a file's size and the checksum of its beginning, which differs between weights of equal shapes.
    None if nothing is there."""
    try:
        fs, path = open_filesystem(place)
        if not fs.exists(path):
            return None
        if fs.isdir(path):
            return "a folder"
        return f"{fs.size(path)} {zlib.crc32(fs.cat_file(path, end=_BEGINNING))}"
    except Exception:  # every file system has its own errors
        return None


def _inspect(root: str, mark: str, node: str, places: dict[str, str]) -> dict[str, Any]:
    """Runs on a node: its versions, whether it reads what the driver wrote to the workspace, and what it sees at the
    paths. It also writes to the workspace."""
    fs, folder = open_filesystem(root)
    path, error = f"{folder}/.seen-{mark}", ""
    try:
        reads = fs.read(path) == mark.encode()
        if reads:
            write_bytes(f"{root}/.seen-{mark}-{node}", b"")
    except Exception as problem:  # every file system has its own errors
        reads, error = False, first_line_of(problem)
    sees = {key: _fingerprint(place) for key, place in places.items()}
    return {"versions": _installed(), "reads": reads, "error": error, "sees": sees}


def _installed() -> dict[str, str]:
    return {"python": platform.python_version(), **installed(PACKAGES)}


def _name(node: dict[str, Any]) -> str:
    pool = (node.get("Labels") or {}).get("pool")
    return f"{node['NodeManagerAddress']} ({pool})" if pool else str(node["NodeManagerAddress"])


def _versions(nodes: list[dict[str, Any]], seen: dict[str, dict[str, Any]]) -> list[Finding]:
    """Compared with the driver, which writes the config that the nodes read."""
    mine, findings = _installed(), []
    for node in nodes:
        theirs = seen.get(node["NodeID"], {}).get("versions", mine)
        differ = [f"{name} {theirs[name]} (here {mine[name]})" for name in mine if theirs[name] != mine[name]]
        if differ:
            advice = "install what the driver has, best as one image for all nodes (deploy/Dockerfile)"
            findings.append(Finding(_name(node), ", ".join(differ), advice))
    if not findings:
        shown = ", ".join(f"{name} {version}" for name, version in mine.items() if name in ("python", "ray", "torch"))
        findings.append(Finding("versions", f"{counted(len(seen), 'nodes')} with equal versions: {shown}"))
    return findings


def _workspace(
    config: RunConfig, nodes: list[dict[str, Any]], seen: dict[str, dict[str, Any]], wrote: dict[str, bool]
) -> list[Finding]:
    advice = "give one that all nodes see under this name, as workspace=s3://bucket/runs or a shared folder"
    findings = []
    for node in (node for node in nodes if node["NodeID"] in seen):
        answer, workspace = seen[node["NodeID"]], f"workspace={config.workspace}"
        if not answer["reads"]:
            why = f": {answer['error']}" if answer["error"] else ""
            findings.append(Finding(_name(node), f"does not see {workspace}{why}", advice))
        elif not wrote[node["NodeID"]]:
            findings.append(Finding(_name(node), f"writes {workspace} where others do not see", advice))
    return findings or [Finding("workspace", f"{counted(len(seen), 'nodes')} read and write {workspace_root(config)}")]


def _unseen(nodes: list[dict[str, Any]], seen: dict[str, dict[str, Any]], places: dict[str, str]) -> list[Finding]:
    advice = "give a bucket, or a shared folder by its full name, that all nodes see"
    mine, findings = {key: _fingerprint(place) for key, place in places.items()}, []
    for node in nodes:
        sees = seen.get(node["NodeID"], {}).get("sees", mine)
        differs = [key for key in places if sees[key] != mine[key]]
        for what, absent in (("does not see", True), ("has another file as", False)):
            if named := [f"{places[key]} ({key})" for key in differs if (sees[key] is None) == absent]:
                findings.append(Finding(_name(node), f"{what} {', '.join(named)}", advice))
    if places and not findings:
        findings.append(Finding("images, models", f"{counted(len(seen), 'nodes')} see {', '.join(places)}"))
    return findings


def _tracking(config: RunConfig, nodes: list[dict[str, Any]]) -> list[Finding]:
    uri = redacted(tracking_uri(config)[0])
    if not config.tracking.enabled:
        return [Finding("tracking", "off")]
    if uri.startswith("sqlite") and len(nodes) > 1:
        advice = "set tracking.uri to an MLflow server, or tracking.enabled=false"
        return [Finding("tracking", f"{uri} is a file, which is lost when the cluster's head ends", advice)]
    return [Finding("tracking", uri or "off: SQLite needs a local workspace; set tracking.uri to an MLflow server")]


def _labels(config: RunConfig, nodes: list[dict[str, Any]]) -> list[Finding]:
    """Nodes for generation may come later, so it is not an error that they are missing."""
    wanted = config.cluster.generator_labels
    if config.generate is None or not wanted:
        return []
    fit = [n for n in nodes if all((n.get("Labels") or {}).get(k) == v for k, v in wanted.items())]
    words = ", ".join(f"{k}={v}" for k, v in wanted.items())
    if fit:
        return [Finding("generator nodes", f"{len(fit)} with {words}")]
    there = {f"{k}={v}" for n in nodes for k, v in (n.get("Labels") or {}).items() if not k.startswith("ray.io")}
    waits = "" if config.cluster.generator_fallback is not None else "; generation waits until one joins"
    found = f"none with {words} yet (there are {', '.join(sorted(there)) or 'none'}){waits}"
    return [Finding("generator nodes", found)]
