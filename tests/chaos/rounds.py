"""Rounds of a whole run on a cluster of several nodes on this machine, with one real fault in each.

A round is a process with Ray, and a home, of its own: `play` starts it, strikes from outside where the fault is the
driver's end, and starts it again where it ended without a result. What it left is read by `read_result`. A stopped job
is a command of its own in the round, which gets the SIGTERM that `ray job stop` sends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from tests.processes import ray_processes, wait_for

ROOT = Path(__file__).parents[2]
EPOCHS = 16
# When a fault strikes: as soon as so many of these are there.
MOMENTS = {
    "generate": "generated/*/*.parquet",
    "teach": "teach-*/train-*.safetensors",
    "distill": "distill-*/epochs/*.json",
}
_ACTORS = {"generator_actor": "GeneratorActor", "teacher_actor": "ShardTeacher", "train_worker": "RayTrainWorker"}
_AT = {
    "generator_actor": ("generate",), "teacher_actor": ("teach",), "train_worker": ("distill",),
    "torn_checkpoint": ("distill",),
}  # fmt: skip
# Calls by which work gets its worker and results are asked for are lost, before or after they were answered, or late.
# Not all of Ray's calls: where any may be lost, Ray 2.60 itself stands still sooner or later, with every process
# waiting; and where those that hand work over may, Ray Train waits for CPUs that its own lost workers keep.
_LOST = {"num_failures": -1, "req_failure_prob": 2, "resp_failure_prob": 2, "in_flight_failure_prob": 1}
_CALLS = (
    "NodeManagerService.grpc_client.RequestWorkerLease", "NodeManagerService.grpc_client.ReturnWorkerLease",
    "CoreWorkerService.grpc_client.GetObjectStatus",
)  # fmt: skip
_BAD_NETWORK = {
    "RAY_testing_rpc_failure": json.dumps(dict.fromkeys(_CALLS, _LOST)),
    "RAY_testing_asio_delay_us": "NodeManagerService.grpc_server.RequestWorkerLease=1000:50000",
}
FAULTS = (
    *_ACTORS, "node_killed", "node_drained", "node_joins", "driver_killed", "job_stopped", "torn_checkpoint",
    "store_fails", "disk_full", "bad_network",
)  # fmt: skip
_ENDS_DRIVER = ("driver_killed", "torn_checkpoint")
_FAILING_SECONDS = 3.0
_SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 1024**2}


def moments_of(fault: str) -> tuple[str, ...]:
    return _AT.get(fault, tuple(MOMENTS))


@dataclass(frozen=True)
class Result:
    """What a run left: a hash of each stage's files, the student's weights, and the work that was done twice."""

    hashes: dict[str, str]
    student: dict[str, np.ndarray]
    epochs: int
    units: int
    redone: int
    lost_nodes: int
    errors: list[str]  # what commands that ended without a result said

    @property
    def redone_share(self) -> float:
        return self.redone / self.units


def make_inputs(folder: Path) -> list[str]:
    """A folder of images, a teacher and a pipeline, always the same; and the words of a small run on them."""
    import timm
    import torch
    from safetensors.torch import save_file

    from tests.conftest import save_class_pipeline
    from tests.small_run import CLASSES, painted

    images, rng = folder / "images", np.random.default_rng(1)
    for label, name in enumerate(CLASSES):
        (images / name).mkdir(parents=True)
        for i in range(40):
            painted(label, rng, 40).save(images / name / f"{i}.png")
    torch.manual_seed(0)
    weights = folder / "teacher.safetensors"
    save_file({k: v.contiguous() for k, v in timm.create_model("test_resnet", num_classes=5).state_dict().items()},
              weights)  # fmt: skip
    save_class_pipeline(folder / "pipeline")
    job = {
        "name": "chaos",
        "workspace": "faulty://runs",
        "images": {"path": str(images), "size": 32, "shard_size": 4},
        "teacher": {"model": "timm:test_resnet", "weights": str(weights), "size": 32, "allow_near_chance": True,
                    "precision": "fp32"},
        # Losses that do not depend on how many workers share a batch.
        "student": {"model": "timm:test_vit", "size": 32},
        "views": {"per_image": 30},
        "generate": {"pipeline": str(folder / "pipeline"), "per_class": 24, "batch_size": 3, "steps": 3,
                     "dtype": "fp32"},
        "loss": {"projection_dim": 8, "projection_head": "two_layer", "uniformity_weight": 0},
        "distill": {"epochs": EPOCHS, "batch_size": 16, "num_workers": 2, "labelled_share": 0.5,
                    "checkpoint_seconds": 0, "precision": "fp32"},
        "cluster": {"teacher_actors": [1, 2], "generator_actors": [1, 2]},
        "export": {"allow_useless": True},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    return [str(folder / "job.yaml")]


def play(words: list[str], folder: Path, fault: str = "none", moment: str = "teach", count: int = 1) -> Result:
    """Run until there is a result, at most three commands. Raises AssertionError where there is none."""
    folder.mkdir(parents=True)
    errors: list[str] = []
    for attempt in range(3):
        error = _command(words, folder, fault if attempt == 0 else "none", moment, count)
        if error is None:
            return read_result(folder, errors)
        errors.append(error)
    raise AssertionError(f"{fault} at {moment} {count}: no result after three commands: {errors}")


def _command(words: list[str], folder: Path, fault: str, moment: str, count: int) -> str | None:
    """One command in a process of its own, and what it said where it ended without a result."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.rounds", json.dumps([words, fault, moment, count])],
            cwd=ROOT, env=_environment(folder, home, fault), start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            if fault in _ENDS_DRIVER:
                wait_for(lambda: _reached(folder, moment, count) or process.poll() is not None, 300)
                if fault == "torn_checkpoint":
                    wait_for(lambda: _checkpoints(folder) or process.poll() is not None, 300)
                _kill_all(process)
                if fault == "torn_checkpoint":
                    _tear_newest_checkpoint(folder)
            out, err = process.communicate(timeout=400)
        finally:
            _kill_all(process)
    if fault in _ENDS_DRIVER:
        return "killed"
    if process.returncode != 0 or not out.strip():
        return err[-2000:] or f"exit code {process.returncode}"
    answer: dict[str, str] = json.loads(out.splitlines()[-1])
    return answer.get("error")


