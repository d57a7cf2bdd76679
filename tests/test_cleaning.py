"""ls, open and clean: what they tell of a workspace, and that nothing goes but what is ours and nobody needs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from raydistill.cleaning import delete, find_waste
from raydistill.cli.commands import app
from raydistill.cli.workspace import clean
from raydistill.config import load_config
from raydistill.errors import CheckpointError, ConfigError, StageError
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.jobs import JobRecord
from raydistill.storage.lease import held

PART = "0" * 32 + ".tmp"
LINKED = "it is a link, has one, or is nested too deeply"


def stage(root: Path, kind: str, identity: str = "{}", size: int = 1000) -> Path:
    folder = root / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(identity)
    (folder / "DONE").write_text("{}")
    (folder / "report.html").write_bytes(b"x" * size)
    return folder


def old(path: Path) -> Path:
    os.utime(path, (1, 1))
    return path


def run_of(root: Path, name: str, directories: list[Path], key: str = "0123456789ab") -> None:
    with JobRecord(
        load_config([], {"images.path": "x", "workspace": str(root), "name": name}), key, "seed 0"
    ) as record:
        record.uses({folder.name.partition("-")[0]: str(folder) for folder in directories})
        record.results({"student": {"val": 0.5, "test": 0.25}}, f"{directories[-1]}/report.html")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace of two jobs that share a directory, and one that belongs to none."""
    place = tmp_path / "w"
    shared, mine, others = (stage(place, kind) for kind in ("teach", "evaluate", "distill"))
    run_of(place, "first", [shared, mine])
    run_of(place, "second", [shared, others])
    stage(place, "export")
    return place


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def names(root: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in root.iterdir()}


def wasted(root: Path, job: str | None = None) -> dict[str, str]:
    return {
        os.path.relpath(item.path, root).partition("-")[0]: item.kept or item.why
        for item in find_waste(str(root), job)[0]
    }


# ls


def test_ls_counts_what_jobs_share_once(root: Path) -> None:
    first, second = json.loads(call("ls", root, "--json").stdout)
    assert (first["name"], first["state"], first["accuracies"]["student"]["test"]) == ("first", "done", 0.25)
    assert (first["bytes"], first["shared_bytes"], second["shared_bytes"]) == (1004, 1004, 1004)
    assert Path(first["report"]).is_file()
    told = call("ls", f"workspace={root}").stdout  # as the other commands take it
    assert "0.500, 0.250" in told
    assert f"2 runs in {root}" in told.replace("\n", "")
    assert "3.0 kB" in told


def test_a_workspace_of_many_runs_is_listed(tmp_path: Path) -> None:
    stage(tmp_path, "teach")
    run_of(tmp_path, "first", list(tmp_path.glob("teach-*")))
    (file,) = tmp_path.glob("jobs/first/runs/*")
    record = json.loads(file.read_text())
    for number in range(500):
        own = {name: f"{name}-{number:012x}" for name in ("adapt", "distill", "evaluate", "export")}
        record["directories"] |= own
        file.with_name(f"{number:012x}.json").write_text(json.dumps(record))
    began = time.process_time()
    assert len(json.loads(call("ls", tmp_path, "--json").stdout)) == 501
    assert time.process_time() - began < 5


def test_a_bucket_is_listed_without_a_request_for_each_file(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with JobRecord(load_config([], {"images.path": "x", "workspace": f"{bucket}/w"}), "ab" * 6, "") as record:
        record.uses({"teach": f"{bucket}/w/teach-0123456789ab", "distill": f"{bucket}/w/distill-0123456789ab"})
    for number in range(30):
        write_bytes(f"{bucket}/w/teach-0123456789ab/deep/{number}", b"12345")
    caplog.clear()
    with caplog.at_level(logging.INFO, "werkzeug"):
        (run,) = json.loads(call("ls", f"{bucket}/w", "--json").stdout)
    assert run["bytes"] == 150
    assert len([record for record in caplog.records if record.name == "werkzeug"]) < 20
    assert "there is no bucket 'no-such-bucket'" in str(call("ls", "s3://no-such-bucket/w").exception)


def test_what_strangers_write_controls_no_terminal(root: Path) -> None:
    file = next(root.glob("jobs/first/runs/*"))
    record = json.loads(file.read_text()) | {"name": "\x1b[2Ja\nb", "title": "\u202ex", "error": "\x1b]8;;http://x\x07"}
    file.write_text(json.dumps(record))
    for words in (("ls", root), ("ls", root, "--json"), ("open", "second", "--workspace", root)):
        told = call(*words).stdout
        assert not {"\x1b", "\x07", "\u202e"} & set(told)
    file.write_text(json.dumps(record | {"started": 1e300}))
    assert "first" not in call("ls", root).stdout


@pytest.mark.parametrize("closed", ["jobs/first", "jobs/first/runs/0123456789ab.json"])
def test_what_another_user_keeps_closed_is_left_out_and_stops_clean(closed: str, root: Path) -> None:
    (root / closed).chmod(0)
    next(root.glob("distill-*")).chmod(0o400)
    as_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*as_user, sys.executable, "-m", "raydistill", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )

    told = run("ls", root, "--json")
    assert [run["name"] for run in json.loads(told.stdout)] == ["second"]
    assert f"Permission denied: '{root}/{closed}" in told.stderr
    told = run("clean", root, "--yes")
    assert (told.returncode, "Permission denied" in told.stderr) == (2, True)
    (root / closed).chmod(0o755)
    assert run("clean", root, "--yes").returncode == 0
    assert names(root) >= {"teach", "evaluate", "distill"}


