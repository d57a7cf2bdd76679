"""export: write the student in the formats that products load, and compare each with the checkpoint.

Shapes: N images, H working pixels on a side, S pixels on a side of what the network sees, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from raydistill.config import Images, RunConfig
from raydistill.data.sample import SampleSet, working_images
from raydistill.data.targets import labels_of, read_samples
from raydistill.engine.speed import measure_speed
from raydistill.errors import StageError
from raydistill.execution import Execution
from raydistill.identity import export_directory
from raydistill.majority_baseline import compare_with_majority
from raydistill.models.formats import (
    INT8_FILE,
    PICTURE_FILE,
    PREPROCESS_FILE,
    Run,
    Shipped,
    load_from_library,
    network_inputs,
    picture_onnx_run,
    preprocess_source,
    program_run,
    quantise,
    save_for_library,
    to_onnx,
    to_picture_onnx,
    to_program,
    torch_run,
)
from raydistill.models.metadata import METADATA_FILE, ExportMetadata, StudentMetadata
from raydistill.models.onnx_files import onnx_run
from raydistill.models.picture_classifier import PictureClassifier
from raydistill.models.student import Student, TimmClassifier, read_student
from raydistill.models.teacher import load_teacher
from raydistill.models.weights import STUDENT_FILE
from raydistill.pages.card import int8_words, model_card
from raydistill.results import Exported
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import needed_state, result_of
from raydistill.tracking.tracker import Tracker

# Compare each format with the checkpoint at these batch sizes, on this many images of val (of train without a val
# split). The bound is on the largest difference of logits, as a share of the largest logit.
_BATCHES, _MOST_IMAGES, _TOLERANCE = (1, 7, 64), 256, 1e-3
_MOST_PICTURES = 32  # of which the file that takes pictures answers one at a time
_CALIBRATION_IMAGES = 256


def export_student(
    config: RunConfig,
    samples: SampleSet,
    student_path: str,
    card: Callable[[dict[str, Any], Exported], str],
    directory: StageDirectory,
    progress: Progress,
) -> Exported:
    """Write every format of the config, and the README.md that `card` makes from `student_metadata` and the result.

    Raises StageError, and writes nothing: a format does not give the checkpoint's logits on real images.
    """
    settings = config.export
    directory.begin()
    student, classes = read_student(student_path, config.student)
    about = student_metadata(student_path, settings.preprocessing, config.images)
    images_NHH3, labels_N = _some_images(samples, "val" if samples.num_rows("val") else "train", _MOST_IMAGES)
    plain_N = network_inputs(images_NHH3, student.preprocessing, from_pixels=False)
    inputs_N = network_inputs(images_NHH3, student.preprocessing, settings.preprocessing)
    logits_NC = _in_batches(torch_run(lambda images: student(images)[0]), plain_N, 64)
    shipped = Shipped(student, config.images.size, settings.preprocessing)
    steps = 2 + len(settings.formats) + (settings.int8 is not None)
    with TemporaryDirectory() as place, progress.task("export", steps, "steps") as advance:
        folder = Path(place)
        save_for_library(student, classes, config.images.fit, folder)
        library = torch_run(load_from_library(folder, isinstance(student.body, TimmClassifier)))
        differences = {"model.safetensors": _compare(library, plain_N, logits_NC, "model.safetensors")}
        advance(1)
        runs = {"torch": torch_run(shipped)}
        for name, (file, write, read) in _FORMATS.items():
            if name in settings.formats:
                write(shipped, torch.from_numpy(inputs_N[[0, -1]]), about, folder / file)
                run = read(folder / file)
                differences[file] = _compare(run, inputs_N, logits_NC, file)
                runs |= {"onnx": run} if name == "onnx" else {}
                advance(1)
        if "onnx_picture" in settings.formats:
            differences[PICTURE_FILE] = _write_picture_onnx(
                student, about, images_NHH3, logits_NC, folder / PICTURE_FILE
            )
            advance(1)
        int8 = None
        if settings.int8 is not None:
            run = _quantise(config, samples, student, folder)
            int8 = _compare_roughly(logits_NC, _in_batches(run, inputs_N, 64), labels_N, settings.int8_max_drop)
            if int8["kept"]:
                runs["onnx int8"] = run
            else:
                (folder / INT8_FILE).unlink()
            advance(1)
        speed = _speeds(config, runs, inputs_N[:1])
        advance(1)
        exported = _ship(folder, about, card, Exported(directory.path, {}, differences, int8, speed), directory)
    directory.finish(asdict(exported))
    return exported


def _ship(
    folder: Path,
    about: dict[str, Any],
    card: Callable[[dict[str, Any], Exported], str],
    exported: Exported,
    directory: StageDirectory,
) -> Exported:
    """Add what describes the formats in the folder, and write all of it into the stage's directory."""
    (folder / METADATA_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / PREPROCESS_FILE).write_text(preprocess_source(), encoding="utf-8")
    exported = replace(exported, files={file.name: file.stat().st_size for file in sorted(folder.iterdir())})
    (folder / "README.md").write_text(card(about, exported), encoding="utf-8")
    for file in sorted(folder.iterdir()):
        directory.write(file.name, file.read_bytes())
    return exported


