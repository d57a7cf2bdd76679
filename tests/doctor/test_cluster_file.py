"""The files that describe clusters are sound, and each thing that is checked is caught in a copy that breaks it."""

import gzip
import importlib.util
import itertools
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raydistill.config import load_config
from raydistill.doctor.cluster_file import NodeType, check_cluster_file, check_kuberay_file, offered
from raydistill.doctor.node_types import read_documents
from raydistill.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"
RAYCLUSTER = ROOT / "deploy" / "kuberay" / "raycluster.yaml"
RAYJOB = ROOT / "deploy" / "kuberay" / "rayjob.yaml"
REMOVED = object()
TYPES = "available_node_types"
SPOT = f"{TYPES}.spot_g5.node_config.InstanceMarketOptions"
NODE = f"{TYPES}.train.node_config"
DISK = f"{NODE}.BlockDeviceMappings.0.Ebs"
MARKET = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
WORLD = [{"CidrIp": "0.0.0.0/0"}]
TOKEN = "RAY_AUTH_MODE=token"
HEAD = "ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"
HEAD_START = f"{HEAD} --dashboard-host=127.0.0.1"
WATCH = "python -m raydistill.cluster.preemption --cloud aws &"
WORKER_START = "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"


def set_at(tree: Any, key: str, value: Any) -> None:
    """Set what stands at a dotted key, in which a number counts in a list and a name finds a group; or take it away."""
    *way, last = key.split(".")
    for step in way:
        if isinstance(tree, list):
            tree = tree[int(step)] if step.isdigit() else next(g for g in tree if g["groupName"] == step)
        else:
            tree = tree[step]
    if value is REMOVED:
        del tree[last]
    else:
        tree[last] = value


