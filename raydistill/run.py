"""run: check the job, then run every stage of the graph in order, and skip finished ones."""

from __future__ import annotations

from importlib import import_module

from raydistill.cluster.plan import local_plan
from raydistill.cluster.session import RayStart
from raydistill.config import RunConfig
from raydistill.errors import UselessStudentError
from raydistill.execution import Execution
from raydistill.graph import STAGES, Work, find_work
from raydistill.identity import student_key
from raydistill.preflight import check_run
from raydistill.results import Outcome
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import check_writable
from raydistill.storage.filesystems import read_bytes
from raydistill.storage.jobs import JobRecord
from raydistill.tracking.tracker import Tracker


def run_stages(
    config: RunConfig,
    progress: Progress,
    until: str | None = "evaluate",
    work: Work | None = None,
    ray: RayStart | None = None,
    command: str | None = None,
) -> Outcome:
    """Run the stages up to `until`, or all of them, and the stages that they need. Raises RaydistillError.

    It refuses what cannot work before it writes anything. `work` and `ray` are for a caller that already has them. With
    `command`, which repeats the run, it also writes report.html.
    """
    work = work or find_work(config, until)
    with ray or RayStart(config) as ray:
        if work.undone:
            check_writable(config)
            plan = ray.plan() if config.cluster.address and work.needs_ray else local_plan(config)
            if work.needs_ray:
                ray.begin()
            for line in plan.describe():
                progress.line(line)
            check_run(config, work)
        title = f"{config.student.model.rpartition(':')[2].rpartition('/')[2]} · seed {config.seed}"
        key = student_key(config, work.prepared)
        with Tracker(config, key, title) as tracker, JobRecord(config, key, title) as record:
            known = [directory for directories in work.directories.values() for directory in directories or ()]
            record.uses({directory.stage: directory.path for directory in known})  # done ones too: none is deleted now
            execution = Execution(config, progress, work, ray, tracker, record)
            for stage in STAGES:
                if stage.name in work.directories:
                    execution.stage = stage
                    module, _, function = stage.function.partition(":")
                    getattr(import_module(module), function)(execution)
            outcome = execution.outcome
            record.uses(outcome.directories)
            if outcome.report is not None and command is not None:
                from raydistill.pages.report import write_report

                outcome.page = write_report(config, outcome, command)
                tracker.parent.text(read_bytes(outcome.page).decode(), "report.html")
            if outcome.report is not None:
                record.results(outcome.report.accuracies, outcome.page)
            if outcome.refused is not None:
                error = UselessStudentError(outcome.refused)
                error.outcome = outcome
                raise error
            return outcome
