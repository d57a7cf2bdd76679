"""Checks KubeRay's RayCluster and RayJob without Kubernetes: what the operator refuses, or accepts and should not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raydistill.cluster.ray_private import autoscaling_of
from raydistill.doctor.cluster_yaml import hint, mapping, read_documents
from raydistill.doctor.kubernetes_schema import document_faults, has_client
from raydistill.doctor.node_types import (
    LOOPBACK,
    NodeType,
    idle_faults,
    image_faults,
    kept_gpu_faults,
    start_options,
    type_faults,
)

# Ray drains a pod's node for up to 30 seconds; a training step and its checkpoint come on top.
LEAST_GRACE_SECONDS = 60
QUANTITY = re.compile(r"\+?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
NATIVE = ("cpu", "memory", "ephemeral-storage")
GPUS = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915")
# The path of the cluster's specification in a document of each kind.
SPECIFICATIONS = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec"}


def check_kuberay_file(path: str) -> list[str]:
    """What is wrong with the RayClusters and RayJobs of a file, a line each: `key: what is wrong; what to write`. Keys
    name groups by their `groupName`.

    If types of fields are wrong, the list has only that, because the rest needs a file of the right form. Raises
    ConfigError if the file cannot be read or is not YAML.
    """
    documents = read_documents(path)
    clusters = [document for document in documents if document.get("kind") in SPECIFICATIONS]
    if not clusters:
        of_ray = [document.get("kind") for document in documents if "ray.io" in str(document.get("apiVersion"))]
        slip = hint(of_ray[0], SPECIFICATIONS, "; add one") if of_ray else "; add one"
        return [f"kind: neither RayCluster nor RayJob is in the file{slip}"]
    if faults := [fault for document in documents for fault in document_faults(document)]:
        return faults
    guarded = any(
        document.get("kind") == "NetworkPolicy"
        and "Ingress" in (mapping(document.get("spec")).get("policyTypes") or [])
        for document in documents
    )
    if not has_client():
        faults.append(
            "template: what stands under it was not checked, since Kubernetes' types come with its client, which is "
            "not installed; pip install 'raydistill[kubernetes]'"
        )
    for document in clusters:
        kind, spec = document["kind"], mapping(document.get("spec"))
        if kind == "RayJob":
            faults += _job(spec)
            if "clusterSelector" in spec:
                continue  # it runs on a cluster that another file describes
            spec = mapping(spec.get("rayClusterSpec"))
        faults += _cluster(SPECIFICATIONS[kind], spec, kind)
        faults += _dashboard(SPECIFICATIONS[kind], kind, mapping(spec.get("headGroupSpec")), guarded)
    return faults


def offered(path: str) -> list[NodeType]:
    """The node types of a sound file's clusters, the heads' too."""
    specs = [document["spec"] for document in read_documents(path) if document.get("kind") in SPECIFICATIONS]
    described = [spec.get("rayClusterSpec", spec) for spec in specs if "clusterSelector" not in spec]
    return [kind for spec in described for kind in _node_types(spec)]


def _job(spec: dict[str, Any]) -> Iterator[str]:
    if not spec.get("entrypoint"):
        yield "spec.entrypoint: missing; write the command, as in deploy/kuberay/rayjob.yaml"
    is_own = "clusterSelector" not in spec
    if is_own and spec.get("shutdownAfterJobFinishes") is not True and not spec.get("deletionStrategy"):
        yield "spec.shutdownAfterJobFinishes: the cluster stays, and is paid for, when the job has ended; write true"


def _cluster(key: str, spec: dict[str, Any], kind: str) -> list[str]:
    from jsonschema import ValidationError  # type: ignore[import-untyped]  # comes with ray

    groups = spec.get("workerGroupSpecs") or []
    faults = [*_settings(key, spec), *_group(f"{key}.headGroupSpec", mapping(spec.get("headGroupSpec")))]
    for group in groups:
        faults += _group(f"{key}.workerGroupSpecs.{group.get('groupName')}", group)
        faults += _replicas(f"{key}.workerGroupSpecs.{group.get('groupName')}", group)
    names = [group.get("groupName") for group in groups]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        faults.append(f"{key}.workerGroupSpecs.{name}: two groups have this name, and Ray takes the last; rename one")
    try:
        types = _node_types(spec)
    except (LookupError, TypeError, ValueError, ValidationError) as error:  # the file has another form
        return faults or [f"{key}: Ray cannot read it: {error!r}; compare it with deploy/kuberay/raycluster.yaml"]
    if types[0].resources["CPU"]:
        faults.append(f"{key}.headGroupSpec.rayStartParams.num-cpus: work on the head can end the cluster; write '0'")
    if kind == "RayCluster":  # the job's own cluster is deleted with it
        for node_type in types:
            faults += kept_gpu_faults(f"{key}.{node_type.name}.minReplicas", node_type)
    return [*faults, *type_faults(key, types)]


def _replicas(key: str, group: dict[str, Any]) -> Iterator[str]:
    least, most, hosts = group.get("minReplicas", 0), group.get("maxReplicas"), group.get("numOfHosts", 1)
    if most is not None and not 0 <= least <= most:
        yield f"{key}.minReplicas: {least}, where maxReplicas is {most}; write 0 to {most}"
    elif most is not None and not least <= group.get("replicas", least) <= most:
        yield f"{key}.replicas: {group['replicas']}; write {least} to {most}"
    if hosts != 1:
        yield f"{key}.numOfHosts: {hosts} pods would start and stop together, idle or not; write 1"
    if "idleTimeoutSeconds" in group:
        yield from idle_faults(f"{key}.idleTimeoutSeconds", group["idleTimeoutSeconds"], 1)


def _settings(key: str, spec: dict[str, Any]) -> Iterator[str]:
    import ray

    if mapping(spec.get("authOptions")).get("mode") != "token":
        yield f"{key}.authOptions.mode: anybody who reaches a port of Ray can run code; write token"
    if spec.get("rayVersion") != ray.__version__:
        yield f"{key}.rayVersion: {spec.get('rayVersion')!r}, but the Ray here is another; write {ray.__version__!r}"
    if spec.get("enableInTreeAutoscaling") is not True:
        yield f"{key}.enableInTreeAutoscaling: without it no group ever grows; write true"
    options = mapping(spec.get("autoscalerOptions"))
    if "idleTimeoutSeconds" not in options:
        yield f"{key}.autoscalerOptions.idleTimeoutSeconds: missing, and the default of 60 is too short; write 600"
    else:
        yield from idle_faults(f"{key}.autoscalerOptions.idleTimeoutSeconds", options["idleTimeoutSeconds"], 1)
    if options.get("version") != "v2":
        yield f"{key}.autoscalerOptions.version: v1 knows neither labels nor priorities; write v2"


def _group(key: str, group: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the head's group or one of the workers' groups."""
    params = mapping(group.get("rayStartParams"))
    if "labels" in params:
        yield f"{key}.rayStartParams.labels: KubeRay refuses it; write {key}.labels"
    for name, value in params.items():
        if name not in start_options():
            yield f"{key}.rayStartParams.{name}: `ray start` has no such option{hint(name, start_options())}"
        if not isinstance(value, str):
            yield f"{key}.rayStartParams.{name}: KubeRay accepts only strings; write '{value}'"
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
        place, image = f"{key}.template.spec.containers", str(container.get("image"))
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@" not in image and tag in ("", "latest", "nightly"):
            yield f"{place}.image: {image!r} changes over time; write the tag of a version"
        else:
            yield from image_faults(f"{place}.image", image)
        yield from _resources(f"{place}.resources", mapping(container.get("resources")))
    if containers:
        limits = mapping(mapping(containers[0].get("resources")).get("limits"))
        given = {"num-gpus": str(sum(int(limits.get(name, 0)) for name in GPUS if str(limits.get(name, 0)).isdigit()))}
        if "num-gpus" in params and params["num-gpus"] != given["num-gpus"]:
            yield (
                f"{key}.rayStartParams.num-gpus: {params['num-gpus']}, and the container's limits have "
                f"{given['num-gpus']}; leave it out, KubeRay counts the limits"
            )
    for toleration in pod.get("tolerations") or []:
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield f"{key}.template.spec.tolerations: Exists takes no value; leave {toleration['value']!r} out"


