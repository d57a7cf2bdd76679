"""The files that describe clusters are sound, and each thing that is checked is caught in a copy that breaks it."""

import gzip
import importlib.util
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
from raydistill.doctor.cluster_file import check_cluster_file, offered
from raydistill.doctor.cluster_yaml import read_documents
from raydistill.doctor.kuberay_file import check_kuberay_file
from raydistill.doctor.node_types import NodeType
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
SPOT_TYPES = ("spot_g6", "spot_g5", "spot_g4dn")
WORLD = [{"CidrIp": "0.0.0.0/0"}]
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


Broken = Callable[..., str]


@pytest.fixture
def broken(tmp_path: Path) -> Broken:
    """Writes a copy of a shipped file with things changed in one of its documents."""

    def write(source: Path, changes: dict[str, Any], document: int = -1) -> str:
        documents = list(yaml.safe_load_all(source.read_text()))
        # Aliases are one object in memory; a change is to stay where it is made.
        documents = [yaml.safe_load(yaml.dump(tree, Dumper=_NoAliases, sort_keys=False)) for tree in documents]
        for key, value in changes.items():
            set_at(documents[document], key, value)
        (tmp_path / source.name).write_text(yaml.dump_all(documents, Dumper=_NoAliases, sort_keys=False))
        return str(tmp_path / source.name)

    return write


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
    ("max_worker", 3, "did you mean max_workers?"),
    (f"{TYPES}.spot_g5.idle_timeout", 3, "did you mean idle_timeout_s?"),
    (f"{TYPES}.train.resources", REMOVED, "'resources' is a required property; add it", f"{TYPES}.train"),
    (f"{TYPES}.train.resources.GPU", "1", "write integer"),
    (f"{TYPES}.train.resources.GPU", -1, "write 0 or more"),
    (f"{TYPES}.train.labels.pool", 1, "write text, in quotes"),
    ("provider", REMOVED, "'provider' is a required property; add it", "the file"),
    ("head_node_type", "haed", "did you mean head?"),
    ("available_node_types", REMOVED, "add it"),
    ("max_workers", REMOVED, "add it"),
    ("available_node_types", {1: {"resources": {}, "node_config": {}}}, "write keys in quotes", "the file"),
    # Numbers of nodes.
    (f"{TYPES}.train.max_workers", 13, "write 12 or less"),
    (f"{TYPES}.spot_g6.min_workers", 3, "write 2 or less"),
    # The provider.
    ("provider.availability_zones", "a", "did you mean availability_zone?"),
    ("provider.type", "gcp", "only files for aws are checked"),
    ("provider.cache_stopped_nodes", True, "write false"),
    ("provider.cache_stopped_nodes", REMOVED, "write false"),
    ("provider.type", "asw", "did you mean aws?"),
    ("provider.region", REMOVED, "add it"),
    ("provider.availability_zone", "us-west-2a, us-east-1a", "'us-east-1a' is not in"),
    ("provider.availability_zone", ["us-west-2a"], "write text, in quotes"),
    ("provider.aws_credentials", {"aws_access_key_id": "x"}, "leave it out"),
    ("provider.security_group.IpPermissions", [{"FromPort": "22", "ToPort": 22, "IpProtocol": "tcp"}],
     "EC2 takes a whole number", "provider.security_group.IpPermissions.0.FromPort"),
    ("provider.security_group.IpPermissions", [{"FromPort": 22, "ToPort": 22, "IpProtocl": "tcp"}],
     "did you mean IpProtocol?", "provider.security_group.IpPermissions.0.IpProtocl"),
    # What EC2 starts nodes with.
    (f"{NODE}.InstanceMarketOption", MARKET, "did you mean InstanceMarketOptions?"),
    (f"{NODE}.InstanceTyp", "g6.xlarge", "did you mean InstanceType?"),
    (f"{NODE}.ImgeId", "ami-0123456789abcdef0", "did you mean ImageId?"),
    (f"{NODE}.SecurityGroupId", "sg-1", "did you mean SecurityGroupIds?"),
    (f"{NODE}.InstanceType", REMOVED, "default is m1.small; add it"),
    (f"{NODE}.ImageId", REMOVED, "add it"),
    (f"{NODE}.ImageId", "ubuntu-24.04", "not an image id"),
    (f"{NODE}.InstanceType", "g6.3xlarge", "not one of EC2's values; did you mean g6.xlarge?"),
    (f"{NODE}.KeyName", REMOVED, "missing beside auth.ssh_private_key"),
    (f"{NODE}.SubnetId", "subnet-1", "write SubnetIds"),
    (f"{NODE}.SubnetIds", "subnet-1", "EC2 takes a list"),
    (f"{NODE}.MinCount", 2, "write min_workers"),
    (f"{NODE}.IamInstanceProfile", "worker", "EC2 takes keys and values"),
    (f"{NODE}.MetadataOptions.HttpTokens", True, "EC2 takes text"),
    (f"{DISK}.VolumSize", 20, "did you mean VolumeSize?"),
    (f"{DISK}.VolumeSize", "20", "'20', where EC2 takes a whole number"),
    (f"{DISK}.VolumeType", "gp4", "did you mean gp3?"),
    (f"{SPOT}.MarketType", "Spot", "did you mean spot?"),
    (f"{SPOT}.MarketType", "SPOT", "did you mean spot?"),
    (f"{SPOT}.SpotOptions.MaxPrice", 0.5, "EC2 takes text"),
    (f"{TYPES}.train.resources.GPU", 4, "g6.2xlarge has 1"),
    (f"{TYPES}.train.resources", {"CPU": 8}, "1, which would be paid for", f"{TYPES}.train.resources.GPU"),
    (f"{TYPES}.train.resources.CPU", 9, "g6.2xlarge has 8"),
    (f"{TYPES}.train.resources.gpus", 1, "did you mean GPU?"),
    (f"{TYPES}.train.labels.pool", "a b", "Invalid label key value", f"{TYPES}.train.labels"),
    # What is paid for while nobody works.
    (f"{TYPES}.train.min_workers", 1, "write 0, and set cluster.grows_to"),
    ("idle_timeout_minutes", REMOVED, "Ray's default is 5"),
    ("idle_timeout_minutes", 1e9, "write 1 to 60"),
    ("idle_timeout_minutes", 0, "write 1 to 60"),
    ("idle_timeout_minutes", float("nan"), "write 1 to 60"),
    (f"{TYPES}.train.idle_timeout_s", 86400, "write 60 to 3600"),
    # Other forms than Ray takes, of which its schema says nothing.
    ("rsync_exclude", [3], "write text, in quotes", "rsync_exclude.0"),
    ("file_mounts", {"~/.ray/auth_token": ["a"]}, "write text, in quotes", "file_mounts.~/.ray/auth_token"),
    ("setup_commands", "pip install x", "write a list"),
    # The images of containers.
    ("docker.image", "rayproject/ray:2.9.0-gpu", f"write rayproject/ray:{ray.__version__}"),
    ("docker.head_image", f"rayproject/ray:{ray.__version__}-py310", "raydistill needs 3.11"),
    (f"{TYPES}.train.docker", {"worker_image": "rayproject/ray-ml:latest"},
     f"write rayproject/ray-ml:{ray.__version__}", f"{TYPES}.train.docker.worker_image"),
    # The head.
    (f"{TYPES}.head.resources", {"CPU": 4}, "write 0", f"{TYPES}.head.resources.CPU"),
    (f"{TYPES}.head.resources", {}, "write 0", f"{TYPES}.head.resources.CPU"),
    # The workers' groups.
    (f"{TYPES}.train.labels", REMOVED, "write {pool: ...}"),
    (f"{TYPES}.train.resources", {"GPU": 1}, "write {CPU: ...}"),
    (f"{SPOT}.SpotOptions.SpotInstanceType", "persistent", "write one-time"),
    (f"{SPOT}.SpotOptions.InstanceInterruptionBehavior", REMOVED, "write terminate"),
    # The commands.
    ("setup_commands", REMOVED, "Ray's default is a nightly wheel"),
    ("head_setup_commands", REMOVED, "[] for none"),
    ("worker_setup_commands", REMOVED, "[] for none"),
    ("head_start_ray_commands", REMOVED, "a dashboard on all interfaces"),
    ("worker_start_ray_commands", REMOVED, "a start without a token"),
    ("head_start_ray_commands", ["ray stop"], "nothing starts Ray"),
    ("head_start_ray_commands", [HEAD_START], "write `RAY_AUTH_MODE=token ray start ...`"),
    ("head_start_ray_commands", [f"{HEAD_START}; RAY_AUTH_MODE=token true"],
     "write `RAY_AUTH_MODE=token ray start ...`"),
    ("head_start_ray_commands", [f"RAY_AUTH_MODE=token {HEAD} --dashboard-host=0.0.0.0"], "--dashboard-host=0.0.0.0"),
    ("head_start_ray_commands", [f"RAY_AUTH_MODE=token {HEAD} --dashboard-host '::'"], "--dashboard-host=::"),
    ("worker_start_ray_commands", [WATCH, "RAY_AUTH_MODE=disabled ray start --address=$RAY_HEAD_IP:6379"],
     "write `RAY_AUTH_MODE=token ray start ...`"),
    ("head_start_ray_commands", [f"RAY_AUTH_MODE=token {HEAD} --dashbord-port=1"], "dashboard-port?"),
    ("head_start_ray_commands", ["RAY_AUTH_MODE=token ray start --head"], "no worker ever joins"),
    ("worker_start_ray_commands", [WATCH, "RAY_AUTH_MODE=token ray start"], "without --address"),
    ("setup_commands", ["uv pip install ray==2.9"], "installs ray==2.9"),
    ("setup_commands", ["pip3.12 install ray==2.9"], "installs ray==2.9"),
    ("file_mounts", {"~/.ray/token": "~/.ray/auth_token"}, "~/.ray/auth_token: ~/.ray/auth_token"),
    ("setup_commands", ["pip install -U 'ray[default]==2.59.0'"], "installs ray==2.59.0"),
    ("setup_commands", ["pip install 'ray[default]>=2.60' s3fs"], "installs ray>=2.60"),
    ("setup_commands", ["which ray || pip install ray"], "installs ray of any version"),
    ("head_setup_commands", ["pip install https://s3-us-west-2.amazonaws.com/ray-wheels/latest/ray-3.0.0.whl"],
     "installs a nightly wheel"),
    (f"{TYPES}.train.worker_setup_commands", ["pip install ray==2.59.0"], f"write 'ray[default]=={ray.__version__}'"),
]  # fmt: skip


