"""search.html: a search on one page that needs no network.

Shape: T trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raydistill.errors import reason_of
from raydistill.escaping import for_figure
from raydistill.pages.figures import INK, SERIES, chart
from raydistill.pages.templates import Table, page
from raydistill.secrets import redacted

# Of six settings, of which one explained 70 % of the variance, fANOVA ranked that one first in 25 % of searches of 4
# trials (chance: 17 %), in 90 % of 20 trials, and in all of 30. Where it explained half: in 25, 60 and 70 %.
_FEWEST_TRIALS = 20
_THIRDS = (("worst third", 0.15), ("middle third", 0.5), ("best third", 1.0))


class _Objective(NamedTuple):
    """What the page shows of one: `charts` by trial and against others, `slices` by setting, `importances` or the
    `reason` that there are none."""

    name: str
    charts: list[tuple[str, Markup]]
    slices: list[tuple[str, Markup]]
    importances: Table | None
    reason: str


def search_page(study: optuna.Study, objectives: Sequence[str], **shown: Any) -> bytes:
    """History, importances, slices and pairs and, with several objectives, the Pareto front. `shown`: the name of the
    job, `when`, `verdict`, `tiles` and the table `best`.

    If trials ended early, it compares all trials after the last epoch that each reached. If something needs more
    trials, the page gives the reason.
    """
    trials, when = _compared(study)
    found = [_objective(study, trials, number, name, when) for number, name in enumerate(objectives)]
    fronts = [_front(study, objectives, number) for number in range(1, len(objectives))]
    return page("study.html", kind="search", objectives=found, fronts=fronts, when_compared=when, **shown)


def _objective(study: optuna.Study, trials: list[FrozenTrial], number: int, name: str, when: str) -> _Objective:
    value_T, rising = np.array([t.values[number] for t in trials]), study.directions[number] == StudyDirection.MAXIMIZE
    importances, reason = _importances(trials, study.directions, number)
    keys = [*importances, *dict.fromkeys(key for t in trials for key in t.params if key not in importances)]
    charts = [_history(study, number, name, rising)]
    if len(importances) > 1:
        charts.append(_pair(trials, value_T if rising else -value_T, list(importances)[:2], name))
    slices = [_slice(trials, value_T, key, name) for key in keys]
    rows = [[key, {"share": share, "mark": None}] for key, share in importances.items()]
    return _Objective(name, charts, slices, Table(["setting", "share of the variance"], rows) if rows else None, reason)


def _importances(
    trials: list[FrozenTrial], directions: Sequence[StudyDirection], number: int
) -> tuple[dict[str, float], str]:
    """By key the share of the variance that it explains (fANOVA), or the reason that there are none."""
    if len(trials) < _FEWEST_TRIALS:
        return {}, f"this takes {_FEWEST_TRIALS} trials, or it is chance; {len(trials)} can be compared"
    try:
        whole, fanova = _without_short_trials(trials, directions), FanovaImportanceEvaluator(seed=0)
        return get_param_importances(whole, evaluator=fanova, target=lambda trial: trial.values[number]), ""
    except (ValueError, RuntimeError) as error:  # all values are equal, or no key is in all trials
        return {}, reason_of(error)


def _history(study: optuna.Study, number: int, name: str, rising: bool) -> tuple[str, Markup]:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pruned = [t for t in study.get_trials(states=(TrialState.PRUNED,)) if t.intermediate_values]

    def draw(axes: Axes) -> None:
        at, value_T = [t.number for t in complete], np.array([t.values[number] for t in complete])
        best_T = (np.maximum if rising else np.minimum).accumulate(value_T)
        axes.scatter(at, value_T, label="trial", color=SERIES[0])
        axes.step(at, best_T, where="post", label="best so far", color=SERIES[1])
        if pruned:
            reached = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
            axes.scatter([t.number for t in pruned], reached, marker="x", color=INK, label="ended early, so far")
        axes.set(xlabel="trial", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return chart(f"{name} by trial", draw)


def _front(study: optuna.Study, objectives: Sequence[str], number: int) -> tuple[str, Markup]:
    best = {t.number for t in study.best_trials}

    def draw(axes: Axes) -> None:
        for is_best, label, colour in ((False, "trial", SERIES[0]), (True, "on the Pareto front", SERIES[1])):
            points = [t.values for t in study.trials if t.values and (t.number in best) == is_best]
            axes.scatter([p[0] for p in points], [p[number] for p in points], label=label, color=colour)
        axes.set(xlabel=objectives[0], ylabel=objectives[number])

    return chart(f"{objectives[number]} by {objectives[0]}", draw)


def _slice(trials: list[FrozenTrial], value_T: np.ndarray, key: str, name: str) -> tuple[str, Markup]:
    """Labels stand on the left, where there is room for them."""
    known = [(t, v) for t, v in zip(trials, value_T, strict=True) if key in t.params]
    turned = isinstance(known[0][0].distributions[key], CategoricalDistribution)

    def draw(axes: Axes) -> None:
        for own, marker, colour in ((False, "o", SERIES[0]), (True, "D", SERIES[1])):
            points = [(_place(t, key), v) for t, v in known if bool(t.user_attrs.get("own")) == own]
            places_T2 = np.array(points).reshape(-1, 2)[:, :: -1 if turned else 1]
            axes.scatter(*places_T2.T, marker=marker, color=colour)
        _scale(axes, trials, key, "y" if turned else "x")
        axes.set(**{"xlabel" if turned else "ylabel": name})

    return chart(f"{name} by {key}", draw)


def _pair(trials: list[FrozenTrial], good_T: np.ndarray, keys: list[str], name: str) -> tuple[str, Markup]:
    """Two settings against each other: the higher `good`, the fuller the sign."""
    third_T = np.minimum(3 * np.argsort(np.argsort(good_T)) // len(good_T), 2)
    x, y = sorted(keys, key=lambda key: isinstance(trials[-1].distributions.get(key), CategoricalDistribution))

    def draw(axes: Axes) -> None:
        for k, (label, alpha) in enumerate(_THIRDS):
            points = [t for t, third in zip(trials, third_T, strict=True) if third == k and set(keys) <= set(t.params)]
            places = ([_place(t, key) for t in points] for key in (x, y))
            axes.scatter(*places, label=label, facecolor=(SERIES[0], alpha), edgecolor=SERIES[0])
        _scale(axes, trials, x, "x")
        _scale(axes, trials, y, "y")

    return chart(f"{name} by the two settings that matter most", draw)


def _place(trial: FrozenTrial, key: str) -> float:
    """A label's place is its number."""
    distribution, value = trial.distributions[key], trial.params[key]
    return distribution.to_internal_repr(value) if isinstance(distribution, CategoricalDistribution) else float(value)


