"""TODO tune/search/figures.py."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import optuna.importance
import optuna.visualization
import plotly.graph_objects

from tune.search.verdict import Row, _standing, last_rows

Section = list[plotly.graph_objects.Figure | str]


def figures(rows: Sequence[Row]) -> dict[str, Section]:
    """Learning curves, parallel coordinates, importance and front; a sentence where there is too little to show."""
    drawn: dict[str, Callable[[Sequence[Row]], Section]] = {
        "Learning curves": _curves,
        "Parallel coordinates": _coordinates,
        "Importance": _importance,
        "SDRi and cost": _front,
    }
    found: dict[str, Section] = {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, draw in drawn.items():
        try:
            found[name] = draw(rows)
        except (ValueError, RuntimeError) as error:
            found[name] = [f"There is too little to show: {error}."]
    return found


def _curves(rows: Sequence[Row]) -> Section:
    study, names = optuna.create_study(direction="maximize"), []
    for row in reversed(last_rows(rows)):  # the best on top
        curve = {
            one["iteration"]: one["sdri_db"]
            for one in rows
            if (one["kind"], one["trial"]) == (row["kind"], row["trial"]) and one["sdri_db"] is not None
        }
        if curve and row["kind"] != "repeat":
            value = curve[max(curve)]
            study.add_trial(optuna.trial.create_trial(value=value, intermediate_values=curve))
            names.append(html.escape(f"{row['name']}: {row['words']}"))
    if not names:
        raise ValueError("no trial has a figure")
    figure = optuna.visualization.plot_intermediate_values(study)
    for trace, name in zip(figure.data, names, strict=True):
        trace.name = name
    xaxis = {"title": "iteration", "dtick": 1}
    figure.update_layout(title=None, xaxis=xaxis, yaxis_title="SDRi dB", showlegend=True)
    return [figure]


def _coordinates(rows: Sequence[Row]) -> Section:
    study, shared, notes = _drawn_study(rows)
    figure = optuna.visualization.plot_parallel_coordinate(study, params=shared, target_name="SDRi dB")
    for dimension, name in zip(figure.data[0].dimensions[1:], shared, strict=True):
        dimension.label = name  # Optuna cuts names at 20 characters, and several begin alike
    figure.update_layout(title=None)
    return [figure, *notes]


def _importance(rows: Sequence[Row]) -> Section:
    study, shared, notes = _drawn_study(rows)
    if len({trial.value for trial in study.trials}) == 1:
        raise ValueError("all trials have the same SDRi")
    if all(distribution.single() for distribution in (study.trials[0].distributions[name] for name in shared)):
        raise ValueError("each parameter that all trials have in common has one value")
    figure = optuna.visualization.plot_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=shared,
        target_name="SDRi dB",
    )
    figure.update_layout(title=None)
    return [figure, *notes]


def _front(rows: Sequence[Row]) -> Section:
    last = _standing(rows)
    if not last:
        raise ValueError("no trial has a figure and a cost")
    study = optuna.create_study(directions=["minimize", "maximize"])
    for row in last:
        told = {name: html.escape(row[key]) for name, key in (("trial", "name"), ("schedule", "words"))}
        values = [row["cost_s"] / 3600.0, row["sdri_db"]]
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs=told))
    figure = optuna.visualization.plot_pareto_front(study, target_names=["cost h", "SDRi dB"])
    figure.update_layout(title=None)
    return [figure]


def _drawn_study(rows: Sequence[Row]) -> tuple[optuna.Study, list[str], list[str]]:
    """The drawn trials as Optuna has them, the parameters that all have, and a sentence if some have others.

    Only those that went to their end: what was stopped has the figures of an earlier iteration.
    """
    last = [
        row
        for row in last_rows(rows)
        if row["kind"] == "searched" and row["state"] == "finished" and row["sdri_db"] is not None
    ]
    if len(last) < 2:
        raise ValueError("fewer than two drawn trials went to their end")
    params = [{html.escape(name): value for name, value in json.loads(row["params"]).items()} for row in last]
    shared = sorted(set(params[0]).intersection(*params[1:]))
    if not shared:
        raise ValueError("the trials have no parameter in common")
    columns = {name: _column([some[name] for some in params]) for name in shared}
    spaces = {name: _distribution(values) for name, values in columns.items()}
    study = optuna.create_study(direction="maximize")
    for number, row in enumerate(last):
        some = {name: values[number] for name, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=some, distributions=spaces, value=row["sdri_db"]))
    others = sorted({name for some in params for name in some} - set(shared))
    return study, shared, [f"Left out, as not every trial has them: {', '.join(others)}."] if others else []


def _column(values: Sequence[Any]) -> list[Any]:
    """Numbers where all are numbers, else words: to Optuna, as to Python, true is 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values]
    return [html.escape(value if isinstance(value, str) else json.dumps(value)) for value in values]


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """One that has all of some values."""
    if isinstance(values[0], float):
        return optuna.distributions.FloatDistribution(min(values), max(values))
    return optuna.distributions.CategoricalDistribution(sorted(set(values)))