CONTAINERS = {"image": f"rayproject/ray:{ray.__version__}-py312-gpu", "container_name": "ray"}


def test_a_file_with_containers_is_sound(broken: Broken) -> None:
    assert check_cluster_file(broken(CLUSTER, {"docker": CONTAINERS})) == []


@pytest.mark.parametrize("case", CLUSTER_FAULTS, ids=lambda case: case[0])
def test_a_broken_cluster_file_is_caught(broken: Broken, case: tuple[Any, ...]) -> None:
    key, value, says, named = (*case, case[0])[:4]
    fault = only_fault(check_cluster_file(broken(CLUSTER, {"docker": dict(CONTAINERS), key: value})))
    assert fault.startswith(f"{named}: ")
    assert says in fault


def test_more_nodes_at_once_than_may_be_are_caught(broken: Broken) -> None:
    faults = check_cluster_file(broken(CLUSTER, {f"{TYPES}.train.min_workers": 4, "max_workers": 3}))
    assert faults[0].startswith("max_workers: 3, ")
    assert "write 4 or more" in faults[0]


def test_all_unknown_names_are_said_at_once(broken: Broken) -> None:
    faults = check_cluster_file(broken(CLUSTER, {"max_worker": 3, "auth.ssh_usr": "ubuntu"}))
    assert sorted(fault.partition(":")[0] for fault in faults) == ["auth.ssh_usr", "max_worker"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),  # in three zones
        ({"provider.availability_zone": "us-west-2b"}, "all spot nodes are g5.2xlarge in us-west-2b"),
        ({"provider.availability_zone": REMOVED}, None),
        (
            {"provider.availability_zone": REMOVED, f"{TYPES}.spot_g5.node_config.SubnetIds": ["subnet-1"]},
            "in subnet-1",
        ),
    ],
)
def test_one_spot_machine_in_one_zone_is_caught(broken: Broken, changes: dict[str, Any], said: str | None) -> None:
    types = yaml.safe_load(CLUSTER.read_text())[TYPES]
    one = {TYPES: {name: types[name] for name in ("head", "spot_g5", "fallback")}}
    faults = check_cluster_file(broken(CLUSTER, one | changes))
    assert said in only_fault(faults) if said else faults == []


