"""Files that describe a cluster, checked without a cloud: cluster.yaml for Ray's launcher on AWS, and KubeRay's.

Ray's own validation looks at the shape of a file. What it lets pass opens the cluster to the world, costs money for
nothing, or shows only when the nodes are paid for and do not join.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from raydistill.errors import ConfigError
from raydistill.infra.kuberay_file import check_kuberay_file
from raydistill.infra.node_types import LOOPBACK, NodeType, mapping, read_documents, unlabelled, without_fallback

__all__ = ["NodeType", "check_cluster_file", "check_kuberay_file", "offered"]

# What Ray's AWS provider and its launcher read; its schema lets any key pass.
PROVIDER_KEYS = {
    "type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "use_internal_ips",
    "use_external_head_ip", "key_pair", "aws_credentials", "cloudwatch", "disable_node_updaters",
    "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check",
}  # fmt: skip
# The lists of commands that Ray fills in where a file has none, and with what.
DEFAULT_COMMANDS = {
    "setup_commands": "a nightly wheel",
    "head_setup_commands": "any boto3",
    "worker_setup_commands": "nothing",
    "head_start_ray_commands": "a dashboard on all interfaces",
    "worker_start_ray_commands": "a start without a token",
}
WATCHER = "python -m raydistill.infra.preemption --cloud aws"
ONE_TIME = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}


def offered(path: str) -> list[NodeType]:
    """The node types of a cluster.yaml, the head's among them. Raises ConfigError where Ray cannot read the file."""
    file = _read(path)
    faults = _refused_by_ray(file)
    if faults:
        raise ConfigError(f"{path}: {faults[0]}")
    return _node_types(file)


def check_cluster_file(path: str) -> list[str]:
    """What is wrong with a cluster.yaml, a line each: `key: what is wrong; what to write instead`. Empty: it is sound.

    What Ray refuses is alone, because the rest is read only in a file of the right shape. Raises ConfigError where the
    file cannot be read or is no YAML.
    """
    file = _read(path)
    faults = _refused_by_ray(file)
    if faults:
        return faults
    types = _node_types(file)
    prefix = "available_node_types"
    return [
        *_limits(file),
        *_provider(file["provider"]),
        *_head(file),
        *unlabelled(prefix, types),
        *_workers(file, types),
        *without_fallback(prefix, types),
        *_starts(file),
        *_installs(file),
    ]


def _read(path: str) -> dict[str, Any]:
    file = read_documents(path)
    if len(file) != 1:
        raise ConfigError(f"{path} holds {len(file)} YAML documents; a cluster file has one, of keys and values")
    return file[0]


def _refused_by_ray(file: dict[str, Any]) -> list[str]:
    """By Ray's own validation, whose defaults are left out: everything that they would fill in is asked for."""
    from jsonschema import ValidationError  # type: ignore[import-untyped]  # comes with ray
    from ray.autoscaler._private.util import validate_config

    missing = [key for key in ("max_workers", "head_node_type", "available_node_types") if key not in file]
    if missing:
        return [f"{key}: missing, and Ray's default is another cluster; add it" for key in missing]
    try:
        validate_config({"cluster_synced_files": [], **file})
    except ValidationError as error:
        return [_schema_fault(error)]
    except TypeError as error:
        return [f"the file: a key is not text ({error}); write keys in quotes that YAML takes for something else"]
    except ValueError as error:  # about numbers and names, which are said here with the figures
        return list(_limits(file)) or [f"Ray refuses the file: {error}"]
    kind = file["provider"]["type"]
    if kind != "aws":
        return [f"provider.type: {kind!r}, and only files for aws are checked; have it checked by `ray up`"]
    return []


def _schema_fault(error: Any) -> str:
    where = [str(step) for step in error.absolute_path]
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        key = next(key for key in error.instance if key not in known)
        return f"{'.'.join([*where, str(key)])}: unknown to Ray{_meant(key, known)}"
    advice = f"write {error.validator} {error.validator_value}"
    advice = {"required": "add it", "minimum": f"write {error.validator_value} or more"}.get(error.validator, advice)
    return f"{'.'.join(where) or 'the file'}: {error.message}; {advice}"


