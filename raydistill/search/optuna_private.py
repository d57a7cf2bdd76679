"""Uses of private names of Optuna 5.0 that have no public equivalent. tests/search/test_optuna_private.py fails if they
change."""

from __future__ import annotations

import io
import pickle
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from raydistill.errors import CheckpointError


def running_trial(study: optuna.Study, frozen: FrozenTrial) -> optuna.Trial:
    """A trial that another process began, to continue it. Optuna's public `ask` gives new trials only."""
    return optuna.Trial(study, frozen._trial_id)


class CmaEsSampler(optuna.samplers.CmaEsSampler):
    """Optuna stores the state of CMA-ES in the study as a pickle, and a study may come from others. This sampler loads
    the classes of such a state only."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            if parts := [key for key in trial.system_attrs if key.startswith(self._attr_key_optimizer)]:
                text = "".join(str(trial.system_attrs[f"{self._attr_key_optimizer}:{k}"]) for k in range(len(parts)))
                return _CmaState(io.BytesIO(bytes.fromhex(text))).load()
        return None


class _CmaState(pickle.Unpickler):  # noqa: TID251 - knows only the classes below
    _CLASSES = frozenset({
        ("cmaes._cma", "CMA"), ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.random._mt19937", "MT19937"),
        ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"), ("numpy.random._pickle", "__randomstate_ctor"),
        ("numpy.random._pickle", "__bit_generator_ctor"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._CLASSES:
            raise CheckpointError(
                f"the study's state of CMA-ES holds {module}.{name}, which could run code, so it is not loaded; start "
                "another search in another workspace or tune.storage"
            )
        return super().find_class(module, name)