def broken(source: Path, target: Path, key: str, value: Any, document: int = -1) -> str:
    """A copy of a shipped file with one thing changed in one of its documents."""
    documents = list(yaml.safe_load_all(source.read_text()))
    # Aliases are one object in memory; a change is to stay where it is made.
    documents = [yaml.safe_load(yaml.dump(tree, Dumper=_NoAliases, sort_keys=False)) for tree in documents]
    set_at(documents[document], key, value)
    target.write_text(yaml.dump_all(documents, Dumper=_NoAliases, sort_keys=False))
    return str(target)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def only_fault(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    return faults[0]


@pytest.mark.parametrize(
    ("check", "path"),
    [(check_cluster_file, CLUSTER), (check_kuberay_file, RAYCLUSTER), (check_kuberay_file, RAYJOB)],
    ids=["cluster", "raycluster", "rayjob"],
)
def test_the_shipped_files_are_sound(check: Callable[[str], list[str]], path: Path) -> None:
    assert check(str(path)) == []


CLUSTER_FAULTS = [
    # Ray's own schema and its own rules.
    ("max_worker", 3, "max_worker", "did you mean max_workers?"),
    (f"{TYPES}.spot_g5.idle_timeout", 3, f"{TYPES}.spot_g5.idle_timeout", "did you mean idle_timeout_s?"),
    (f"{TYPES}.train.resources", REMOVED, f"{TYPES}.train", "'resources' is a required property; add it"),
    (f"{TYPES}.train.resources.GPU", "1", f"{TYPES}.train.resources.GPU", "write integer"),
    (f"{TYPES}.train.resources.GPU", -1, f"{TYPES}.train.resources.GPU", "write 0 or more"),
    (f"{TYPES}.train.labels.pool", 1, f"{TYPES}.train.labels.pool", "write text, in quotes"),
    ("provider", REMOVED, "the file", "'provider' is a required property; add it"),
    ("head_node_type", "haed", "head_node_type", "did you mean head?"),
    ("available_node_types", REMOVED, "available_node_types", "add it"),
    ("max_workers", REMOVED, "max_workers", "add it"),
    ("available_node_types", {1: {"resources": {}, "node_config": {}}}, "the file", "write keys in quotes"),
    # Numbers of nodes.
    (f"{TYPES}.train.max_workers", 13, f"{TYPES}.train.max_workers", "write 12 or less"),
    (f"{TYPES}.spot_g6.min_workers", 3, f"{TYPES}.spot_g6.min_workers", "write 2 or less"),
    # The provider.
    ("provider.availability_zones", "a", "provider.availability_zones", "did you mean availability_zone?"),
    ("provider.type", "gcp", "provider.type", "only files for aws are checked"),
    ("provider.cache_stopped_nodes", True, "provider.cache_stopped_nodes", "write false"),
    ("provider.cache_stopped_nodes", REMOVED, "provider.cache_stopped_nodes", "write false"),
    ("provider.type", "asw", "provider.type", "did you mean aws?"),
    ("provider.region", REMOVED, "provider.region", "add it"),
    ("provider.availability_zone", "us-west-2a, us-east-1a", "provider.availability_zone", "'us-east-1a' is not in"),
    ("provider.availability_zone", ["us-west-2a"], "provider.availability_zone", "write text, in quotes"),
    ("provider.aws_credentials", {"aws_access_key_id": "x"}, "provider.aws_credentials", "leave it out"),
    (
        "provider.security_group.IpPermissions",
        [{"FromPort": "22", "ToPort": 22, "IpProtocol": "tcp"}],
        "provider.security_group.IpPermissions.0.FromPort",
        "EC2 takes a whole number",
    ),
    (
        "provider.security_group.IpPermissions",
        [{"FromPort": 22, "ToPort": 22, "IpProtocl": "tcp"}],
        "provider.security_group.IpPermissions.0.IpProtocl",
        "did you mean IpProtocol?",
    ),
    # What EC2 starts nodes with.
    (f"{NODE}.InstanceMarketOption", MARKET, f"{NODE}.InstanceMarketOption", "did you mean InstanceMarketOptions?"),
    (f"{NODE}.InstanceTyp", "g6.xlarge", f"{NODE}.InstanceTyp", "did you mean InstanceType?"),
    (f"{NODE}.ImgeId", "ami-0123456789abcdef0", f"{NODE}.ImgeId", "did you mean ImageId?"),
    (f"{NODE}.SecurityGroupId", "sg-1", f"{NODE}.SecurityGroupId", "did you mean SecurityGroupIds?"),
    (f"{NODE}.InstanceType", REMOVED, f"{NODE}.InstanceType", "default is m1.small; add it"),
    (f"{NODE}.ImageId", REMOVED, f"{NODE}.ImageId", "add it"),
    (f"{NODE}.ImageId", "ubuntu-24.04", f"{NODE}.ImageId", "no id of an image"),
    (f"{NODE}.InstanceType", "g6.3xlarge", f"{NODE}.InstanceType", "none of EC2's values; did you mean g6.xlarge?"),
    (f"{NODE}.KeyName", REMOVED, f"{NODE}.KeyName", "missing beside auth.ssh_private_key"),
    (f"{NODE}.SubnetId", "subnet-1", f"{NODE}.SubnetId", "write SubnetIds"),
    (f"{NODE}.SubnetIds", "subnet-1", f"{NODE}.SubnetIds", "EC2 takes a list"),
    (f"{NODE}.MinCount", 2, f"{NODE}.MinCount", "write min_workers"),
    (f"{NODE}.IamInstanceProfile", "worker", f"{NODE}.IamInstanceProfile", "EC2 takes keys and values"),
    (f"{NODE}.MetadataOptions.HttpTokens", True, f"{NODE}.MetadataOptions.HttpTokens", "EC2 takes text"),
    (f"{DISK}.VolumSize", 20, f"{DISK}.VolumSize", "did you mean VolumeSize?"),
    (f"{DISK}.VolumeSize", "20", f"{DISK}.VolumeSize", "'20', where EC2 takes a whole number"),
    (f"{DISK}.VolumeType", "gp4", f"{DISK}.VolumeType", "did you mean gp3?"),
    (f"{SPOT}.MarketType", "Spot", f"{SPOT}.MarketType", "did you mean spot?"),
    (f"{SPOT}.MarketType", "SPOT", f"{SPOT}.MarketType", "did you mean spot?"),
    (f"{SPOT}.SpotOptions.MaxPrice", 0.5, f"{SPOT}.SpotOptions.MaxPrice", "EC2 takes text"),
    (f"{TYPES}.train.resources.GPU", 4, f"{TYPES}.train.resources.GPU", "g6.2xlarge has 1"),
    (f"{TYPES}.train.resources", {"CPU": 8}, f"{TYPES}.train.resources.GPU", "1 that is paid for"),
    (f"{TYPES}.train.resources.CPU", 9, f"{TYPES}.train.resources.CPU", "g6.2xlarge has 8"),
    (f"{TYPES}.train.resources.gpus", 1, f"{TYPES}.train.resources.gpus", "did you mean GPU?"),
    (f"{TYPES}.train.labels.pool", "a b", f"{TYPES}.train.labels", "Invalid label key value"),
    # What is paid for while nobody works.
    (f"{TYPES}.train.min_workers", 1, f"{TYPES}.train.min_workers", "write 0, and cluster.grows_to"),
    ("idle_timeout_minutes", REMOVED, "idle_timeout_minutes", "Ray's default is 5"),
    ("idle_timeout_minutes", 1e9, "idle_timeout_minutes", "write 1 to 60"),
    ("idle_timeout_minutes", 0, "idle_timeout_minutes", "write 1 to 60"),
    ("idle_timeout_minutes", float("nan"), "idle_timeout_minutes", "write 1 to 60"),
    (f"{TYPES}.train.idle_timeout_s", 86400, f"{TYPES}.train.idle_timeout_s", "write 60 to 3600"),
    # Other forms than Ray takes, of which its schema says nothing.
    ("rsync_exclude", [3], "rsync_exclude.0", "write text, in quotes"),
    ("file_mounts", {"~/.ray/auth_token": ["a"]}, "file_mounts.~/.ray/auth_token", "write text, in quotes"),
    ("setup_commands", "pip install x", "setup_commands", "write a list"),
    # The images of containers.
    ("docker.image", "rayproject/ray:2.9.0-gpu", "docker.image", f"write rayproject/ray:{ray.__version__}"),
    ("docker.head_image", f"rayproject/ray:{ray.__version__}-py310", "docker.head_image", "raydistill needs 3.11"),
    (
        f"{TYPES}.train.docker",
        {"worker_image": "rayproject/ray-ml:latest"},
        f"{TYPES}.train.docker.worker_image",
        f"write rayproject/ray-ml:{ray.__version__}",
    ),
    # The head.
    (f"{TYPES}.head.resources", {"CPU": 4}, f"{TYPES}.head.resources.CPU", "write 0"),
    (f"{TYPES}.head.resources", {}, f"{TYPES}.head.resources.CPU", "write 0"),
    # The workers' groups.
    (f"{TYPES}.train.labels", REMOVED, f"{TYPES}.train.labels", "write {pool: ...}"),
    (f"{TYPES}.train.resources", {"GPU": 1}, f"{TYPES}.train.resources", "write {CPU: ...}"),
    (f"{SPOT}.SpotOptions.SpotInstanceType", "persistent", f"{SPOT}.SpotOptions.SpotInstanceType", "write one-time"),
    (
        f"{SPOT}.SpotOptions.InstanceInterruptionBehavior",
        REMOVED,
        f"{SPOT}.SpotOptions.InstanceInterruptionBehavior",
        "write terminate",
    ),
    # The commands.
    ("setup_commands", REMOVED, "setup_commands", "Ray's default is a nightly wheel"),
    ("head_setup_commands", REMOVED, "head_setup_commands", "[] for none"),
    ("worker_setup_commands", REMOVED, "worker_setup_commands", "[] for none"),
    ("head_start_ray_commands", REMOVED, "head_start_ray_commands", "a dashboard on all interfaces"),
    ("worker_start_ray_commands", REMOVED, "worker_start_ray_commands", "a start without a token"),
    ("head_start_ray_commands", ["ray stop"], "head_start_ray_commands", "nothing starts Ray"),
    ("head_start_ray_commands", [HEAD_START], "head_start_ray_commands", "write `RAY_AUTH_MODE=token ray start ...`"),
    (
        "head_start_ray_commands",
        [f"{HEAD_START}; RAY_AUTH_MODE=token true"],
        "head_start_ray_commands",
        "write `RAY_AUTH_MODE=token ray start ...`",
    ),
    (
        "head_start_ray_commands",
        [f"RAY_AUTH_MODE=token {HEAD} --dashboard-host=0.0.0.0"],
        "head_start_ray_commands",
        "--dashboard-host=0.0.0.0",
    ),
    (
        "head_start_ray_commands",
        [f"RAY_AUTH_MODE=token {HEAD} --dashboard-host '::'"],
        "head_start_ray_commands",
        "--dashboard-host=::",
    ),
    (
        "worker_start_ray_commands",
        [WATCH, "RAY_AUTH_MODE=disabled ray start --address=$RAY_HEAD_IP:6379"],
        "worker_start_ray_commands",
        "write `RAY_AUTH_MODE=token ray start ...`",
    ),
    (
        "head_start_ray_commands",
        [f"RAY_AUTH_MODE=token {HEAD} --dashbord-port=1"],
        "head_start_ray_commands",
        "dashboard-port?",
    ),
    (
        "head_start_ray_commands",
        ["RAY_AUTH_MODE=token ray start --head"],
        "head_start_ray_commands",
        "no worker ever joins",
    ),
    (
        "worker_start_ray_commands",
        [WATCH, "RAY_AUTH_MODE=token ray start"],
        "worker_start_ray_commands",
        "without --address",
    ),
    ("setup_commands", ["uv pip install ray==2.9"], "setup_commands", "installs ray==2.9"),
    ("setup_commands", ["pip3.12 install ray==2.9"], "setup_commands", "installs ray==2.9"),
    ("file_mounts", {"~/.ray/token": "~/.ray/auth_token"}, "file_mounts", "~/.ray/auth_token: ~/.ray/auth_token"),
    ("setup_commands", ["pip install -U 'ray[default]==2.59.0'"], "setup_commands", "installs ray==2.59.0"),
    ("setup_commands", ["pip install 'ray[default]>=2.60' s3fs"], "setup_commands", "installs ray>=2.60"),
    ("setup_commands", ["which ray || pip install ray"], "setup_commands", "installs ray of any version"),
    (
        "head_setup_commands",
        ["pip install https://s3-us-west-2.amazonaws.com/ray-wheels/latest/ray-3.0.0.whl"],
        "head_setup_commands",
        "installs a nightly wheel",
    ),
    (
        f"{TYPES}.train.worker_setup_commands",
        ["pip install ray==2.59.0"],
        f"{TYPES}.train.worker_setup_commands",
        f"write 'ray[default]=={ray.__version__}'",
    ),
]


CONTAINERS = {"image": f"rayproject/ray:{ray.__version__}-py312-gpu", "container_name": "ray"}


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file with containers."""
    path = tmp_path_factory.mktemp("containers") / "cluster.yaml"
    broken(CLUSTER, path, "docker", CONTAINERS)
    assert check_cluster_file(str(path)) == []
    return path


@pytest.mark.parametrize(("key", "value", "named", "says"), CLUSTER_FAULTS)
def test_a_broken_cluster_file_is_caught(
    tmp_path: Path, containers: Path, key: str, value: Any, named: str, says: str
) -> None:
    fault = only_fault(check_cluster_file(broken(containers, tmp_path / "cluster.yaml", key, value)))
    assert fault.startswith(f"{named}: ")
    assert says in fault


def test_more_nodes_at_once_than_may_be_are_caught(tmp_path: Path) -> None:
    more = broken(CLUSTER, tmp_path / "more.yaml", f"{TYPES}.train.min_workers", 4)
    faults = check_cluster_file(broken(Path(more), tmp_path / "cluster.yaml", "max_workers", 3))
    assert faults[0].startswith("max_workers: 3, ")
    assert "write 4 or more" in faults[0]


def test_all_unknown_names_are_said_at_once(tmp_path: Path) -> None:
    twice = broken(CLUSTER, tmp_path / "twice.yaml", "max_worker", 3)
    faults = check_cluster_file(broken(Path(twice), tmp_path / "cluster.yaml", "auth.ssh_usr", "ubuntu"))
    assert sorted(fault.partition(":")[0] for fault in faults) == ["auth.ssh_usr", "max_worker"]


def test_one_spot_machine_in_one_zone_is_caught(tmp_path: Path) -> None:
    types = yaml.safe_load(CLUSTER.read_text())[TYPES]
    one = {name: types[name] for name in ("head", "spot_g5", "fallback")}
    path = broken(CLUSTER, tmp_path / "one.yaml", TYPES, one)
    assert check_cluster_file(path) == []  # in three zones
    narrow = broken(Path(path), tmp_path / "narrow.yaml", "provider.availability_zone", "us-west-2b")
    assert "all spot nodes are g5.2xlarge in us-west-2b" in only_fault(check_cluster_file(narrow))
    all_zones = broken(Path(path), tmp_path / "all.yaml", "provider.availability_zone", REMOVED)
    assert check_cluster_file(all_zones) == []
    subnet = broken(Path(all_zones), tmp_path / "subnet.yaml", f"{TYPES}.spot_g5.node_config.SubnetIds", ["subnet-1"])
    assert "in subnet-1" in only_fault(check_cluster_file(subnet))


def test_a_region_that_is_none_is_caught(tmp_path: Path) -> None:
    path = broken(CLUSTER, tmp_path / "cluster.yaml", "provider.availability_zone", REMOVED)
    wrong = broken(Path(path), tmp_path / "wrong.yaml", "provider.region", "us-wst-2")
    assert "did you mean us-west-2?" in only_fault(check_cluster_file(wrong))


def test_a_launch_template_may_name_the_rest(tmp_path: Path) -> None:
    config = {"LaunchTemplate": {"LaunchTemplateName": "mine"}}
    assert check_cluster_file(broken(CLUSTER, tmp_path / "cluster.yaml", NODE, config)) == []
    wrong = {"LaunchTemplate": {"LaunchTemplatName": "mine"}}
    fault = only_fault(check_cluster_file(broken(CLUSTER, tmp_path / "wrong.yaml", NODE, wrong)))
    assert "did you mean LaunchTemplateName?" in fault


def test_without_the_schemas_it_is_said_what_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from raydistill.doctor import ec2

    ec2._session.cache_clear()
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    assert "pip install 'raydistill[aws]'" in only_fault(check_cluster_file(str(CLUSTER)))
    monkeypatch.setattr("raydistill.doctor.kubernetes_schema.find_spec", lambda name: None)
    assert "pip install 'raydistill[kubernetes]'" in only_fault(check_kuberay_file(str(RAYCLUSTER)))


def test_the_gpus_and_cpus_of_machines_are_those_that_aws_tells() -> None:
    """moto keeps AWS' answer to DescribeInstanceTypes."""
    from raydistill.doctor.ec2 import _resource_faults

    folder = Path(importlib.util.find_spec("moto").submodule_search_locations[0])  # type: ignore[union-attr,index]
    machines = json.loads(gzip.decompress((folder / "ec2/resources/instance_types.json.gz").read_bytes()))
    for name, facts in machines.items():
        has = sum(gpu["Count"] for gpu in facts.get("GpuInfo", {}).get("Gpus", []))
        has = has or int("GpuInfo" in facts)  # a part of one is one
        cpus = facts["VCpuInfo"]["DefaultVCpus"]
        faults = list(_resource_faults("key", {"InstanceType": name}, {"CPU": cpus, "GPU": has}))
        assert faults == [], name
        assert list(_resource_faults("key", {"InstanceType": name}, {"CPU": cpus, "GPU": has + 1})), name


def test_a_head_on_spot_is_caught(tmp_path: Path) -> None:
    key = f"{TYPES}.head.node_config.InstanceMarketOptions"
    faults = check_cluster_file(broken(CLUSTER, tmp_path / "cluster.yaml", key, MARKET))
    assert any(fault.startswith(f"{key}: ") and "leave it out" in fault for fault in faults)


def test_spot_needs_a_watcher_in_the_start_of_all_workers_or_in_its_own_setup(tmp_path: Path) -> None:
    path = broken(CLUSTER, tmp_path / "cluster.yaml", "worker_start_ray_commands", [WORKER_START])
    faults = check_cluster_file(path)
    assert [fault.partition(":")[0] for fault in faults] == [
        f"{TYPES}.{name}" for name in ("spot_g6", "spot_g5", "spot_g4dn")
    ]
    assert all("start `python -m raydistill.cluster.preemption" in fault for fault in faults)
    own = broken(Path(path), tmp_path / "own.yaml", f"{TYPES}.spot_g5.worker_setup_commands", [WATCH])
    assert [fault.partition(":")[0] for fault in check_cluster_file(own)] == [
        f"{TYPES}.{name}" for name in ("spot_g6", "spot_g4dn")
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fallback", REMOVED),
        ("fallback.resources.GPU", 0),
        ("fallback.priority", 10),  # Ray would as soon take it as spot
        ("fallback.max_workers", 0),
        ("fallback.node_config.InstanceMarketOptions", {**MARKET}),
    ],
)
def test_spot_needs_on_demand_nodes_with_its_gpus_behind_it(tmp_path: Path, key: str, value: Any) -> None:
    faults = check_cluster_file(broken(CLUSTER, tmp_path / "cluster.yaml", f"{TYPES}.{key}", value))
    for name in ("spot_g6", "spot_g5", "spot_g4dn"):
        assert any(
            fault.startswith(f"{TYPES}.{name}: ") and "add on-demand nodes with {'GPU': 1}" in fault for fault in faults
        )


