"""Figures of a search's report, drawn by Optuna with Plotly."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import optuna.importance
import optuna.visualization
import plotly.graph_objects

from tune.search.verdict import TrialRow, comparable_rows, last_rows

Section = list[plotly.graph_objects.Figure | str]
"""A part of the report: figures, and sentences about them."""


def figures(rows: Sequence[TrialRow]) -> dict[str, Section]:
    """Learning curves, parallel coordinates, importance and Pareto front; a sentence where too little can be shown."""
    drawn: dict[str, Callable[[Sequence[TrialRow]], Section]] = {
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
            found[name] = _not_drawn(str(error))
    return found


def _not_drawn(reason: str) -> Section:
    return [f"Not drawn: {reason}."]


def _curves(rows: Sequence[TrialRow]) -> Section:
    study, names = optuna.create_study(direction="maximize"), []
    for row in reversed(last_rows(rows)):  # Optuna draws the last trial on top
        curve = {
            one["iteration"]: one["sdri_db"]
            for one in rows
            if (one["kind"], one["trial"]) == (row["kind"], row["trial"]) and one["sdri_db"] is not None
        }
        if curve and row["kind"] != "repeat":
            value = curve[max(curve)]
            study.add_trial(optuna.trial.create_trial(value=value, intermediate_values=curve))
            names.append(html.escape(f"{row['name']}: {row['description']}"))
    if not names:
        return _not_drawn("no trial has a figure")
    figure = optuna.visualization.plot_intermediate_values(study)
    for trace, name in zip(figure.data, names, strict=True):
        trace.name = name
    xaxis = {"title": "iteration", "dtick": 1}
    figure.update_layout(title=None, xaxis=xaxis, yaxis_title="SDRi dB", showlegend=True)
    return [figure]


def _coordinates(rows: Sequence[TrialRow]) -> Section:
    drawn = _drawn_study(rows)
    if isinstance(drawn, str):
        return _not_drawn(drawn)
    study, shared, notes = drawn
    figure = optuna.visualization.plot_parallel_coordinate(study, params=shared, target_name="SDRi dB")
    for dimension, name in zip(figure.data[0].dimensions[1:], shared, strict=True):
        dimension.label = name  # Optuna cuts names at 20 characters, and several begin alike
    figure.update_layout(title=None)
    return [figure, *notes]


def _importance(rows: Sequence[TrialRow]) -> Section:
    drawn = _drawn_study(rows)
    if isinstance(drawn, str):
        return _not_drawn(drawn)
    study, shared, notes = drawn
    if len({trial.value for trial in study.trials}) == 1:
        return _not_drawn("all trials have the same SDRi")
    if all(distribution.single() for distribution in (study.trials[0].distributions[name] for name in shared)):
        return _not_drawn("every parameter that all trials have in common has one value")
    figure = optuna.visualization.plot_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=shared,
        target_name="SDRi dB",
    )
    figure.update_layout(title=None)
    return [figure, *notes]


def _front(rows: Sequence[TrialRow]) -> Section:
    last = comparable_rows(rows)
    if not last:
        return _not_drawn("no trial has a figure and a cost")
    study = optuna.create_study(directions=["minimize", "maximize"])
    for row in last:
        attributes = {"trial": html.escape(row["name"]), "schedule": html.escape(row["description"])}
        values = [(row["cost_s"] or 0.0) / 3600.0, row["sdri_db"] or 0.0]
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs=attributes))
    figure = optuna.visualization.plot_pareto_front(study, target_names=["cost h", "SDRi dB"])
    figure.update_layout(title=None)
    return [figure]


def _drawn_study(rows: Sequence[TrialRow]) -> tuple[optuna.Study, list[str], list[str]] | str:
    """The finished drawn trials as an Optuna study, their common parameters, and a sentence if some have others.

    Returns the reason if they cannot be drawn. Stopped trials are left out: their figures are of an earlier iteration.
    """
    last = [
        row
        for row in last_rows(rows)
        if row["kind"] == "searched" and row["state"] == "finished" and row["sdri_db"] is not None
    ]
    if len(last) < 2:
        return "fewer than two drawn trials have finished"
    params = [{html.escape(name): value for name, value in json.loads(row["params"]).items()} for row in last]
    shared = sorted(set(params[0]).intersection(*params[1:]))
    if not shared:
        return "the trials have no parameter in common"
    columns = {name: _column([some[name] for some in params]) for name in shared}
    spaces = {name: _distribution(values) for name, values in columns.items()}
    study = optuna.create_study(direction="maximize")
    for number, row in enumerate(last):
        some = {name: values[number] for name, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=some, distributions=spaces, value=row["sdri_db"]))
    others = sorted({name for some in params for name in some} - set(shared))
    return study, shared, [f"Left out, because not every trial has them: {', '.join(others)}."] if others else []


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of a parameter: numbers if all are numbers, else texts, because Optuna takes true for 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values]
    return [html.escape(value if isinstance(value, str) else json.dumps(value)) for value in values]


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """A distribution that contains all of the values."""
    if isinstance(values[0], float):
        return optuna.distributions.FloatDistribution(min(values), max(values))
    return optuna.distributions.CategoricalDistribution(sorted(set(values)))
