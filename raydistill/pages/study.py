"""The page of a search: Optuna's own plots of the study, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from raydistill.errors import reason_of
from raydistill.secrets import on_page
from raydistill.strangers import in_figure

_MOST_KEYS_IN_CONTOUR = 3
_INTERVAL = 110  # dots an inch


def search_page(study: optuna.Study, verdict: str, objectives: Sequence[str]) -> bytes:
    """History, importance, slices and contours or, of several objectives, the Pareto front and each one's importance.

    Where trials were ended early, few came to an end, and all are compared after the last epoch that each of them
    reached. A picture that these trials do not suffice for is named with the reason.
    """
    matplotlib.use("Agg")  # Optuna draws with pyplot
    trials, when = _compared(study)
    whole = _without_short_trials(trials, study.directions)
    pictures: list[tuple[str, Callable[[], Any]]] = []
    for number, name in enumerate(objectives):
        target = _target(number) if len(objectives) > 1 else {}
        pictures.append((f"{name} by trial", _history(study, name, target)))
        pictures.append(
            (f"Which settings {name}{when} depends on (fANOVA)",
             _call(plots.plot_param_importances, whole, name, target))
        )  # fmt: skip
        pictures.append((f"{name}{when} by each setting", _call(plots.plot_slice, whole, name, target)))
    if len(objectives) > 1:
        front = lambda: plots.plot_pareto_front(study, target_names=list(objectives))  # noqa: E731
        pictures.insert(0, ("Pareto front", front))
    else:
        keys = _important(whole)
        pictures.append((
            f"{objectives[0]}{when} by two settings at a time, those that matter most",
            lambda: _contour(whole, keys, objectives[0]),
        ))  # fmt: skip
    parts = [f"<h2>{html.escape(on_page(title))}</h2>\n{_image(draw)}" for title, draw in pictures]
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>raydistill tune</title><style>'
    head += (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}</style></head>"
    )
    return "\n".join(
        [f"{head}<body>", f"<h1>Search</h1>\n<p>{html.escape(on_page(verdict))}</p>", *parts, "</body></html>\n"]
    ).encode()


def _call(plot: Callable[..., Any], study: optuna.Study, name: str, target: dict[str, Any]) -> Callable[[], Any]:
    # A slice has one panel for each setting and takes no more than that many.
    return lambda: plot(study, target_name=name, **target)


def _target(number: int) -> dict[str, Any]:
    return {"target": lambda trial: trial.values[number]}


def _history(study: optuna.Study, name: str, target: dict[str, Any]) -> Callable[[], Any]:
    """Optuna's, with the trials that were ended early at what they had reached."""

    def draw() -> Any:
        axes = plots.plot_optimization_history(study, target_name=name, **target)
        pruned = [t for t in study.get_trials(states=(TrialState.PRUNED,)) if t.intermediate_values]
        if pruned:
            reached = [t.intermediate_values[max(t.intermediate_values)] for t in pruned]
            axes.scatter([t.number for t in pruned], reached, marker="x", color="grey", label="ended early, so far")
            axes.legend(loc="lower right")
        return axes

    return draw


def _compared(study: optuna.Study) -> tuple[list[FrozenTrial], str]:
    """Trials with values that can be compared, and when those were measured: at the end, or after the last epoch that
    all trials reached, those that were ended early among them."""
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
    """The trials, less the job's own where the space does not hold all of its values: Optuna compares settings that all
    trials have."""
    copy = optuna.create_study(directions=directions)
    others = [t for t in trials if not t.user_attrs.get("own")]
    always = {key for trial in others for key in trial.params if all(key in t.params for t in others)}
    copy.add_trials([_in_figure(t) for t in trials if always <= set(t.params)])
    return copy


def _in_figure(trial: FrozenTrial) -> FrozenTrial:
    """The trial with its keys and labels as pictures show them: a space or a study may be a stranger's."""
    params, distributions = dict(trial.params), dict(trial.distributions)
    for key, distribution in trial.distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            shown = [in_figure(label) if isinstance(label, str) else label for label in distribution.choices]
            # What is alike once it is cut is still two labels.
            shown = [f"{label} #{k}" if shown.index(label) < k else label for k, label in enumerate(shown)]
            distributions[key] = CategoricalDistribution(shown)
            params[key] = shown[int(distribution.to_internal_repr(params[key]))]
    return optuna.trial.create_trial(
        values=trial.values, user_attrs=trial.user_attrs,
        params={in_figure(key): value for key, value in params.items()},
        distributions={in_figure(key): value for key, value in distributions.items()},
    )  # fmt: skip


def _contour(study: optuna.Study, keys: list[str], name: str) -> Any:
    if len(keys) < 2:  # Optuna would draw nothing
        raise ValueError("it takes two settings that matter")
    return plots.plot_contour(study, params=keys, target_name=name)


def _important(study: optuna.Study) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(optuna.importance.get_param_importances(study))[:_MOST_KEYS_IN_CONTOUR]
    except (ValueError, RuntimeError):  # too few trials
        return []


def _image(draw: Callable[[], Any]) -> str:
    from matplotlib import pyplot

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = draw()
        figure = np.ravel(axes)[0].figure
        panels = np.shape(axes)
        if len(panels) == 2:  # a contour for each pair
            figure.set_size_inches(4.2 * panels[1], 4 * panels[0])
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_INTERVAL, bbox_inches="tight")
        pyplot.close("all")
    except Exception as error:  # Optuna's plots fail in many ways where trials are few or alike
        pyplot.close("all")
        return f"<p>These trials do not suffice for it ({html.escape(on_page(reason_of(error)))}).</p>"
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
