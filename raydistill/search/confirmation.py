"""Is the best trial of a search really better? Train it and the job's own settings again with new seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydistill.config import RunConfig, overlay
from raydistill.escaping import counted
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.significance import LEVEL, Answers, align, difference, needed_words, p_words, read_answers
from raydistill.search.study import Trial
from raydistill.storage.directory import read_seconds
from raydistill.tracking.tracker import Tracker


@dataclass(frozen=True)
class Gain:
    """The best settings against the job's own with new seeds, paired by seed and image: means, and the gain with its
    95 % confidence interval over seeds and images; with one seed over images only, and without a p-value."""

    split: str
    own: float
    best: float
    gain: float
    low: float
    high: float
    p_value: float | None
    needed: str  # in words: the seeds or images at which it would be significant


def confirm(
    config: RunConfig, settings: dict[str, Any], progress: Progress, tracker: Tracker
) -> tuple[list[Gain], float]:
    """Train the best and the job's own settings with seeds that no trial used; measure val and, only here, test."""
    if not settings or not config.tune.confirm_seeds:
        return [], 0.0
    answers: dict[str, dict[str, list[Answers]]] = {"val": {"own": [], "best": []}, "test": {"own": [], "best": []}}
    stages: set[str] = set()  # both share some
    for number in range(1, config.tune.confirm_seeds + 1):
        for who, tree in (("own", {}), ("best", settings)):
            again = overlay(config, {**tree, "seed": config.seed + number, "tracking": {"enabled": False}})
            progress.line(f"tune: confirming, {who} settings with seed {again.seed}")
            with tracker.child(f"confirm {who}, seed {again.seed}") as record:
                outcome = run_stages(again, progress)
                report, samples = outcome.report, outcome.samples
                assert report is not None
                assert samples is not None
                record.data(again, samples)
                for split, of_split in answers.items():
                    if split in report.student:
                        of_split[who].append(read_answers(report.path, split))
                        record.log({f"{split}_accuracy": float(of_split[who][-1].right.mean())})
            stages |= set(outcome.directories.values())
    return gains_of(answers), sum(read_seconds(path) for path in stages)


def gains_of(answers: dict[str, dict[str, list[Answers]]]) -> list[Gain]:
    """The gain by split, from one answer of the `own` and the `best` settings for each seed."""
    gains = []
    for split, of_split in answers.items():
        if of_split["own"]:
            own_SN, best_SN = align([of_split["own"], of_split["best"]])
            gain = difference(best_SN, own_SN)
            own, best = (float(np.mean([one.right.mean() for one in of_split[who]])) for who in ("own", "best"))
            needed = needed_words(gain, LEVEL, "tune.confirm_seeds")
            gains.append(Gain(split, own, best, gain.mean, *gain.interval(), gain.p_value(), needed))
    return gains


def search_verdict(config: RunConfig, best: Trial, trials: list[Trial], gains: list[Gain]) -> str:
    name = config.tune.objectives[0]
    assert best.values is not None
    own = next((t.values[0] for t in trials if t.own and t.values), None)
    failed = sum(trial.state == "failed" for trial in trials)
    lost = f" ({failed} failed, see search.json)" if failed else ""
    words = f"Trial {best.number} of {len(trials)}{lost} is best: {name} {best.values[0]:.4g}"
    if best.own:
        return f"{words}, with the job's own values. Keep them: no trial was better."
    words += "" if own is None else f" against {own:.4g} with the job's own values"
    if not gains:
        return f"{words}. The best of many trials looks better than it is: confirm it with tune.confirm_seeds=3."
    shown = [f"{100 * g.gain:+.1f} points on {g.split} ({100 * g.low:+.1f} to {100 * g.high:+.1f})" for g in gains]
    words += f". With {counted(config.tune.confirm_seeds, 'new seeds')} it gains {' and '.join(shown)}"
    # The search selected by val, so val is biased even with new seeds: test decides if there is one.
    last = gains[-1]
    if last.p_value is None:
        return f"{words}; {last.needed}."
    if last.gain <= 0:
        return f"{words}: keep the job's own values; the search overfitted one val split."
    if last.p_value < LEVEL:
        biased = ", which the search selected by" if last.split == "val" else ""
        return f"{words}; on {last.split}{biased}, p {p_words(last.p_value, '= ')}: run the job with best.yaml."
    return f"{words}; on {last.split} p = {last.p_value:.2f}, so this may be chance: {last.needed}."
