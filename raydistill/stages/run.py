"""run: every stage in order, those that are done skipped; all that can be checked is checked before the first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.config import RunConfig, fine_tuning
from raydistill.data.images import Listing, list_images
from raydistill.data.sample import SampleSet, samples_from_json
from raydistill.data.targets import read_bytes
from raydistill.errors import ConfigError, DataError, UselessStudentError
from raydistill.infra import artifacts
from raydistill.infra.artifacts import StageDirectory, Work, find_work
from raydistill.infra.cluster import RayStart
from raydistill.infra.lease import held
from raydistill.infra.node_hours import NodeClock
from raydistill.infra.plan import local_plan
from raydistill.infra.progress import Progress
from raydistill.infra.tracking import Tracker
from raydistill.models.student import build_student, has_batch_norm
from raydistill.models.teacher import load_teacher, match_native_head, zero_shot_head
from raydistill.stages.adapt import AdaptedTeacher, adapt_teacher, refuse_near_chance, write_plain_features
from raydistill.stages.batches import DistillJob
from raydistill.stages.distill import StudentCheckpoint, distill_student
from raydistill.stages.generate import (
    GeneratedImages,
    check_generate,
    generate_images,
    generated_from_json,
    label_weights,
)
from raydistill.stages.prepare import prepare_samples
from raydistill.stages.showing import teach_files
from raydistill.stages.teach import stream_soft_targets
from raydistill.storage.state import result_of

if TYPE_CHECKING:
    from raydistill.stages.evaluate import Report
    from raydistill.stages.export import Exported

_DECIDING = {
    "prepare": ("images", "seed"),
    "generate": ("generate", "seed"),
    "teach": ("teacher", "views", "seed"),
    "teach_generated": ("teacher", "views", "seed"),
    "distill": ("student", "loss", "distill", "views", "seed"),
    "evaluate": ("evaluate",),
    "export": ("export",),
}  # of the others it is the teacher


@dataclass
class Outcome:
    """What a run came to; stages that were not asked for are None."""

    samples: SampleSet | None = None
    adapted: AdaptedTeacher | None = None
    generated: GeneratedImages | None = None
    student: StudentCheckpoint | None = None
    report: Report | None = None
    exported: Exported | None = None
    refused: str | None = None  # why the student is not exported
    without_generated: Report | None = None  # of the same job without generated images, where it was run
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages that ran; 0 where one was done before
    directories: dict[str, str] = field(default_factory=dict)
    page: str | None = None  # where report.html lies


def run_stages(
    config: RunConfig,
    progress: Progress,
    until: str = "evaluate",
    work: Work | None = None,
    ray: RayStart | None = None,
    command: str | None = None,
) -> Outcome:
    """Run the stages up to `until` and all that they need. Raises RaydistillError.

    What cannot work is refused before anything is written. `work` and `ray` are for a caller that has begun already;
    with the `command` that makes the run again, report.html is written too.
    """
    work = work or find_work(config, until)
    with ray or RayStart(config) as ray:
        if work.undone:
            artifacts.check_writable(config)
            plan = ray.plan() if config.cluster.address and work.needs_ray else local_plan(config)
            if work.needs_ray:
                ray.begin()
            for line in plan.describe():
                progress.line(line)
            check_run(config, work)
        title = f"{config.student.model.rpartition(':')[2].rpartition('/')[2]} · seed {config.seed}"
        with Tracker(config, artifacts.student_key(config, work.prepared), title) as tracker:
            outcome = _Run(config, progress, work, ray, tracker).stages()
            if outcome.report is not None and command is not None:
                from raydistill.stages.report import write_report

                outcome.page = write_report(config, outcome, command)
                tracker.parent.text(read_bytes(outcome.page).decode(), "report.html")
            if outcome.refused is not None:
                error = UselessStudentError(outcome.refused)
                error.outcome = outcome
                raise error
            return outcome


def check_run(config: RunConfig, work: Work) -> None:
    """Refuse what cannot work before anything is written. Raises ConfigError, DataError."""
    if {"task", "kd", "dkd", "dist", "standardised_kd"}.isdisjoint(config.loss.terms):
        raise ConfigError(
            f"loss: none of its terms ({', '.join(config.loss.terms)}) teaches the student's classifier, which would "
            "stay as it began; raise loss.task_weight or loss.kd_weight"
        )
    _check_counts(config, work.listing)
    _check_models(config, work.listing, work.undone)
    if "generate" in work.undone:
        check_generate(config, work.listing.classes)


def check_measurable(config: RunConfig, command: str, splits: tuple[str, ...]) -> None:
    """Raises DataError where the images have, and would be given, none of a split that a command needs."""
    images = config.images
    listing = list_images(images)
    has_val, has_test = listing.has_split("val"), listing.has_split("test")
    there = {
        "val": has_val or images.val_share > 0,
        "test": has_test or (not has_val and images.test_share > 0),
    }
    if lacking := [split for split in splits if not there[split]]:
        raise DataError(
            f"images.path={images.path}: {command} measures {' and '.join(splits)}, and there is no {lacking[0]} "
            f"split; add one, or name none in the data and set images.{lacking[0]}_share for a share to be drawn"
        )


def _check_counts(config: RunConfig, listing: Listing) -> None:
    workers = config.distill.most_workers
    if config.views.per_image == "fresh" and config.distill.batch_size % workers:
        raise ConfigError(
            f"distill.batch_size={config.distill.batch_size} does not divide among the {workers} workers of "
            "distill.num_workers, as views.per_image=fresh needs it to"
        )
    train = sum(entry.split in (None, "train") for entry in listing.entries)
    if train < workers:
        raise DataError(
            f"images.path={config.images.path}: {train} train images for the {workers} workers of distill.num_workers; "
            "lower it, or add images"
        )


def _check_models(config: RunConfig, listing: Listing, undone: frozenset[str]) -> None:
    """Build what will be needed: a name, a size or weights that do not fit are cheap to find now."""
    if "distill" in undone:
        student = build_student(config.student, len(listing.classes))
        simclr = config.loss.projects_with_batch_norm
        what = f"loss.projection_head={config.loss.projection_head}" if simclr else config.student.model
        _check_batch_norm(config, what, simclr or has_batch_norm(student))
    if config.teacher and config.loss.needs_teacher and {"adapt", "teach"} & undone:
        _, head, names = load_teacher(config.teacher)
        if config.teacher.head == "native":
            match_native_head(head, names, listing.classes)
        elif config.teacher.head == "zero_shot":
            zero_shot_head(config.teacher, listing.classes)
        elif config.teacher.head == "fine_tune":
            _check_fine_tuning(config, listing)


def _check_fine_tuning(config: RunConfig, listing: Listing) -> None:
    settings = fine_tuning(config).student
    try:
        student = build_student(settings, len(listing.classes))
    except ConfigError as error:
        raise ConfigError(f"teacher.head=fine_tune trains the teacher as if it were the student: {error}") from None
    _check_batch_norm(config, settings.model, has_batch_norm(student), "teacher.fine_tune_batch_size")


def _check_batch_norm(config: RunConfig, what: str, has_one: bool, key: str = "distill.batch_size") -> None:
    section, _, name = key.partition(".")
    size: int = getattr(getattr(config, section), name)
    if has_one and size // config.distill.most_workers < 2:
        raise ConfigError(
            f"{key}={size} leaves a worker one image a step, and {what} has batch norm, which needs two; raise {key}"
        )


def distill_job(config: RunConfig, outcome: Outcome) -> tuple[DistillJob, StageDirectory]:
    """What `distill` trains on once the stages before it are done, and where the student goes. A teacher that no term
    of the loss needs is left out."""
    samples, generated, taught = outcome.samples, outcome.generated, config.loss.needs_teacher
    assert samples is not None, "prepare has run"
    directory = artifacts.distill_directory(config, samples)
    job = DistillJob(
        config,
        samples,
        directory.path,
        head=outcome.adapted.path if taught and outcome.adapted is not None else None,
        targets=outcome.directories.get("teach") if taught else None,
        generated=None if generated is None else generated.samples,
        generated_targets=outcome.directories.get("teach_generated") if taught else None,
        weights=None if generated is None else label_weights(config, generated),
    )
    return job, directory


class _Run:
    """One command's way through the stages. Ray is waited for only by a stage that is to run and needs it."""

    def __init__(self, config: RunConfig, progress: Progress, work: Work, ray: RayStart, tracker: Tracker) -> None:
        self._config, self._progress, self._work, self._ray, self._tracker = config, progress, work, ray, tracker
        self._outcome = Outcome()

    def _stage(self, directory: StageDirectory, work: Any) -> dict[str, Any]:
        """The stage's result: that of an earlier run, or of doing the work now."""
        self._outcome.directories[directory.stage] = directory.path
        done = directory.done()
        if done is None:
            with held(directory, self._progress.line) as is_to_do:  # another command may do it meanwhile
                if is_to_do:
                    return self._do(directory, work)
            done = directory.done()
            assert done is not None, "another command has finished it"
        self._progress.line(f"{directory.stage:<9} done before: {directory.path}")
        self._outcome.seconds[directory.stage] = 0.0
        return done

    def _do(self, directory: StageDirectory, work: Any) -> dict[str, Any]:
        started, progress = time.monotonic(), self._progress
        images_again, seconds_again = progress.images_again, progress.seconds_again
        with self._tracker.child(directory.stage, directory.name, _deciding(self._config, directory.stage)) as record:
            with NodeClock(self._config) as clock:
                work(record)
            done = directory.done()
            assert done is not None, "a stage ends by marking itself done"
            seconds = time.monotonic() - started
            bill = {"seconds": seconds, **clock.record()}
            if images := progress.images_again - images_again:
                bill |= {"images_again": images, "seconds_again": progress.seconds_again - seconds_again}
            directory.write_bill(bill)
            numbers = {"seconds": seconds, "images_again": images}
            record.log(numbers | {k: float(v) for k, v in done.items() if _is_number(v)})
        self._outcome.seconds[directory.stage] = seconds
        return done

    def stages(self) -> Outcome:
        """All that was asked for, in order."""
        config, progress, outcome, work = self._config, self._progress, self._outcome, self._work

        def prepare(_: Any) -> None:
            prepare_samples(config, work.listing, work.prepared, self._ray.plan(), progress)

        samples = outcome.samples = samples_from_json(self._stage(work.prepared, prepare))
        self._say_samples(samples)
        self._tracker.parent.data(config, samples)
        if "adapt" in work.wanted:
            self._adapt(samples)
        config = self._config  # adapt may have changed the teacher
        if "generate" in work.wanted:
            self._generate(samples)
        if "teach" in work.wanted:
            teach = artifacts.teach_directory(config, samples)
            self._stage(
                teach, lambda _: stream_soft_targets(config, samples, self._head(), teach, self._ray.plan(), progress)
            )
            if outcome.generated is not None:
                self._teach_generated(samples, outcome.generated.samples)
        if "distill" in work.wanted:
            self._distill(samples)
        if "evaluate" in work.wanted:
            self._evaluate(samples)
        if "export" in work.wanted:
            self._export(samples)
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
        for what, count in self._work.listing.ignored.items():
            self._progress.line(f"          {count} ignored: {what}")
        for what, count in self._work.listing.notes.items():
            self._progress.line(f"          mind: {count} {what}")

    def _fine_tune(self, samples: SampleSet) -> None:
        """Train the whole teacher on the task first; to what follows it is a teacher with a head of its own."""
        directory = artifacts.fine_tune_directory(self._config, samples)
        job = DistillJob(fine_tuning(self._config), samples, directory.path, head=None, targets=None)

        def work(record: Any) -> None:
            plan = self._ray.plan()
            distill_student(job, directory, plan, self._progress, lambda m: record.log(m, int(m["step"])), "fine-tune")

        self._stage(directory, work)
        later = artifacts.tuned(self._config, samples)
        assert later is not None, "it has just been done"
        self._config = later

    def _adapt(self, samples: SampleSet) -> None:
        if self._config.teacher is not None and self._config.teacher.head == "fine_tune":
            self._fine_tune(samples)
        config, progress = self._config, self._progress
        features = artifacts.features_directory(config, samples)
        adapt = artifacts.adapt_directory(config, samples)
        if adapt.done() is None:
            self._infer(samples, features, ("val", "train"))
        self._outcome.directories["features"] = features.path
        done = self._stage(adapt, lambda _: adapt_teacher(config, samples, features, adapt))
        adapted = self._outcome.adapted = result_of({**done, "features": features.path}, adapt.path, AdaptedTeacher)
        if adapted.val_accuracy is not None:
            progress.line(
                f"teacher:  val accuracy {adapted.val_accuracy:.3f} (always the commonest class: "
                f"{adapted.chance:.3f}), {adapted.val_confidence:.3f} sure of it on average, head from "
                f"{adapted.num_train} labelled images"
            )
        assert config.teacher is not None
        refuse_near_chance(config.teacher, adapted)
        test = artifacts.held_out_directory(config, samples)
        if samples.num_rows("test") and test.done() is None:
            self._infer(samples, test, ("test",))

    def _infer(self, samples: SampleSet, directory: StageDirectory, splits: tuple[str, ...]) -> None:
        def work(_: Any) -> None:
            write_plain_features(self._config, samples, splits, directory, self._ray.plan(), self._progress)

        self._stage(directory, work)

    def _generate(self, samples: SampleSet) -> None:
        config, directory = self._config, artifacts.generate_directory(self._config, samples)
        head = None if self._outcome.adapted is None else self._outcome.adapted.path

        def work(_: Any) -> None:
            generate_images(config, samples, head, directory, self._ray.plan(), self._progress)

        generated = self._outcome.generated = generated_from_json(self._stage(directory, work), directory.path)
        kept, rejected = sum(generated.kept.values()), sum(generated.rejected.values())
        self._progress.line(f"generated: {kept} images kept, {rejected} rejected; see {directory.path}/sheet-*.png")
        # Where `evaluate` follows, it records them.
        if "evaluate" not in self._work.wanted and "://" not in directory.path:
            self._tracker.parent.files(self._generated_files(), "generate")

    def _teach_generated(self, samples: SampleSet, generated: SampleSet) -> None:
        config, directory = self._config, artifacts.teach_generated_directory(self._config, samples)
        teach = teach_files if config.streams_generated else stream_soft_targets
        plan, progress = self._ray.plan, self._progress
        self._stage(directory, lambda _: teach(config, generated, self._head(), directory, plan(), progress))

    def _head(self) -> str:
        assert self._outcome.adapted is not None, "adapt comes before teach"
        return self._outcome.adapted.path

    def _distill(self, samples: SampleSet) -> None:
        config = self._config
        job, directory = distill_job(config, self._outcome)
        if job.head is None and samples.num_labelled["train"] < samples.num_rows("train"):
            unused = samples.num_rows("train") - samples.num_labelled["train"]
            self._progress.line(
                f"distill   {unused} unlabelled images take no part: there is no teacher to speak for them"
            )

        def work(record: Any) -> None:
            plan = self._ray.plan() if self._work.needs_ray else local_plan(config)
            distill_student(job, directory, plan, self._progress, lambda m: record.log(m, int(m["step"])))

        self._outcome.student = result_of(self._stage(directory, work), directory.path, StudentCheckpoint)

    def _evaluate(self, samples: SampleSet) -> None:
        # Its plots and metrics take a second to load, which no training should wait for.
        from raydistill.stages.evaluate import Report, evaluate_student

        config, outcome = self._config, self._outcome
        directory = artifacts.evaluate_directory(config, samples)

        def work(_: Any) -> None:
            assert outcome.student is not None
            evaluate_student(config, samples, outcome.adapted, outcome.student, directory, self._progress)

        outcome.report = result_of(self._stage(directory, work), directory.path, Report)
        if config.generate is not None:
            without = artifacts.evaluate_directory(config.model_copy(update={"generate": None}), samples).done()
            outcome.without_generated = None if without is None else result_of(without, without["path"], Report)
        self._record_report(outcome.report)

    def _export(self, samples: SampleSet) -> None:
        from raydistill.stages.card import int8_words, model_card
        from raydistill.stages.chance import usefulness
        from raydistill.stages.export import Exported, export_student, push_to_hub, record_model

        config, outcome = self._config, self._outcome
        assert outcome.report is not None
        useful = usefulness(outcome.report.student)
        if useful.state == "at chance" and not config.export.allow_useless:
            outcome.refused = (
                f"{useful.warnings[0].rstrip('.')}; so it is not exported. Train it longer or in another way (the "
                "report shows how it went), or set export.allow_useless=true to export it all the same"
            )
            return
        directory = artifacts.export_directory(config, samples)

        def work(_: Any) -> None:
            assert outcome.student is not None
            assert outcome.report is not None
            report, generated = outcome.report, outcome.generated

            def card(about: dict[str, Any], exported: Exported) -> str:
                return model_card(config, samples, report, generated, about, exported)

            export_student(config, samples, outcome.student.path, card, directory, self._progress)

        exported = outcome.exported = result_of(self._stage(directory, work), directory.path, Exported)
        self._progress.line(f"exported: {', '.join(exported.files)}")
        if exported.int8 is not None:
            self._progress.line(f"          {int8_words(exported.int8)}")
        self._progress.line(f"          raydistill predict {exported.path} PICTURES…")
        if "model.onnx" in exported.files and "://" not in exported.path:
            record_model(config, exported, self._tracker)
        if config.export.hub is not None:
            push_to_hub(exported.path, config.export.hub)
            self._progress.line(f"          pushed to {config.export.hub}")

    def _record_report(self, report: Report) -> None:
        metrics = {
            f"{who}_{split}_{name}": float(values[split][name])
            for who, values in (("student", report.student), ("teacher", report.teacher or {}))
            for split in values for name in ("accuracy", "top5", "ece")
        }  # fmt: skip
        metrics |= {f"agreement_{split}": share for split, share in (report.agreement or {}).items()}
        parent, student = self._tracker.parent, self._outcome.directories["distill"]
        parent.log(metrics)
        parent.note({stage: path.rpartition("/")[2] for stage, path in self._outcome.directories.items()})
        if "://" in report.path:
            return
        parent.files([report.path], "evaluate")
        parent.files([f"{student}/student.safetensors", f"{student}/student.json"], "student")
        parent.files(self._generated_files(), "generate")

    def _generated_files(self) -> list[str]:
        """What shows the generated images, not they themselves."""
        generated = self._outcome.generated
        if generated is None:
            return []
        folder = Path(generated.samples.path)
        return [str(p) for p in sorted(folder.glob("*")) if p.suffix in (".png", ".json") or p.name == "ledger.parquet"]


def _deciding(config: RunConfig, stage: str) -> dict[str, Any]:
    """The sections that decide a stage's result, beside what it takes from those before it."""
    return config.model_dump(mode="json", include=set(_DECIDING.get(stage, ("teacher",))))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