def _meant(key: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; leave it out"


def _node_types(file: dict[str, Any]) -> list[NodeType]:
    return [
        NodeType(
            name,
            entry["resources"],
            entry.get("labels", {}),
            entry.get("min_workers", 0),
            entry.get("max_workers", 0 if name == file["head_node_type"] else file["max_workers"]),
            _market(entry).get("MarketType") == "spot",
            entry.get("priority", 0),
        )
        for name, entry in file["available_node_types"].items()
    ]


def _market(entry: dict[str, Any]) -> dict[str, Any]:
    return mapping(entry["node_config"].get("InstanceMarketOptions"))


def _limits(file: dict[str, Any]) -> Iterator[str]:
    most, head = file["max_workers"], file["head_node_type"]
    if head not in file["available_node_types"]:
        yield f"head_node_type: {head!r} is no node type{_meant(head, file['available_node_types'])}"
    types = _node_types(file)
    fewest = sum(node_type.min_workers for node_type in types)
    if fewest > most:
        yield f"max_workers: {most}, and min_workers of all types are {fewest} together; write {fewest} or more"
    for node_type in types:
        key = f"available_node_types.{node_type.name}"
        if node_type.max_workers > most:
            yield f"{key}.max_workers: {node_type.max_workers}, where that of all types is {most}; write {most} or less"
        if node_type.min_workers > node_type.max_workers:
            bound = node_type.max_workers
            yield f"{key}.min_workers: {node_type.min_workers}, where its max_workers is {bound}; write {bound} or less"


def _provider(provider: dict[str, Any]) -> Iterator[str]:
    for key in sorted(map(str, provider.keys() - PROVIDER_KEYS)):
        yield f"provider.{key}: unknown to Ray's AWS provider{_meant(key, PROVIDER_KEYS)}"
    if provider.get("cache_stopped_nodes") is not False:
        yield "provider.cache_stopped_nodes: Ray stops nodes for later use, and their disks cost; write false"
    for rule in map(mapping, provider.get("security_group", {}).get("IpPermissions", [])):
        ranges = map(mapping, [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])])
        world = any(span.get("CidrIp", span.get("CidrIpv6")) in ("0.0.0.0/0", "::/0") for span in ranges)
        first, last = rule.get("FromPort"), rule.get("ToPort")
        if world and (first, last) != (22, 22):
            yield (
                f"provider.security_group.IpPermissions: the world may come in by ports {first} to {last} and run "
                "code through those of Ray; leave the rule out, and use the tunnel of `ray dashboard`"
            )


def _head(file: dict[str, Any]) -> Iterator[str]:
    key = f"available_node_types.{file['head_node_type']}"
    entry = file["available_node_types"][file["head_node_type"]]
    if entry["resources"].get("CPU") != 0:
        yield f"{key}.resources.CPU: tasks on the head can end the cluster by its memory; write 0"
    if _market(entry).get("MarketType") == "spot":
        yield f"{key}.node_config.InstanceMarketOptions: the cluster is lost with a spot head; leave it out"


def _workers(file: dict[str, Any], types: list[NodeType]) -> Iterator[str]:
    for node_type in types:
        key, entry = f"available_node_types.{node_type.name}", file["available_node_types"][node_type.name]
        if node_type.name == file["head_node_type"]:
            continue
        if "CPU" not in node_type.resources:
            yield f"{key}.resources: no CPU, so what the type offers is not known before it runs; write {{CPU: ...}}"
        if not node_type.spot:
            continue
        options = mapping(_market(entry).get("SpotOptions"))
        for name, value in ONE_TIME.items():
            if options.get(name) != value:
                yield (
                    f"{key}.node_config.InstanceMarketOptions.SpotOptions.{name}: {options.get(name)!r} leaves nodes "
                    f"that the autoscaler does not know; write {value}"
                )
        # Where the list is missing, that is said, and it is enough.
        started = [*entry.get("worker_setup_commands", []), *file.get("worker_start_ray_commands", [WATCHER])]
        if not any(WATCHER in command for command in started):
            yield f"{key}: no one tells Ray that a node is about to be taken; start `{WATCHER}` before `ray start`"


def _starts(file: dict[str, Any]) -> Iterator[str]:
    for key, default in DEFAULT_COMMANDS.items():
        if key not in file:
            yield f"{key}: missing, and Ray's default is {default}; write the list, [] for none"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in file.get(key, []) if re.search(r"\bray start\b", command)]
        if key in file and not starts:
            yield f"{key}: nothing starts Ray; write `RAY_AUTH_MODE=token ray start ...`"
        for command in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", command, re.DOTALL):
                yield f"{key}: `ray start` without a token lets anyone in; write `RAY_AUTH_MODE=token ray start ...`"
            for host in re.findall(r"--dashboard-host[ =]+['\"]?([^\s'\";&|]+)", command):
                if host not in LOOPBACK:
                    yield f"{key}: --dashboard-host={host} lets code be run from outside; write 127.0.0.1"
    if not any(remote.endswith(".ray/auth_token") for remote in file.get("file_mounts", {})):
        yield "file_mounts: nothing brings the token to the nodes; write ~/.ray/auth_token: ~/.ray/auth_token"


def _installs(file: dict[str, Any]) -> Iterator[str]:
    """Setup commands that install another Ray than the one that runs here."""
    import ray

    lists = {key: file.get(key, []) for key in DEFAULT_COMMANDS if "setup" in key}
    for name, entry in file["available_node_types"].items():
        lists[f"available_node_types.{name}.worker_setup_commands"] = entry.get("worker_setup_commands", [])
    wanted = f"=={ray.__version__}"
    for key, commands in lists.items():
        for command in commands:
            if re.search(r"ray-wheels|nightly|\.dev0", command):
                yield f"{key}: installs a nightly wheel; write 'ray[default]{wanted}'"
                continue
            words = " ".join(re.findall(r"pip install([^;&|]*)", command)).split()
            for word in words:
                found = re.fullmatch(r"ray(?:\[[^]]*\])?((?:[=<>!~].*)?)", word.strip("'\""))
                if found and found[1] != wanted:
                    yield f"{key}: installs ray{found[1] or ' of any version'}; write 'ray[default]{wanted}'"
