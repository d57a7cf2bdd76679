"""The Python interface: the same jobs, settings and errors as the command line.

Slow imports are inside the functions, so that `import raydistill` takes milliseconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from raydistill.config import RunConfig
    from raydistill.config.keys import Key
    from raydistill.doctor.images import Checkup
    from raydistill.inference.student import Pictures, Prediction, Student
    from raydistill.results import Outcome, Report
    from raydistill.runtime.progress import Progress
    from raydistill.search.tune import Search
    from raydistill.search.verdict import Comparison

    Path = str | os.PathLike[str]

# One job at a time in a process: the first one to end would take Ray away from the other.
_ONE = threading.Lock()
_ARGUMENTS = ("learning_curve", "progress", "strict")  # arguments of the functions below that are not keys of a job


@dataclass(frozen=True)
class Page:
    """A page of results as one HTML file. A notebook shows it."""

    path: str

    def _repr_html_(self) -> str:
        import html

        from raydistill.storage.filesystems import read_bytes

        page = html.escape(read_bytes(self.path).decode())
        return f'<iframe srcdoc="{page}" sandbox="" style="width: 100%; height: 80vh; border: 0"></iframe>'

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, repr=False)
class Run:
    """A finished job: `config` as it was resolved, and `outcome` with every stage's result."""

    config: RunConfig
    outcome: Outcome

    def __repr__(self) -> str:
        from raydistill.storage.jobs import job_name

        shares = ", ".join(f"{name}={value:.3f}" for name, value in self.metrics.items() if name.endswith("accuracy"))
        return f"<Run {job_name(self.config)!r}: {shares}; report {self.report}>"

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies, expected calibration errors and agreement, each as a share: `test_accuracy`,
        `teacher_test_accuracy`, `val_top5`, `agreement_test` and so on, for the splits that exist."""
        report = self._report
        measured = {"": report.student, "teacher_": report.teacher or {}}
        found = {
            f"{who}{split}_{name}": float(of_split[name])
            for who, splits in measured.items()
            for split, of_split in splits.items()
            for name in ("accuracy", "top5", "ece")
        }
        return found | {f"agreement_{split}": share for split, share in (report.agreement or {}).items()}

    @property
    def report(self) -> Page:
        """report.html. A notebook shows it; `str()` of it is its path."""
        assert self.outcome.page is not None, "distill() writes it"
        return Page(self.outcome.page)

    @property
    def path(self) -> str:
        """The folder that `export` wrote, for `load`, `raydistill predict` and `raydistill serve`."""
        assert self.outcome.exported is not None, "distill() exports"
        return self.outcome.exported.path

    @cached_property
    def student(self) -> Student:
        """The student as a torch module, with its preprocessing and its classes."""
        return load(self.path)

    def predict(self, pictures: Pictures) -> list[Prediction]:
        """One prediction for each picture: paths, folders, PIL images, or (H, W, 3) uint8 arrays."""
        return self.student.predict(pictures)

    @property
    def _report(self) -> Report:
        assert self.outcome.report is not None, "distill() evaluates"
        return self.outcome.report


def distill(
    images: Path,
    /,
    teacher: str | Mapping[str, Any] | None = None,
    student: str | Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Distil a student on a folder, table or file of images, or by a job file. Finished stages are skipped.

    `teacher` and `student` are models, such as `timm:resnet10t`, or whole sections. `settings` are the keys of the
    job, nested or dotted: `distill={"epochs": 30}`, `**{"loss.temperature": 2}`, `workspace="runs"`. `keys()` lists
    them. `progress=False` prints no progress.

    Raises ConfigError and DataError if the job cannot work, UselessStudentError if the student is at chance
    (export.allow_useless), StageError if a stage fails.
    """
    given = {name: model for name, model in (("teacher", teacher), ("student", student)) if model is not None}
    config = _config(images, {**given, **settings})
    from raydistill.run import run_stages

    with _alone():
        outcome = run_stages(config, _progress(progress), None, command=f"raydistill.distill({str(images)!r}, …)")
    return Run(config, outcome)


