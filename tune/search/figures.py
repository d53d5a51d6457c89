"""Figures of a search's report: curves, parallel coordinates, importance by Optuna's fANOVA, Pareto front."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import optuna.importance

from engine.cli.tables import Table
from tune.report.plots import Curve, Plot, coordinates, lines, scatter
from tune.search.verdict import TrialRow, comparable_rows, last_rows, pareto_rows

Section = list[Plot | Table | str]
"""A part of the report: plots, tables and sentences."""


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
    curves: list[Curve] = []
    for row in last_rows(rows):
        points = [
            (float(one["iteration"]), one["sdri_db"])
            for one in rows
            if (one["kind"], one["trial"]) == (row["kind"], row["trial"]) and one["sdri_db"] is not None
        ]
        if points and row["kind"] != "repeat":
            curves.append(Curve(name=f"{row['name']}: {row['description']}", points=points, is_muted=bool(curves)))
    best = curves[0].name if curves else ""
    plot = lines(f"SDRi of every trial; strong: {best}", curves, x_label="iteration", y_label="SDRi dB")
    return [plot] if plot is not None else _not_drawn("no trial has a figure")


def _coordinates(rows: Sequence[TrialRow]) -> Section:
    drawn = _drawn_trials(rows)
    if isinstance(drawn, str):
        return _not_drawn(drawn)
    last, columns, notes = drawn
    axes: dict[str, Sequence[float | str]] = {"SDRi dB": [row["sdri_db"] or 0.0 for row in last], **columns}
    return [
        coordinates(f"Parameters of the drawn trials; strong: {last[0]['name']}", axes, [row["name"] for row in last]),
        *notes,
    ]


def _importance(rows: Sequence[TrialRow]) -> Section:
    drawn = _drawn_trials(rows)
    if isinstance(drawn, str):
        return _not_drawn(drawn)
    last, columns, notes = drawn
    if len({row["sdri_db"] for row in last}) == 1:
        return _not_drawn("all trials have the same SDRi")
    spaces = {name: _distribution(values) for name, values in columns.items()}
    if all(distribution.single() for distribution in spaces.values()):
        return _not_drawn("every parameter that all trials have in common has one value")
    study = optuna.create_study(direction="maximize")
    for number, row in enumerate(last):
        some = {name: values[number] for name, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=some, distributions=spaces, value=row["sdri_db"]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(columns))
    cells = [[name, f"{fraction:.2f}"] for name, fraction in found.items()]
    title = "Fraction of the variance of SDRi that a parameter explains"
    return [Table(title=title, columns=["parameter", "importance"], rows=cells), *notes]


def _front(rows: Sequence[TrialRow]) -> Section:
    front = {(row["kind"], row["trial"]) for row in pareto_rows(rows)}
    points = [
        (
            f"{row['name']}: {row['description']}",
            ((row["cost_s"] or 0.0) / 3600.0, row["sdri_db"] or 0.0),
            (row["kind"], row["trial"]) in front,
        )
        for row in comparable_rows(rows)
    ]
    plot = scatter(
        "SDRi and cost of every trial; strong: the Pareto front", points, x_label="cost h", y_label="SDRi dB"
    )
    return [plot] if plot is not None else _not_drawn("no trial has a figure and a cost")


def _drawn_trials(rows: Sequence[TrialRow]) -> tuple[list[TrialRow], dict[str, list[Any]], list[str]] | str:
    """The finished drawn trials, best first, the parameters that all have, and a sentence if some have others.

    Returns the reason if they cannot be drawn. Stopped trials are left out: their figures are of an earlier iteration.
    """
    last = [
        row
        for row in last_rows(rows)
        if row["kind"] == "searched" and row["state"] == "finished" and row["sdri_db"] is not None
    ]
    if len(last) < 2:
        return "fewer than two drawn trials have finished"
    params = [json.loads(row["params"]) for row in last]
    shared = sorted(set(params[0]).intersection(*params[1:]))
    if not shared:
        return "the trials have no parameter in common"
    columns = {name: _column([some[name] for some in params]) for name in shared}
    others = sorted({name for some in params for name in some} - set(shared))
    notes = [f"Left out, because not every trial has them: {', '.join(others)}."] if others else []
    return last, columns, notes


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of a parameter: numbers if all are numbers, else texts, because Optuna takes true for 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """A distribution that contains all of the values."""
    if isinstance(values[0], float):
        return optuna.distributions.FloatDistribution(min(values), max(values))
    return optuna.distributions.CategoricalDistribution(sorted(set(values)))
