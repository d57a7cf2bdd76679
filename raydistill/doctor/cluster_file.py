"""Checks files that describe a cluster, without a cloud: cluster.yaml for Ray's launcher on AWS, and KubeRay's.

Ray's own validation checks the form of a file. It accepts files that open the cluster to the world, cost money for
nothing, or fail only when the nodes are paid for and do not join.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from raydistill.cluster.ray_private import cluster_file_schema, refuse_cluster_file, refuse_labels
from raydistill.doctor.cluster_yaml import hint, mapping, read_documents
from raydistill.doctor.ec2 import aws_faults
from raydistill.doctor.node_types import (
    LOOPBACK,
    NodeType,
    idle_faults,
    image_faults,
    kept_gpu_faults,
    start_flag_faults,
    type_faults,
)
from raydistill.errors import ConfigError, reason_of

# The words of JSON Schema in plainer ones.
TYPES = {"array": "a list", "object": "keys and values", "string": "text, in quotes", "boolean": "true or false"}
PROVIDERS = ("aws", "gcp", "azure", "vsphere", "aliyun", "local", "external")
# Names of resources with a meaning in Ray; users may add others.
RESOURCES = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
# The lists of commands that Ray fills in if a file has none, and with what.
DEFAULT_COMMANDS = {
    "setup_commands": "a nightly wheel",
    "head_setup_commands": "any boto3",
    "worker_setup_commands": "nothing",
    "head_start_ray_commands": "a dashboard on all interfaces",
    "worker_start_ray_commands": "a start without a token",
}
WATCHER = "python -m raydistill.cluster.preemption --cloud aws"
ONE_TIME = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}


def offered(path: str) -> list[NodeType]:
    """The node types of a cluster.yaml, the head's too. Raises ConfigError if Ray cannot read the file."""
    file = _read(path)
    faults = _refused_by_ray(file)
    if faults:
        raise ConfigError(f"{path}: {faults[0]}")
    return _node_types(file)


def check_cluster_file(path: str) -> list[str]:
    """What is wrong with a cluster.yaml, a line each: `key: what is wrong; what to write instead`. An empty list means
    that it is sound.

    If Ray refuses the file, the list has only that, because the rest needs a file of the right form. Raises ConfigError
    if the file cannot be read or is not YAML.
    """
    file = _read(path)
    faults = _refused_by_ray(file)
    if faults:
        return faults
    types, kind = _node_types(file), file["provider"]["type"]
    if kind == "aws":
        of_cloud = list(aws_faults(file, types))
    else:
        slip = "" if kind in PROVIDERS else hint(kind, PROVIDERS, "")
        of_cloud = [
            f"provider.type: {kind!r}, and only files for aws are checked{slip}; what stands "
            "under provider and node_config was not looked at: have it checked by `ray up`"
        ]
    return [
        *_limits(file),
        *of_cloud,
        *_head(file),
        *_workers(file, types),
        *type_faults("available_node_types", types),
        *_idle(file),
        *_starts(file),
        *_installs(file),
    ]


def _read(path: str) -> dict[str, Any]:
    file = read_documents(path)
    if len(file) != 1:
        raise ConfigError(f"{path} holds {len(file)} YAML documents; a cluster file has one, of keys and values")
    return file[0]


def _refused_by_ray(file: dict[str, Any]) -> list[str]:
    """Ray's own validation, without its defaults, so that it checks everything that they would fill in."""
    from jsonschema import Draft7Validator  # type: ignore[import-untyped]  # comes with ray

    validator = Draft7Validator(_of_text(cluster_file_schema()))
    missing = [key for key in ("max_workers", "head_node_type", "available_node_types") if key not in file]
    if missing:
        return [f"{key}: missing, and Ray's default is another cluster; add it" for key in missing]
    try:
        if faults := [fault for error in validator.iter_errors(file) for fault in _schema_faults(error)]:
            return faults
        refuse_cluster_file(file)
    except TypeError as error:
        return [f"the file: a key is not text ({error}); write keys in quotes that YAML takes for something else"]
    except ValueError as error:  # about numbers and names, which are reported here with the figures
        return list(_limits(file)) or [f"Ray refuses the file: {error}"]
    return []


