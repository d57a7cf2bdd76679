"""Memory that this process may use, from proc and sys as kernels and container runtimes show them."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from raydistill.runtime import memory
from raydistill.runtime.memory import available_bytes, object_store_bytes, total_bytes

GIB = 1024**3
NO_LIMIT_V1 = "9223372036854771712"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=40 * GIB))


def lay(root: Path, cgroup: str | None, files: dict[str, str]) -> Path:
    for name, text in (files if cgroup is None else {"proc/self/cgroup": cgroup, **files}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(folder: str, limit: str, used: int, idle: int = 0, high: str = "max") -> dict[str, str]:
    stat = f"anon 5\nfile {idle + 7}\ninactive_anon 3\ninactive_file {idle}\nactive_file 7"
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    texts = {"memory.max": limit, "memory.high": high, "memory.current": str(used), "memory.stat": stat}
    return {f"{place}/{name}": text for name, text in texts.items()}


def v1(folder: str, limit: str, used: int, idle: int = 0) -> dict[str, str]:
    stat = f"cache 9\ninactive_file 1\ntotal_inactive_file {idle}"
    place = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    texts = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(used), "memory.stat": stat}
    return {f"{place}/{name}": text for name, text in texts.items()}


OLD = "9:name=systemd:/\n4:{}:{}\n0::/"
CASES = {
    "no cgroups": (None, {}, 64, 40),
    "no limit, v2": ("0::/user.slice", v2("user.slice", "max", 3 * GIB), 64, 40),
    "no limit, v1": (OLD.format("memory", "/"), v1("", NO_LIMIT_V1, 3 * GIB), 64, 40),
    "container, v2": ("0::/", v2("", str(8 * GIB), 3 * GIB, GIB), 8, 6),
    "container, v1": (OLD.format("memory", "/"), v1("", str(8 * GIB), 3 * GIB, GIB), 8, 6),
    "container that sees the host's path, v1": (
        OLD.format("cpu,memory", "/docker/0123"), v1("", str(8 * GIB), 3 * GIB), 8, 5
    ),
    "slice within a container, v2": (
        "0::/a/b", v2("a/b", str(8 * GIB), 2 * GIB) | v2("a", str(6 * GIB), 5 * GIB) | v2("", "max", 9 * GIB), 6, 1
    ),
    "throttled before the limit, v2": ("0::/a", v2("a", str(8 * GIB), GIB, high=str(4 * GIB)), 4, 3),
    "more used than allowed, v2": ("0::/a", v2("a", str(8 * GIB), 9 * GIB), 8, 0),
    "both, memory under v1": (
        OLD.format("memory", "/job"), v1("job", str(8 * GIB), GIB) | v2("", str(99 * GIB), 0), 8, 7
    ),
    "limit above the machine": ("0::/", v2("", str(99 * GIB), 1), 64, 40),
}  # fmt: skip


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_the_smallest_limit_counts(tmp_path: Path, case: str) -> None:
    cgroup, files, total, available = CASES[case]
    root = lay(tmp_path, cgroup, files)
    assert total_bytes(root) == total * GIB
    assert available_bytes(root) == available * GIB


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("limit", "shared", "store"),
    [
        (40.0, 64.0, 4.0),  # a tenth
        (2.5, 64.0, 0.5),  # half a gigabyte at least
        (1.0, 64.0, 0.25),  # but no more than a quarter
        (999.0, 64.0, 6.4),  # of the machine where the limit is above it
        (40.0, 2.0, 1.8),  # what /dev/shm holds
        (40.0, 0.0625, 4.0),  # docker's 64 MB hold no shard: Ray takes its temporary folder
        (1.0, 0.0625, 0.25),
    ],
)
def test_the_object_store_follows_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, shared: float, store: float
) -> None:
    root = lay(tmp_path, "0::/", v2("", str(int(limit * GIB)), 0))
    space = SimpleNamespace(f_bavail=int(shared * GIB) // 4096, f_frsize=4096)
    monkeypatch.setattr(memory.os, "statvfs", lambda place: space if str(place).endswith("dev/shm") else None)
    assert object_store_bytes(root) == pytest.approx(store * GIB, rel=1e-6)