def read_result(folder: Path, errors: list[str]) -> Result:
    store = folder / "store" / "runs"
    hashes = {}
    for stage, pattern in {"prepare": "*.parquet", "adapt": "head.safetensors", "generate": "train-*.parquet",
                           "teach": "*.safetensors"}.items():  # fmt: skip
        digest = hashlib.sha256()
        for path in sorted(store.glob(f"{stage}-*/{pattern}")):
            digest.update(path.relative_to(store).as_posix().encode() + path.read_bytes())
        hashes[stage] = digest.hexdigest()
    assert len(list(store.glob("teach-*"))) == 2, "of the real and of the generated images"
    (student,) = store.glob("distill-*/student.safetensors")
    bills = [json.loads(path.read_text()) for path in store.glob("*/seconds.json")]
    units, redone = _work(folder)
    return Result(
        hashes, load_file(student), len(list(store.glob("distill-*/epochs/*.json"))), units, redone,
        sum(bill.get("lost_nodes", 0) for bill in bills), errors,
    )  # fmt: skip


def _work(folder: Path) -> tuple[int, int]:
    """Units of work that there are, and how many were begun again: an actor looks for a unit's file before it makes
    it, and training begins an open epoch again whenever its workers start."""
    drivers, looks, epochs, trainers = set(), Counter[str](), Counter[str](), set()
    notes = [line.split(" ", 2) for line in (folder / "notes.log").read_text().splitlines()]
    for pid, what, path in notes:
        if what == "write" and path.endswith("/identity.json"):
            drivers.add(pid)
    for pid, what, path in notes:
        is_unit = ("/generated/" in path and path.endswith(".parquet")) or path.partition("/")[2].startswith("teach")
        if what == "look" and pid not in drivers and is_unit and path.endswith((".parquet", ".safetensors")):
            looks[path] += 1
        if what == "write" and "/epochs/" in path:
            epochs[path] += 1
            trainers.add(pid)
    units = len(looks) + len(epochs)
    again = sum(looks.values()) - len(looks) + sum(epochs.values()) - len(epochs) + max(0, len(trainers) - 1)
    return units, again