def _of_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Ray's schema, where lists and mounts of anything become lists and mounts of text, as Ray uses them."""
    for key, inner in list(schema.items()):
        if isinstance(inner, dict):
            schema[key] = _of_text(inner)
            if inner.get("type") == "array" and key != "IpPermissions":
                inner.setdefault("items", {"type": "string"})
    if "file_mounts" in schema:
        schema["file_mounts"]["additionalProperties"] = {"type": "string"}
    return schema


def _schema_faults(error: Any) -> Iterator[str]:
    where = [str(step) for step in error.absolute_path]
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in (key for key in error.instance if key not in known):
            yield f"{'.'.join([*where, str(key)])}: unknown to Ray{hint(key, known)}"
        return
    advice = f"write {TYPES.get(str(error.validator_value), error.validator_value)}"
    advice = {"required": "add it", "minimum": f"write {error.validator_value} or more"}.get(error.validator, advice)
    said = error.message if len(error.message) < 200 else "it is of another form"
    yield f"{'.'.join(where) or 'the file'}: {said}; {advice}"


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
        yield f"head_node_type: {head!r} is not a node type{hint(head, file['available_node_types'])}"
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


def _idle(file: dict[str, Any]) -> Iterator[str]:
    if "idle_timeout_minutes" not in file:
        yield "idle_timeout_minutes: missing, and Ray's default is 5; write how long a node may be paid for idling"
    else:
        yield from idle_faults("idle_timeout_minutes", file["idle_timeout_minutes"], 60)
    for name, entry in file["available_node_types"].items():
        if entry.get("idle_timeout_s") is not None:
            yield from idle_faults(f"available_node_types.{name}.idle_timeout_s", entry["idle_timeout_s"], 1)


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
        for name in node_type.resources:
            if name not in RESOURCES and (slip := hint(name, RESOURCES, "")):
                yield f"{key}.resources.{name}: no resource of Ray's{slip}"
        try:
            refuse_labels(node_type.labels)
        except ValueError as error:
            yield f"{key}.labels: {reason_of(error)}"
        if node_type.name == file["head_node_type"]:
            continue
        yield from kept_gpu_faults(f"{key}.min_workers", node_type)
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
        # A missing list is one finding, and it is enough.
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
        flag = "--autoscaling-config" if key.startswith("head") else "--address"
        if starts and not any(flag in command for command in starts):
            yield f"{key}: `ray start` without {flag}, so no worker ever joins; add it"
        for command in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", command, re.DOTALL):
                yield f"{key}: `ray start` without a token lets anyone in; write `RAY_AUTH_MODE=token ray start ...`"
            yield from start_flag_faults(key, command)
            for host in re.findall(r"--dashboard-host[ =]+['\"]?([^\s'\";&|]+)", command):
                if host not in LOOPBACK:
                    yield f"{key}: --dashboard-host={host} lets code be run from outside; write 127.0.0.1"
    if not any(remote.endswith(".ray/auth_token") for remote in file.get("file_mounts", {})):
        yield "file_mounts: nothing brings the token to the nodes; write ~/.ray/auth_token: ~/.ray/auth_token"


def _installs(file: dict[str, Any]) -> Iterator[str]:
    """Setup commands that install another Ray than the one that runs here."""
    import ray

    lists = {key: file.get(key, []) for key in DEFAULT_COMMANDS if "setup" in key}
    images = {f"docker.{key}": value for key, value in file.get("docker", {}).items() if key.endswith("image")}
    for name, entry in file["available_node_types"].items():
        lists[f"available_node_types.{name}.worker_setup_commands"] = entry.get("worker_setup_commands", [])
        if image := entry.get("docker", {}).get("worker_image"):
            images[f"available_node_types.{name}.docker.worker_image"] = image
    yield from chain.from_iterable(image_faults(key, image) for key, image in images.items())
    wanted = f"=={ray.__version__}"
    for key, commands in lists.items():
        for command in commands:
            if re.search(r"ray-wheels|nightly|\.dev0", command):
                yield f"{key}: installs a nightly wheel; write 'ray[default]{wanted}'"
                continue
            words = " ".join(re.findall(r"\b(?:pip[\d.]*|conda|mamba) install([^;&|]*)", command)).split()
            for word in words:
                found = re.fullmatch(r"ray(?:\[[^]]*\])?((?:[=<>!~].*)?)", word.strip("'\""))
                if found and found[1] != wanted:
                    yield f"{key}: installs ray{found[1] or ' of any version'}; write 'ray[default]{wanted}'"
