"""Cores that this process may use, from proc and sys as kernels and container runtimes show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raydistill.cluster.plan import local_plan
from raydistill.config import load_config
from raydistill.runtime.cgroups import num_cores, num_threads

MACHINE = 64


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MACHINE)))


def lay(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2, V1 = "sys/fs/cgroup/{}cpu.max", "sys/fs/cgroup/cpu/{}cpu.cfs_{}_us"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/", {}, MACHINE),
        ("0::/", {V2.format(""): "max 100000"}, MACHINE),
        ("0::/", {V2.format(""): "400000 100000"}, 4),
        ("0::/", {V2.format(""): "50000 100000"}, 1),  # half a core
        ("0::/", {V2.format(""): "250000 100000"}, 3),
        ("0::/a/b", {V2.format("a/b/"): "max 100000", V2.format("a/"): "200000 100000"}, 2),  # of the slice around it
        ("0::/pod/of/the/host", {V2.format(""): "300000 100000"}, 3),
        ("0::/", {V2.format(""): "9999999 100000"}, MACHINE),
        ("0::/", {V2.format(""): "nonsense"}, MACHINE),
        ("4:cpu,cpuacct:/\\n0::/", {V1.format("", "quota"): "150000", V1.format("", "period"): "50000"}, 3),
        ("4:cpu,cpuacct:/\\n0::/", {V1.format("", "quota"): "-1", V1.format("", "period"): "100000"}, MACHINE),
        ("9:memory:/", {V1.format("", "quota"): "100000", V1.format("", "period"): "100000"}, MACHINE),
    ],
)
def test_a_container_has_the_cores_of_its_quota(cgroup: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert num_cores(lay(tmp_path, cgroup.replace("\\n", "\n"), files)) == cores


def test_without_proc_it_has_those_of_its_affinity(tmp_path: Path) -> None:
    assert num_cores(tmp_path) == MACHINE


def test_threads_are_as_many_as_asked_for_and_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = num_cores()
    for asked, threads in {"1": 1, "100000": cores, "": cores, "many": cores, "0": cores, "1,4": 1}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert num_threads() == threads, asked
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ("null", 2, 100_000)
    plans = [local_plan(load_config(["images.path=x", f"cluster.threads={threads}"])) for threads in asked]
    least = min(2, cores)
    assert [(p.train_threads, p.teacher_threads) for p in plans] == [(1, 1), (least, least), (cores, cores)]
    assert plans[0].cpus == cores  # Ray may still run as many tasks