def test_a_region_that_is_none_is_caught(broken: Broken) -> None:
    wrong = broken(CLUSTER, {"provider.availability_zone": REMOVED, "provider.region": "us-wst-2"})
    assert "did you mean us-west-2?" in only_fault(check_cluster_file(wrong))


def test_a_launch_template_may_name_the_rest(broken: Broken) -> None:
    config = {"LaunchTemplate": {"LaunchTemplateName": "mine"}}
    assert check_cluster_file(broken(CLUSTER, {NODE: config})) == []
    wrong = {"LaunchTemplate": {"LaunchTemplatName": "mine"}}
    assert "did you mean LaunchTemplateName?" in only_fault(check_cluster_file(broken(CLUSTER, {NODE: wrong})))


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


def test_a_head_on_spot_is_caught(broken: Broken) -> None:
    key = f"{TYPES}.head.node_config.InstanceMarketOptions"
    faults = check_cluster_file(broken(CLUSTER, {key: MARKET}))
    assert any(fault.startswith(f"{key}: ") and "leave it out" in fault for fault in faults)


def test_spot_needs_a_watcher_in_the_start_of_all_workers_or_in_its_own_setup(broken: Broken) -> None:
    changes: dict[str, Any] = {"worker_start_ray_commands": [WORKER_START]}
    for watched in ((), ("spot_g5",)):
        changes |= {f"{TYPES}.{name}.worker_setup_commands": [WATCH] for name in watched}
        faults = check_cluster_file(broken(CLUSTER, changes))
        unwatched = [f"{TYPES}.{name}" for name in SPOT_TYPES if name not in watched]
        assert [fault.partition(":")[0] for fault in faults] == unwatched
        assert all("start `python -m raydistill.cluster.preemption" in fault for fault in faults)


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
def test_spot_needs_on_demand_nodes_with_its_gpus_behind_it(broken: Broken, key: str, value: Any) -> None:
    faults = check_cluster_file(broken(CLUSTER, {f"{TYPES}.{key}": value}))
    lacking = {fault.partition(":")[0] for fault in faults if "add on-demand nodes with {'GPU': 1}" in fault}
    assert lacking >= {f"{TYPES}.{name}" for name in SPOT_TYPES}


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
def test_only_ssh_may_be_open_to_the_world(broken: Broken, rule: dict[str, Any], caught: bool) -> None:
    key = "provider.security_group.IpPermissions"
    faults = check_cluster_file(broken(CLUSTER, {key: [rule]}))
    assert [fault.startswith(f"{key}: ") for fault in faults] == [True] * caught


