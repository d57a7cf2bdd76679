"""A Ray of this machine alone, as commands start it: who may reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

# In a process of its own, with a home of its own for the token.
_LOCAL = """
import json, stat
from pathlib import Path
import psutil, ray
from raydistill.config import load_config
from raydistill.infra.cluster import joined_cluster

with joined_cluster(load_config(["images.path=x"]), dashboard=True):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    heard = []
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                heard.append([process.name(), *connection.laddr])
    token = Path.home() / ".ray" / "auth_token"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)]
    print("ANSWERS" + json.dumps([heard, modes, len(token.read_text().strip())]))
"""


@pytest.mark.cluster
def test_a_local_ray_is_closed_to_the_network_and_its_token_to_others(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", _LOCAL], env=environment, capture_output=True, text=True, timeout=280)
    assert "ANSWERS" in ended.stdout, ended.stdout + ended.stderr
    heard, modes, length = json.loads(ended.stdout.partition("ANSWERS")[2])
    assert heard, "Ray listens on something"
    assert [port for port in heard if not ip_address(port[1]).is_loopback] == []
    assert modes == [0o600, 0o700]
    assert length >= 32
