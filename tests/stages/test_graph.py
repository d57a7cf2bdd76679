"""The table of the stages is all that a new one needs, beside its own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydistill.config import load_config
from raydistill.graph import STAGES, find_work
from tests.processes import python

ALONE = ("teacher=null", "loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0")
STAGE = """
import json

from raydistill.execution import Execution
from raydistill.identity import stage_directory


def directory(config, samples):
    return stage_directory(config, "count", {"ids": samples.ids, "seed": config.seed})


def count(execution: Execution) -> None:
    samples, place = execution.samples, directory(execution.config, execution.samples)

    def work(record) -> None:
        place.begin()
        place.finish({"images": samples.num_rows("train")})

    done = execution.result(place, work)
    execution.progress.line(f"count:    {done['images']} images to train on")
"""
ROW = """
import counting, sys
from raydistill import graph
graph.STAGES += (graph.Stage(
    "count", "Count the images.", "counting:count", takes=("prepare",), settings=("seed",),
    directories=lambda config, samples: [counting.directory(config, samples)], needs_ray=lambda config: False,
),)
from raydistill.cli import main
main()
"""


@pytest.mark.cluster
def test_a_new_stage_is_a_file_and_a_row(taught, words, tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(STAGE)

    def raydistill(*given: str) -> str:
        ended = python("-c", ROW, *given, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "Count the images." in raydistill("--help")
    shown = [line.split() for line in raydistill("show", *words).splitlines()]
    assert [line[-2:] for line in shown if line[1:2] == ["count"]] == [["would", "run"]]
    assert "count:    " in raydistill("count", *words)
    again = raydistill("count", *words)
    assert "count     done before" in again
    assert "train on" in again
    done = [line for line in raydistill("show", *words).splitlines() if line.startswith("# count ")]
    assert "done" in done[0]
    assert "count     done before" in raydistill("run", *words, *ALONE, "distill.epochs=1", "export.formats=[]")


def test_what_a_command_wants_is_what_its_stage_takes(words) -> None:
    config = load_config(words)
    order = [stage.name for stage in STAGES]
    for stage in STAGES:
        assert all(order.index(name) < order.index(stage.name) for name in stage.takes), "a stage takes earlier ones"
    wanted = {stage: list(find_work(config, stage).directories) for stage in ("prepare", "adapt", "teach", "evaluate")}
    assert wanted == {
        "prepare": ["prepare"],
        "adapt": ["prepare", "adapt"],
        "teach": ["prepare", "adapt", "teach"],
        "evaluate": ["prepare", "adapt", "teach", "distill", "evaluate"],
    }
    assert list(find_work(config).directories) == [name for name in order if name != "generate"]
    assert list(find_work(load_config([*words, *ALONE])).directories) == ["prepare", "distill", "evaluate", "export"]
