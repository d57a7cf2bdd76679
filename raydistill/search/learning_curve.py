"""The learning curve of a comparison: accuracy by the number of labels, and what to collect next."""

from __future__ import annotations

from typing import Any

import numpy as np

from raydistill.search.arms import Arm
from raydistill.search.significance import LEVEL, accuracy_interval, align, difference, gain_words, needed_words

_WORTH = 0.02  # smaller gains in accuracy are not worth more data


def learning_curve(curve: list[Arm]) -> tuple[list[dict[str, Any]], str]:
    """Means with intervals by arm and share of the labels, and what to collect: labels or unlabelled images."""
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
    """The distilled student's gain from the last step of labels, and its gain over scratch with all labels: two claims,
    each at half of the 5 %."""
    distilled = sorted((p for p in points if p["arm"] != "scratch"), key=lambda p: p["label_share"])
    if len(distilled) < 2:
        return "One share of the labels shows no slope; give compare.label_shares two or more."
    before, last = distilled[-2:]
    all_labels = right[last["arm"], last["label_share"]]
    slope = difference(all_labels, right[before["arm"], before["label_share"]])
    ahead = difference(all_labels, right["scratch", last["label_share"]])
    level = LEVEL / 2
    ratio = last["num_labelled"] / max(before["num_labelled"], 1)
    bought = f"{ratio:.1f} times the labels gain the distilled student {gain_words(slope, level)} of test accuracy"
    more = f"with {last['num_labelled']} labels distilling gains {gain_words(ahead, level)} over scratch"
    one_seed = slope.seeds == 1
    if not one_seed and slope.interval(level)[0] > 0:
        return f"Collect more labels: {bought}, and the curve still rises."
    if not one_seed and ahead.interval(level)[0] > 0:
        return f"Collect unlabelled images or generate images rather than label more: {more}; {bought}."
    if not one_seed and max(slope.interval(level)[1], ahead.interval(level)[1]) < _WORTH:
        return f"More data of this kind is not worth it: {bought}; {more}."
    key = "compare.seeds"
    return f"The results do not decide: {bought}, and {more}. For the labels, {needed_words(slope, level, key)}."