CLUSTER_SPEC = "spec.workerGroupSpecs"
SPOT_POD = f"{CLUSTER_SPEC}.spot.template.spec"
CONTAINER = f"{SPOT_POD}.containers.0"
KUBERAY_FAULTS = [
    ("spec.authOptions", REMOVED, "write token", "spec.authOptions.mode"),
    ("spec.authOptions.mode", "disabled", "write token"),
    ("spec.rayVersion", "2.59.0", f"write '{ray.__version__}'"),
    ("spec.enableInTreeAutoscaling", REMOVED, "write true"),
    ("spec.autoscalerOptions.version", "v1", "write v2"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", "4", "write '0'"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", REMOVED, "write '0'"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0, "write '0'"),
    ("spec.headGroupSpec.labels", REMOVED, "write {pool: ...}"),
    (f"{CLUSTER_SPEC}.train.labels", REMOVED, "write {pool: ...}"),
    (f"{CLUSTER_SPEC}.train.rayStartParams.labels", "pool=train", f"write {CLUSTER_SPEC}.train.labels"),
    (f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds", 30, "write 60 or more"),
    ("spec.headGroupSpec.template.spec.terminationGracePeriodSeconds", REMOVED, "30 is too short"),
    (f"{CLUSTER_SPEC}.spot.template.spec.terminationGracePeriodSeconds", "120", "takes a whole number"),
    (f"{CLUSTER_SPEC}.spot.template.spec.containers", [], "add the one that runs Ray"),
    (f"{CLUSTER_SPEC}.spot.template.spec.containers.0.image", "registry.example.com:5000/raydistill",
     "write the tag of a version", f"{CLUSTER_SPEC}.spot.template.spec.containers.image"),
    ("spec.headGroupSpec.template.spec.containers.0.image", "raydistill:latest",
     "write the tag of a version", "spec.headGroupSpec.template.spec.containers.image"),
    (f"{CLUSTER_SPEC}.spot.maxReplicas", REMOVED, "maxReplicas", "spec"),
    # Names and types, by KubeRay's and Kubernetes' own.
    ("spec.rayVerson", "2.60.0", "did you mean rayVersion?"),
    ("spec.autoscalerOptions.idleTimeout", 60, "mean idleTimeoutSeconds?"),
    ("spec.autoscalerOptions.upscalingMode", "default", "mean Default?"),
    (f"{CLUSTER_SPEC}.spot.minReplica", 0, "did you mean minReplicas?"),
    (f"{CLUSTER_SPEC}.spot.minReplicas", "0", "takes a whole number"),
    (f"{CLUSTER_SPEC}.spot.rayStartParams.num-gpu", "1", "num-gpus?"),
    (f"{SPOT_POD}.nodeSelctor", {}, "did you mean nodeSelector?"),
    (f"{SPOT_POD}.nodeSelector.spot", True, "takes text"),
    (f"{SPOT_POD}.tolerations", "nvidia.com/gpu", "takes a list"),
    (f"{SPOT_POD}.tolerations.0.opertor", "Exists", "did you mean operator?"),
    (f"{SPOT_POD}.tolerations.0.effect", "NoSchedul", "did you mean NoSchedule?"),
    (f"{SPOT_POD}.tolerations.0.value", "true", "Exists takes no value", f"{SPOT_POD}.tolerations"),
    (f"{CONTAINER}.imge", "x", "did you mean image?"),
    (f"{CONTAINER}.name", REMOVED, "missing; add it"),
    (f"{CONTAINER}.imagePullPolicy", "always", "did you mean Always?"),
    (f"{CONTAINER}.env", {"A": "b"}, "takes a list"),
    (f"{CONTAINER}.env", [{"name": "A", "value": 1}], "takes text", f"{CONTAINER}.env.0.value"),
    (f"{CONTAINER}.resources.limit", {}, "did you mean limits?"),
    (f"{CONTAINER}.resources.limits.cpus", 6, "did you mean cpu?", f"{SPOT_POD}.containers.resources.limits.cpus"),
    (f"{CONTAINER}.resources.limits", {"cpu": 6, "nvidia.com/gpu": 1, "nvidia.com/gpus": 1},
     "did you mean nvidia.com/gpu?", f"{SPOT_POD}.containers.resources.limits.nvidia.com/gpus"),
    (f"{CONTAINER}.resources.limits.memory", "16GiB", "write one such as",
     f"{SPOT_POD}.containers.resources.limits.memory"),
    (f"{CONTAINER}.image", "rayproject/ray:2.9.0", f"ray:{ray.__version__}", f"{SPOT_POD}.containers.image"),
    (f"{CONTAINER}.image", "rayproject/ray:nightly-gpu", f"ray:{ray.__version__}", f"{SPOT_POD}.containers.image"),
    # Numbers of pods, and what is paid for.
    (f"{CLUSTER_SPEC}.spot.minReplicas", 7, "write 0 to 6"),
    (f"{CLUSTER_SPEC}.spot.replicas", 7, "write 0 to 6"),
    (f"{CLUSTER_SPEC}.spot.numOfHosts", 2, "write 1"),
    (f"{CLUSTER_SPEC}.spot.idleTimeoutSeconds", 86400, "60 to 3600"),
    (f"{CLUSTER_SPEC}.spot.rayStartParams", {"num-gpus": "4"},
     "limits have 1", f"{CLUSTER_SPEC}.spot.rayStartParams.num-gpus"),
    ("spec.autoscalerOptions.idleTimeoutSeconds", REMOVED, "write 600"),
    ("spec.autoscalerOptions.idleTimeoutSeconds", 10**7, "60 to 3600"),
    (f"{CLUSTER_SPEC}.spot.groupName", "train", "two groups have this name", f"{CLUSTER_SPEC}.train"),
    (f"{CLUSTER_SPEC}.fallback.priority", 10, "a priority below 10", f"{CLUSTER_SPEC}.spot"),
    (f"{CLUSTER_SPEC}.fallback.labels.pool", "spot", "add on-demand nodes with {'GPU': 1}", f"{CLUSTER_SPEC}.spot"),
]  # fmt: skip


@pytest.mark.parametrize("case", KUBERAY_FAULTS, ids=lambda case: case[0])
@pytest.mark.parametrize("source", [RAYCLUSTER, RAYJOB], ids=["raycluster", "rayjob"])
def test_a_broken_kuberay_file_is_caught(broken: Broken, source: Path, case: tuple[Any, ...]) -> None:
    key, value, says, named = (*case, case[0])[:4]
    place = "spec.rayClusterSpec" if source == RAYJOB else "spec"
    faults = check_kuberay_file(broken(source, {re.sub("^spec", place, key): value}))
    found = [fault for fault in faults if fault.startswith(re.sub("^spec", place, named) + ": ")]
    assert says.replace("spec.", f"{place}.") in only_fault(found)


HOST = "headGroupSpec.rayStartParams.dashboard-host"


@pytest.mark.parametrize(
    ("source", "document", "changes", "says"),
    [
        # The documents beside the cluster.
        (RAYCLUSTER, 1, {"spec.polcyTypes": ["Ingress"]}, "did you mean policyTypes?"),
        (RAYCLUSTER, 1, {"kind": "NetworkPolcy"}, "Kubernetes has no NetworkPolcy"),
        (RAYCLUSTER, -1, {"apiVersion": "ray.io/v1alpha1"}, "write ray.io/v1"),
        (RAYCLUSTER, -1, {"kind": "RayClutser"}, "did you mean RayCluster?"),
        (RAYCLUSTER, -1, {"kind": "RayService"}, "kind: "),
        # A job ends its cluster.
        (RAYJOB, -1, {"spec.shutdownAfterJobFinishes": False}, "the cluster stays"),
        (RAYJOB, -1, {"spec.entrypoint": REMOVED}, "spec.entrypoint: missing"),
        # The dashboard is closed, or guarded by a policy.
        (RAYJOB, -1, {f"spec.rayClusterSpec.{HOST}": "127.0.0.1"}, "write 0.0.0.0"),
        (RAYJOB, 1, {"spec.policyTypes": ["Egress"]}, "add a NetworkPolicy"),
        # GPUs are kept by a cluster, and not by a job.
        (RAYCLUSTER, -1, {"spec.workerGroupSpecs.train.minReplicas": 1, "spec.workerGroupSpecs.train.replicas": 1},
         "machines with GPUs are kept"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_whole_kuberay_file_is_caught(
    broken: Broken, source: Path, document: int, changes: dict[str, Any], says: str
) -> None:
    assert says in only_fault(check_kuberay_file(broken(source, changes, document)))


def test_the_dashboard_of_a_cluster_is_closed_or_guarded(broken: Broken) -> None:
    open_host = Path(broken(RAYCLUSTER, {f"spec.{HOST}": "0.0.0.0"}))
    assert check_kuberay_file(str(open_host)) == []  # guarded by the policy in the same file
    alone = Path(broken(open_host, {"spec.policyTypes": ["Egress"]}, document=1))
    assert "write 127.0.0.1" in only_fault(check_kuberay_file(str(alone)))
    assert "write 127.0.0.1" in only_fault(check_kuberay_file(broken(alone, {f"spec.{HOST}": REMOVED})))


def test_a_job_counts_on_what_its_groups_come_to() -> None:
    from raydistill.doctor.cluster import check_offers

    [finding] = check_offers(None, str(RAYJOB))
    entrypoint = list(yaml.safe_load_all(RAYJOB.read_text()))[-1]["spec"]["entrypoint"]
    assert re.search(r"cluster\.grows_to=\{.*\}", finding.found)[0] in entrypoint  # type: ignore[index]


IMAGE = "spec.headGroupSpec.template.spec.containers.0.image"
ELSEWHERE = {"clusterSelector": {"ray.io/cluster": "raydistill"}, "entrypoint": "raydistill run job.yaml"}


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        (CLUSTER, {"head_start_ray_commands": [f"export RAY_AUTH_MODE=token\n{HEAD_START}"]}),
        (RAYCLUSTER, {IMAGE: "raydistill@sha256:" + "0" * 64}),
        (RAYCLUSTER, {IMAGE: "raydistill:latest@sha256:" + "0" * 64}),
        (RAYCLUSTER, {"spec.headGroupSpec.resources": {"CPU": "0"}, "spec.headGroupSpec.rayStartParams": {}}),
        (RAYJOB, {"spec": ELSEWHERE}),
        (RAYJOB, {f"spec.rayClusterSpec.workerGroupSpecs.train.{key}": 1 for key in ("minReplicas", "replicas")}),
    ],
)
def test_other_sound_ways_are_let_pass(broken: Broken, source: Path, changes: dict[str, Any]) -> None:
    check = check_cluster_file if source == CLUSTER else check_kuberay_file
    assert check(broken(source, changes)) == []


NO_YAML = {
    "cut": "a: [", "a list": "- a\n- b", "empty": "", "bytes": "\x00", "none": None, "a key twice": "a: 1\na: 2\n",
    "code": "a: !!python/object/apply:os.system ['touch RAN']\n",
}  # fmt: skip


@pytest.mark.parametrize("read", [check_cluster_file, check_kuberay_file, offered])
@pytest.mark.parametrize("case", NO_YAML)
def test_what_is_no_yaml_of_keys_is_an_error(tmp_path: Path, read: Callable[[str], Any], case: str) -> None:
    path, text = tmp_path / "cluster.yaml", NO_YAML[case]
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read(str(path))
    assert not Path("RAN").exists()


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    said = {".": "a folder", "pipe.yaml": "not a regular", "zero.yaml": "not a regular", "bytes.yaml": "not UTF-8"}
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
    assert tuple(name for name, node_type in types.items() if node_type.spot) == SPOT_TYPES


def test_a_type_without_a_limit_of_its_own_has_that_of_all(broken: Broken) -> None:
    path = broken(CLUSTER, {f"{TYPES}.train.max_workers": REMOVED})
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


def test_nothing_is_offered_by_a_file_that_ray_refuses(broken: Broken) -> None:
    with pytest.raises(ConfigError, match=r"did you mean head\?"):
        offered(broken(CLUSTER, {"head_node_type": "haed"}))


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


def test_nodes_get_all_that_the_package_is_built_from() -> None:
    """Where the target of one of its links lacks, pip builds a package without jobs and says nothing."""
    links = {str(link.resolve().relative_to(ROOT)) for link in (ROOT / "raydistill").iterdir() if link.is_symlink()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "raydistill", *links}
    assert "jobs" in wanted
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert wanted <= set(" ".join(copied).split())
    mounts = yaml.safe_load(CLUSTER.read_text())["file_mounts"]
    assert wanted <= {source.removeprefix("./") for source in mounts.values()}
    assert {name: mounts[f"~/raydistill/{name}"] for name in wanted} == {name: f"./{name}" for name in wanted}