@pytest.mark.parametrize(
    ("rule", "caught"),
    [
        ({"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": WORLD}, True),
        ({"FromPort": 22, "ToPort": 6379, "IpProtocol": "tcp", "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}, True),
        ({"IpProtocol": "-1", "IpRanges": WORLD}, True),
        ({"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": WORLD}, False),
        ({"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}, False),
    ],
)
def test_only_ssh_may_be_open_to_the_world(tmp_path: Path, rule: dict[str, Any], caught: bool) -> None:
    key = "provider.security_group.IpPermissions"
    faults = check_cluster_file(broken(CLUSTER, tmp_path / "cluster.yaml", key, [rule]))
    assert [fault.startswith(f"{key}: ") for fault in faults] == [True] * caught


CLUSTER_SPEC = "spec.workerGroupSpecs"
SPOT_POD = f"{CLUSTER_SPEC}.spot.template.spec"
CONTAINER = f"{SPOT_POD}.containers.0"
KUBERAY_FAULTS = [
    ("spec.authOptions", REMOVED, "spec.authOptions.mode", "write token"),
    ("spec.authOptions.mode", "disabled", "spec.authOptions.mode", "write token"),
    ("spec.rayVersion", "2.59.0", "spec.rayVersion", f"write '{ray.__version__}'"),
    ("spec.enableInTreeAutoscaling", REMOVED, "spec.enableInTreeAutoscaling", "write true"),
    ("spec.autoscalerOptions.version", "v1", "spec.autoscalerOptions.version", "write v2"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", "4", "spec.headGroupSpec.rayStartParams.num-cpus", "write '0'"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", REMOVED, "spec.headGroupSpec.rayStartParams.num-cpus", "write '0'"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0, "spec.headGroupSpec.rayStartParams.num-cpus", "write '0'"),
    ("spec.headGroupSpec.labels", REMOVED, "spec.headGroupSpec.labels", "write {pool: ...}"),
    (f"{CLUSTER_SPEC}.train.labels", REMOVED, f"{CLUSTER_SPEC}.train.labels", "write {pool: ...}"),
    (
        f"{CLUSTER_SPEC}.train.rayStartParams.labels",
        "pool=train",
        f"{CLUSTER_SPEC}.train.rayStartParams.labels",
        f"write {CLUSTER_SPEC}.train.labels",
    ),
    (
        f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds",
        30,
        f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds",
        "write 60 or more",
    ),
    (
        "spec.headGroupSpec.template.spec.terminationGracePeriodSeconds",
        REMOVED,
        "spec.headGroupSpec.template.spec.terminationGracePeriodSeconds",
        "30 is too short",
    ),
    (
        f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds",
        "120",
        f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds",
        "takes a whole number",
    ),
    (
        f"{CLUSTER_SPEC}.spot.template.spec.containers",
        [],
        f"{CLUSTER_SPEC}.spot.template.spec.containers",
        "add the one that runs Ray",
    ),
    (
        f"{CLUSTER_SPEC}.spot.template.spec.containers.0.image",
        "registry.example.com:5000/raydistill",
        f"{CLUSTER_SPEC}.spot.template.spec.containers.image",
        "write the tag of a version",
    ),
    (
        "spec.headGroupSpec.template.spec.containers.0.image",
        "raydistill:latest",
        "spec.headGroupSpec.template.spec.containers.image",
        "write the tag of a version",
    ),
    (f"{CLUSTER_SPEC}.spot.maxReplicas", REMOVED, "spec", "maxReplicas"),
    # Names and types, by KubeRay's and Kubernetes' own.
    ("spec.rayVerson", "2.60.0", "spec.rayVerson", "did you mean rayVersion?"),
    ("spec.autoscalerOptions.idleTimeout", 60, "spec.autoscalerOptions.idleTimeout", "mean idleTimeoutSeconds?"),
    ("spec.autoscalerOptions.upscalingMode", "default", "spec.autoscalerOptions.upscalingMode", "mean Default?"),
    (f"{CLUSTER_SPEC}.spot.minReplica", 0, f"{CLUSTER_SPEC}.spot.minReplica", "did you mean minReplicas?"),
    (f"{CLUSTER_SPEC}.spot.minReplicas", "0", f"{CLUSTER_SPEC}.spot.minReplicas", "takes a whole number"),
    (f"{CLUSTER_SPEC}.spot.rayStartParams.num-gpu", "1", f"{CLUSTER_SPEC}.spot.rayStartParams.num-gpu", "num-gpus?"),
    (f"{SPOT_POD}.nodeSelctor", {}, f"{SPOT_POD}.nodeSelctor", "did you mean nodeSelector?"),
    (f"{SPOT_POD}.nodeSelector.spot", True, f"{SPOT_POD}.nodeSelector.spot", "takes text"),
    (f"{SPOT_POD}.tolerations", "nvidia.com/gpu", f"{SPOT_POD}.tolerations", "takes a list"),
    (f"{SPOT_POD}.tolerations.0.opertor", "Exists", f"{SPOT_POD}.tolerations.0.opertor", "did you mean operator?"),
    (f"{SPOT_POD}.tolerations.0.effect", "NoSchedul", f"{SPOT_POD}.tolerations.0.effect", "did you mean NoSchedule?"),
    (f"{SPOT_POD}.tolerations.0.value", "true", f"{SPOT_POD}.tolerations", "Exists takes no value"),
    (f"{CONTAINER}.imge", "x", f"{CONTAINER}.imge", "did you mean image?"),
    (f"{CONTAINER}.name", REMOVED, f"{CONTAINER}.name", "missing; add it"),
    (f"{CONTAINER}.imagePullPolicy", "always", f"{CONTAINER}.imagePullPolicy", "did you mean Always?"),
    (f"{CONTAINER}.env", {"A": "b"}, f"{CONTAINER}.env", "takes a list"),
    (f"{CONTAINER}.env", [{"name": "A", "value": 1}], f"{CONTAINER}.env.0.value", "takes text"),
    (f"{CONTAINER}.resources.limit", {}, f"{CONTAINER}.resources.limit", "did you mean limits?"),
    (f"{CONTAINER}.resources.limits.cpus", 6, f"{SPOT_POD}.containers.resources.limits.cpus", "did you mean cpu?"),
    (
        f"{CONTAINER}.resources.limits",
        {"cpu": 6, "nvidia.com/gpu": 1, "nvidia.com/gpus": 1},
        f"{SPOT_POD}.containers.resources.limits.nvidia.com/gpus",
        "did you mean nvidia.com/gpu?",
    ),
    (
        f"{CONTAINER}.resources.limits.memory",
        "16GiB",
        f"{SPOT_POD}.containers.resources.limits.memory",
        "no quantity",
    ),
    (f"{CONTAINER}.image", "rayproject/ray:2.9.0", f"{SPOT_POD}.containers.image", f"ray:{ray.__version__}"),
    (f"{CONTAINER}.image", "rayproject/ray:nightly-gpu", f"{SPOT_POD}.containers.image", f"ray:{ray.__version__}"),
    # Numbers of pods, and what is paid for.
    (f"{CLUSTER_SPEC}.spot.minReplicas", 7, f"{CLUSTER_SPEC}.spot.minReplicas", "write 0 to 6"),
    (f"{CLUSTER_SPEC}.spot.replicas", 7, f"{CLUSTER_SPEC}.spot.replicas", "write 0 to 6"),
    (f"{CLUSTER_SPEC}.spot.numOfHosts", 2, f"{CLUSTER_SPEC}.spot.numOfHosts", "write 1"),
    (f"{CLUSTER_SPEC}.spot.idleTimeoutSeconds", 86400, f"{CLUSTER_SPEC}.spot.idleTimeoutSeconds", "60 to 3600"),
    (
        f"{CLUSTER_SPEC}.spot.rayStartParams",
        {"num-gpus": "4"},
        f"{CLUSTER_SPEC}.spot.rayStartParams.num-gpus",
        "limits have 1",
    ),
    ("spec.autoscalerOptions.idleTimeoutSeconds", REMOVED, "spec.autoscalerOptions.idleTimeoutSeconds", "write 600"),
    ("spec.autoscalerOptions.idleTimeoutSeconds", 10**7, "spec.autoscalerOptions.idleTimeoutSeconds", "60 to 3600"),
    (f"{CLUSTER_SPEC}.spot.groupName", "train", f"{CLUSTER_SPEC}.train", "two groups have this name"),
    (f"{CLUSTER_SPEC}.fallback.priority", 10, f"{CLUSTER_SPEC}.spot", "a priority below 10"),
    (f"{CLUSTER_SPEC}.fallback.labels.pool", "spot", f"{CLUSTER_SPEC}.spot", "add on-demand nodes with {'GPU': 1}"),
]


@pytest.mark.parametrize(("key", "value", "named", "says"), KUBERAY_FAULTS)
@pytest.mark.parametrize("source", [RAYCLUSTER, RAYJOB], ids=["raycluster", "rayjob"])
def test_a_broken_kuberay_file_is_caught(
    tmp_path: Path, source: Path, key: str, value: Any, named: str, says: str
) -> None:
    place = "spec.rayClusterSpec" if source == RAYJOB else "spec"
    path = broken(source, tmp_path / "kuberay.yaml", re.sub("^spec", place, key), value)
    faults = [fault for fault in check_kuberay_file(path) if fault.startswith(re.sub("^spec", place, named) + ": ")]
    assert says.replace("spec.", f"{place}.") in only_fault(faults)


def test_the_documents_beside_the_cluster_are_looked_at(tmp_path: Path) -> None:
    path = broken(RAYCLUSTER, tmp_path / "policy.yaml", "spec.polcyTypes", ["Ingress"], document=1)
    assert "did you mean policyTypes?" in only_fault(check_kuberay_file(path))
    path = broken(RAYCLUSTER, tmp_path / "kind.yaml", "kind", "NetworkPolcy", document=1)
    assert "Kubernetes has no NetworkPolcy" in only_fault(check_kuberay_file(path))
    path = broken(RAYCLUSTER, tmp_path / "version.yaml", "apiVersion", "ray.io/v1alpha1")
    assert "write ray.io/v1" in only_fault(check_kuberay_file(path))
    path = broken(RAYCLUSTER, tmp_path / "ray.yaml", "kind", "RayClutser")
    assert "did you mean RayCluster?" in only_fault(check_kuberay_file(path))


def test_a_job_ends_its_cluster(tmp_path: Path) -> None:
    path = broken(RAYJOB, tmp_path / "stays.yaml", "spec.shutdownAfterJobFinishes", False)
    assert "the cluster stays" in only_fault(check_kuberay_file(path))
    path = broken(RAYJOB, tmp_path / "none.yaml", "spec.entrypoint", REMOVED)
    assert only_fault(check_kuberay_file(path)).startswith("spec.entrypoint: missing")


def test_gpus_are_kept_by_a_cluster_alone_and_not_by_a_job(tmp_path: Path) -> None:
    changes = {"minReplicas": 1, "replicas": 1}
    paths = {RAYCLUSTER: "spec", RAYJOB: "spec.rayClusterSpec"}
    for source, place in paths.items():
        path = tmp_path / source.name
        path.write_text(source.read_text())
        for key, value in changes.items():
            broken(path, path, f"{place}.workerGroupSpecs.train.{key}", value)
        faults = check_kuberay_file(str(path))
        assert ["machines with GPUs are kept" in fault for fault in faults] == [True] * (source == RAYCLUSTER)


def test_a_job_counts_on_what_its_groups_come_to() -> None:
    from raydistill.doctor.cluster import check_offers

    [finding] = check_offers(None, str(RAYJOB))
    entrypoint = list(yaml.safe_load_all(RAYJOB.read_text()))[-1]["spec"]["entrypoint"]
    assert re.search(r"cluster\.grows_to=\{.*\}", finding.found)[0] in entrypoint  # type: ignore[index]


def test_the_dashboard_of_a_kuberay_cluster_is_closed_or_guarded(tmp_path: Path) -> None:
    host = "headGroupSpec.rayStartParams.dashboard-host"
    closed = broken(RAYJOB, tmp_path / "closed.yaml", f"spec.rayClusterSpec.{host}", "127.0.0.1")
    assert "write 0.0.0.0" in only_fault(check_kuberay_file(closed))
    unguarded = broken(RAYJOB, tmp_path / "unguarded.yaml", "spec.policyTypes", ["Egress"], document=1)
    assert "add a NetworkPolicy" in only_fault(check_kuberay_file(unguarded))

    open_host = broken(RAYCLUSTER, tmp_path / "open.yaml", f"spec.{host}", "0.0.0.0")
    assert check_kuberay_file(open_host) == []  # guarded by the policy in the same file
    alone = broken(Path(open_host), tmp_path / "alone.yaml", "spec.policyTypes", ["Egress"], document=1)
    assert "write 127.0.0.1" in only_fault(check_kuberay_file(alone))
    default = broken(Path(alone), tmp_path / "default.yaml", f"spec.{host}", REMOVED)
    assert "write 127.0.0.1" in only_fault(check_kuberay_file(default))


def test_other_sound_ways_are_let_pass(tmp_path: Path) -> None:
    lines = f"export RAY_AUTH_MODE=token\n{HEAD_START}"
    assert check_cluster_file(broken(CLUSTER, tmp_path / "lines.yaml", "head_start_ray_commands", [lines])) == []
    image = "spec.headGroupSpec.template.spec.containers.0.image"
    digest = broken(RAYCLUSTER, tmp_path / "digest.yaml", image, "raydistill@sha256:" + "0" * 64)
    assert check_kuberay_file(digest) == []
    tagged = broken(RAYCLUSTER, tmp_path / "tagged.yaml", image, "raydistill:latest@sha256:" + "0" * 64)
    assert check_kuberay_file(tagged) == []
    resources = broken(RAYCLUSTER, tmp_path / "resources.yaml", "spec.headGroupSpec.resources", {"CPU": "0"})
    assert (
        check_kuberay_file(broken(Path(resources), tmp_path / "b.yaml", "spec.headGroupSpec.rayStartParams", {})) == []
    )
    elsewhere = {"clusterSelector": {"ray.io/cluster": "raydistill"}, "entrypoint": "raydistill run job.yaml"}
    assert check_kuberay_file(broken(RAYJOB, tmp_path / "elsewhere.yaml", "spec", elsewhere)) == []


def test_a_file_without_a_cluster_is_said(tmp_path: Path) -> None:
    path = broken(RAYCLUSTER, tmp_path / "kuberay.yaml", "kind", "RayService")
    assert only_fault(check_kuberay_file(path)).startswith("kind: ")


@pytest.mark.parametrize("read", [check_cluster_file, check_kuberay_file, offered])
@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "", "\x00", None], ids=["cut", "list", "empty", "bytes", "none"])
def test_what_is_no_yaml_of_keys_is_an_error(tmp_path: Path, read: Callable[[str], Any], text: str | None) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read(str(path))


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in itertools.pairwise("abcdefghij")
)
STRANGE = {
    "a key twice": ("cluster_name: x\ncluster_name: y\n", "'cluster_name' stands twice"),
    "a key twice, deep": ("a:\n  - {b: 1, c: 2, b: 3}\n", "'b' stands twice"),
    "a tab": ("a:\n\tb: 1\n", "cannot start any token"),
    "code": ("a: !!python/object/apply:os.system ['touch RAN']\n", "could not determine a constructor"),
    "code of a module": ("a: !!python/name:os.system\n", "could not determine a constructor"),
    "billions": (LAUGHS, "its aliases come to"),
    "itself": ("a: &a [*a]\n", "part of"),
    "itself, as keys": ("a: &a {b: *a}\n", "part of"),
    "no anchor": ("a: *nowhere\n", "undefined alias"),
    "a merge of nothing": ("<<: 3\n", "merging"),
    "deep lists": ("a: " + "[" * 9000 + "]" * 9000, "nested too deeply"),
    "deep keys": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "a list as a key": ("{[1]: 2}\n", "unhashable key"),
    "no date": ("a: 2024-99-99\n", "'2024-99-99' is no timestamp"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "is no int"),
    "a zero byte": ("a: \x00\n", "control characters are not allowed"),
    "large": ("a: " + "x" * 5_000_000, "4,194,304 are the most"),
}


@pytest.mark.parametrize("read", [check_cluster_file, check_kuberay_file])
@pytest.mark.parametrize("case", STRANGE)
def test_strange_yaml_ends_with_one_sentence(tmp_path: Path, read: Callable[[str], Any], case: str) -> None:
    text, said = STRANGE[case]
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        read(str(path))
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) < len(str(path)) * 3 + 400
    assert "\n" not in str(refused.value)
    assert not Path("RAN").exists()


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    said = {".": "a folder", "pipe.yaml": "no file", "zero.yaml": "no file", "bytes.yaml": "not UTF-8"}
    for name, words in said.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            check_cluster_file(str(tmp_path / name))
        if name != ".":
            with pytest.raises(ConfigError, match=re.escape(words)):
                load_config([str(tmp_path / name), "images.path=x"])


