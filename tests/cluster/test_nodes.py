"""What is said of a cluster before work starts on it: of real nodes, each with one thing wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raydistill.config import load_config
from raydistill.doctor.cluster import check_offers
from tests.processes import python

CLUSTER_FILE = Path(__file__).parents[2] / "cluster.yaml"
# In a process of its own: the nodes of such a cluster, and its Ray, are not those of the other tests.
_TWO_NODES = """
import json, logging, os, sys
from types import SimpleNamespace
import ray
from ray.cluster_utils import Cluster
from raydistill.config import load_config
from raydistill.errors import ConfigError
from raydistill.cluster import session as joining, late_nodes, preemption, nodes as preflight
from tests.processes import wait_for

root = sys.argv[1]
for folder in ("here/images/cat", "here/pipe", "here/w", "there/pipe", "there/w"):
    os.makedirs(f"{root}/{folder}")
for file in ("here/pipe/model_index.json", "here/weights.pth", "shared.pth"):
    open(f"{root}/{file}", "w").close()
for folder, content in {"here": "0" * 99, "there": "0" * 98 + "1"}.items():
    with open(f"{root}/{folder}/other.pth", "w") as file:
        file.write(content)
for table, image in {"seen.csv": "shared.pth", "unseen.csv": "/proc/self/cwd/weights.pth"}.items():
    with open(f"{root}/{table}", "w") as file:
        file.write(f"path,label\\n{image},cat\\n")
small = {"object_store_memory": 80_000_000}
os.chdir(f"{root}/here")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
os.chdir(f"{root}/there")  # the second node's own folder, where relative names mean something else
cluster.add_node(num_cpus=1, labels={"pool": "spot"}, **small)
os.chdir(f"{root}/here")
ray.init(address=cluster.address)
base = ["images.path=x", f"workspace={root}/w", "tracking.enabled=false"]
generates = ["generate.pipeline=p", "cluster.generator_labels={pool: spot}"]


def said(*words):
    found = preflight.check_nodes(load_config([*base, *words]))
    return [[f.about, f.found, f.advice] for f in found]


answers = {
    "sound": said(*generates),
    "memory": said("workspace=memory://w"),
    "sqlite": said("tracking.enabled=true"),
    "no_label": said("generate.pipeline=p", "cluster.generator_labels={pool: gold}"),
    "places": said("images.path=images", f"teacher.weights={root}/shared.pth", "student.model=hf:some/model"),
    "table": said(f"images.path={root}/seen.csv"),
    "hidden_images": said(f"images.path={root}/unseen.csv"),
    "other": said("teacher.weights=other.pth"),
    "unseen": said("generate.pipeline=pipe", "teacher.weights=weights.pth", "teacher.model=example:x"),
}
preflight.uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="known"))  # so that the second node can have a link
os.symlink(f"{root}/here/w/.seen-known", f"{root}/there/w/.seen-known")
answers["elsewhere"] = said("workspace=file://w")
os.remove(f"{root}/there/w/.seen-known")
import uuid
preflight.uuid = uuid
installed = preflight._installed
preflight._installed = lambda: installed() | {"torch": "0.0.1"}  # in this process alone
answers["versions"] = said()
try:
    with joining.ray_cluster(load_config([*base, "cluster.address=auto"])):
        answers["refused"] = None
except ConfigError as error:
    answers["refused"] = str(error)
preflight._installed = installed

late_nodes._SECONDS_BETWEEN_LOOKS = 0.5
looked, inspect_nodes = [], preflight.inspect_nodes
preflight.inspect_nodes = lambda config, nodes: [looked.append(found := inspect_nodes(config, nodes)), found][1]
records = []
late_nodes.log.addHandler(handler := logging.Handler())
handler.emit = lambda record: records.append(record.getMessage())
drain, drains = preemption.drain, []


def drain_that_fails_at_first(*arguments):
    drains.append(arguments)
    if len(drains) == 1:
        raise ConnectionError("the head is busy")
    drain(*arguments)


preemption.drain = drain_that_fails_at_first
with joining.ray_cluster(load_config([*base, "cluster.address=auto"])):
    looked.clear()
    good = cluster.add_node(num_cpus=1, **small)
    wait_for(lambda: looked and looked[-1], 60)  # and nothing is said of it
    preflight._installed = lambda: installed() | {"torch": "0.0.1"}  # so that the next one differs from the driver
    bad = cluster.add_node(num_cpus=1, resources={"bad": 1}, **small)
    wait_for(lambda: len(drains) > 1 and not any(n["Alive"] for n in ray.nodes() if n["NodeID"] == bad.node_id), 60)
    answers["newcomer"] = records
    answers["good"] = [n["Alive"] for n in ray.nodes() if n["NodeID"] == good.node_id]
