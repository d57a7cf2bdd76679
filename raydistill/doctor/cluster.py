"""Checks whether a job would run on this cluster, or on one that a file describes."""

from __future__ import annotations

from raydistill.cluster.nodes import Finding, check_nodes
from raydistill.cluster.plan import live_plan
from raydistill.cluster.session import joined_cluster
from raydistill.config import RunConfig, overlay
from raydistill.doctor import cluster_file, kuberay_file
from raydistill.doctor.cluster_yaml import read_documents
from raydistill.errors import ConfigError


def check_cluster(config: RunConfig) -> list[Finding]:
    """Join the cluster of `cluster.address`, or the one of this node, and check its nodes, and whether the plan
    fits."""
    joined = overlay(config, {"cluster": {"address": config.cluster.address or "auto"}})
    with joined_cluster(joined):
        findings = check_nodes(joined)
        try:
            plan = live_plan(joined)
        except ConfigError as error:
            return [*findings, Finding("plan", str(error), "see above")]
        return [*findings, *(Finding("plan", line) for line in plan.describe())]


def check_offers(config: RunConfig | None, path: str) -> list[Finding]:
    """Check the node types of a cluster.yaml or of a KubeRay file, which may scale from zero: their sum, and whether
    one has the labels that the job asks for."""
    if any("kind" in document for document in read_documents(path)):  # as all KubeRay files are
        faults, offered, then = kuberay_file.check_kuberay_file(path), kuberay_file.offered, "kubectl apply"
    else:
        faults, offered, then = cluster_file.check_cluster_file(path), cluster_file.offered, "ray up"
    if faults:
        return [Finding(path, line, f"fix it before `{then}`") for line in faults]
    types = offered(path)
    most = {name: sum(t.max_workers * t.resources.get(name, 0) for t in types) for name in ("CPU", "GPU")}
    grown = ", ".join(f"{name}: {count}" for name, count in most.items() if count)
    findings = [Finding(path, f"sound; a job that may use all of it: cluster.grows_to={{{grown}}}")]
    wanted = None if config is None or config.generate is None else config.cluster.generator_labels
    if wanted:
        fit = [t for t in types if t.max_workers and all(t.labels.get(k) == v for k, v in wanted.items())]
        words = ", ".join(f"{k}={v}" for k, v in wanted.items())
        if not fit:
            labels = sorted({f"{k}={v}" for t in types for k, v in t.labels.items()})
            advice = f"set cluster.generator_labels to one of {', '.join(labels)}, or add such a node type"
            findings.append(Finding("generator nodes", f"no node type of {path} has {words}", advice))
        else:
            count = sum(t.max_workers for t in fit)
            findings.append(Finding("generator nodes", f"up to {count} of {', '.join(t.name for t in fit)}"))
    return findings