def _scale(axes: Axes, trials: list[FrozenTrial], key: str, axis: str) -> None:
    distribution = next(t.distributions[key] for t in trials if key in t.params)
    axes.set(**{f"{axis}label": for_figure(key)})
    if isinstance(distribution, CategoricalDistribution):
        labels = [for_figure(redacted(str(label))) for label in distribution.choices]
        tilted: dict[str, Any] = {"rotation": 30, "ha": "right"} if axis == "x" else {}
        getattr(axes, f"set_{axis}ticks")(range(len(labels)), labels, **tilted)
    elif getattr(distribution, "log", False):
        axes.set(**{f"{axis}scale": "log"})


def _compared(study: optuna.Study) -> tuple[list[FrozenTrial], str]:
    """Trials with comparable values, and when these were measured: at the end or, if trials ended early, after the last
    epoch that all trials reached."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    pruned = study.get_trials(states=(TrialState.PRUNED,))
    together = [*complete, *pruned]
    common = set.intersection(*(set(t.intermediate_values) for t in together)) if pruned else set()
    if not common:
        return complete, ""
    epoch = max(common)
    values = [
        optuna.trial.create_trial(
            value=t.intermediate_values[epoch], params=t.params, distributions=t.distributions, user_attrs=t.user_attrs
        )
        for t in together
    ]
    return values, f"after epoch {epoch}, which all {len(together)} trials reached"


def _without_short_trials(trials: list[FrozenTrial], directions: Sequence[StudyDirection]) -> optuna.Study:
    """The trials, without the job's own settings if the space lacks one of their values: Optuna compares the settings
    that all trials have."""
    copy = optuna.create_study(directions=directions)
    others = [t for t in trials if not t.user_attrs.get("own")]
    always = {key for trial in others for key in trial.params if all(key in t.params for t in others)}
    copy.add_trials([t for t in trials if always <= set(t.params)])
    return copy