def test_keys_that_are_merged_may_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: [*b, *a], y: 4}\n")
    assert read_documents(str(path)) == [yaml.safe_load(path.read_text())]  # as Ray reads it


def test_the_node_types_that_a_file_offers() -> None:
    types = {node_type.name: node_type for node_type in offered(str(CLUSTER))}
    assert types["spot_g5"] == NodeType("spot_g5", {"CPU": 8, "GPU": 1}, {"pool": "spot"}, 0, 2, True, 10)
    assert types["head"] == NodeType("head", {"CPU": 0}, {"pool": "head"}, 0, 0, False)
    assert {node_type.labels["pool"] for node_type in types.values()} == {"head", "train", "spot", "fallback"}
    assert [name for name, node_type in types.items() if node_type.spot] == ["spot_g6", "spot_g5", "spot_g4dn"]


def test_a_type_without_a_limit_of_its_own_has_that_of_all(tmp_path: Path) -> None:
    path = broken(CLUSTER, tmp_path / "cluster.yaml", f"{TYPES}.train.max_workers", REMOVED)
    assert {node_type.name: node_type.max_workers for node_type in offered(path)}["train"] == 12


@pytest.mark.parametrize(
    ("generators", "started"),
    [
        (1, {"spot_g6": 1}),
        (8, {"spot_g6": 2, "spot_g5": 2, "spot_g4dn": 2, "fallback": 2}),  # as the file says of itself
    ],
)
def test_what_the_autoscaler_starts_for_generators(generators: int, started: dict[str, int]) -> None:
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    selectors = [[("pool", LabelSelectorOperator.LABEL_OPERATOR_IN, [pool])] for pool in ("spot", "fallback")]
    demand = ResourceRequestUtil.make({"CPU": 1, "GPU": 1}, label_selectors=selectors)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs={
                node_type.name: NodeTypeConfig(
                    name=node_type.name,
                    min_worker_nodes=0,
                    max_worker_nodes=node_type.max_workers,
                    resources=dict(node_type.resources),
                    labels=node_type.labels,
                    priority=node_type.priority,
                )
                for node_type in offered(str(CLUSTER))
            },
            max_num_nodes=13,
            resource_requests=[ResourceRequestByCount(request=demand, count=generators)],
        )
    )
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == started


