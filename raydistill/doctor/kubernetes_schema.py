"""Checks documents for Kubernetes against the published types of their fields.

Kubernetes' own types come with its Python client. Those of KubeRay 1.7 are in no package and are written out here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from raydistill.doctor.cluster_yaml import hint

# https://github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds. `V1…` are Kubernetes' own.
KUBERAY = {
    "RayCluster": {"apiVersion": "str", "kind": "str", "metadata": "V1ObjectMeta", "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": "str", "kind": "str", "metadata": "V1ObjectMeta", "spec": "RayJobSpec"},
    "RayClusterSpec": {
        "authOptions": "AuthOptions", "autoscalerOptions": "AutoscalerOptions", "enableInTreeAutoscaling": "bool",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions", "headGroupSpec": "HeadGroupSpec",
        "headServiceAnnotations": "dict[str, str]", "historyServerOptions": "object", "managedBy": "str",
        "networkPolicy": "object", "rayVersion": "str", "suspend": "bool", "tlsOptions": "TlsOptions",
        "upgradeStrategy": "UpgradeStrategy", "workerGroupSpecs": "list[WorkerGroupSpec]",
    },
    "AuthOptions": {"enableK8sTokenAuth": "bool", "mode": "str", "secretName": "str"},
    "AutoscalerOptions": {
        "args": "list[str]", "command": "list[str]", "env": "list[V1EnvVar]", "envFrom": "list[V1EnvFromSource]",
        "idleTimeoutSeconds": "int", "image": "str", "imagePullPolicy": "str", "resources": "V1ResourceRequirements",
        "securityContext": "V1SecurityContext", "upscalingMode": "str", "version": "str",
        "volumeMounts": "list[V1VolumeMount]",
    },
    "GcsFaultToleranceOptions": {
        "backend": "str", "externalStorageNamespace": "str", "redisAddress": "str", "redisPassword": "object",
        "redisUsername": "object", "storage": "object",
    },
    "TlsOptions": {"enabled": "bool"},
    "UpgradeStrategy": {"type": "str"},
    "HeadGroupSpec": {
        "enableIngress": "bool", "headService": "V1Service", "ingressOptions": "object", "labels": "dict[str, str]",
        "rayStartParams": "dict[str, object]", "resources": "dict[str, quantity]", "serviceType": "str",
        "template": "V1PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName": "str", "idleTimeoutSeconds": "int", "labels": "dict[str, str]", "maxReplicas": "int",
        "minReplicas": "int", "numOfHosts": "int", "priority": "int", "rayStartParams": "dict[str, object]",
        "replicas": "int", "resources": "dict[str, quantity]", "scaleStrategy": "ScaleStrategy", "suspend": "bool",
        "template": "V1PodTemplateSpec",
    },
    "ScaleStrategy": {"workersToDelete": "list[str]"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int", "backoffLimit": "int", "clusterSelector": "dict[str, str]",
        "deletionStrategy": "object", "entrypoint": "str", "entrypointNumCpus": "float", "entrypointNumGpus": "float",
        "entrypointResources": "str", "jobId": "str", "managedBy": "str", "metadata": "V1ObjectMeta",
        "preRunningDeadlineSeconds": "int", "rayClusterSpec": "RayClusterSpec", "runtimeEnvYAML": "str",
        "shutdownAfterJobFinishes": "bool", "submissionMode": "str", "submitterConfig": "SubmitterConfig",
        "submitterPodTemplate": "V1PodTemplateSpec", "suspend": "bool", "ttlSecondsAfterFinished": "int",
    },
    "SubmitterConfig": {"backoffLimit": "int"},
}  # fmt: skip
# The values that Kubernetes and KubeRay accept; the client knows only types.
VALUES = {
    "AuthOptions.mode": ("disabled", "token"),
    "AutoscalerOptions.upscalingMode": ("Default", "Aggressive", "Conservative"),
    "AutoscalerOptions.version": ("v1", "v2"),
    "GcsFaultToleranceOptions.backend": ("redis", "rocksdb"),
    "HeadGroupSpec.serviceType": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    "RayJobSpec.submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "UpgradeStrategy.type": ("Recreate", "None"),
    "V1Container.imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "V1NetworkPolicySpec.policyTypes": ("Ingress", "Egress"),
    "V1PodSpec.dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "V1PodSpec.restartPolicy": ("Always", "OnFailure", "Never"),
    "V1SeccompProfile.type": ("RuntimeDefault", "Unconfined", "Localhost"),
    "V1Toleration.effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "V1Toleration.operator": ("Exists", "Equal", "Lt", "Gt"),
}
_PLAIN: dict[str, tuple[Any, str]] = {
    "str": (str, "text, in quotes where YAML takes it for something else"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "quantity": ((str, int, float), "a quantity, such as 4 or 16Gi"),
}


def has_client() -> bool:
    """Without Kubernetes' client its own types are unknown."""
    return find_spec("kubernetes") is not None


