"""The private names of Ray that the package uses are there, take what they are given, and are used in one file."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import ray

import raydistill

NAMES = {
    "ray._private.ray_constants:RAY_ENABLE_UV_RUN_RUNTIME_ENV": None,
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": None,
    "ray._private.utils:set_sigterm_handler": ("sigterm_handler",),
    "ray._private.utils:set_kill_on_parent_death_linux": (),
    "ray._private.services:find_node_ids": (),
    "ray._private.services:find_gcs_addresses": (),
    "ray._private.services:find_gcs_addresses.cache_clear": (),
    "ray._private.authentication.authentication_token_setup:ensure_token_if_auth_enabled": (
        "system_config", "create_token_if_missing",
    ),
    "ray._private.label_utils:validate_node_label_syntax": ("labels",),
    "ray._raylet:GcsClient": None,
    "ray._raylet:InnerGcsClient.drain_node": ("node_id", "reason", "reason_message", "deadline_timestamp_ms"),
    "ray._raylet:InnerGcsClient.get_all_node_info": ("timeout", "state_filter"),
    "ray.core.generated.autoscaler_pb2:DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION": None,
    "ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE": None,
    "ray.autoscaler._private.util:validate_config": ("config",),
    "ray.autoscaler._private.kuberay.autoscaling_config:_derive_autoscaling_config_from_ray_cr": ("ray_cr",),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_private_is_there_and_takes_what_it_is_given(name: str) -> None:
    found, takes = resolve_name(name), NAMES[name]
    assert ray.__version__.startswith("2.60."), "look at all of cluster/ray_private.py"
    if takes is not None:
        parameters = inspect.signature(found).parameters
        assert set(takes) <= set(parameters), parameters
        needed = {one.name for one in parameters.values() if one.default is one.empty and one.kind != one.VAR_KEYWORD}
        assert needed <= {*takes, "self"}


@pytest.mark.parametrize("option", ["_node_ip_address", "_temp_dir"])
def test_init_takes_its_private_options(option: str) -> None:
    assert f'"{option}"' in inspect.getsource(ray.init)


def test_no_other_file_uses_what_is_private() -> None:
    package = Path(raydistill.__file__).parent
    private = re.compile(r"\bray(\.\w+)*\._(?!_)\w+|_raylet|ray\.core\.generated|\b_global_node\b")
    users = {str(f.relative_to(package)) for f in package.rglob("*.py") if private.search(f.read_text())}
    assert users == {"cluster/ray_private.py"}
