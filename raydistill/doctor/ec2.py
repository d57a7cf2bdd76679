"""Checks a cluster.yaml for AWS by EC2's own published schema, which comes with botocore.

Ray passes `node_config` to EC2's RunInstances unchanged, so a mistake in it shows only when the first node starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import date
from functools import lru_cache
from typing import Any

from raydistill.doctor.cluster_yaml import hint, mapping
from raydistill.doctor.node_types import NodeType

# The keys that Ray's AWS provider and launcher read; Ray's schema accepts any key.
PROVIDER_KEYS = {
    "type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "use_internal_ips",
    "use_external_head_ip", "key_pair", "aws_credentials", "cloudwatch", "disable_node_updaters",
    "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check",
}  # fmt: skip
# The parts of a node_config that Ray's AWS provider replaces.
OVERWRITTEN = {
    "MinCount": "write min_workers of the node type",
    "MaxCount": "write max_workers of the node type",
    "SubnetId": "write SubnetIds, a list",
    "DryRun": "nothing would start; leave it out",
}
# GPUs of a machine by family and size, "" for other sizes: https://aws.amazon.com/ec2/instance-types
GPUS: dict[str, dict[str, int]] = {
    "p2": {"xlarge": 1, "8xlarge": 8, "16xlarge": 16},
    "p3": {"2xlarge": 1, "8xlarge": 4, "16xlarge": 8},
    "p5": {"4xlarge": 1, "48xlarge": 8},
    "p6e-gb200": {"": 4},
    **{family: {"": 8} for family in ("p3dn", "p4d", "p4de", "p5e", "p5en", "p6-b200", "p6-b300")},
    "g2": {"2xlarge": 1, "8xlarge": 4},
    **{family: {"8xlarge": 2, "16xlarge": 4, "": 1} for family in ("g3", "g4ad")},
    **{family: {"": 1} for family in ("g3s", "gr6", "g6f", "gr6f")},
    "g5g": {"16xlarge": 2, "metal": 2, "": 1},
    **{
        family: {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8, "metal": 8, "": 1}
        for family in ("g4dn", "g5", "g6", "g6e")
    },
    **{family: {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8, "": 1} for family in ("g7", "g7e")},
}
# Machines of more than four vCPUs for each "xlarge" in their name.
_MORE_CPUS = {"c1.xlarge": 8, "c4.8xlarge": 36, "d2.8xlarge": 36}
_KINDS: dict[str, tuple[Any, str]] = {
    "string": (str, "text, in quotes where YAML takes it for something else"),
    "blob": ((str, bytes), "text"),
    "timestamp": ((str, date), "a time"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
    "long": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "double": ((int, float), "a number"),
    "structure": (dict, "keys and values"),
    "map": (dict, "keys and values"),
    "list": (list, "a list"),
}


def aws_faults(file: dict[str, Any], types: list[NodeType]) -> Iterator[str]:
    """For a file that Ray's schema accepts: what AWS, or Ray's provider for it, would refuse, ignore or bill."""
    yield from _provider(file["provider"])
    yield from _launches(file)
    yield from _spot(file, types)


def _provider(provider: dict[str, Any]) -> Iterator[str]:
    for key in sorted(map(str, provider.keys() - PROVIDER_KEYS)):
        yield f"provider.{key}: unknown to Ray's AWS provider{hint(key, PROVIDER_KEYS)}"
    region, zones = provider.get("region"), _zones(provider)
    if region is None:
        yield "provider.region: missing; add it"
    for zone in zones:
        if region is not None and not zone.startswith(str(region)):
            yield f"provider.availability_zone: {zone!r} is not in {region}; write zones of one region, with commas"
    if "aws_credentials" in provider:
        yield "provider.aws_credentials: anybody who reads the file has the keys; leave it out, and use `aws configure`"
    if provider.get("cache_stopped_nodes") is not False:
        yield "provider.cache_stopped_nodes: Ray stops nodes for later use, and their disks cost; write false"
    for rule in map(mapping, provider.get("security_group", {}).get("IpPermissions", [])):
        ranges = map(mapping, [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])])
        world = any(span.get("CidrIp", span.get("CidrIpv6")) in ("0.0.0.0/0", "::/0") for span in ranges)
        first, last = rule.get("FromPort"), rule.get("ToPort")
        if world and (first, last) != (22, 22):
            yield (
                f"provider.security_group.IpPermissions: anybody can reach ports {first} to {last} and run "
                "code through Ray's; leave the rule out, and use the tunnel of `ray dashboard`"
            )


def _zones(provider: dict[str, Any]) -> list[str]:
    return [zone.strip() for zone in provider.get("availability_zone", "").split(",") if zone.strip()]


def _launches(file: dict[str, Any]) -> Iterator[str]:
    """What EC2 would refuse, by its own schema."""
    try:
        region = file["provider"].get("region")
        if region is not None and region not in _regions():
            yield f"provider.region: {region!r} is not a region of EC2{hint(region, _regions(), '')}"
        rules = file["provider"].get("security_group", {}).get("IpPermissions", [])
        yield from _ingress_faults("provider.security_group.IpPermissions", rules)
        for name, entry in file["available_node_types"].items():
            yield from _launch_faults(f"available_node_types.{name}.node_config", entry["node_config"])
    except _Unknown:
        yield (
            "available_node_types: node_config was not checked, because EC2's schema comes with "
            "botocore, which is not installed; pip install 'raydistill[aws]'"
        )
    with_key = "ssh_private_key" in file.get("auth", {})
    for name, entry in file["available_node_types"].items():
        key, node_config = f"available_node_types.{name}", entry["node_config"]
        yield from _resource_faults(key, node_config, entry["resources"])
        if with_key and not node_config.keys() & {"KeyName", "UserData", "LaunchTemplate"}:
            yield f"{key}.node_config.KeyName: missing beside auth.ssh_private_key; write that key pair's name"
        elif not with_key and "KeyName" in node_config:
            yield f"{key}.node_config.KeyName: Ray overwrites it; add auth.ssh_private_key, or leave it out"


def _spot(file: dict[str, Any], types: list[NodeType]) -> Iterator[str]:
    """Spot capacity runs out by machine type and by zone."""
    spots, pools = [node_type.name for node_type in types if node_type.spot and node_type.max_workers], set()
    for name in spots:
        node_config = file["available_node_types"][name]["node_config"]
        places = node_config.get("SubnetIds") or _zones(file["provider"]) or ["all zones", "of the region"]
        pools |= {(str(node_config.get("InstanceType")), str(place)) for place in places}
    if len(pools) == 1:
        machine, zone = pools.pop()
        yield (
            f"available_node_types.{spots[0]}: all spot nodes are {machine} in {zone}, and run out together; "
            "write more zones in provider.availability_zone, or add spot types of other machines"
        )


class _Unknown(Exception):
    """botocore is not installed."""


@lru_cache
def _session() -> Any:
    try:
        import botocore.session  # type: ignore[import-untyped]
    except ImportError:
        raise _Unknown from None
    return botocore.session.get_session()


@lru_cache
def _shape(operation: str) -> Any:
    return _session().get_service_model("ec2").operation_model(operation).input_shape


def _regions() -> list[str]:
    """The zones of EC2 in every partition. Raises _Unknown."""
    session = _session()
    return [name for part in session.get_available_partitions() for name in session.get_available_regions("ec2", part)]


def _launch_faults(key: str, node_config: dict[str, Any]) -> Iterator[str]:
    """What EC2 would refuse in a `node_config`, or Ray would not pass on. Raises _Unknown."""
    shape = _shape("RunInstances")
    for name, instead in OVERWRITTEN.items():
        if name in node_config:
            yield f"{key}.{name}: Ray overwrites it; {instead}"
    subnets = node_config.get("SubnetIds")  # Ray turns it into SubnetId, one after the other
    if subnets is not None:
        yield from _of_shape(f"{key}.SubnetIds", shape.members["SecurityGroupIds"], subnets)
    known = {name: value for name, value in node_config.items() if name not in ("SubnetIds", *OVERWRITTEN)}
    yield from _of_shape(key, shape, known, {"SubnetIds"}, required=False)
    if "LaunchTemplate" in node_config:  # may name all the rest
        return
    for name, lack in (("InstanceType", "AWS' default is m1.small"), ("ImageId", "Ray's default is an old image")):
        if name not in node_config:
            yield f"{key}.{name}: missing, and {lack}; add it"
    image = node_config.get("ImageId")
    if isinstance(image, str) and not re.fullmatch(r"ami-([0-9a-f]{8}|[0-9a-f]{17})|resolve:ssm:.+", image):
        yield f"{key}.ImageId: {image!r} is not an image id; write ami- and the digits that AWS gave it"


def _ingress_faults(key: str, permissions: list[Any]) -> Iterator[str]:
    """What EC2 would refuse in a security group's rules. Raises _Unknown."""
    yield from _of_shape(key, _shape("AuthorizeSecurityGroupIngress").members["IpPermissions"], permissions)