def _resources(key: str, resources: dict[str, Any]) -> Iterator[str]:
    """Quantities that Kubernetes refuses, and names of resources that no node has."""
    limits, requests = mapping(resources.get("limits")), mapping(resources.get("requests"))
    for part, named in (("limits", limits), ("requests", requests)):
        for name, quantity in named.items():
            if not QUANTITY.fullmatch(str(quantity)):
                yield f"{key}.{part}.{name}: {quantity!r} is not a quantity; write one such as 4, 500m or 16Gi"
            if "/" not in name and name not in NATIVE and not name.startswith("hugepages-"):
                yield f"{key}.{part}.{name}: not a Kubernetes resource{hint(name, NATIVE)}"
            elif name not in GPUS and (slip := hint(name, GPUS, "", likeness=0.9)):
                yield f"{key}.{part}.{name}: no node has it{slip}"
    for name in GPUS:
        if name in requests and str(requests[name]) != str(limits.get(name)):
            most = limits.get(name, "nothing")
            yield f"{key}.requests.{name}: {requests[name]}, and limits say {most}; GPUs must be equal in both"


def _node_types(spec: dict[str, Any]) -> list[NodeType]:
    """The groups as Ray's autoscaler reads them; the head's first."""
    document = {"metadata": {"name": "cluster", "namespace": "default"}, "spec": spec}
    entries = autoscaling_of(document)["available_node_types"].items()
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
