"""adapt: give the teacher a head for this task, and measure it on val before it teaches.

Shapes: N rows, D features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from raydistill.config import RunConfig, Teacher, fine_tuning
from raydistill.data.sample import SampleSet
from raydistill.data.targets import split_features
from raydistill.errors import CheckpointError, ConfigError
from raydistill.execution import Execution
from raydistill.identity import (
    adapt_directory,
    features_directory,
    fine_tune_directory,
    fine_tunes,
    held_out_directory,
    member_directories,
    tuned,
)
from raydistill.models.heads import HEAD_FILE, LinearHead, encode_head, match_native_head
from raydistill.models.teacher import load_teacher
from raydistill.models.zero_shot import zero_shot_head
from raydistill.results import AdaptedTeacher, Features, Member
from raydistill.stages.feature_pass import FeaturePass, join_features, precision_of, write_features
from raydistill.stages.stored_teacher import adapt_stored
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import result_of

# The inverse L2 strengths to try, from a prior that outweighs the data to almost none.
INVERSE_STRENGTHS = tuple(10.0 ** np.arange(-5, 3))
# More threads than this wait for each other: on a busy machine two took ten times as long as one for 160 images.
_NUMBERS_OF_A_THREAD = 2**22
Rows = tuple[np.ndarray, np.ndarray]  # (N, D) features and (N,) labels


def adapt_teacher(
    config: RunConfig, samples: SampleSet, features: StageDirectory, directory: StageDirectory
) -> AdaptedTeacher:
    """Fit the head on the cached features, or take it from the model or the class names, and measure it on val.

    Raises ConfigError: the native head does not know a class.
    """
    assert config.teacher is not None
    directory.begin()
    train, val = (split_features(samples, features.path, split) for split in ("train", "val"))
    l2 = None
    if config.teacher.head == "native":
        _, native, names = load_teacher(config.teacher)
        head = match_native_head(native, names, samples.classes)
    elif config.teacher.head == "zero_shot":
        head = zero_shot_head(config.teacher, samples.classes)
    else:
        head, l2 = fit_linear_probe(train, val, len(samples.classes), config.teacher.class_balanced)
    val_features, val_labels = val
    accuracy = confidence = None
    if len(val_labels):
        likely_NC = softmax(head.logits(val_features), axis=1)
        accuracy = float((likely_NC.argmax(1) == val_labels).mean())
        confidence = float(likely_NC.max(axis=1).mean())
    chance = float(np.bincount(val_labels).max() / len(val_labels)) if len(val_labels) else 1 / len(samples.classes)
    directory.write(HEAD_FILE, encode_head(head))
    precision = (features.done() or {}).get("precision", "fp32")
    gains = _members(config, samples, train, val, accuracy)
    result = AdaptedTeacher(
        directory.path, features.path, accuracy, confidence, chance, l2, len(train[1]), precision, gains
    )
    done = asdict(result)
    del done["features"]  # the config names this directory
    directory.finish(done)
    return result


def _members(
    config: RunConfig, samples: SampleSet, train: Rows, val: Rows, accuracy: float | None
) -> tuple[Member, ...]:
    """What each member of a committee brings on val. All together have this `accuracy`."""
    assert config.teacher is not None
    balanced, found, end = config.teacher.class_balanced, list[Member](), 0

    def measured(columns: slice) -> float | None:
        if accuracy is None or columns == slice(0, train[0].shape[1]):
            return accuracy
        some = [(features_ND[:, columns], labels_N) for features_ND, labels_N in (train, val)]
        head, _ = fit_linear_probe(some[0], some[1], len(samples.classes), balanced)
        return float((head.logits(some[1][0]).argmax(1) == val[1]).mean())

    for member, directory in member_directories(config, samples, features_directory):
        seen = result_of(directory.done() or {}, directory.path, Features)
        assert member.teacher is not None
        first, end = end, end + seen.num_features
        alone = measured(slice(first, end))
        together = measured(slice(0, end)) if first else alone
        found.append(Member(member.teacher.name, seen.num_features, alone, together, seen.seconds_a_view))
    return tuple(found)


def _words_of(members: Sequence[Member], num_views: int | None) -> str:
    """What each member brings, and what its soft targets cost: what to know before it is paid."""
    parts, before = [], 0.0
    for member in members:
        words = f"{member.model} alone" if member is members[0] else f"with {member.model}"
        if member.together is not None:
            words += f" {member.together:.3f}"
            if member is not members[0]:
                words += f" (alone {member.alone:.3f})"
                words += " - it adds nothing on val; leave it out" * (member.together <= before)
            before = member.together
        if member.seconds_a_view is not None and num_views:
            words += f", {num_views * member.seconds_a_view:,.0f} s of an actor for all views"
        parts.append(words)
    return "; ".join(parts)


def refuse_near_chance(teacher: Teacher, adapted: AdaptedTeacher) -> None:
    """Raises ConfigError: the teacher is hardly better than guessing."""
    accuracy, chance = adapted.val_accuracy, adapted.chance
    if accuracy is not None and accuracy < near_chance(chance) and not teacher.allow_near_chance:
        raise ConfigError(
            f"teacher.model={teacher.name} has a val accuracy of {accuracy:.3f}, not clearly above the {chance:.3f} "
            "of always naming the most frequent class, so it cannot teach this task; choose another teacher, head or "
            "image size, or set teacher.allow_near_chance=true to continue"
        )


def near_chance(chance: float) -> float:
    """The val accuracy below which a teacher counts as guessing: a tenth of the way from chance to perfect."""
    return chance + 0.1 * (1 - chance)


def fit_linear_probe(train: Rows, val: Rows, num_classes: int, class_balanced: bool) -> tuple[LinearHead, float]:
    """Multinomial logistic regression by L-BFGS, which is convex, so every run gives the same head. Returns the L2
    strength too: the one with the lowest val cross-entropy, or the middle one without val images. The search goes from
    strong to weak and ends after two worse strengths.

    Accuracy would choose badly: with few labels the strongest penalties can rank the classes best with almost equal
    probabilities, and soft targets need the probabilities.
    """
    (train_ND, train_labels), (val_ND, val_labels) = train, val
    scaler = StandardScaler().fit(train_ND)
    scaled_ND = scaler.transform(train_ND)
    strengths: Sequence[float] = INVERSE_STRENGTHS if len(val_labels) else (1e-2,)
    best: tuple[float, LogisticRegression] | None = None
    worse = 0
    for strength in strengths:
        probe = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced" if class_balanced else None)
        with warnings.catch_warnings(), threadpool_limits(1 + scaled_ND.size // _NUMBERS_OF_A_THREAD):
            # With weak penalties and separable features the optimum is far away.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(scaled_ND, train_labels)
        loss = 0.0
        if len(val_labels):
            if len(probe.classes_) != num_classes:  # prepare leaves no class without a labelled train image
                raise CheckpointError(
                    f"the train images of `prepare` are of {len(probe.classes_)} classes, and its DONE names "
                    f"{num_classes}; delete its folder and run the command again"
                )
            likely_NC = np.clip(probe.predict_proba(scaler.transform(val_ND)), 1e-7, 1)
            loss = float(log_loss(val_labels, likely_NC, labels=range(num_classes)))
        worse = worse + 1 if best is not None and loss >= best[0] else 0
        if best is None or loss < best[0]:
            best = (loss, probe)
        if worse == 2:  # weaker penalties overfit too, and take the longest
            break
    assert best is not None
    probe = best[1]
    weight_CD = probe.coef_ if len(probe.coef_) > 1 else np.concatenate([-probe.coef_ / 2, probe.coef_ / 2])
    bias_C = probe.intercept_ if len(probe.coef_) > 1 else np.concatenate([-probe.intercept_ / 2, probe.intercept_ / 2])
    # Fold the scaling into the head: logits = W ((f - mean) / scale) + b.
    weight_CD = weight_CD / scaler.scale_
    bias_C = bias_C - weight_CD @ scaler.mean_
    return LinearHead(weight_CD.astype(np.float32), bias_C.astype(np.float32)), 1 / probe.C


def adapt(execution: Execution) -> None:
    teacher = execution.config.teacher
    if teacher is not None and teacher.stored is not None:
        adapt_stored(execution)
    else:
        _adapt_network(execution)


def _adapt_network(execution: Execution) -> None:
    samples, progress = execution.samples, execution.progress
    if fine_tunes(execution.config):
        _fine_tune(execution)
    config = execution.config
    features, directory = features_directory(config, samples), adapt_directory(config, samples)
    if directory.done() is None:
        _infer(execution, features_directory, ("val", "train"))
    execution.outcome.directories["features"] = features.path
    done = execution.result(directory, lambda _: adapt_teacher(config, samples, features, directory))
    adapted = execution.outcome.adapted = result_of({**done, "features": features.path}, directory.path, AdaptedTeacher)
    if adapted.val_accuracy is not None:
        progress.line(
            f"teacher:  val accuracy {adapted.val_accuracy:.3f} (most frequent class: {adapted.chance:.3f}), "
            f"mean confidence {adapted.val_confidence:.3f}, head from {adapted.num_train} labelled images, computed in "
            f"{adapted.precision}"
        )
    if adapted.members:
        views = config.views.per_image
        num_views = None if views == "fresh" else views * samples.num_rows("train")
        progress.line(f"          {_words_of(adapted.members, num_views)}")
    assert config.teacher is not None
    refuse_near_chance(config.teacher, adapted)
    if samples.num_rows("test"):
        test = held_out_directory(config, samples)
        execution.outcome.directories[test.stage] = test.path
        if test.done() is None:
            _infer(execution, held_out_directory, ("test",))


def _fine_tune(execution: Execution) -> None:
    """Train the whole teacher on the task. The later stages then see a teacher with a native head."""
    from raydistill.engine.batches import DistillJob
    from raydistill.stages.distill import distill_student

    config, samples = execution.config, execution.samples
    directory = fine_tune_directory(config, samples)
    job = DistillJob(fine_tuning(config), samples, directory.path, head=None, targets=None)

    def work(record: Any) -> None:
        plan, follow = execution.plan(), lambda metrics: record.log(metrics, int(metrics["step"]))
        distill_student(job, directory, plan, execution.progress, follow, "fine-tune")

    execution.result(directory, work)
    later = tuned(config, samples)
    assert later is not None, "fine-tuning has finished"
    execution.config = later


def _infer(
    execution: Execution, directory_of: Callable[[RunConfig, SampleSet], StageDirectory], splits: tuple[str, ...]
) -> None:
    """Compute the teacher's features of every labelled image of the splits, without augmentation: those of each member
    of a committee, and all side by side."""
    config, samples, progress = execution.config, execution.samples, execution.progress
    parts = member_directories(config, samples, directory_of)

    def infer(config: RunConfig, directory: StageDirectory, _: Any) -> None:
        left, wanted = directory.begin(), FeaturePass(config, samples, splits, 0, directory.path)
        done = write_features(wanted, directory.stage, execution.plan(), progress, left)
        directory.finish(asdict(Features(directory.path, done.num_features, done.precision, done.seconds_a_view)))

    def join(config: RunConfig, directory: StageDirectory, _: Any) -> None:
        left, wanted = directory.begin(), FeaturePass(config, samples, splits, 0, directory.path)
        width = join_features(wanted, [own.path for _, own in parts], execution.plan(), left)
        directory.finish(asdict(Features(directory.path, width, precision_of(own for _, own in parts))))

    for member, own in parts:
        execution.result(own, partial(infer, member, own))
    directory = directory_of(config, samples)
    execution.result(directory, partial(join if parts else infer, config, directory))
