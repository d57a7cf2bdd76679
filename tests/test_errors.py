"""Errors survive the trip between processes and say how the command ends."""

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

import raydistill as rd
from raydistill import errors
from raydistill.cli.commands import app
from raydistill.cli.main import _explain
from raydistill.cluster.upload import pack
from raydistill.config import load_config
from raydistill.errors import ConfigError
from raydistill.examples import images_path
from raydistill.search.space import read_space

KINDS = [errors.ConfigError, errors.DataError, errors.CheckpointError, errors.StageError, errors.DivergedError]


@pytest.mark.parametrize(("kind", "exit_code"), [*zip(KINDS, [2, 2, 2, 1, 1], strict=True)])
def test_an_error_arrives_as_it_was_raised(kind, exit_code):
    found = pickle.loads(pickle.dumps(kind("the disk is full: café")))
    assert type(found) is kind
    assert isinstance(found, errors.RaydistillError)
    assert str(found) == "the disk is full: café"
    assert found.exit_code == exit_code


def test_a_message_of_any_length_is_cut_and_shows_no_half_of_a_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the whole secret")
    for before in range(2_480, 2_520):  # the cut lies after so many
        message = str(
            errors.DataError(f"t.csv: {'a b/'[before % 4 :] * 700}"[:before] + "the whole secret" + "a b/" * 9_999)
        )
        assert message.startswith("t.csv: ")
        assert len(message) < 5_000
        assert "secret" not in message
        assert "the who" not in message


def test_an_error_of_which_ray_kept_the_text_alone_is_said_as_it_is(capsys):
    """As Ray Data raises what a task raised, in an exception of its own without a cause."""
    text = (
        "ray::MapBatches()\n  File x\nraydistill.errors.CheckpointError: w/1.parquet is damaged (a); delete it\n\n"
        "The above exception was the direct cause of the following exception:\n\nUDF failed\nTo change retry attempts …"
    )
    assert _explain(RuntimeError(text)) == errors.CheckpointError.exit_code
    assert capsys.readouterr().err == "error: w/1.parquet is damaged (a); delete it\n"
    assert _explain(RuntimeError("something else")) == 1


@pytest.mark.parametrize(
    ("ask", "near"),
    [
        (lambda: load_config(["https://x/y.parquet", "student.init=pretraned"]), "pretrained"),  # a value
        (lambda: load_config(["https://x/y.parquet", "compare.arms=[scrath]"]), "scratch"),
        (lambda: load_config(["smok"]), "smoke"),
        (lambda: load_config(["https://x/y.parquet"], {"studnet": "timm:x"}), "student"),
        (lambda: images_path("fashion-mnis"), "fashion-mnist"),
        (lambda: read_space("los", load_config(["https://x/y.parquet"])), "loss"),
        (lambda: pack(load_config(["https://x/y.parquet"]), "rnu", (), "", "python", False), "run"),
        (lambda: rd.compare("https://x/y.parquet", learning_curv=True), "learning_curve"),  # an argument, and no key
        (lambda: rd.check("https://x/y.parquet", strct=True), "strict"),
        (lambda: rd.distill("https://x/y.parquet", progres=False), "progress"),
        (lambda: rd.distill("https://x/y.parquet", epoch=3), "distill.epochs"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_one(ask: Callable[[], object], near: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean {near}\?"):
        ask()


@pytest.mark.parametrize(
    ("words", "near"),
    [("rnu", "'run'"), ("teahc x", "'teach'"), ("job stauts", "'status'"), ("check --strct x", "--strict"),
     ("clean --dryrun", "--dry-run"), ("--versio", "--version")],
)  # fmt: skip
def test_a_misspelt_command_or_option_gets_the_nearest_one(words: str, near: str) -> None:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert near in result.output


def test_a_setting_with_dashes_is_told_how_settings_are_written() -> None:
    for command, words in (
        ("run", ["--epochs", "8"]),
        ("run", ["-distill.epochs=8"]),
        ("run", ["--lr=8"]),
        ("check", ["--teachr"]),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "raydistill", command, "x", *words], capture_output=True, text=True
        )
        assert ended.returncode == 2
        told = ": a setting is written without dashes: distill."
        assert (told in ended.stderr) == (command == "run")  # an option that there is has its own hint
        assert command == "check" or ended.stderr.count("\n") == 1


def test_keys_are_listed_by_section() -> None:
    lines = CliRunner().invoke(app, ["keys"]).output.split("\n")
    assert lines[lines.index("images") - 1] == ""
    assert lines[lines.index("images") + 2].startswith("images.path = required")
    assert not any(line.endswith(" ") for line in lines)
    assert "loss" not in CliRunner().invoke(app, ["keys", "temperature"]).output.split("\n")
