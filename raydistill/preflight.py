"""Refuses a job that cannot work, before it loads anything slow or writes anything."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from raydistill.config import RunConfig, fine_tuning
from raydistill.data.sources.listing import Listing, list_images
from raydistill.errors import ConfigError, DataError, near_path
from raydistill.examples import weights_fingerprint
from raydistill.graph import Work
from raydistill.models.timm_names import may_be_timm, no_timm_model

_PROBE_SECONDS = 3.0
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def refuse_early(config: RunConfig) -> None:
    """Raises ConfigError: a model of an unknown kind, a missing file, or a cluster that does not answer."""
    if config.teacher is not None and config.loss.needs_teacher:
        if config.teacher.stored is not None:
            from raydistill.data.open_targets import read_settings

            read_settings(config.teacher.stored)
        else:
            also = "targets:FOLDER, or a folder that timm, transformers or distill"
            for member in config.teacher.members:
                _check_model("teacher.model", member.name, also_here=also)
        for member in config.teacher.members:
            _check_file("teacher.weights", member.weights)
    _check_model("student.model", config.student.model, also_here="or a folder that timm or transformers")
    _check_file("student.weights", config.student.weights)
    if config.generate is not None:
        _check_file("generate.names", config.generate.names)
        if not Path(config.generate.pipeline).is_dir() and not _REPOSITORY.fullmatch(config.generate.pipeline):
            raise ConfigError(f"generate.pipeline={config.generate.pipeline}: no such folder, not a name on the hub")
    if config.cluster.address is not None:
        _probe(config.cluster.address)


def _check_model(key: str, model: str, also_here: str) -> None:
    prefix, colon, name = model.partition(":")
    if "://" in model or Path(model).is_dir():
        return
    if colon and prefix == "timm" and name:
        if not may_be_timm(name):
            raise no_timm_model(model, key)
        return
    if colon and prefix == "example":
        weights_fingerprint(name)  # knows its names
        return
    if colon and prefix == "hf":
        if not _REPOSITORY.fullmatch(name) and not Path(name).is_dir():
            raise ConfigError(f"{key}={model}: no such folder, not a name on the hub (OWNER/NAME)")
        return
    meant = f"; did you mean timm:{model} or hf:{model}?" if _REPOSITORY.fullmatch(model) and not colon else ""
    raise ConfigError(f"{key}={model}: no such folder; use timm:NAME, hf:NAME, {also_here} saved{meant}")


def _check_file(key: str, path: str | None) -> None:
    if path is not None and "://" not in path and not path.startswith("example:") and not Path(path).exists():
        raise ConfigError(f"{key}={path}: no such file{near_path(path) or '; correct the path, or leave the key out'}")


def _probe(address: str) -> None:
    """Raises ConfigError: HOST:PORT accepts no connection."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return  # `auto` and the like, which Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cluster.address={address}: no server answers ({getattr(error, 'strerror', None) or error}); start a "
            "cluster (`ray start --head`, `ray up cluster.yaml`), or leave it out to use only this machine"
        ) from None


def check_run(config: RunConfig, work: Work) -> None:
    """Refuse what cannot work before anything is written. Raises ConfigError, DataError."""
    if {"task", "kd", "dkd", "dist", "standardised_kd"}.isdisjoint(config.loss.terms):
        raise ConfigError(
            f"loss: none of its terms ({', '.join(config.loss.terms)}) trains the student's classifier; raise "
            "loss.task_weight or loss.kd_weight"
        )
    if isinstance(config.loss.class_weights, dict):
        from raydistill.data.prompts import refuse_unknown

        refuse_unknown(config.loss.class_weights, work.listing.classes, "loss.class_weights")
    _check_counts(config, work.listing)
    _check_models(config, work.listing, work.undone)
    if "generate" in work.undone:
        from raydistill.generation.forecast import check_generate

        check_generate(config, work.listing.classes)


