"""run: every stage in order, those that are done skipped; all that can be checked is checked before the first."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from raydistill.config import RunConfig
from raydistill.data.images import Listing, list_images
from raydistill.data.sample import SampleSet, samples_from_json
from raydistill.errors import ConfigError, DataError
from raydistill.infra import artifacts
from raydistill.infra.artifacts import StageDirectory
from raydistill.infra.cluster import Plan, local_plan, ray_cluster
from raydistill.infra.progress import Progress
from raydistill.infra.tracking import Tracker
from raydistill.models.student import build_student, has_batch_norm
from raydistill.models.teacher import load_teacher, match_native_head
from raydistill.stages.adapt import AdaptedTeacher, adapt_teacher, write_plain_features
from raydistill.stages.distill import DistillJob, StudentCheckpoint, distill_student
from raydistill.stages.evaluate import Report, evaluate_student
from raydistill.stages.prepare import prepare_samples
from raydistill.stages.teach import stream_soft_targets

STAGES = ("prepare", "adapt", "teach", "distill", "evaluate")


@dataclass
class Outcome:
    """What a run came to; stages that were not asked for are None."""

    samples: SampleSet | None = None
    adapted: AdaptedTeacher | None = None
    student: StudentCheckpoint | None = None
    report: Report | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages that ran; 0 where one was done before
    directories: dict[str, str] = field(default_factory=dict)


def run_stages(config: RunConfig, progress: Progress, until: str = "evaluate") -> Outcome:
    """Run the stages up to `until` and all that they need. Raises RaydistillError."""
    listing = list_images(config.images)
    artifacts.check_writable(config)
    prepared = artifacts.prepare_directory(config, listing)
    run = _Run(config, progress, until, listing)
    run.check(prepared)
    tracker = Tracker(config, job=prepared.name + "/" + config.name)
    status = "FAILED"
    try:
        with run.tracked(tracker):
            outcome = run.stages(prepared)
        status = "FINISHED"
        return outcome
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


class _Run:
    """One command's way through the stages. Ray starts when the first stage asks for it, and once."""

    def __init__(self, config: RunConfig, progress: Progress, until: str, listing: Listing) -> None:
        self._config, self._progress, self._listing = config, progress, listing
        self._wanted = STAGES[: STAGES.index(until) + 1]
        self._outcome = Outcome()
        self._stack = contextlib.ExitStack()
        self._plan: Plan | None = None
        self._tracker: Tracker | None = None

    def check(self, prepared: StageDirectory) -> None:
        """Refuse what cannot work before anything is written: resources, models and their weights, counts."""
        config = self._config
        plan = local_plan(config) if config.cluster.address is None else None
        samples = None if (done := prepared.done()) is None else samples_from_json(done)
        if samples is not None and self._finished(samples):
            return
        for line in plan.describe() if plan else ():
            self._progress.line(line)
        needs_student = "distill" in self._wanted
        if needs_student:
            with torch.device("cpu"):
                student = build_student(config.student, len(self._listing.classes))
            smallest = config.distill.batch_size // config.distill.most_workers
            if smallest < 2 and has_batch_norm(student):
                raise ConfigError(
                    f"distill.batch_size={config.distill.batch_size} leaves a worker one image a step, and "
                    f"{config.student.model} has batch norm, which needs two; raise distill.batch_size"
                )
        if config.views.per_image == "fresh" and config.distill.batch_size % config.distill.most_workers:
            raise ConfigError(
                f"distill.batch_size={config.distill.batch_size} does not divide among the "
                f"{config.distill.most_workers} workers of distill.num_workers, as views.per_image=fresh needs it to"
            )
        train = sum(entry.split in (None, "train") for entry in self._listing.entries)
        if train < config.distill.most_workers:
            raise DataError(
                f"images.path={config.images.path}: {train} train images for the {config.distill.most_workers} workers "
                "of distill.num_workers; lower it, or add images"
            )
        teaching = config.loss.needs_teacher and len(self._wanted) > 1
        if teaching and config.teacher and not (samples and artifacts.teach_directory(config, samples).done()):
            _, head, names = load_teacher(config.teacher)
            if config.teacher.head == "native":
                match_native_head(head, names, self._listing.classes)

    def _finished(self, samples: SampleSet) -> bool:
        makers = {"adapt": artifacts.adapt_directory, "teach": artifacts.teach_directory,
                  "distill": artifacts.distill_directory, "evaluate": artifacts.evaluate_directory}  # fmt: skip
        last = self._wanted[-1]
        return last == "prepare" or makers[last](self._config, samples).done() is not None

    @contextlib.contextmanager
    def tracked(self, tracker: Tracker):  # type: ignore[no-untyped-def]
        self._tracker = tracker
        with self._stack:
            yield

    def _cluster(self) -> Plan:
        if self._plan is None:
            self._plan = self._stack.enter_context(ray_cluster(self._config))
        return self._plan

    def _stage(self, directory: StageDirectory, work: Any) -> dict[str, Any]:
        """The stage's result: that of an earlier run, or of doing the work now."""
        self._outcome.directories[directory.stage] = directory.path
        done = directory.done()
        if done is not None:
            self._progress.line(f"{directory.stage:<9} done before: {directory.path}")
            self._outcome.seconds[directory.stage] = 0.0
            return done
        started = time.monotonic()
        assert self._tracker is not None
        with self._tracker.stage(directory) as record:
            work(record)
            done = directory.done()
            assert done is not None, "a stage ends by marking itself done"
            seconds = time.monotonic() - started
            record.log({"seconds": seconds} | {k: float(v) for k, v in done.items() if _is_number(v)})
        self._outcome.seconds[directory.stage] = seconds
        return done

    def stages(self, prepared: StageDirectory) -> Outcome:
        config, progress, outcome = self._config, self._progress, self._outcome
        samples = outcome.samples = samples_from_json(
            self._stage(prepared, lambda _: prepare_samples(config, self._listing, prepared, self._cluster(), progress))
        )
        self._say_samples(samples)
        if config.loss.needs_teacher:
            self._teach(samples)
        if "distill" in self._wanted:
            self._distill(samples)
        if "evaluate" in self._wanted:
            student, adapted = outcome.student, outcome.adapted
            assert student is not None
            directory = artifacts.evaluate_directory(config, samples)
            outcome.report = Report(
                **self._stage(
                    directory, lambda _: evaluate_student(config, samples, adapted, student, directory, progress)
                )
            )
            self._record_report(outcome.report)
        return outcome

    def _say_samples(self, samples: SampleSet) -> None:
        counts = []
        for split in (split for split, shards in samples.shards.items() if shards):
            rows, labelled = samples.num_rows(split), samples.num_labelled[split]
            counts.append(f"{rows} {split}" + (f" ({labelled} labelled)" if labelled < rows else ""))
        self._progress.line(f"samples:  {', '.join(counts)}; {len(samples.classes)} classes")
        if samples.num_refused:
            self._progress.line(
                f"          {samples.num_refused} refused, each with its reason: {samples.path}/refused.json"
            )
        for what, count in self._listing.ignored.items():
            self._progress.line(f"          {count} ignored: {what}")

    def _teach(self, samples: SampleSet) -> None:
        config, progress = self._config, self._progress
        if "adapt" in self._wanted:
            features = artifacts.features_directory(config, samples)
            adapt = artifacts.adapt_directory(config, samples)

            def work(_: Any) -> None:
                if features.done() is None:
                    write_plain_features(config, samples, features, self._cluster(), progress)
                adapt_teacher(config, samples, features, adapt)

            adapted = self._outcome.adapted = AdaptedTeacher(**self._stage(adapt, work))
            if adapted.val_accuracy is not None:
                progress.line(
                    f"teacher:  val accuracy {adapted.val_accuracy:.3f} (always the commonest class: "
                    f"{adapted.chance:.3f}), head from {adapted.num_train} labelled images"
                )
        if "teach" in self._wanted and config.views.per_image != "fresh":
            teach = artifacts.teach_directory(config, samples)
            self._stage(teach, lambda _: stream_soft_targets(config, samples, teach, self._cluster(), progress))

    def _distill(self, samples: SampleSet) -> None:
        config, outcome = self._config, self._outcome
        directory = artifacts.distill_directory(config, samples)
        adapted = outcome.adapted
        job = DistillJob(
            config,
            samples,
            directory.path,
            head=None if adapted is None else adapted.path,
            targets=outcome.directories.get("teach"),
        )
        if adapted is None and samples.num_labelled["train"] < samples.num_rows("train"):
            unused = samples.num_rows("train") - samples.num_labelled["train"]
            self._progress.line(
                f"distill   {unused} unlabelled images take no part: there is no teacher to speak for them"
            )
        in_process = config.distill.num_workers == 0
        streams = config.views.per_image == "fresh" and adapted is not None

        def work(record: Any) -> None:
            plan = local_plan(config) if in_process and not streams else self._cluster()
            distill_student(job, directory, plan, self._progress, lambda m: record.log(m, int(m["step"])))

        outcome.student = StudentCheckpoint(**self._stage(directory, work))

    def _record_report(self, report: Report) -> None:
        assert self._tracker is not None
        metrics = {
            f"{who}_{split}_{name}": float(values[split][name])
            for who, values in (("student", report.student), ("teacher", report.teacher or {}))
            for split in values for name in ("accuracy", "top5", "ece")
        }  # fmt: skip
        metrics |= {f"agreement_{split}": share for split, share in (report.agreement or {}).items()}
        artifacts_here = [] if "://" in report.path else [report.path]
        student = self._outcome.directories["distill"]
        if artifacts_here:
            artifacts_here += [f"{student}/student.safetensors", f"{student}/student.json"]
        self._tracker.log_job(metrics, artifacts_here)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
