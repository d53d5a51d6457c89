"""What a search found: its trials as a table on disk, the verdict on its winner, and the report."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import optuna.importance
import optuna.visualization
import plotly.graph_objects  # type: ignore[import-untyped]
import plotly.io  # type: ignore[import-untyped]
import pyarrow as pa
import yaml

from engine.storage import Location, location, read_parquet, write_bytes, write_json, write_parquet
from tune.report import Table

Row = dict[str, Any]
Section = list[plotly.graph_objects.Figure | str]
TRIALS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("trial", "kind", "name", "params", "schedule", "words")),
        pa.field("seed", pa.int64()),
        pa.field("iteration", pa.int32()),
        *(pa.field(name, pa.float64()) for name in ("sdri_db", "si_sdri_db", "confirmed_sdri_db", "kept_h")),
        *(pa.field(name, pa.int64()) for name in ("num_kept", "num_stems")),
        *(pa.field(name, pa.float64()) for name in ("estimated_si_sdr_db", "cost_s", "made_s")),
        pa.field("pieces", pa.list_(pa.string())),
        *(pa.field(name, pa.string()) for name in ("state", "error")),
    ]
)
"""A trial at an iteration.

``kind`` is baseline, searched or repeat; ``params`` (what its schedule was drawn from) and ``schedule`` are JSON.
``sdri_db`` is on the mixtures that the choice is made on, ``confirmed_sdri_db`` on others. ``estimated_si_sdr_db`` is
the mean of the kept stems, a stand-in for the gate's precision. ``cost_s`` is what all iterations so far cost by
themselves, ``made_s`` what of it this trial had to make. ``state`` is finished, stopped (early, as others were better)
or failed, with its ``error``; of a trial that failed before its first report there is one row, of iteration 0.
"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule that was repeated with several seeds."""

    name: str
    """A baseline's name, or the trial's."""
    words: str
    """Its schedule in words."""
    schedule: list[dict[str, Any]]
    """Its thresholds, an iteration each."""
    choice_sdri_db: list[float]
    """A figure a seed, on the mixtures that the choice is made on."""
    confirmed_sdri_db: list[float]
    """The same separators on mixtures that nothing was chosen by."""
    is_baseline: bool
    """Whether it was given, not found."""


def write_trials(rows: Sequence[Row], path: Location) -> None:
    """Keep the trials as Parquet."""
    write_parquet(path, pa.Table.from_pylist([{name: row.get(name) for name in TRIALS.names} for row in rows], TRIALS))


def read_trials(path: Location) -> list[Row]:
    """What :func:`write_trials` wrote."""
    rows: list[Row] = read_parquet(location(path), schema=TRIALS).to_pylist()
    return rows


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """Of every trial its last iteration, best first; those without figures last."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = last.get((row["kind"], row["trial"]))
        if before is None or row["iteration"] >= before["iteration"]:
            last[row["kind"], row["trial"]] = row
    return sorted(last.values(), key=lambda row: (row["sdri_db"] is None, -(row["sdri_db"] or 0.0)))


def verdict(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Who won on the mixtures of the choice, and how far it is ahead of each baseline on the others.

    A drawn schedule must be better than a baseline to win. ``spread_db`` is the standard deviation of the differences
    seed by seed (``paired_db``, null where the numbers of seeds differ); null where there are less than two.
    """
    if not candidates:
        return {"winner": None, "ahead": []}
    winner = max(candidates, key=lambda one: (statistics.fmean(one.choice_sdri_db), one.is_baseline))
    return {
        "winner": winner.name,
        "words": winner.words,
        "is_baseline": winner.is_baseline,
        "schedule": winner.schedule,
        "num_seeds": len(winner.confirmed_sdri_db),
        "choice_sdri_db": statistics.fmean(winner.choice_sdri_db),
        "choice_std_db": _std(winner.choice_sdri_db),
        "confirmed_sdri_db": statistics.fmean(winner.confirmed_sdri_db),
        "confirmed_std_db": _std(winner.confirmed_sdri_db),
        "ahead": [_ahead(winner, other) for other in candidates if other.is_baseline and other is not winner],
    }


