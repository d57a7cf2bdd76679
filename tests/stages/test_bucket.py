"""Whole runs in a bucket, by several processes, on a bad line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load

from raydistill.storage.filesystems import open_filesystem, read_bytes, write_bytes
from tests.buckets import CUT, CutConnections, Line
from tests.small_run import CLASSES, painted

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


def pictures(bucket: str, of_each: int) -> str:
    """The address of so many pictures of each class in the bucket."""
    rng, folder = np.random.default_rng(1), f"{bucket}/images{of_each}"
    for label, name in enumerate(CLASSES):
        for number in range(of_each):
            data = io.BytesIO()
            painted(label, rng, 40).save(data, "PNG")
            write_bytes(f"{folder}/{name}/{number}.png", data.getvalue())
    return folder


def by_stage(requests: list[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Kinds of requests by stage: a stage begins where its directory's lease is looked for."""
    stage, found = "start", dict[str, Counter[str]]()
    for kind, key in requests:
        begins = re.search(r"/(\w+)-[0-9a-f]{12}/lease-000001$", key)
        if begins and begins[1] != stage and kind == "GET" and begins[1] not in found:
            stage = begins[1]
        found.setdefault(stage, Counter())[kind] += 1
    return found


@pytest.mark.slow
def test_requests_grow_with_shards_and_never_with_images(words: list[str], bucket: str, s3_line: Line) -> None:
    shards, size = {}, 48
    found: dict[int, dict[str, Counter[str]]] = {}
    for of_each in (24, 96):
        images = pictures(bucket, of_each)
        s3_line.requests.clear()
        words_here = [*words, f"images.path={images}", f"images.shard_size={size}", f"workspace={bucket}/w{of_each}"]
        command = start("run", *words_here)
        output = command.communicate(timeout=800)[0]
        assert command.returncode == 0, output
        asked = Counter(request for request in s3_line.requests if request[1].startswith(f"images{of_each}/"))
        assert asked == Counter({("LIST", f"images{of_each}/"): 1} | {
            ("GET", f"images{of_each}/{name}/{k}.png"): 1 for name in CLASSES for k in range(of_each)
        })  # fmt: skip
        found[of_each] = by_stage([r for r in s3_line.requests if r not in asked or r[0] == "LIST"])
        shards[of_each] = sum(kind == "PUT" and bool(re.search(r"/(prepare|decoded)-\w+/.*parquet$", key))
                              for kind, key in s3_line.requests)  # fmt: skip
    for stage, few in found[24].items():
        many = found[96][stage]
        print(stage, dict(few), dict(many))
        assert many["LIST"] <= 1, (stage, many)
        # a stage that takes longer renews its lease, and looks at the progress, more often
        assert many.total() <= few.total() + 12 * (shards[96] - shards[24]) + 40, (stage, few, many)


@pytest.mark.slow
def test_a_line_that_is_dead_for_ten_seconds_in_each_stage_changes_no_result(
    words: list[str], bucket: str, s3_line: Line
) -> None:
    began: dict[str, float] = {}  # when the line went dead: with a stage's first file that is not its lease
    refused = Counter[str]()

    def refuse(kind: str, key: str) -> str | None:
        writes = re.search(r"/(\w+)-[0-9a-f]{12}/(?!lease)", key) if kind == "PUT" else None
        if writes and writes[1] in STAGES:
            began.setdefault(writes[1], time.monotonic())
        dead = [stage for stage, since in began.items() if time.monotonic() - since < 10]
        refused.update(dead)
        return CUT if dead else None

    students = []
    for name, rule in ({"quiet": lambda *_: None, "dead": refuse}).items():
        s3_line.refuse = rule
        command = start("run", *words, f"workspace={bucket}/{name}")
        output = command.communicate(timeout=800)[0]
        assert command.returncode == 0, output
        distill, evaluate = (stages_in(f"{bucket}/{name}")[stage][0] for stage in ("distill", "evaluate"))
        files = [f"{distill}/student.safetensors", f"{evaluate}/predictions.parquet"]
        students.append([read_bytes(f"{bucket}/{name}/{file}") for file in files])
    assert refused.keys() == set(STAGES), "each stage met it"
    assert students[0] == students[1]
