"""The private names of Ray 2.60 that raydistill uses, each behind a function. No other file uses one.

`tests/cluster/test_ray_private.py` fails if Ray removes or changes one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import IO, Any
from unittest.mock import patch

from raydistill.errors import RaydistillError
from raydistill.runtime.periodic import repeated

_RAY_SECONDS = 10.0


def leave_uv_alone() -> None:
    """Ray takes `uv run` to mean the project's folder, and would send all of it to its workers."""
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def on_loopback() -> contextlib.AbstractContextManager[Any]:
    """A Ray that starts in the block is as on macOS, without clusters: its servers listen on the loopback interface
    only."""
    from ray._private import ray_constants

    return patch.multiple(ray_constants, ENABLE_RAY_CLUSTER=False)


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Ray starts or stops meanwhile, and has no say in how this process ends.

    Its Python handler of SIGTERM would exit with 15, and is not installed. Its native one ends the process on the spot;
    only libc's sigaction can put back what was there, as often as Ray changes it. Ray's processes get a session of
    their own: Ctrl-C, a closed terminal and `timeout` signal a whole group, and a Ray that goes first ends this
    process too. They do not inherit an ignored SIGINT, as commands behind `&` do: Ray cancels tasks by that signal.
    """
    from ray._private import utils

    native, own = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # of any sigaction
    native.sigaction(signal.SIGTERM, None, own)
    die_with_parent = utils.set_kill_on_parent_death_linux

    def begin_process() -> None:  # between fork and exec
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        die_with_parent()

    keep = partial(native.sigaction, signal.SIGTERM, own, None)
    try:
        with (
            repeated(keep, 0.01, "signals"),
            patch.object(utils, "set_sigterm_handler", lambda handler: None),
            patch.object(utils, "set_kill_on_parent_death_linux", begin_process),
        ):
            yield
    finally:
        keep()


def raylets_here() -> tuple[set[str], set[str]]:
    """Hex ids of the nodes whose raylets run on this machine, and the `host:port` of their GCS."""
    from ray._private import services

    services.find_gcs_addresses.cache_clear()  # Ray may have been restarted, for another cluster
    return set(services.find_node_ids()), set(services.find_gcs_addresses())


@contextlib.contextmanager
def _asking(address: str) -> Iterator[None]:
    """In the block, errors of Ray become RaydistillError."""
    import ray
    from ray.exceptions import RayError

    try:
        # Ray's C++ layer also writes its errors to stderr. Drivers tell it not to, when they join a cluster.
        with open(os.devnull, "wb") as null, contextlib.nullcontext() if ray.is_initialized() else stderr_into(null):
            yield
    except RayError as error:
        raise RaydistillError(f"Ray at {address} does not do what is asked: {str(error)[:300]!r}") from error


@contextlib.contextmanager
def stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Everything that this process writes to descriptor 2 in the block, also from C++, goes to a file."""
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def gcs_client(node_id: str, address: str) -> Any:
    """A client of the GCS at `address`, which knows `node_id` as alive. Raises RaydistillError."""
    from ray import NodeID
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # not in Ray's own stub
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    with _asking(address):
        # Without a token for a cluster that asks for one, the client would abort this process.
        ensure_token_if_auth_enabled(None, create_token_if_missing=False)
        client = GcsClient(address=address)
        alive = client.get_all_node_info(timeout=_RAY_SECONDS, state_filter=GcsNodeInfo.ALIVE)
    # The GCS reports success for draining a node that it does not know, or does not know yet.
    if NodeID.from_hex(node_id) not in alive:
        raise RaydistillError(f"node {node_id} is not among the living nodes of the cluster at {address}")
    return client


def drain_preempted(node_id: str, reason: str, deadline_ms: int, address: str) -> None:
    """Tell the GCS that the node will be gone at that time, in ms since the epoch, as `ray drain-node` does. Raises
    RaydistillError."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = gcs_client(node_id, address)
    with _asking(address):
        accepted, why_not = client.drain_node(node_id, preemption, reason, deadline_ms, timeout=_RAY_SECONDS)
    if not accepted:
        raise RaydistillError(f"Ray at {address} does not drain node {node_id}: {why_not}")


def cluster_file_schema() -> dict[str, Any]:
    """The JSON Schema of a cluster.yaml."""
    import ray.autoscaler

    with open(f"{os.path.dirname(ray.autoscaler.__file__)}/ray-schema.json", encoding="utf-8") as text:
        schema: dict[str, Any] = json.load(text)
    return schema


def refuse_cluster_file(file: dict[str, Any]) -> None:
    """Raises ValueError if the numbers or names of a cluster.yaml are not valid."""
    from ray.autoscaler._private.util import validate_config

    validate_config({"cluster_synced_files": [], **file})


def refuse_labels(labels: dict[str, str]) -> None:
    """Raises ValueError if a node cannot have these labels."""
    from ray._private.label_utils import validate_node_label_syntax

    validate_node_label_syntax(labels)


def autoscaling_of(document: dict[str, Any]) -> dict[str, Any]:
    """A RayCluster as Ray's autoscaler reads it: the configuration of a cluster.yaml."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    read: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(document)
    return read
