"""A cluster of a head that runs no work: its autoscaler starts spot nodes when `generate` asks, and ends them after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.chaos.rounds import ROOT, make_inputs
from tests.processes import wait_for
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
# Ray's own provider for tests: nodes are raylets on this machine. It is not public.
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"
HEAD = "f" * 51 + "00000"
NODES_SCRIPT = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while True:
    print(sum(n["Alive"] for n in ray.nodes()) - 1, flush=True)
    time.sleep(0.5)
"""


@dataclass
class Cloud:
    address: str
    environment: dict[str, str]


@contextmanager
def cloud(home: Path) -> Iterator[Cloud]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 0.1, "head_node_type": "ray.head.default",
        # What the launcher of a cloud fills in, and a provider of one's own has to state.
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [], "upscaling_speed": 1.0,
        "provider": {
            "type": "external", "module": f"{PROVIDER}.FakeMultiNodeProvider", "gcs_address": address,
            "head_node_id": HEAD, "launch_multiple": True, "use_internal_ips": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": {
                "resources": {"CPU": 1, "object_store_memory": 100 * 1024**2}, "labels": {"pool": "spot"},
                "node_config": {}, "min_workers": 0, "max_workers": 2,
            },
        },
    }  # fmt: skip
    (home / "autoscaling.json").write_text(json.dumps(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(home), "RAY_TMPDIR": str(home), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ray = Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=0", f"--port={port}", "--node-ip-address=127.0.0.1",
         "--include-dashboard=false", f"--autoscaling-config={home}/autoscaling.json"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    drivers = {k: v for k, v in environment.items() if k not in ("RAY_CLOUD_INSTANCE_ID",
               "RAY_OVERRIDE_NODE_ID_FOR_TESTING")}  # fmt: skip
    try:
        yield Cloud(address, drivers)
    finally:
        family = [head, *psutil.Process(head.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_nodes_come_for_generate_and_go(tmp_path: Path) -> None:
    pytest.importorskip(PROVIDER)
    make_inputs(tmp_path)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as home, cloud(Path(home)) as there:
        with open(tmp_path / "nodes", "w") as counts:
            watcher = subprocess.Popen(
                [sys.executable, "-c", NODES_SCRIPT, there.address], env=there.environment, text=True,
                stdout=counts, stderr=subprocess.DEVNULL,
            )  # fmt: skip

        def nodes() -> list[int]:
            return [int(line) for line in (tmp_path / "nodes").read_text().split()]

        try:
            wait_for(nodes, 90)
            assert nodes()[-1] == 0
            words = [
                f"{tmp_path}/job.yaml", f"workspace={tmp_path}/workspace", f"cluster.address={there.address}",
                "cluster.grows_to={CPU: 2}", "cluster.generator_labels={pool: spot}",
                "cluster.generator_actors=[0,2]", "generate.per_class=60", "cluster.prices={head: 1, spot: 2}",
            ]  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "raydistill", "generate", *words], env=there.environment, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            assert max(nodes()) == 2
            wait_for(lambda: nodes()[-1] == 0, 90)
        finally:
            watcher.kill()
    (folder,) = (tmp_path / "workspace").glob("generate-*")
    assert sum(json.loads((folder / "DONE").read_text())["kept"].values()) > 0
    bill = json.loads((folder / "seconds.json").read_text())
    assert bill["node_seconds"]["spot"] > 0
    assert bill["lost_nodes"] == 0, "an idle node that ends is not lost"