def _of_shape(key: str, shape: Any, value: Any, also: Iterable[str] = (), required: bool = True) -> Iterator[str]:
    kind, words = _KINDS[shape.type_name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        yield f"{key}: {value!r}, where EC2 takes {words}"
    elif shape.type_name == "structure":
        for name, inner in value.items():
            if name in shape.members:
                yield from _of_shape(f"{key}.{name}", shape.members[name], inner)
            else:
                yield f"{key}.{name}: unknown to EC2{hint(name, [*shape.members, *also])}"
        for name in shape.required_members if required else ():
            if name not in value:
                yield f"{key}.{name}: missing; add it"
    elif shape.type_name == "list":
        for number, inner in enumerate(value):
            yield from _of_shape(f"{key}.{number}", shape.member, inner)
    elif shape.type_name == "map":
        for name, inner in value.items():
            yield from _of_shape(f"{key}.{name}", shape.value, inner)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        import botocore

        few = f"; write one of {', '.join(shape.enum)}" if len(shape.enum) <= 8 else ""
        newer = f"; botocore {botocore.__version__} knows no other: where it is newer, pip install -U botocore"
        yield f"{key}: {value!r} is not one of EC2's values{hint(value, shape.enum, few or newer)}"


def _resource_faults(key: str, node_config: dict[str, Any], resources: dict[str, Any]) -> Iterator[str]:
    """More GPUs or CPUs than the machine has, or GPUs that nothing will use. For an unknown family it checks
    nothing."""
    machine = node_config.get("InstanceType")
    if not isinstance(machine, str) or "." not in machine:
        return
    family, _, size = machine.partition(".")
    sizes = GPUS.get(family, {} if re.match(r"[gp]\d", family) else {"": 0})
    has, said = sizes.get(size, sizes.get("")), resources.get("GPU", 0)
    if has is not None and said > has:
        yield f"{key}.resources.GPU: {said}, and {machine} has {has}; write {has} or choose another InstanceType"
    elif has and not said:
        yield f"{key}.resources.GPU: none, and {machine} has {has}, which would be paid for; write {has}"
    large = re.fullmatch(r"(\d*)xlarge", size)
    cpus = _MORE_CPUS.get(machine, 4 * int(large[1] or 1)) if large else None
    if cpus is not None and not family.startswith("hpc") and resources.get("CPU", 0) > cpus:
        yield f"{key}.resources.CPU: {resources['CPU']}, and {machine} has {cpus}; write {cpus} or less"
