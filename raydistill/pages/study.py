"""study.html: Optuna's plots of a search, in one self-contained HTML file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from raydistill.errors import reason_of
from raydistill.escaping import for_figure
from raydistill.pages.templates import data_uri, page

_MOST_KEYS_IN_CONTOUR = 3
_DOTS_PER_INCH = 110


def search_page(study: optuna.Study, verdict: str, objectives: Sequence[str]) -> bytes:
    """History, importance, slices and contours or, with several objectives, the Pareto front and each importance.

    If trials ended early, the plots compare all trials after the last epoch that each reached. If a plot needs more
    trials, the page gives the reason.
    """
    matplotlib.use("Agg")  # Optuna draws with pyplot
    trials, when = _compared(study)
    whole = _without_short_trials(trials, study.directions)
    pictures: list[tuple[str, Callable[[], Any]]] = []
    for number, name in enumerate(objectives):
        options: dict[str, Any] = {"target_name": name}
        if len(objectives) > 1:
            options["target"] = partial(_value, number)
        pictures += [
            (f"{name} by trial", partial(_history, study, options)),
            (f"Which settings {name}{when} depends on (fANOVA)",
             partial(plots.plot_param_importances, whole, **options)),
            # A slice plot has one panel for each setting.
            (f"{name}{when} by each setting", partial(plots.plot_slice, whole, **options)),
        ]  # fmt: skip
    if len(objectives) > 1:
        pictures.insert(0, ("Pareto front", partial(plots.plot_pareto_front, study, target_names=list(objectives))))
    else:
        title = f"{objectives[0]}{when} by pairs of the most important settings"
        pictures.append((title, partial(_contour, whole, objectives[0])))
    return page("study.html", verdict=verdict, pictures=[(title, *_drawn(draw)) for title, draw in pictures])


def _value(number: int, trial: FrozenTrial) -> float:
    return trial.values[number]


def _history(study: optuna.Study, options: dict[str, Any]) -> Any:
    """Optuna's plot, with the trials that ended early at their last value."""
    axes = plots.plot_optimization_history(study, **options)
    pruned = [t for t in study.get_trials(states=(TrialState.PRUNED,)) if t.intermediate_values]
    if pruned:
        reached = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
        axes.scatter([t.number for t in pruned], reached, marker="x", color="grey", label="ended early, so far")
        axes.legend(loc="lower right")
    return axes


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
    return values, f" after epoch {epoch}, which all {len(together)} trials reached,"


def _without_short_trials(trials: list[FrozenTrial], directions: Sequence[StudyDirection]) -> optuna.Study:
    """The trials, without the job's own settings if the space lacks one of their values: Optuna compares the settings
    that all trials have."""
    copy = optuna.create_study(directions=directions)
    others = [t for t in trials if not t.user_attrs.get("own")]
    always = {key for trial in others for key in trial.params if all(key in t.params for t in others)}
    copy.add_trials([_in_figure(t) for t in trials if always <= set(t.params)])
    return copy


def _in_figure(trial: FrozenTrial) -> FrozenTrial:
    """The trial with its keys and labels escaped for plots: a space or a study may come from others."""
    params, distributions = dict(trial.params), dict(trial.distributions)
    for key, distribution in trial.distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            shown = [for_figure(label) if isinstance(label, str) else label for label in distribution.choices]
            # Two labels stay two if shortening makes them equal.
            shown = [f"{label} #{k}" if shown.index(label) < k else label for k, label in enumerate(shown)]
            distributions[key] = CategoricalDistribution(shown)
            params[key] = shown[int(distribution.to_internal_repr(params[key]))]
    return optuna.trial.create_trial(
        values=trial.values, user_attrs=trial.user_attrs,
        params={for_figure(key): value for key, value in params.items()},
        distributions={for_figure(key): value for key, value in distributions.items()},
    )  # fmt: skip


def _contour(study: optuna.Study, name: str) -> Any:
    try:
        keys = list(optuna.importance.get_param_importances(study))[:_MOST_KEYS_IN_CONTOUR]
    except (ValueError, RuntimeError):  # too few trials
        keys = []
    if len(keys) < 2:  # Optuna would draw nothing
        raise ValueError("it needs two settings with an effect")
    return plots.plot_contour(study, params=keys, target_name=name)


def _drawn(draw: Callable[[], Any]) -> tuple[str, str]:
    """The plot as a data URI, or "" and the reason."""
    from matplotlib import pyplot

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = draw()
        figure, panels = np.ravel(axes)[0].figure, np.shape(axes)
        if len(panels) == 2:  # a contour for each pair
            figure.set_size_inches(4.2 * panels[1], 4 * panels[0])
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
        return data_uri(file.getvalue()), ""
    except Exception as error:  # Optuna's plots fail in many ways if trials are few or equal
        return "", reason_of(error)
    finally:
        pyplot.close("all")
