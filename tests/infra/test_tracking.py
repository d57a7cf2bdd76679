"""What MLflow keeps of names that it would refuse: class names, prompts, arms and job names with quotes."""

from __future__ import annotations

import mlflow
import pytest

from raydistill.config import load_config
from raydistill.infra.tracking import Tracker


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_name_ends_the_record(tmp_path, caplog) -> None:
    words = [f"workspace={tmp_path}", "images.path=x", "name=Ann's set", "generate.pipeline=p"]
    config = load_config([*words, 'generate.templates={"a {class}, 100%":2,"ein Bild: {class}":1}'])
    for _ in range(2):  # the second time its run is found again
        with Tracker(config, job="prepare-1/Ann's set") as tracker:
            with tracker.child("scratch+generated, seed 0") as record:
                record.log({"recall of 'größe+1'": 0.5})
            tracker.log_job({"kd+generated_test_accuracy": 0.25}, [])
    assert not caplog.records
    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    experiment = client.get_experiment_by_name("Ann's set")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("Ann's set")
    assert parent.data.metrics == {"kd_generated_test_accuracy": 0.25}
    assert parent.data.params["generate.templates.a _class__ 100_"] == "2.0"
    (child,) = runs.values()
    assert child.data.metrics == {"recall of _größe_1_": 0.5}
