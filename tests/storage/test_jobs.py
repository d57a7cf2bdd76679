"""Jobs by name: what runs leave in `jobs/`, also at once, after failures, in buckets and in strangers' folders."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raydistill.cli.commands import app
from raydistill.config import RunConfig, load_config
from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.storage.jobs import JobRecord, folder_name, forget, job_name, read_jobs, state_of

KEY, TEACH, DISTILL = "0123456789ab", "teach-0123456789ab", "distill-0123456789ab"
NAMES = (
    "../x",
    "a/b",
    "a_b",
    "x" * 300,
    "x" * 301,
    "größe 3",
    "グループ",
    "",
    ".",
    "..",
    "-rf",
    "CON:",
    "a\nb",
    "\x1b[2J",
    "demo",
    "é",
)


def job(root: object, **settings: object) -> RunConfig:
    return load_config([], {"images.path": "./my_images", "workspace": str(root), "name": "demo", **settings})


def links(folder: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}


def test_a_run_leaves_links_to_its_directories_and_the_latest_one(tmp_path: Path) -> None:
    for name in (TEACH, DISTILL):
        (tmp_path / name).mkdir()
    with JobRecord(job(tmp_path), KEY, "resnet10t") as record:
        record.uses({"teach": f"{tmp_path}/{TEACH}"})
        ((_, run),) = read_jobs(str(tmp_path))
        assert (run.directories, run.ended) == ({"teach": TEACH}, None)  # a directory in use is never nobody's
        record.uses({"teach": f"{tmp_path}/{TEACH}", "distill": f"{tmp_path}/{DISTILL}"})
        record.results({"student": {"test": 0.5}}, None)
    assert links(tmp_path / "jobs/demo") == {"teach": f"../../{TEACH}", "distill": f"../../{DISTILL}"}
    assert (tmp_path / "latest/distill").resolve() == tmp_path / DISTILL
    ((_, run),) = read_jobs(str(tmp_path))
    assert (run.name, run.accuracies, state_of(str(tmp_path), run)) == ("demo", {"student": {"test": 0.5}}, "done")
    with JobRecord(job(tmp_path), "ba9876543210", "other settings") as record:
        record.uses({"teach": f"{tmp_path}/{TEACH}"})
    assert links(tmp_path / "jobs/demo") == {"teach": f"../../{TEACH}"}  # those of the last run
    assert len(list(read_jobs(str(tmp_path)))) == 2


def test_the_links_stay_with_the_last_finished_run_and_a_new_one_names_the_student_before(tmp_path, caplog) -> None:
    """A run that is interrupted, or one of a comparison, which writes no page, does not hide a good student."""
    first, second = "export-0123456789ab", "export-ba9876543210"
    for name in (TEACH, first, second):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").touch()

    def run(key: str, export: str, page: str | None, error: type[BaseException] | None = None) -> None:
        with JobRecord(job(tmp_path), key, "") as record:
            record.uses({"teach": f"{tmp_path}/{TEACH}", "export": f"{tmp_path}/{export}"})
            if error is not None:
                raise error
            record.results({}, page and f"{tmp_path}/{export}/{page}")

    run(KEY, first, "report.html")
    shown = links(tmp_path / "jobs/demo")
    assert shown["export"] == f"../../{first}"
    with pytest.raises(KeyboardInterrupt):
        run("ba9876543210", second, None, KeyboardInterrupt)
    run("ba9876543211", second, None)
    assert links(tmp_path / "jobs/demo") == shown
    run(KEY, first, "report.html")
    assert not caplog.messages
    run("ba9876543212", second, "report.html")
    assert links(tmp_path / "jobs/demo")["export"] == f"../../{second}"
    (said,) = caplog.messages
    assert said == f"{tmp_path}/jobs/demo leads to this run from now on; the student before is in {tmp_path}/{first}"


def test_a_failed_run_leaves_what_is_there_and_is_not_the_latest(tmp_path: Path) -> None:
    (tmp_path / TEACH).mkdir()

    def fail() -> None:
        with JobRecord(job(tmp_path), KEY, "") as record:
            record.uses({"teach": f"{tmp_path}/{TEACH}", "distill": f"{tmp_path}/{DISTILL}"})
            raise DataError("no images of password=hunter22 at https://user:hunter22@host/x")

    with pytest.raises(DataError):
        fail()
    assert links(tmp_path / "jobs/demo") == {"teach": f"../../{TEACH}"}
    assert not (tmp_path / "latest").is_symlink()
    ((path, run),) = read_jobs(str(tmp_path))
    assert state_of(str(tmp_path), run) == "failed"
    assert "hunter22" not in Path(path).read_text()
    with pytest.raises(KeyboardInterrupt), JobRecord(job(tmp_path), KEY, ""):
        raise KeyboardInterrupt
    ((path, run),) = read_jobs(str(tmp_path))
    assert state_of(str(tmp_path), run) == "interrupted"
    assert run.directories == {"teach": TEACH, "distill": DISTILL}  # of the run before: they are still its own
    living = run.model_copy(update={"ended": None})
    assert state_of(str(tmp_path), living) == "running"
    dead = living.model_copy(update={"process": living.process.rpartition(" ")[0] + " 1"})
    assert state_of(str(tmp_path), dead) == "killed"
    elsewhere = living.model_copy(update={"process": "another-machine pid:[1] 7 1"})
    assert state_of(str(tmp_path), elsewhere) == "killed"  # nobody there holds a directory of its
    (tmp_path / DISTILL).symlink_to(tmp_path / TEACH)  # a stranger's, which hides no other job from `ls`
    assert state_of(str(tmp_path), elsewhere) == "killed"
    (lease := tmp_path / TEACH / "lease-000001").write_text(json.dumps({"id": "x", "process": elsewhere.process}))
    assert state_of(str(tmp_path), elsewhere) == "running"
    os.utime(lease, (1, 1))
    assert state_of(str(tmp_path), elsewhere) == "killed"


def test_runs_of_one_name_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / TEACH).mkdir()

    def run(number: int) -> None:
        with JobRecord(job(tmp_path), f"{number % 3:012x}", "") as record:
            record.uses({"teach": f"{tmp_path}/{TEACH}"})

    with ThreadPoolExecutor(8) as pool, caplog.at_level(logging.WARNING):
        list(pool.map(run, range(60)))
    assert not caplog.records
    assert sorted(p.name for p in (tmp_path / "jobs/demo").iterdir()) == ["runs", "teach"]
    assert len(list(read_jobs(str(tmp_path)))) == 3


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_one_folder(name: str, tmp_path: Path) -> None:
    folder = folder_name(name)
    assert Path(folder).name == folder
    assert 0 < len(folder.encode()) < 255
    assert folder.isprintable()
    assert folder[0] not in ".-"
    assert folder_name(name) == folder
    with JobRecord(job(tmp_path / "w", name=name), KEY, ""):
        pass
    assert [p.name for p in (tmp_path / "w/jobs").iterdir()] == [folder]
    assert {p.name for p in tmp_path.iterdir()} == {"w"}
    ((_, run),) = read_jobs(str(tmp_path / "w"))
    assert run.name == name


def test_no_two_names_are_one_folder() -> None:
    assert len({folder_name(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("path", "name"),
    [("./my_images", "my_images"), ("/data/cats/", "cats"), ("example:open-clip-art", "open-clip-art"),
     ("a/..", "raydistill"),     ("https://host/x.parquet?sig=SECRET", "x.parquet"),
     ("s3://bucket/set", "set"), ("set.csv", "set.csv")],
)  # fmt: skip
def test_a_job_without_a_name_has_that_of_its_images(path: str, name: str) -> None:
    assert job_name(load_config([], {"images.path": path})) == name


@pytest.mark.parametrize("link", ["jobs", "jobs/demo", "jobs/demo/runs"])
def test_links_in_the_place_of_records_are_not_followed(link: str, tmp_path: Path) -> None:
    victim, root = tmp_path / "victim", tmp_path / "w"
    (victim / "demo/runs").mkdir(parents=True)
    (victim / "runs").mkdir()
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"is a link to .*victim"):
        JobRecord(job(root), KEY, "")
    with pytest.raises((CheckpointError, ConfigError)):
        list(read_jobs(str(root)))
    assert sorted(p.name for p in victim.rglob("*")) == ["demo", "runs", "runs"]


def test_what_is_in_the_way_of_a_link_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest/mine.txt").write_text("mine")
    with JobRecord(job(tmp_path), KEY, ""):
        pass
    assert "latest is there, and no link" in caplog.text
    assert (tmp_path / "latest/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["{", '{"name": 3}', '{"name": "x", "directories": {"teach": "../../etc"}}', '{"name": "x", "page": "/x"}',
             '{"name": "x", "directories": {"../x": "teach-0123456789ab"}}'],
)  # fmt: skip
def test_a_strangers_record_is_named_and_left_out(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with JobRecord(job(tmp_path), KEY, ""):
        pass
    (tmp_path / "jobs/demo/runs/ba9876543210.json").write_text(text)
    assert [run.name for _, run in read_jobs(str(tmp_path))] == ["demo"]
    assert "ba9876543210.json is not what raydistill writes" in caplog.text
    assert "ba9876543210.json and run the command again" in caplog.text  # not the folder, where other runs' records are


def test_files_of_others_among_the_jobs_are_none(tmp_path: Path) -> None:
    with JobRecord(job(tmp_path), KEY, ""):
        pass
    (tmp_path / "jobs/.DS_Store").write_text("as a file manager leaves it")
    (tmp_path / "jobs/odd").mkdir()
    (tmp_path / "jobs/odd/runs").write_text("a file")
    assert [run.name for _, run in read_jobs(str(tmp_path))] == ["demo"]


def test_a_bucket_has_records_alone(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with JobRecord(job(f"{bucket}/w"), KEY, "") as record:
        record.uses({"teach": f"{bucket}/w/{TEACH}"})
    ((path, run),) = read_jobs(f"{bucket}/w")
    assert (path, run.directories) == (f"{bucket}/w/jobs/demo/runs/{KEY}.json", {"teach": TEACH})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_in_the_place_of_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("a file")
    with pytest.raises(CheckpointError, match="jobs/demo/runs"):
        JobRecord(job(tmp_path), KEY, "")


def test_two_that_forget_a_job_at_once_end_well(tmp_path: Path) -> None:
    with JobRecord(job(tmp_path), KEY, ""):
        pass
    paths = [path for path, _ in read_jobs(str(tmp_path))]
    forget(str(tmp_path), paths)
    forget(str(tmp_path), paths)
    assert list(tmp_path.rglob("*")) == [tmp_path / "jobs"]


def test_a_record_that_another_user_keeps_closed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("raydistill.storage.jobs.read_state", refuse)
    monkeypatch.setattr("raydistill.storage.jobs.write_bytes", refuse)
    with JobRecord(job(tmp_path), KEY, "") as record:
        record.uses({"teach": f"{tmp_path}/{TEACH}"})
    told = [record.getMessage() for record in caplog.records if "the job's record" in record.getMessage()]
    assert ["cannot be read (Permission denied)" in told[0], "cannot be written" in told[-1], len(told)] == [
        True,
        True,
        2,
    ]


def test_where_no_job_has_run_the_job_that_is_asked_for_is_named(tmp_path: Path) -> None:
    for words in (["ls", str(tmp_path)], ["open", "x", "--workspace", str(tmp_path)], ["clean", str(tmp_path)]):
        error = str(CliRunner().invoke(app, words).exception)
        assert f"{tmp_path}: no job has run here" in error
        assert error.startswith("no job 'x'") == (words[0] == "open")
        assert "older version" not in error
    (tmp_path / "prepare-0123456789ab").mkdir()
    assert "older version" in str(CliRunner().invoke(app, ["ls", str(tmp_path)]).exception)
