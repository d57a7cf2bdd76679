"""The node types in a cluster file, and what may be wrong with them on AWS and on Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from raydistill.doctor.cluster_yaml import hint

# Addresses on which a dashboard may listen: it can run code.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Between two stages a node idles for some seconds; after an hour no stage will use it again.
LEAST_IDLE_SECONDS, MOST_IDLE_SECONDS = 60, 3600


@dataclass(frozen=True)
class NodeType:
    """A type of node that a cluster starts, at most `max_workers` of them; among equal types, those of higher
    `priority`. `resources` are counts, and bytes for `memory`."""

    name: str
    resources: dict[str, int]
    labels: dict[str, str]
    min_workers: int
    max_workers: int
    spot: bool
    priority: int = 0


def kept_gpu_faults(key: str, node_type: NodeType) -> Iterator[str]:
    """`key` is that of the number of nodes that always exist."""
    if 0 < node_type.min_workers <= node_type.max_workers and node_type.resources.get("GPU"):
        yield (
            f"{key}: machines with GPUs are kept, and paid for, without work ({node_type.min_workers} of "
            f"{node_type.name}); write 0, and set cluster.grows_to in the job, to plan with nodes that can start"
        )


def idle_faults(key: str, value: float, unit: int) -> Iterator[str]:
    """How long a node may idle before it is released, in units of that many seconds."""
    least, most = LEAST_IDLE_SECONDS / unit, MOST_IDLE_SECONDS / unit
    if not least <= value <= most:
        wrong = "goes before the next stage can use it" if value < least else "is paid for all that time"
        yield f"{key}: {value:,g}, and a node that idles that long {wrong}; write {least:g} to {most:g}"


def image_faults(key: str, image: object) -> Iterator[str]:
    """An image by Ray's makers with another Ray than the one that runs here, or a Python that is too old."""
    import ray

    name, _, tag = str(image).rpartition("/")[2].partition("@")[0].partition(":")
    if not re.fullmatch(r"ray(-[a-z]+)?", name):
        return
    place = str(image).rpartition(name)[0]
    instead = f"write {place}{name}:{ray.__version__}-py312-gpu"
    if tag.partition("-")[0] != ray.__version__:
        yield f"{key}: {image!r} has another Ray than {ray.__version__}; {instead}"
    python = re.search(r"-py3(\d+)", tag)
    if python and int(python[1]) < 11:
        yield f"{key}: {image!r} has Python 3.{python[1]}, and raydistill needs 3.11; {instead}"


def start_options() -> set[str]:
    """The options of `ray start`, without the dashes."""
    from ray.scripts.scripts import start

    return {option.lstrip("-") for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}


def start_flag_faults(key: str, command: str) -> Iterator[str]:
    for words in re.findall(r"\bray start\b([^;&|>\n]*)", command.replace("\\\n", " ")):
        for flag in re.findall(r"(?<!\S)--([\w-]+)", words):
            if flag not in start_options():
                yield f"{key}: `ray start` has no option --{flag}{hint(flag, start_options())}"


def type_faults(prefix: str, types: list[NodeType]) -> Iterator[str]:
    """Types without labels, and spot types without an on-demand type of the same GPUs that Ray prefers less."""
    for node_type in types:
        if not node_type.labels:
            yield f"{prefix}.{node_type.name}.labels: none, so no work can ask for this type; write {{pool: ...}}"
    for spot in types:
        needed = {name: count for name, count in spot.resources.items() if name not in ("CPU", "memory")}
        if spot.spot and not any(
            not other.spot
            and other.max_workers
            and other.priority < spot.priority
            and all(other.resources.get(name, 0) >= count for name, count in needed.items())
            for other in types
        ):
            yield (
                f"{prefix}.{spot.name}: nothing replaces it if there is no spot; add on-demand nodes with {needed}, "
                f"labels {{pool: fallback}} and a priority below {spot.priority}"
            )
