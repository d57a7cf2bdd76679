"""`Execution` is the argument of each stage's function. It makes each result once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raydistill.cluster.bill import billed
from raydistill.cluster.plan import Plan, local_plan
from raydistill.cluster.session import RayStart
from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.graph import STAGES, Work
from raydistill.results import Outcome
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory
from raydistill.storage.jobs import JobRecord
from raydistill.storage.lease import held
from raydistill.tracking.tracker import Tracker


class Execution:
    """A stage reads `config`, `outcome` and the other fields, and adds its result to `outcome`. `adapt` may replace the
    config's teacher with its fine-tuned one."""

    def __init__(
        self, config: RunConfig, progress: Progress, work: Work, ray: RayStart, tracker: Tracker, record: JobRecord
    ) -> None:
        self.config, self.progress, self.work = config, progress, work
        self.tracker, self.record = tracker, record
        self.outcome = Outcome()
        self._ray = ray
        self.stage = STAGES[0]  # the one that runs now

    @property
    def samples(self) -> SampleSet:
        assert self.outcome.samples is not None, "prepare runs first"
        return self.outcome.samples

    @property
    def head(self) -> str:
        """The directory of the teacher's head."""
        assert self.outcome.adapted is not None, "adapt runs before stages that need its head"
        return self.outcome.adapted.path

    def plan(self) -> Plan:
        """The resources of actors, tasks and workers. It waits for Ray if this stage needs it."""
        return self._ray.plan() if self.stage.needs_ray(self.config) else local_plan(self.config)

    def plan_of_many(self) -> Plan | None:
        """The plan for work that can do without Ray. None where Ray does not run yet and would bring nothing but this
        machine's CPUs, which the work has anyway."""
        own = local_plan(self.config)
        brings_more = self.config.cluster.address is not None or own.gpus > 1
        return self._ray.plan() if brings_more or self._ray.runs else None

    def result(self, directory: StageDirectory, work: Callable[[Any], object]) -> dict[str, Any]:
        """The result in a directory: from an earlier command, from another command that runs now, or from `work`, which
        gets the directory's MLflow run."""
        self.outcome.directories[directory.stage] = directory.path
        self.record.uses(self.outcome.directories)
        done = directory.done()
        if done is None:
            with held(directory, self.progress.line) as is_to_do:  # false: another command did it meanwhile
                if is_to_do:
                    return self._do(directory, work)
            done = directory.done()
            assert done is not None, "another command has finished it"
        self.progress.line(f"{directory.stage:<9} done before: {directory.path}")
        self.outcome.seconds[directory.stage] = 0.0
        return done

    def _do(self, directory: StageDirectory, work: Callable[[Any], object]) -> dict[str, Any]:
        started, progress = time.monotonic(), self.progress
        images_again, seconds_again = progress.images_again, progress.seconds_again
        settings = self.config.resolved.model_dump(mode="json", include=set(self.stage.settings))
        with self.tracker.child(directory.stage, directory.name, settings) as record:
            with billed(self.config) as nodes:
                work(record)
            done = directory.done()
            assert done is not None, "a stage ends by marking itself done"
            seconds = time.monotonic() - started
            bill = {"seconds": seconds, **nodes}
            if images := progress.images_again - images_again:
                bill |= {"images_again": images, "seconds_again": progress.seconds_again - seconds_again}
            directory.write_bill(bill)
            numbers = {"seconds": seconds, "images_again": images}
            record.log(numbers | {k: float(v) for k, v in done.items() if _is_number(v)})
        self.outcome.seconds[directory.stage] = seconds
        return done


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