def _ahead(winner: Candidate, other: Candidate) -> dict[str, Any]:
    ours, theirs = winner.confirmed_sdri_db, other.confirmed_sdri_db
    by = statistics.fmean(ours) - statistics.fmean(theirs)
    paired = [our - their for our, their in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else None
    spread = None if paired is None else _std(paired)
    more = None if spread is None else by > spread
    return {"of": other.name, "by_db": by, "paired_db": paired, "spread_db": spread, "is_more_than_spread": more}


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def verdict_in_words(found: Mapping[str, Any]) -> str:
    """One sentence for every baseline."""
    if found["winner"] is None:
        return "No schedule was taken to its last iteration."
    who = f"{found['winner']} ({found['words']})"
    if found["is_baseline"]:
        who = f"No schedule that was drawn is better than the baseline {who}, which"
    else:
        who = f"Trial {who}"
    sentences = [f"{who} has {found['confirmed_sdri_db']:.2f} dB SDRi on mixtures that nothing was chosen by."]
    for one in found["ahead"]:
        side = f"{abs(one['by_db']):.2f} dB {'ahead of' if one['by_db'] >= 0 else 'behind'} {one['of']}"
        if one["paired_db"] is None:
            sentences.append(f"It is {side}; their numbers of seeds differ, so the spread is not known.")
        elif one["spread_db"] is None:
            sentences.append(f"It is {side}; with one seed the spread is not known.")
        else:
            more = "more than" if one["is_more_than_spread"] else "not more than"
            seeds = f"{one['spread_db']:.2f} dB over {found['num_seeds']} seeds"
            sentences.append(f"It is {side}: {more} the spread of {seeds}.")
    return " ".join(sentences)


def sharing(rows: Sequence[Row]) -> dict[str, Any]:
    """What all trials would have cost by themselves, and what they cost together."""
    last = [row for row in last_rows(rows) if row["cost_s"] is not None]
    alone, made = sum(row["cost_s"] for row in last), sum(row["made_s"] or 0.0 for row in last)
    return {"num_trials": len(last), "cost_alone_s": alone, "made_s": made, "ratio": made / alone if alone else None}


def pareto(rows: Sequence[Row]) -> list[str]:
    """Trials of which none other has a better SDRi at no more cost, or less cost at no worse SDRi; best first.

    They are given by name: a baseline and a drawn trial may have the same number.
    """
    return [row["name"] for row in _front_rows(rows)]


def _standing(rows: Sequence[Row]) -> list[Row]:
    """Baselines and drawn trials that did not fail, at their last iteration, best first."""
    return [
        row
        for row in last_rows(rows)
        if row["kind"] != "repeat" and row["state"] != "failed" and None not in (row["sdri_db"], row["cost_s"])
    ]


def _front_rows(rows: Sequence[Row]) -> list[Row]:
    last = _standing(rows)

    def is_beaten(row: Row) -> bool:
        return any(
            other["sdri_db"] >= row["sdri_db"]
            and other["cost_s"] <= row["cost_s"]
            and (other["sdri_db"], other["cost_s"]) != (row["sdri_db"], row["cost_s"])
            for other in last
        )

    return [row for row in last if not is_beaten(row)]


def tables(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Table]:
    """Trials, the confirmation of the best, what sharing saved, and the Pareto front."""
    trials = [
        [
            *(row["name"], row["words"], row["state"], str(row["iteration"])),
            *(_number(row[name], ".2f") for name in ("sdri_db", "si_sdri_db")),
            _number(row["kept_h"], ".3f"),
            f"{row['num_kept'] / row['num_stems']:.0%}" if row["num_stems"] else "",
            _number(row["estimated_si_sdr_db"], ".1f"),
            _hours(row["cost_s"]),
            row["error"] or "",
        ]
        for row in last_rows(rows)
        if row["kind"] != "repeat"
    ]
    columns = [
        *("trial", "schedule", "state", "iterations", "SDRi dB", "SI-SDRi dB", "kept h", "kept"),
        *("estimated SI-SDR dB", "cost h", "error"),
    ]
    shared = sharing(rows)
    saved = [str(shared["num_trials"]), _hours(shared["cost_alone_s"]), _hours(shared["made_s"])]
    front = [
        [row["name"], row["words"], _number(row["sdri_db"], ".2f"), _hours(row["cost_s"])] for row in _front_rows(rows)
    ]
    return [
        Table(title="Trials", columns=columns, rows=trials),
        _confirmation(candidates),
        Table(
            title="Sharing",
            columns=["trials", "cost alone h", "made h", "made / alone"],
            rows=[[*saved, _number(shared["ratio"], ".2f")]],
        ),
        Table(title="Pareto front", columns=["trial", "schedule", "SDRi dB", "cost h"], rows=front),
    ]


def search_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a search's summary."""
    return tables(summary["rows"], [Candidate(**one) for one in summary["candidates"]])


def _confirmation(candidates: Sequence[Candidate]) -> Table:
    found = verdict(candidates)
    ahead = {one["of"]: one for one in found["ahead"]}
    rows = []
    for one in sorted(candidates, key=lambda one: -statistics.fmean(one.choice_sdri_db)):
        told = ahead.get(one.name)
        more = _more(told) if told else ""
        by = f"{told['by_db']:+.2f}" if told else ("winner" if one.name == found["winner"] else "")
        rows.append([one.name, one.words, _spread(one.choice_sdri_db), _spread(one.confirmed_sdri_db), by, more])
    columns = [
        "",
        "schedule",
        "SDRi dB, choice",
        "SDRi dB, confirmed",
        "the winner is ahead dB",
        "more than the spread",
    ]
    return Table(title="Confirmation", columns=columns, rows=rows)


def _more(ahead: Mapping[str, Any]) -> str:
    if ahead["is_more_than_spread"] is None:
        return "one seed" if ahead["paired_db"] is not None else "seeds differ"
    return "yes" if ahead["is_more_than_spread"] else "no"


def _spread(values: Sequence[float]) -> str:
    spread = _std(values)
    return f"{statistics.fmean(values):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600.0:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_report(
    out: Location, rows: Sequence[Row], candidates: Sequence[Candidate], *, settings: dict[str, Any], title: str
) -> dict[str, Any]:
    """Write ``trials.parquet``, ``report.md``, ``report.html``, ``best.yaml`` and ``summary.json``; returns the last.

    ``settings`` are those of the run that every trial was; ``best.yaml`` is it under the winner's schedule.
    """
    rows = [{name: _finite(value) for name, value in row.items()} for row in rows]
    found = verdict(candidates)
    words, made = verdict_in_words(found), tables(rows, candidates)
    write_trials(rows, out / "trials.parquet")
    parts = [f"# {_marked(title)}", _marked(words), *(f"## {table.title}\n\n{_markdown(table)}" for table in made)]
    schedule = ""
    if found["winner"] is not None:
        best = {**settings, "schedule": [_without_nulls(one) for one in found["schedule"]]}
        schedule = yaml.safe_dump({"schedule": best["schedule"]}, sort_keys=False)
        parts.append(f"## Best schedule\n\n```yaml\n{schedule}```")
        write_bytes(out / "best.yaml", yaml.safe_dump(best, sort_keys=False).encode())
    write_bytes(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    write_bytes(out / "report.html", _page(title, words, made, schedule, rows).encode())
    values = {
        "verdict": {**found, "words": words},
        "sharing": sharing(rows),
        "pareto": pareto(rows),
        "candidates": [asdict(one) for one in candidates],
        "rows": rows,
    }
    write_json(out / "summary.json", values)
    return values


def _finite(value: Any) -> Any:  # noqa: ANN401 - a cell
    """Null for a figure that is not a number: JSON has none, and nothing is better or worse than it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - walks any JSON-like value
    """A null threshold is off, as one that is not there."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}


def _markdown(table: Table) -> str:
    rows = [[_marked(cell) for cell in row] for row in table.rows]
    return Table(title=table.title, columns=table.columns, rows=rows).markdown()


def _marked(text: str) -> str:
    """One line that neither ends a cell nor begins HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _page(title: str, words: str, made: Sequence[Table], schedule: str, rows: Sequence[Row]) -> str:
    """One page that needs no network."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(words)}</p>", *map(_table, made)]
    if schedule:
        parts += ["<h2>Best schedule</h2>", f"<pre>{html.escape(schedule)}</pre>"]
    num_figures = 0
    for name, section in figures(rows).items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for shown in section:
            if isinstance(shown, str):
                parts.append(f"<p>{html.escape(shown)}</p>")
                continue
            script = num_figures == 0  # Plotly itself, with the first figure
            parts.append(
                plotly.io.to_html(shown, full_html=False, include_plotlyjs=script, div_id=f"figure-{num_figures}")
            )
            num_figures += 1
    style = (
        "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:left;border-bottom:1px solid #ccc}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>"


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