def _own_model(name: str) -> Any:
    from kubernetes.client import models  # type: ignore[import-untyped]

    return getattr(models, name, None)


@lru_cache
def _fields(kind: str) -> tuple[dict[str, str], frozenset[str]]:
    """The type of each field of a kind by name, and the names of the required fields."""
    if kind in KUBERAY:
        return KUBERAY[kind], frozenset()
    model = _own_model(kind)
    types = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
    if kind == "V1ResourceRequirements":
        types |= dict.fromkeys(("limits", "requests"), "dict[str, quantity]")
    return types, frozenset(json for name, json in model.attribute_map.items() if _is_required(model, name))


def _is_required(model: Any, name: str) -> bool:
    """Asks for each field alone, because a model without values names only the first one."""
    from kubernetes.client import Configuration

    empty = model.__new__(model)
    empty.local_vars_configuration = Configuration()
    try:
        setattr(empty, name, None)
    except ValueError:
        return True
    return False


def document_faults(document: dict[str, Any]) -> Iterator[str]:
    """Wrong types in a whole document. Kinds that neither of the two defines are not checked."""
    kind, version = str(document.get("kind")), str(document.get("apiVersion"))
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not metadata.keys() & {"name", "generateName"}:
        yield f"metadata.name: missing in the document of kind {kind}; add it"
    if kind in KUBERAY and "." in version:
        if version != "ray.io/v1":
            yield f"apiVersion: {version!r} is an old version of KubeRay; write ray.io/v1"
        yield from faults(kind, "", document)
    elif not has_client():
        return
    elif re.fullmatch(r"(apps/|batch/|policy/|autoscaling/|[a-z.]+\.k8s\.io/)?v1", version):
        if _own_model(f"V1{kind}") is None:
            yield f"kind: Kubernetes has no {kind} in {version}; see https://kubernetes.io/docs/reference"
        else:
            yield from faults(f"V1{kind}", f"{kind}.", document)
    elif "kind" not in document or "apiVersion" not in document:
        yield f"apiVersion and kind: not both are in the document of {sorted(map(str, document))[:3]}; add them"


def faults(kind: str, key: str, value: Any) -> Iterator[str]:
    """Errors in a `value` of a `kind`: unknown names, other types, missing fields. `key` ends with a dot, or is empty.

    Kubernetes' own kinds are not checked if its client is not installed.
    """
    inner = re.fullmatch(r"(list|dict)\[(?:str, )?(.*)\]", kind)
    name = key.removesuffix(".") or "the file"
    if value is None or kind in ("object", "datetime", "file", "bytes"):
        return  # Kubernetes accepts null for a missing field
    if kind.startswith("V1") and not has_client():
        return
    if kind in _PLAIN:
        expected, words = _PLAIN[kind]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            yield f"{name}: {value!r}, where Kubernetes takes {words}"
    elif inner and inner[1] == "list":
        if not isinstance(value, list):
            yield f"{name}: {value!r}, where Kubernetes takes a list"
            return
        for number, one in enumerate(value):
            label = one.get("groupName", number) if isinstance(one, dict) else number
            yield from faults(inner[2], f"{key}{label}.", one)
    elif not isinstance(value, dict):
        yield f"{name}: {value!r}, where Kubernetes takes keys and values"
    elif inner:
        for label, one in value.items():
            yield from faults(inner[2], f"{key}{label}.", one)
    else:
        types, required = _fields(kind)
        for label, one in value.items():
            if label not in types:
                yield f"{key}{label}: unknown to {'KubeRay' if kind in KUBERAY else 'Kubernetes'}{hint(label, types)}"
                continue
            yield from faults(types[label], f"{key}{label}.", one)
            known = VALUES.get(f"{kind}.{label}", ())
            for given in one if isinstance(one, list) else [one]:
                if known and isinstance(given, str) and given not in known:
                    instead = hint(given, known, f"; write one of {', '.join(known)}")
                    yield f"{key}{label}: {given!r} is not one of its values{instead}"
        for label in sorted(required - value.keys()):
            yield f"{key}{label}: missing; add it"