def _environment(folder: Path, home: str, fault: str) -> dict[str, str]:
    """Apart from every other Ray on the machine, by a short path, since sockets lie there; a lost node is noticed in
    seconds."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return environment | {
        "HOME": home, "RAY_TMPDIR": home, "CHAOS_FOLDER": str(folder), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'tests' / 'chaos' / 'faulty'}:{ROOT}",
        "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3", "RAY_USAGE_STATS_ENABLED": "0",
        **(_BAD_NETWORK if fault == "bad_network" else {}),
    }  # fmt: skip


def _kill_all(process: subprocess.Popen[str]) -> None:
    """The round and all that it started: what Ray starts has sessions of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _checkpoints(folder: Path) -> list[Path]:
    """The weights of those that are whole."""
    whole = (folder / "store" / "runs").glob("distill-*/checkpoints/*/checkpoint.json")
    return [path.with_name("weights.safetensors") for path in whole]


def _tear_newest_checkpoint(folder: Path) -> None:
    """As a disk does that lost power: its name and length are there, and half of what it held."""
    newest = max(_checkpoints(folder), key=lambda p: p.stat().st_mtime)
    half = newest.stat().st_size // 2
    newest.write_bytes(newest.read_bytes()[:half] + bytes(newest.stat().st_size - half))


def _reached(folder: Path, moment: str, count: int) -> bool:
    return len(list((folder / "store" / "runs").glob(MOMENTS[moment]))) >= count


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**_SMALL, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**_SMALL, labels={"pool": "spot"})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _round(words: list[str], fault: str, moment: str, count: int) -> None:
    """In the round's own process: the run in a thread, the fault from this one."""
    from rich.console import Console

    from raydistill.config import load_config
    from raydistill.run import run_stages
    from raydistill.runtime.progress import Progress

    folder = Path(os.environ["CHAOS_FOLDER"])
    with _cluster() as cluster, ThreadPoolExecutor(1) as pool:
        if fault == "job_stopped":
            _stop_job([*words, f"cluster.address={cluster.address}"], folder, moment, count)
        config = load_config([*words, f"cluster.address={cluster.address}"])
        running = pool.submit(run_stages, config, Progress(Console(quiet=True)))
        if fault not in ("none", "bad_network", "job_stopped", *_ENDS_DRIVER):
            wait_for(lambda: _reached(folder, moment, count) or running.done(), 300)
            if not running.done():
                _strike(fault, cluster, folder)
        running.result(timeout=350)


def _stop_job(words: list[str], folder: Path, moment: str, count: int) -> None:
    """A driver that ends as told, with the exit code of an interruption, before the command that goes on."""
    job = subprocess.Popen([sys.executable, "-m", "raydistill", "run", *words], stdout=subprocess.DEVNULL)
    wait_for(lambda: _reached(folder, moment, count) or job.poll() is not None, 300)
    job.terminate()
    if (ended := job.wait(60)) != 143:
        raise RuntimeError(f"a job that was stopped ended with {ended}")


def _strike(fault: str, cluster: Any, folder: Path) -> None:
    if fault in _ACTORS:
        wait_for(lambda: ray_processes(_ACTORS[fault]), 20)
        ray_processes(_ACTORS[fault])[0].kill()
    elif fault in ("node_killed", "node_drained"):
        node = next(iter(cluster.worker_nodes))
        if fault == "node_drained":
            from raydistill.cluster.preemption import drain

            drain(node.node_id, "a drill", 5, cluster.address)
            time.sleep(5)
        cluster.remove_node(node, allow_graceful=False)
    elif fault == "node_joins":
        cluster.add_node(**_SMALL, labels={"pool": "spot"})
    else:
        (folder / "failing").write_text(str(errno.ENOSPC if fault == "disk_full" else errno.EIO))
        time.sleep(_FAILING_SECONDS)
        (folder / "failing").unlink()


def main() -> None:
    try:
        _round(*json.loads(sys.argv[1]))
        answer: dict[str, str] = {}
    except Exception as error:  # whatever a command would end with
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # Ray's threads need not be waited for


if __name__ == "__main__":
    main()
