"""The learning curve of a comparison: accuracy by the number of labels, and what more of would help."""

from __future__ import annotations

from typing import Any

import numpy as np

from raydistill.search.arms import Arm
from raydistill.search.significance import LEVEL, accuracy_interval, align, difference, gain_words, needed_words

_WORTH = 0.02  # a difference that anybody would act on


def learning_curve(curve: list[Arm]) -> tuple[list[dict[str, Any]], str]:
    """Means with intervals by arm and share of the labels, and what is short: labels, or other images."""
    groups: dict[tuple[str, float], list[Arm]] = {}
    for arm in curve:
        groups.setdefault((arm.arm, arm.label_share), []).append(arm)
    right = dict(zip(groups, align([[run.test for run in runs] for runs in groups.values()]), strict=True))
    points = []
    for (name, share), runs in sorted(groups.items()):
        low, high = accuracy_interval(right[name, share])
        points.append(
            {
                "arm": name,
                "label_share": share,
                "num_labelled": round(np.mean([run.num_labelled for run in runs])),
                "val_mean": float(np.mean([run.val_accuracy for run in runs])),
                "test_mean": float(np.mean([run.test_accuracy for run in runs])),
                "test_low": low,
                "test_high": high,
            }
        )
    return points, _curve_verdict(points, right)


def _curve_verdict(points: list[dict[str, Any]], right: dict[tuple[str, float], np.ndarray]) -> str:
    """What the last step of labels bought the distilled student, and what distilling buys at all labels: two claims,
    each at half of the 5 %."""
    distilled = sorted((p for p in points if p["arm"] != "scratch"), key=lambda p: p["label_share"])
    if len(distilled) < 2:
        return "One share of the labels says nothing of a slope; give compare.label_shares two or more."
    before, last = distilled[-2:]
    all_labels = right[last["arm"], last["label_share"]]
    slope = difference(all_labels, right[before["arm"], before["label_share"]])
    ahead = difference(all_labels, right["scratch", last["label_share"]])
    level = LEVEL / 2
    ratio = last["num_labelled"] / max(before["num_labelled"], 1)
    bought = (
        f"the last {ratio:.1f}-fold of labels bought the distilled student {gain_words(slope, level)} of test accuracy"
    )
    more = f"with {last['num_labelled']} labels distilling is {gain_words(ahead, level)} from scratch"
    one_seed = slope.seeds == 1
    if not one_seed and slope.interval(level)[0] > 0:
        return f"More labels: {bought}, and the curve has not levelled off."
    if not one_seed and ahead.interval(level)[0] > 0:
        return f"More unlabelled or generated images, whose worth is shown, rather than labels: {more}; {bought}."
    if not one_seed and max(slope.interval(level)[1], ahead.interval(level)[1]) < _WORTH:
        return f"Nothing more of this kind: {bought}; {more}."
    key = "compare.seeds"
    return f"Nothing is proven: {bought}, and {more}. As to the labels, {needed_words(slope, level, key)}."
