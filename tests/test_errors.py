"""Errors survive the trip between processes and say how the command ends."""

import pickle

import pytest

from raydistill import errors


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.CheckpointError, 2),
        (errors.StageError, 1),
        (errors.DivergedError, 1),
    ],
)
def test_an_error_arrives_as_it_was_raised(kind, exit_code):
    found = pickle.loads(pickle.dumps(kind("the disk is full: café")))
    assert type(found) is kind
    assert isinstance(found, errors.RaydistillError)
    assert str(found) == "the disk is full: café"
    assert found.exit_code == exit_code