def test_nothing_is_offered_by_a_file_that_ray_refuses(tmp_path: Path) -> None:
    path = broken(CLUSTER, tmp_path / "cluster.yaml", "head_node_type", "haed")
    with pytest.raises(ConfigError, match=r"did you mean head\?"):
        offered(path)


def test_both_kuberay_files_have_the_same_groups() -> None:
    def groups(spec: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [
            tuple(group.get(key) for key in ("groupName", "labels", "priority", "minReplicas", "maxReplicas"))
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        ]

    cluster = list(yaml.safe_load_all(RAYCLUSTER.read_text()))[-1]["spec"]
    job = list(yaml.safe_load_all(RAYJOB.read_text()))[-1]["spec"]["rayClusterSpec"]
    assert groups(cluster) == groups(job)
    assert [group[1]["pool"] for group in groups(job)] == ["head", "train", "spot", "fallback"]


def test_versions_are_those_of_the_package() -> None:
    pins = set(re.findall(r"'([a-z]+)(?:\[default\])?==([\d.]+)'", CLUSTER.read_text()))
    assert {name for name, _ in pins} == {"ray", "torch", "torchvision"}
    assert pins == set(re.findall(r"'([a-z]+)(?:\[default\])?==([\d.]+)'", (ROOT / "deploy/Dockerfile").read_text()))
    assert ("ray", ray.__version__) in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.requirements import Requirement

    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert [name for name, version in pins if version not in allowed[name]] == []
    images = re.findall(r"image: (?:&image )?(\S+:\S+)", RAYCLUSTER.read_text() + RAYJOB.read_text())
    assert images == [f"registry.example.com/raydistill:{project['version']}"] * 2