print("ANSWERS" + json.dumps(answers))
"""


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_two_nodes_are_looked_at_from_themselves(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    ended = python("-c", _TWO_NODES, str(tmp_path), env=environment, timeout=380)
    assert "ANSWERS" in ended.stdout, ended.stdout + ended.stderr
    answers = json.loads(ended.stdout.partition("ANSWERS")[2])
    assert [advice for *_, advice in answers["sound"]] == [None] * 4
    assert ["workspace", f"2 nodes read and write {tmp_path}/w", None] in answers["sound"]
    assert ["generator nodes", "1 with pool=spot", None] in answers["sound"]
    blind = [(found, advice) for _, found, advice in answers["memory"] if "does not see" in found]
    assert len(blind) == 2  # this file system lies in each process's own memory
    assert all("workspace=s3://bucket/runs" in advice for _, advice in blind)
    places = [(found, advice) for about, found, advice in answers["places"] if about == "images, models"]
    assert places == [("2 nodes see images.path, teacher.weights", None)]
    assert ["images, models", "2 nodes see images.path, the first image of images.path", None] in answers["table"]
    hidden = [found for _, found, advice in answers["hidden_images"] if advice]
    assert hidden == ["does not see /proc/self/cwd/weights.pth (the first image of images.path)"]
    ((other, advice),) = [(found, advice) for _, found, advice in answers["other"] if advice]
    assert other == "has another file as other.pth (teacher.weights)"
    assert "a shared folder by its full name" in advice
    ((unseen, advice),) = [(found, advice) for _, found, advice in answers["unseen"] if "does not see" in found]
    assert unseen == "does not see weights.pth (teacher.weights), pipe/model_index.json (generate.pipeline)"
    assert "a bucket, or a shared folder by its full name" in advice
    ((elsewhere, advice),) = [(found, advice) for _, found, advice in answers["elsewhere"] if advice]
    assert elsewhere == "writes workspace=file://w where others do not see"
    assert "workspace=s3://bucket/runs" in advice
    assert any("sqlite" in found and "MLflow server" in (advice or "") for _, found, advice in answers["sqlite"])
    assert any(found.startswith("none with pool=gold yet (there are pool=spot)") for _, found, _ in answers["no_label"])
    differing = [found for _, found, advice in answers["versions"] if advice]
    assert len(differing) == 2
    assert all(found.startswith("torch ") and "(here 0.0.1)" in found for found in differing)
    assert "torch" in answers["refused"]
    assert answers["good"] == [True]
    drained, failed, again = answers["newcomer"]
    assert "a node that joined is drained, because it is not fit" in drained
    assert "(here 0.0.1)" in drained
    assert failed == "nodes that join are not checked for now: the head is busy"
    assert again == drained, "what failed is tried again"
    assert not list((tmp_path / "w").glob(".*")), "no marker is left"
    assert not list((tmp_path / "here" / "w").glob(".*"))


@pytest.mark.parametrize(("label", "is_offered"), [("spot", True), ("gold", False)])
def test_a_label_is_looked_for_among_the_node_types_of_a_cluster_file(label: str, is_offered: bool) -> None:
    config = load_config(["images.path=x", "generate.pipeline=p", f"cluster.generator_labels={{pool: {label}}}"])
    sound, finding = check_offers(config, str(CLUSTER_FILE))
    assert sound.found == "sound; a job that may use all of it: cluster.grows_to={CPU: 96, GPU: 12}"
    assert (finding.advice is None) is is_offered
    assert ("no node type" in finding.found) is not is_offered


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberays_files_are_looked_at_too(name: str, tmp_path: Path) -> None:
    path = CLUSTER_FILE.parent / "deploy" / "kuberay" / name
    config = load_config(["images.path=x", "generate.pipeline=p", "cluster.generator_labels={pool: spot}"])
    sound, offers = check_offers(config, str(path))
    assert sound.found.startswith("sound; a job that may use all of it: cluster.grows_to={CPU: ")
    assert (offers.about, offers.advice) == ("generator nodes", None)
    broken = tmp_path / name
    broken.write_text(path.read_text().replace("mode: token", "mode: disabled"))
    (finding,) = check_offers(config, str(broken))
    assert finding.found.endswith("authOptions.mode: anybody who reaches a port of Ray can run code; write token")
    assert finding.advice == "fix it before `kubectl apply`"


def test_a_broken_cluster_file_is_named(tmp_path: Path) -> None:
    text = CLUSTER_FILE.read_text().replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")
    (tmp_path / "cluster.yaml").write_text(text)
    findings = check_offers(None, str(tmp_path / "cluster.yaml"))
    assert findings
    assert all(finding.advice for finding in findings)
    assert "dashboard" in findings[0].found
