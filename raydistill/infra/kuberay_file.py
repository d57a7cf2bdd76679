"""KubeRay's RayCluster and RayJob, checked without Kubernetes: what the operator refuses, or should not let pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raydistill.infra.node_types import LOOPBACK, NodeType, mapping, read_documents, unlabelled, without_fallback

# Ray drains a pod's node for up to 30 seconds, and a training step and its checkpoint come on top.
LEAST_GRACE_SECONDS = 60
# Where the specification of the cluster stands in a document of each kind.
SPECIFICATIONS = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec"}


def check_kuberay_file(path: str) -> list[str]:
    """What is wrong with the RayClusters and RayJobs of a file, a line each: `key: what is wrong; what to write`.

    Groups stand in the keys by their `groupName`. Raises ConfigError where the file cannot be read or is no YAML.
    """
    documents = read_documents(path)
    clusters = [document for document in documents if document.get("kind") in SPECIFICATIONS]
    if not clusters:
        return ["kind: neither RayCluster nor RayJob is in the file; add one"]
    guarded = any(
        document.get("kind") == "NetworkPolicy"
        and "Ingress" in (mapping(document.get("spec")).get("policyTypes") or [])
        for document in documents
    )
    faults = []
    for document in clusters:
        kind, spec = document["kind"], mapping(document.get("spec"))
        if kind == "RayJob":
            if "clusterSelector" in spec:
                continue  # it runs on a cluster that is described elsewhere
            spec = mapping(spec.get("rayClusterSpec"))
        faults += _cluster(SPECIFICATIONS[kind], spec)
        faults += _dashboard(SPECIFICATIONS[kind], kind, mapping(spec.get("headGroupSpec")), guarded)
    return faults


def offered(path: str) -> list[NodeType]:
    """The kinds of nodes of a sound file's clusters, the heads among them."""
    specs = [document["spec"] for document in read_documents(path) if document.get("kind") in SPECIFICATIONS]
    described = [spec.get("rayClusterSpec", spec) for spec in specs if "clusterSelector" not in spec]
    return [kind for spec in described for kind in _node_types(spec)]


def _cluster(key: str, spec: dict[str, Any]) -> list[str]:
    from jsonschema import ValidationError  # type: ignore[import-untyped]  # comes with ray

    faults = [*_settings(key, spec), *_group(f"{key}.headGroupSpec", mapping(spec.get("headGroupSpec")))]
    for group in spec.get("workerGroupSpecs") or []:
        faults += _group(f"{key}.workerGroupSpecs.{mapping(group).get('groupName')}", mapping(group))
    try:
        types = _node_types(spec)
    except (LookupError, TypeError, ValueError, ValidationError) as error:  # the file is of another shape
        return faults or [f"{key}: Ray cannot read it: {error!r}; compare it with deploy/kuberay/raycluster.yaml"]
    if types[0].resources["CPU"]:
        faults.append(f"{key}.headGroupSpec.rayStartParams.num-cpus: work on the head can end the cluster; write '0'")
    return [*faults, *unlabelled(key, types), *without_fallback(key, types)]


def _settings(key: str, spec: dict[str, Any]) -> Iterator[str]:
    import ray

    if mapping(spec.get("authOptions")).get("mode") != "token":
        yield f"{key}.authOptions.mode: whoever reaches a port of Ray's can run code; write token"
    if spec.get("rayVersion") != ray.__version__:
        yield f"{key}.rayVersion: {spec.get('rayVersion')!r}, and here runs another; write {ray.__version__!r}"
    if spec.get("enableInTreeAutoscaling") is not True:
        yield f"{key}.enableInTreeAutoscaling: without it no group ever grows; write true"
    if mapping(spec.get("autoscalerOptions")).get("version") != "v2":
        yield f"{key}.autoscalerOptions.version: the first one knows neither labels nor priorities; write v2"


def _group(key: str, group: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the head's group or one of the workers'."""
    params = mapping(group.get("rayStartParams"))
    if "labels" in params:
        yield f"{key}.rayStartParams.labels: KubeRay refuses it; write {key}.labels"
    for name, value in params.items():
        if not isinstance(value, str):
            yield f"{key}.rayStartParams.{name}: KubeRay takes strings alone; write '{value}'"
    pod = mapping(mapping(group.get("template")).get("spec"))
    containers = pod.get("containers") or []
    if not containers:
        yield f"{key}.template.spec.containers: missing; add the one that runs Ray"
    grace = pod.get("terminationGracePeriodSeconds", 30)  # Kubernetes' default
    if not isinstance(grace, int) or grace < LEAST_GRACE_SECONDS:
        yield (
            f"{key}.template.spec.terminationGracePeriodSeconds: {grace} is too short to drain the node and save; "
            f"write {LEAST_GRACE_SECONDS} or more"
        )
    for container in containers:
        image = str(mapping(container).get("image"))
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@" not in image and tag in ("", "latest"):
            yield f"{key}.template.spec.containers.image: {image!r} is another next week; write the tag of a version"


def _node_types(spec: dict[str, Any]) -> list[NodeType]:
    """The groups as Ray's autoscaler reads them, by a function that is not public; the head's first."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    document = {"metadata": {"name": "cluster", "namespace": "default"}, "spec": spec}
    entries = _derive_autoscaling_config_from_ray_cr(document)["available_node_types"].items()
    return [
        NodeType(
            "headGroupSpec" if position == 0 else f"workerGroupSpecs.{name}",
            entry["resources"],
            entry["labels"],
            entry["min_workers"],
            entry["max_workers"],
            "spot" in entry["labels"].values(),
            entry.get("priority", 0),
        )
        for position, (name, entry) in enumerate(entries)
    ]


def _dashboard(key: str, kind: str, head: dict[str, Any], guarded: bool) -> Iterator[str]:
    host = mapping(head.get("rayStartParams")).get("dashboard-host", "0.0.0.0")  # KubeRay's default
    key = f"{key}.headGroupSpec.rayStartParams.dashboard-host"
    if kind == "RayJob" and host in LOOPBACK:
        yield f"{key}: KubeRay cannot ask for the job on {host}; write 0.0.0.0 and a NetworkPolicy beside it"
    elif host not in LOOPBACK and not guarded:
        open_to_all = f"{key}: every pod can run code through {host}; "
        if kind == "RayJob":
            yield open_to_all + "add a NetworkPolicy as in deploy/kuberay/rayjob.yaml"
        else:
            yield open_to_all + "write 127.0.0.1 and use kubectl port-forward"