@pytest.mark.parametrize("command", ["ls", "clean"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda place: None, lambda place: place.write_text("a file")])
def test_outside_a_workspace_is_refused(command: str, make, tmp_path: Path) -> None:
    make(tmp_path / "place")
    result = call(command, tmp_path / "place")
    assert isinstance(result.exception, ConfigError)
    assert str(tmp_path / "place") in str(result.exception)


# open


def test_open_shows_the_latest_report_or_the_named_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert "distill-" in call("open", "--workspace", root).stdout
    assert opened == []  # without a display
    monkeypatch.setenv("DISPLAY", ":0")
    assert "evaluate-" in call("open", "first", "--workspace", root).stdout
    assert opened == [next(root.glob("evaluate-*/report.html")).as_uri()]
    assert "did you mean first?" in str(call("open", "frist", "--workspace", root).exception)
    for page in root.glob("*/report.html"):
        page.unlink()
    assert "no report yet" in str(call("open", "--workspace", root).exception)


# clean


def test_what_no_job_needs_goes_and_nothing_else(root: Path) -> None:
    (root / "mine.txt").write_text("mine")
    (root / "mlflow.db").write_text("runs")
    before = names(root)
    assert wasted(root) == {"export": "no job needs it"}
    assert "would delete 1 thing" in call("clean", root, "--dry-run").stdout
    asked = call("clean", root)
    assert "--yes" in str(asked.exception)
    assert names(root) == before
    assert "deleted 1 thing, 1.0 kB" in call("clean", root, "--yes").stdout
    assert names(root) == before - {"export"}
    assert "nothing to delete" in call("clean", root, "--yes").stdout


def test_a_job_goes_with_what_it_alone_needs(root: Path) -> None:
    assert wasted(root, "second") == {"distill": "no job needs it", "export": "no job needs it"}
    assert call("clean", root, "--job", "second", "--yes").exit_code == 0
    assert names(root) == {"teach", "evaluate", "jobs"}  # `latest` was that job
    assert [path.name for path in (root / "jobs").iterdir()] == ["first"]
    assert isinstance(call("clean", root, "--job", "second", "--yes").exception, ConfigError)


def test_a_running_job_and_a_damaged_record_stop_it(root: Path) -> None:
    first = load_config([], {"images.path": "x", "workspace": str(root), "name": "first"})
    with JobRecord(first, "ab" * 6, ""), pytest.raises(ConfigError, match="is running"):
        find_waste(str(root), "first")
    next(root.glob("jobs/first/runs/0*")).write_text("{")
    with pytest.raises(CheckpointError, match="jobs/first/runs"):
        find_waste(str(root))


def test_a_directory_in_use_stays(root: Path) -> None:
    (export,) = root.glob("export-*")
    (export / "DONE").unlink()
    waste, _ = find_waste(str(root))
    with held(StageDirectory(str(export), "export", "{}"), print):
        assert wasted(root) == {"export": "in use"}
        assert not delete(waste[0])  # found before it came into use
    assert export.is_dir()
    assert wasted(root) == {"export": "no job needs it"}


def test_what_a_job_needs_that_began_before_the_answer_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(root, "adapt")
    (export,) = root.glob("export-*")

    def answer(*_: object) -> bool:
        run_of(root, "third", [export])
        return True

    monkeypatch.setattr("typer.confirm", answer)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    clean(str(root), None, dry_run=False, yes=False)
    told = capsys.readouterr().out
    assert names(root) >= {"export"}
    assert "adapt" not in names(root)
    assert "stays: another command began to use it" in told
    assert "deleted 1 thing" in told


