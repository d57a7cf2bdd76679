"""Whole runs in a bucket, by several processes, on a bad line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from safetensors.torch import load

from raydistill.storage.filesystems import open_filesystem, read_bytes
from tests.buckets import CutConnections

pytestmark = pytest.mark.cluster
STAGES = ["prepare", "features", "adapt", "teach", "distill", "evaluate", "export"]


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raydistill", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stages_in(workspace: str) -> dict[str, list[str]]:
    """The directories of each stage."""
    fs, place = open_filesystem(workspace)
    found: dict[str, list[str]] = {}
    for name in fs.names(place):
        found.setdefault(name.rpartition("-")[0], []).append(name)
    return found


def test_two_commands_at_once_on_a_line_that_is_cut_make_one_student(
    words: list[str], bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = CutConnections(s3_server, nth=9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
    workspace = f"{bucket}/work space"
    commands = [start("run", *words, f"workspace={workspace}") for _ in range(2)]
    outputs = [command.communicate(timeout=800)[0] for command in commands]
    line.close()
    assert [command.returncode for command in commands] == [0, 0], "\n".join(outputs)
    cut = {match[1] for request in line.requests if (match := re.search(r"/(\w+)-[0-9a-f]{12}/", request))}
    assert cut.issuperset(STAGES), "a connection was cut in each stage"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    found = stages_in(workspace)
    assert {stage: len(found[stage]) for stage in STAGES} == {**dict.fromkeys(STAGES, 1), "features": 2}
    for stage in STAGES:
        made = [output for output in outputs if re.search(rf"^{stage} +(\d|done by)", output, re.M)]
        assert len(made) <= 1, f"{stage} was paid twice:\n" + "\n".join(outputs)
    fs, place = open_filesystem(f"{workspace}/{found['distill'][0]}")
    assert not [name for name in fs.names(place) if name.startswith(("lease", "checkpoints"))]
    assert load(read_bytes(f"{workspace}/{found['distill'][0]}/student.safetensors"))
    # The same again finds all of it, with few requests, and predicts from the bucket.
    again = start("run", *words, f"workspace={workspace}")
    output = again.communicate(timeout=400)[0]
    assert again.returncode == 0, output
    assert all(re.search(rf"^{stage} +done before", output, re.M) for stage in STAGES if stage != "features"), output