def check(images: Path, /, *, strict: bool = False, progress: bool = True, **settings: Any) -> Checkup:
    """Look at every image, as `raydistill check` does, and list what would stop a run and what deserves attention. It
    writes nothing.

    `settings` are as for `distill`. Raises ConfigError, DataError.
    """
    config = _config(images, settings, trains=False)
    from raydistill.doctor.images import check_images

    checkup = check_images(config, _progress(progress), strict)
    if checkup.is_interrupted:  # the checkup covers only the images before the interruption
        from raydistill.runtime.interrupts import Interrupted

        raise Interrupted("the same call looks at all images again")
    return checkup


def compare(
    images: Path, /, *, learning_curve: bool = False, progress: bool = True, **settings: Any
) -> tuple[Comparison, str]:
    """Train the student in several ways over several seeds (`compare.arms`, `compare.seeds`). Returns the comparison,
    which says which arm to ship, and the folder of its tables and figures.

    Raises RaydistillError.
    """
    config = _config(images, settings)
    from raydistill.search.compare import compare_arms

    with _alone():
        return compare_arms(config, _progress(progress), learning_curve)


def tune(images: Path, space: Path, /, *, progress: bool = True, **settings: Any) -> Search:
    """Search the settings of a search space, a file such as `tune_spaces/loss.yaml`, and confirm the best with new
    seeds.

    Raises RaydistillError.
    """
    config = _config(images, {**settings, "tune.space": space})
    from raydistill.search.tune import tune_job

    with _alone():
        return tune_job(config, _progress(progress))


def load(student: Path) -> Student:
    """An exported student from its folder, or from the Hugging Face hub (`OWNER/NAME`, or `hf:OWNER/NAME`).

    Raises ConfigError if it is not an exported student.
    """
    import os

    from raydistill.runtime.environment import prepare_environment

    prepare_environment()
    from raydistill.inference.student import load_student

    return load_student(os.path.expanduser(os.fspath(student)))


def keys(word: str = "") -> list[Key]:
    """The settings of a job whose name or meaning contains `word`: dotted name, default, allowed values, meaning."""
    from raydistill.config.keys import describe_keys

    return list(describe_keys(word))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One job at a time in this process. An interruption, as by a notebook's stop button, says how to go on."""
    from raydistill.runtime.interrupts import Interrupted

    try:
        with _ONE:
            yield
    except KeyboardInterrupt:
        raise Interrupted("the same call continues from here") from None


def _config(images: Path, settings: Mapping[str, Any], trains: bool = True) -> RunConfig:
    """The config. If the call `trains`, it also checks the job's models and cluster."""
    import os

    from raydistill.config import RunConfig, load_config
    from raydistill.errors import ConfigError, did_you_mean
    from raydistill.preflight import refuse_early
    from raydistill.runtime.environment import prepare_environment

    prepare_environment()
    for key in settings.keys() - RunConfig.model_fields.keys() - set(_ARGUMENTS):
        if "." not in key and (hint := did_you_mean(key, _ARGUMENTS)):  # otherwise it would count as a key of the job
            raise ConfigError(f"{key}: unknown argument{hint}")
    # A folder may have any name. `day=1` among the words of a command would be a setting.
    place = os.path.expanduser(images)
    words, under = ([], {"images.path": place}) if os.path.isdir(place) else ([place], {})
    models = {
        name: {"model": settings[name]}
        for name in ("teacher", "student")
        if isinstance(settings.get(name), str | list | tuple)
    }
    config = load_config(words, {**under, **settings, **models})
    if trains:
        refuse_early(config)
    return config


def _progress(shown: bool) -> Progress:
    from rich.console import Console

    from raydistill.escaping import plain_console
    from raydistill.runtime.progress import Progress

    return Progress(plain_console() if shown else Console(quiet=True))


__all__: Sequence[str] = ("Page", "Run", "check", "compare", "distill", "keys", "load", "tune")