def test_what_cannot_be_deleted_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "rename", refuse)
    result = call("clean", root, "--yes")
    assert isinstance(result.exception, StageError)
    assert "export-" in str(result.exception)
    assert "Permission denied" in str(result.exception)


def test_links_and_folders_of_others_stay(root: Path, tmp_path: Path) -> None:
    victim = stage(tmp_path, "teach", "of another workspace")
    (root / victim.name).symlink_to(victim)  # a link with a name of ours to a directory of ours
    inside = stage(root, "features", "holds a link")
    (inside / "more").symlink_to(tmp_path)
    (root / "adapt-0123456789ab").mkdir()
    (root / "adapt-0123456789ab/thesis.tex").write_text("mine")
    (root / "prepare-0123456789ab").mkdir()
    (root / "prepare-0123456789ab/identity.json").write_text("{}")  # of another hash
    (root / "decoded-0123456789ab").write_text("a file")
    (root / f"student.{PART}").symlink_to(old(victim / "report.html"))
    everything = sorted(path for path in tmp_path.rglob("*") if not path.match("export-*"))
    ours = "no folder of raydistill's"
    assert wasted(root) == {
        "adapt": ours, "decoded": ours, "prepare": ours, "export": "no job needs it",
        "features": LINKED, "teach": LINKED,
    }  # fmt: skip
    assert call("clean", root, "--yes").exit_code == 0
    kept = set(tmp_path.rglob("*"))
    assert [path for path in everything if path not in kept and "export-" not in str(path)] == []
    assert not list(root.glob("export-*"))


def test_a_link_that_takes_the_place_of_a_found_folder_is_not_followed(root: Path, tmp_path: Path) -> None:
    waste, _ = find_waste(str(root))
    (export,) = root.glob("export-*")
    victim = export.rename(tmp_path / export.name)
    export.symlink_to(victim)
    assert not delete(waste[0])
    assert sorted(path.name for path in victim.iterdir()) == ["DONE", "identity.json", "report.html"]


def test_what_killed_processes_leave_goes(root: Path) -> None:
    (evaluate,) = root.glob("evaluate-*")
    new, half = evaluate / f"student.{PART}", evaluate / f"report.json.{PART}"
    new.write_text("being written")
    old_files = [half, root / f".writable-{'1' * 32}", root / f"jobs/first/runs/0123456789ab.json.{PART}"]
    old_files.append(root / f"precision/0123456789ab.json.{PART}")
    (pinned := root / "precision" / "0123456789ab.json").parent.mkdir()
    pinned.write_text("{}")
    old(pinned)
    for path in old_files:
        path.write_text("half")
        old(path)
    (begun := root / "teach-0123456789ab").mkdir()
    (begun / "lease-000001").write_text(json.dumps({"id": "x", "process": "m - 1 1", "released": True}))
    (root / ".deleted-teach-0123456789ab").mkdir()
    steps = evaluate / "checkpoints/step-000000007"
    steps.mkdir(parents=True)
    (steps / "state.pt").write_text("superseded")
    assert call("clean", root, "--yes").exit_code == 0
    assert not any(path.exists() for path in (*old_files, begun, root / ".deleted-teach-0123456789ab", steps))
    assert new.exists()
    assert pinned.exists()


def test_a_second_clean_at_the_same_time_ends_well(root: Path) -> None:
    for number in range(20):
        stage(root, "teach", str(number))
    waste, _ = find_waste(str(root))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for item in waste:
                delete(item)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wasted(root) == {}


def nest(folder: Path, depth: int) -> None:
    """Folders in folders: from a certain depth on no path leads to them."""
    folder.mkdir(parents=True)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def test_folders_of_any_depth_end_nothing(root: Path) -> None:
    needed = json.loads(next((root / "jobs").rglob("runs/*.json")).read_text())["directories"]
    used, orphan = root / next(iter(needed.values())), stage(root, "prepare")
    for folder in (used, orphan, root / "jobs/x"):
        nest(folder / "deep", 2100)
    nest(root / ".deleted-teach-0123456789ab", 1200)
    try:
        assert call("ls", root).exit_code == 0
        found = {Path(waste.path).name: waste.kept for waste in find_waste(str(root))[0]}
        assert found[orphan.name] == LINKED
        with pytest.raises(StageError, match=r"\.deleted-.*: cannot be deleted .its folders are nested too deeply"):
            clean(str(root), yes=True)
        with pytest.raises(CheckpointError, match="has folders that are nested too deeply; delete it"):
            StageDirectory(str(used), used.name.partition("-")[0], "{}").done()
    finally:
        subprocess.run(["rm", "-rf", str(root)], check=True)  # pytest's own way is recursive
