"""Optuna's private names do what search/optuna_private.py takes them to do."""

from __future__ import annotations

import optuna
import pytest

from raydistill.errors import CheckpointError
from raydistill.search.optuna_private import CmaEsSampler, running_trial


def test_a_trial_of_another_process_goes_on() -> None:
    study = optuna.create_study()
    begun = study.ask()
    begun.suggest_float("x", 0, 1)
    (frozen,) = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    trial = running_trial(study, frozen)
    assert trial.params == begun.params
    study.tell(trial, 0.5)
    assert study.best_trial.number == begun.number


def test_the_state_of_cma_es_is_in_the_study_and_is_read_here(monkeypatch) -> None:
    """Each trial has a new sampler. If Optuna kept or read the state in another way, nothing would be refused."""
    study = optuna.create_study()

    def ask(count: int) -> list[float]:
        drawn = []
        for _ in range(count):
            study.sampler = CmaEsSampler(seed=len(study.trials))
            trial = study.ask()
            drawn.append(trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1))
            study.tell(trial, drawn[-1])
        return drawn

    ask(12)
    assert any(key.startswith("cma:optimizer:") for trial in study.trials for key in trial.system_attrs)
    monkeypatch.setattr("raydistill.search.optuna_private._CmaState._CLASSES", frozenset())
    with pytest.raises(CheckpointError, match="which could run code"):
        ask(1)