def check_measurable(config: RunConfig, command: str, splits: tuple[str, ...]) -> None:
    """Raises DataError: the images lack a split that the command needs, and the job draws no share for it."""
    images = config.images
    listing = list_images(images)
    has_val, has_test = listing.has_split("val"), listing.has_split("test")
    there = {"val": has_val or images.val_share > 0, "test": has_test or (not has_val and images.test_share > 0)}
    if lacking := [split for split in splits if not there[split]]:
        raise DataError(
            f"images.path={images.path}: {command} measures {' and '.join(splits)}, and there is no {lacking[0]} "
            f"split; add one, or use data without splits and set images.{lacking[0]}_share to draw one"
        )


def _check_counts(config: RunConfig, listing: Listing) -> None:
    workers = config.distill.most_workers
    if config.views.per_image == "fresh" and config.distill.batch_size % workers:
        raise ConfigError(
            f"distill.batch_size={config.distill.batch_size} is not a multiple of the {workers} workers of "
            "distill.num_workers, which views.per_image=fresh needs"
        )
    train = int(listing.entries.in_split(None, "train").sum())
    if train < workers:
        raise DataError(
            f"images.path={config.images.path}: {train} train images for the {workers} workers of distill.num_workers; "
            "lower it, or add images"
        )


def _check_models(config: RunConfig, listing: Listing, undone: frozenset[str]) -> None:
    """Build the models now: a wrong name, size or weights show before the run."""
    if undone.isdisjoint({"adapt", "teach", "distill"}):
        return
    import torch

    from raydistill.engine.optimizer import layer_rates
    from raydistill.engine.precision import refuse_unable
    from raydistill.models.heads import match_native_head
    from raydistill.models.student import build_student, has_batch_norm
    from raydistill.models.teacher import load_teacher
    from raydistill.models.zero_shot import zero_shot_head

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "distill" in undone:
        student = build_student(config.student, len(listing.classes))
        layer_rates(config.distill, student)  # refuses one without layers
        simclr = config.loss.projects_with_batch_norm
        what = f"loss.projection_head={config.loss.projection_head}" if simclr else config.student.model
        _check_batch_norm(config, what, simclr or has_batch_norm(student))
        if config.cluster.address is None:  # the workers of a cluster try their own devices, and so do its actors
            refuse_unable("distill.precision", config.distill.precision, here)
    if config.teacher and config.loss.needs_teacher and {"adapt", "teach"} & undone:
        if config.teacher.stored is not None:
            from raydistill.stages.stored_teacher import refuse_misfit

            refuse_misfit(config, list(listing.classes))
            return
        if config.cluster.address is None:
            refuse_unable("teacher.precision", config.teacher.precision, here)
        loaded = [load_teacher(member) for member in config.teacher.members]
        if config.teacher.head == "native":
            match_native_head(loaded[0].head, loaded[0].names, listing.classes)
        elif config.teacher.head == "zero_shot":
            zero_shot_head(config.teacher, listing.classes)
        elif config.teacher.head == "fine_tune":
            _check_fine_tuning(config, listing)


def _check_fine_tuning(config: RunConfig, listing: Listing) -> None:
    from raydistill.models.student import build_student, has_batch_norm

    settings = fine_tuning(config).student
    try:
        student = build_student(settings, len(listing.classes))
    except ConfigError as error:
        raise ConfigError(f"teacher.head=fine_tune builds the teacher like a student: {error}") from None
    _check_batch_norm(config, settings.model, has_batch_norm(student), "teacher.fine_tune_batch_size")


def _check_batch_norm(config: RunConfig, what: str, has_one: bool, key: str = "distill.batch_size") -> None:
    section, _, name = key.partition(".")
    size: int = getattr(getattr(config, section), name)
    if has_one and size // config.distill.most_workers < 2:
        raise ConfigError(
            f"{key}={size} gives a worker one image a step, and {what} has batch norm, which needs two; raise {key}"
        )
