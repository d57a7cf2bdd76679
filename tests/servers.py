"""Servers on this machine: a head of a Ray cluster, and MLflow's."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.processes import wait_for

TOKEN = "0123456789abcdef" * 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head of its own, which asks for a token; gives the environment that reaches it."""
    home, port, gcs = tmp_path_factory.mktemp("home"), free_port(), free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    ray = Path(sys.executable).parent / "ray"
    words = ["start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={port}", "--num-cpus=2",
             f"--dashboard-agent-listen-port={free_port()}",
             "--dashboard-host=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir=/tmp/rd{port}"]  # fmt: skip
    node = subprocess.Popen([str(ray), *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)  # fmt: skip

    def answers() -> bool:
        assert node.poll() is None, "the head ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, 90)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        if node.poll() is None:
            os.killpg(node.pid, 15)
            node.wait(60)


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """A server at this port of 127.0.0.1, which keeps all in the folder. It may be killed before the end."""
    words = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts",
             "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words], start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip

    def answers() -> bool:
        try:
            return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (URLError, OSError):
            return False

    try:
        wait_for(answers, 120)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait(60)
