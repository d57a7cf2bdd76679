"""The MLflow experiment of a job's runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from raydistill.config import RunConfig
from raydistill.escaping import one_line
from raydistill.tracking.stores import UnusableError

logger = logging.getLogger(__name__)


def experiment_name(config: RunConfig) -> tuple[str, str]:
    """The experiment's name, and what gives it: `name` or, if it is not set, the environment."""
    told = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if told and config.name == RunConfig.model_fields["name"].default:
        return told, "MLFLOW_EXPERIMENT_NAME"
    return one_line(config.name), "name"


def find_experiment(client: Any, name: str, whence: str, files: str) -> str:
    """The id of the experiment, which is created if needed; its runs' files go to `files`, if given. Raises
    UnusableError."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UnusableError(
            f"has an experiment {name!r} that was deleted: restore it (`mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`), or name another one in {whence}"
        )
    experiment = str(found.experiment_id if found else _new_experiment(client, name, files))
    if not experiment:
        raise UnusableError("is not an MLflow server (it knows no experiments): look at host, port and path")
    return experiment


def _new_experiment(client: Any, name: str, files: str) -> Any:
    """Without `files` MLflow would put them into the current folder."""
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name, artifact_location=files or None)
    except MlflowException:  # another machine may just have created it
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def mention_old_runs(root: str, store: str) -> None:
    """MLflow kept runs in folders before it required a database. Today's `mlruns` has only files, no meta.yaml."""
    for place in sorted({Path.cwd(), Path(root).parent}):
        if any(place.glob("mlruns/*/meta.yaml")):
            logger.warning(
                "%s/mlruns has runs that are not in MLflow at %s; to see them: mlflow migrate-filestore --source %s "
                "--target sqlite:///old.db, then mlflow ui --backend-store-uri sqlite:///old.db", place, store, place,
            )  # fmt: skip