def record_model(config: RunConfig, exported: Exported, tracker: Tracker) -> None:
    """Log the ONNX file to MLflow as a model."""
    if not config.tracking.enabled:
        return
    about = needed_state(f"{exported.path}/{METADATA_FILE}", ExportMetadata)
    if config.export.preprocessing:
        example = np.full((1, config.images.size, config.images.size, 3), 255, np.uint8)
    else:
        side = config.student.size or about.preprocessing.size
        example = np.zeros((1, 3, side, side), np.float32)
    tracker.log_model(f"{exported.path}/model.onnx", example, about.as_written(), config.export.register_as)


def push_to_hub(folder: str, repository: str) -> None:
    """Upload the exported files to a model repository; a new one is private. Raises StageError."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=["DONE", "identity.json", "seconds.json"],
            commit_message="raydistill export",
        )  # fmt: skip
    except Exception as error:  # network, name and permission errors come from three libraries
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(
            f"export.hub={repository}: the upload failed ({first}); log in with `hf auth login`, check the name, or "
            f"upload {folder} yourself: it is complete"
        ) from None


def student_metadata(path: str, from_pixels: bool, images: Images) -> dict[str, Any]:
    """What a program needs to use the exported files: the classes, how a picture becomes a working image, and the input
    of the graphs: `pixels`, working images (B, H, H, 3) uint8, or `normalised` images (B, 3, S, S) float32."""
    about = needed_state(f"{path}/{STUDENT_FILE}", StudentMetadata).as_written()
    image = images.model_dump(include={"size", "fit", "max_pixels", "max_bytes"})
    return about | {"image": image, "input": "pixels" if from_pixels else "normalised"}


# By format: the file, its writer and its reader.
_FORMATS: dict[str, tuple[str, Callable[..., None], Callable[[Path], Run]]] = {
    "onnx": ("model.onnx", to_onnx, onnx_run),
    "torch_export": ("model.pt2", to_program, program_run),
}


def _some_images(samples: SampleSet, split: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The first (N, H, H, 3) uint8 working images of a split and their (N,) labels."""
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for shard in range(len(samples.shards[split])):
        if len(images) >= most:
            break
        table = read_samples(samples, split, shard)
        images += list(working_images(table, samples.size))
        labels.append(labels_of(table))
    return np.stack(images[:most]), np.concatenate(labels)[:most]


