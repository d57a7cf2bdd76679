"""report.html: the results of a run on one page that needs no network."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
from markupsafe import Markup
from PIL import Image
from pyarrow import compute as pc
from pydantic import BaseModel

from raydistill.cluster.bill import bill_words
from raydistill.config import RunConfig, overlay, shown_yaml
from raydistill.config.baselines import OVERLAYS
from raydistill.data.decode import encode
from raydistill.data.sample import SampleSet, working_images
from raydistill.data.targets import read_samples
from raydistill.engine.records import read_epochs
from raydistill.errors import ConfigError
from raydistill.identity import evaluate_directory
from raydistill.majority_baseline import FEWEST_MEASURED, compare_with_majority
from raydistill.pages import tables
from raydistill.pages.figures import curves, reliability
from raydistill.pages.templates import Table, data_uri, file_name, page
from raydistill.results import PREDICTIONS, PREDICTIONS_FILE, Outcome, Report
from raydistill.runtime.versions import PACKAGES, installed
from raydistill.storage.directory import finished_at, read_bill
from raydistill.storage.filesystems import exists, read_bytes, write_bytes
from raydistill.storage.jobs import job_name
from raydistill.storage.state import needed_state, result_of
from raydistill.storage.tables import read_table, rows_of, values

_MOST_OF_REFUSED = 64 * 1024**2  # some 400,000 files
_MOST_DISAGREEMENTS, _MOST_SHEETS, _MOST_REASONS, _EXAMPLES = 24, 12, 20, 3


@dataclass(frozen=True)
class Disagreement:
    """An image for which student and teacher predict different classes."""

    image: str  # as a data URI
    label: str
    student: str
    student_probability: float
    teacher: str
    teacher_probability: float


def write_report(config: RunConfig, outcome: Outcome, command: str) -> str:
    """Write `report.html` into the directory of `evaluate`, and return its path. `command` repeats the run."""
    report, samples, student = outcome.report, outcome.samples, outcome.student
    assert report is not None
    assert samples is not None
    assert student is not None
    # A reader who sees single test images selects by them, so the page shows them only without a val split.
    shown = "val" if "val" in report.student else "test"
    main = "test" if "test" in report.student else "val"
    baselines = _baselines(config, samples, report)
    predictions = read_table(f"{report.path}/{PREDICTIONS_FILE}", PREDICTIONS)
    html = page(
        "report.html",
        name=job_name(config),
        kind="report",
        when=finished_at(report.path),
        report=report,
        warnings=compare_with_majority(report.student).warnings,
        main=main,
        baselines=baselines,
        measures=tables.measures(report, baselines, len(samples.classes)),
        without_generated=outcome.without_generated,
        classes=tables.by_class(report, samples, main) if report.student else None,
        matrix=tables.confusion_matrix(report, main) if report.student else None,
        confused=tables.confused(report, main) if report.student else None,
        curves=curves(read_epochs(student.path), student.kept_epoch),
        fewest=FEWEST_MEASURED,
        calibration=_calibration(config, report, predictions, main),
        disagreements=_disagreements(report, samples, predictions, shown),
        shown=shown,
        generated=outcome.generated,
        wanted=outcome.generated and tables.wanted(outcome.generated),
        sheets=_sheets(outcome),
        samples=samples,
        images=tables.by_split(samples),
        refused=_refused(samples),
        stages=_stages(config, outcome),
        trained=student.precision,
        taught=outcome.adapted and outcome.adapted.precision,
        exported=outcome.exported,
        files=outcome.exported and tables.files(outcome.exported),
        speeds=outcome.exported and tables.speeds(outcome.exported),
        yaml=shown_yaml(config),
        versions=installed((*PACKAGES, "optuna", "mlflow")) | {"python": platform.python_version()},
        other_versions=_other_versions(outcome),
        command=command,
    )
    path = f"{report.path}/report.html"
    write_bytes(path, html)
    return path


def _baselines(config: RunConfig, samples: SampleSet, report: Report) -> dict[str, Report]:
    """By overlay of jobs/overlays, the report of this job with it, if that run exists."""
    found = {}
    for name, tree in OVERLAYS.items():
        student = dict(tree.get("student", {}))
        if student.get("init") == "pretrained":
            student["weights"] = config.compare.student_weights or config.student.weights
        elif name != "job":
            student["weights"] = None
        try:
            other = overlay(config, {**tree, "student": student, "generate": None})
            done = evaluate_directory(other, samples).done()
        except ConfigError:
            continue  # this arm cannot be trained with this job
        if done is not None and done["path"] != report.path:
            of_arm = result_of(done, done["path"], Report)
            if of_arm.student.keys() >= report.student.keys():
                found[name] = of_arm
    return found


def _calibration(config: RunConfig, report: Report, predictions: pa.Table, split: str) -> tuple[str, Markup] | None:
    table = predictions.filter(pc.equal(predictions["split"], split))
    if table.num_rows < FEWEST_MEASURED:
        return None
    answers = {
        who: (table[f"{who}_probability"].to_numpy(), pc.equal(table[f"{who}_class"], table["label"]).to_numpy())
        for who in ("student", *(["teacher"] if report.agreement else []))
    }
    return reliability(answers, config.evaluate.calibration_bins, split)


def _disagreements(report: Report, samples: SampleSet, table: pa.Table, split: str) -> list[Disagreement]:
    """The images of the highest confidence of both, in descending order."""
    if report.agreement is None:
        return []
    differ = pc.and_(pc.equal(table["split"], split), pc.not_equal(table["student_class"], table["teacher_class"]))
    rows = rows_of(table.filter(differ))
    rows.sort(key=lambda row: -(row["student_probability"] + row["teacher_probability"]))
    rows = rows[:_MOST_DISAGREEMENTS]
    images = _images(samples, split, {row["sample_id"] for row in rows})
    names = samples.classes
    return [
        Disagreement(
            images[row["sample_id"]], names[row["label"]],
            names[row["student_class"]], row["student_probability"],
            names[row["teacher_class"]], row["teacher_probability"],
        )
        for row in rows
    ]  # fmt: skip


def _images(samples: SampleSet, split: str, wanted: set[str]) -> dict[str, str]:
    """Data URIs of working images by sample id."""
    found: dict[str, str] = {}
    for shard in range(len(samples.shards[split])):
        if wanted <= found.keys():
            break
        table = read_samples(samples, split, shard)
        table = table.filter(pc.is_in(table["sample_id"], pa.array(wanted, pa.string())))
        for sample, image in zip(values(table["sample_id"]), working_images(table, samples.size), strict=True):
            found[sample] = data_uri(encode(Image.fromarray(image)))
    return found


def _sheets(outcome: Outcome) -> list[str]:
    generated = outcome.generated
    if generated is None:
        return []
    paths = [f"{generated.samples.path}/sheet-{number:03d}.png" for number in range(len(generated.wanted))]
    return [data_uri(read_bytes(path)) for path in [path for path in paths if exists(path)][:_MOST_SHEETS]]


class _Refused(BaseModel):
    path: str
    reason: str


def _refused(samples: SampleSet) -> Table:
    """Reasons of refused images, their counts and some examples."""
    refused = needed_state(f"{samples.path}/refused.json", list[_Refused], most_bytes=_MOST_OF_REFUSED)
    reasons = Counter(_reason(one.reason) for one in refused)
    rows = []
    for reason, count in reasons.most_common(_MOST_REASONS):
        names = [file_name(one.path) for one in refused if _reason(one.reason) == reason]
        rows.append([reason, f"{count:,}", ", ".join(names[:_EXAMPLES])])
    return Table(["reason", "images", "for instance"], rows)


def _reason(words: str) -> str:
    """The reason without the details of one image."""
    if words.startswith("a copy of "):
        return "a copy of another image"
    return words.partition(":")[0] if words.startswith("the same file stands under ") else words


def _other_versions(outcome: Outcome) -> dict[str, str]:
    """By stage, the versions that it ran with and that differ from the installed ones."""
    now, others = installed(PACKAGES), {}
    for stage, path in outcome.directories.items():
        ran: dict[str, str] = read_bill(path).get("versions", {})
        if words := [f"{name} {number}" for name, number in ran.items() if number != now.get(name)]:
            others[stage] = ", ".join(words)
    return others


def _stages(config: RunConfig, outcome: Outcome) -> Table:
    rows = [
        [stage, bill_words(read_bill(path), config.cluster.prices), path.rpartition("/")[2]]
        for stage, path in outcome.directories.items()
    ]
    return Table(["stage", "took", "directory"], rows)
