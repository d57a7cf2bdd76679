"""Files of finished stages that were cut off, altered or deleted: named with their images, and made anew as it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config import load_config
from raydistill.data.sample import SCHEMA, decode_shard, encode_shard
from raydistill.data.targets import decode_targets, encode_targets, read_ids, read_samples, read_targets
from raydistill.errors import CheckpointError
from raydistill.run import run_stages

rng = np.random.default_rng(0)
IDS = [f"{n:032x}" for n in range(40)]
ROWS = {"sample_id": IDS, "image": [rng.bytes(48) for _ in IDS], "label": [n % 3 for n in range(40)],
        "source": ["real"] * 40, "split": ["train"] * 40}  # fmt: skip
SHARD = encode_shard(SCHEMA.empty_table().from_pydict(ROWS))
TARGETS = encode_targets(IDS, rng.normal(size=(2, 40, 16)))


@given(place=st.integers(0, len(SHARD) - 1), change=st.integers(1, 255))
def test_a_changed_byte_of_a_shard_is_found_or_changes_nothing(place: int, change: int) -> None:
    data = bytearray(SHARD)
    data[place] ^= change
    try:
        found = decode_shard(bytes(data), "w/train-00000.parquet")
    except CheckpointError as error:
        found, said = None, str(error)
    if found is None:
        assert re.match(r"w/train-00000.parquet is damaged .*; delete it and w/DONE and run the command", said)
    else:
        assert found == decode_shard(SHARD)


@given(place=st.integers(0, len(TARGETS) - 1), change=st.integers(1, 255))
def test_a_changed_byte_of_soft_targets_is_found_or_changes_nothing(place: int, change: int) -> None:
    data = bytearray(TARGETS)
    data[place] ^= change
    try:
        found = decode_targets(bytes(data), IDS, "w/train-00000.safetensors")
    except CheckpointError as error:
        found, said = None, str(error)
    if found is None:
        assert said.startswith("w/train-00000.safetensors is damaged (")
    else:
        np.testing.assert_array_equal(found, decode_targets(TARGETS, IDS, ""))


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x5A
    path.write_bytes(data)


HARMS = {
    "deleted": (Path.unlink, "is missing"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    "altered": (altered, "is damaged"),
}


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("stage", ["prepare", "teach"])
def test_the_sentence_s_advice_makes_the_one_file_anew(words, progress, tmp_path, stage: str, harm: str) -> None:
    config = load_config(words)
    outcome = run_stages(config, progress, until="teach")
    samples = outcome.samples
    folder = Path(samples.path if stage == "prepare" else outcome.directories["teach"])
    file = folder / ("train-00001.parquet" if stage == "prepare" else "train-00001.safetensors")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*-0*")}

    def read() -> None:
        ids = read_ids(samples, "train", 1)
        read_samples(samples, "train", 1)
        read_targets(outcome.directories["teach"], "train", 1, ids)

    read()
    change, words_of = HARMS[harm]
    change(file)
    first, count = samples.shards["train"][:2]
    rows = f"train images {first + 1} to {first + count}: " if stage == "prepare" else ""
    sentence = rf"^{rows}{re.escape(str(file))} {words_of}.*; delete (it and )?{re.escape(str(folder))}/DONE and run"
    with pytest.raises(CheckpointError, match=sentence):
        read()
    with pytest.raises(CheckpointError, match=sentence):  # a run says so too
        run_stages(load_config([*words, "distill.learning_rate=0.003"]), progress)
    file.unlink(missing_ok=True)
    (folder / "DONE").unlink()
    run_stages(config, progress, until="teach")
    read()
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*-0*")}
    assert {path for path in before if after[path] != before[path]} == {file}
    assert after[file][1] == before[file][1]