def _in_batches(run: Run, inputs_N: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([run(inputs_N[first : first + size]) for first in range(0, len(inputs_N), size)])


def _compare(run: Run, inputs_N: np.ndarray, logits_NC: np.ndarray, what: str) -> float:
    """The largest difference of logits over all images and batch sizes. Raises StageError if it is too large."""
    largest = 0.0
    for size in _BATCHES:
        found_NC = _in_batches(run, inputs_N, size)
        difference = float(np.abs(found_NC - logits_NC).max())
        if not difference <= _TOLERANCE * float(np.abs(logits_NC).max()):
            raise StageError(
                f"export: the logits of {what} differ from the checkpoint's by up to {difference:.3g} in batches of "
                f"{size} (of {len(logits_NC)} real images), so nothing is exported; leave it out of export.formats, or "
                "train another architecture"
            )
        largest = max(largest, difference)
    return largest


def _write_picture_onnx(
    student: Student, about: dict[str, Any], images_NHH3: np.ndarray, logits_NC: np.ndarray, file: Path
) -> float:
    """The largest difference of probabilities. Raises as `_compare`."""
    size = about["image"]["size"]
    own = PictureClassifier(Shipped(student, size, from_pixels=True), size, about["image"]["fit"])
    to_picture_onnx(own, about, file)
    expected_NC = softmax(logits_NC[:_MOST_PICTURES], axis=1)
    return _compare(picture_onnx_run(file), images_NHH3[:_MOST_PICTURES], expected_NC, file.name)


def _quantise(config: RunConfig, samples: SampleSet, student: Student, folder: Path) -> Run:
    batches = None
    if config.export.int8 == "static":
        images, _ = _some_images(samples, "train", _CALIBRATION_IMAGES)
        inputs = network_inputs(images, student.preprocessing, config.export.preprocessing)
        batches = [inputs[first : first + 32] for first in range(0, len(inputs), 32)]
    quantise(folder / "model.onnx", folder / INT8_FILE, batches)
    return onnx_run(folder / INT8_FILE)


def _compare_roughly(
    logits_NC: np.ndarray, rough_NC: np.ndarray, labels_N: np.ndarray, max_drop: float
) -> dict[str, float | None]:
    """INT8 changes logits by design, so compare the accuracy. Without labels compare the share of answers that changed:
    the accuracy cannot drop by more."""
    before_N, after_N, labelled_N = logits_NC.argmax(1), rough_NC.argmax(1), labels_N >= 0
    right = [int((answers_N == labels_N)[labelled_N].sum()) for answers_N in (before_N, after_N)]
    num = int(labelled_N.sum())
    before, after, drop = (count / num if num else None for count in (*right, right[0] - right[1]))
    agreement = float((before_N == after_N).mean())
    return {
        "images": len(labels_N), "agreement": agreement, "accuracy_before": before, "accuracy_after": after,
        "max_drop": max_drop, "kept": (1 - agreement if drop is None else drop) <= max_drop,
    }  # fmt: skip


def _speeds(config: RunConfig, runs: dict[str, Run], input_1: np.ndarray) -> dict[str, dict[str, float]]:
    """The speed of each format on this machine's CPUs, and of the teacher's backbone if the job asks for it."""
    found = {f"student, {name}": asdict(measure_speed(run, input_1)) for name, run in runs.items()}
    if config.evaluate.time_teacher and config.teacher is not None and config.loss.needs_teacher:
        for member in config.teacher.members:
            teacher, who = load_teacher(member)[0], "teacher" if len(config.teacher.members) == 1 else member.name
            side = teacher.preprocessing.size
            found[f"{who}, torch"] = asdict(measure_speed(torch_run(teacher), np.zeros((1, 3, side, side), np.float32)))
    return found


def export(execution: Execution) -> None:
    config, samples, outcome, progress = execution.config, execution.samples, execution.outcome, execution.progress
    student, report, generated = outcome.student, outcome.report, outcome.generated
    assert student is not None
    assert report is not None
    useful = compare_with_majority(report.student)
    if useful.state == "at chance" and not config.export.allow_useless:
        outcome.refused = (
            f"{useful.warnings[0].rstrip('.')}; so it is not exported. Train it longer or with other settings (the "
            "report shows its training), or set export.allow_useless=true to export it anyway"
        )
        return
    directory = export_directory(config, samples)

    def work(_: Any) -> None:
        def card(about: dict[str, Any], exported: Exported) -> str:
            return model_card(config, samples, report, generated, about, exported)

        export_student(config, samples, student.path, card, directory, progress)

    exported = outcome.exported = result_of(execution.result(directory, work), directory.path, Exported)
    progress.line(f"exported: {', '.join(exported.files)}")
    if exported.int8 is not None:
        progress.line(f"          {int8_words(exported.int8)}")
    progress.line(f"          raydistill predict {exported.path} PICTURES…")
    if "model.onnx" in exported.files and "://" not in exported.path:
        record_model(config, exported, execution.tracker)
    if config.export.hub is not None:
        push_to_hub(exported.path, config.export.hub)
        progress.line(f"          pushed to {config.export.hub}")
