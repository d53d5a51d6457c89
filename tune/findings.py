"""What a search found: its trials as a table on disk, the verdict on its winner, and the report."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import optuna.visualization
import plotly.graph_objects  # type: ignore[import-untyped]
import plotly.io  # type: ignore[import-untyped]
import pyarrow as pa
import yaml

from engine.storage import Location, location, read_parquet, write_bytes, write_json, write_parquet
from tune.report import Table

Row = dict[str, Any]
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
        if before is None or row["iteration"] > before["iteration"]:
            last[row["kind"], row["trial"]] = row
    return sorted(last.values(), key=lambda row: (row["sdri_db"] is None, -(row["sdri_db"] or 0.0)))


def verdict(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Who won on the mixtures of the choice, and how far it is ahead of each baseline on the others.

    ``spread_db`` is the standard deviation of the differences seed by seed; null where there is one seed.
    """
    if not candidates:
        return {"winner": None, "ahead": []}
    winner = max(candidates, key=lambda one: statistics.fmean(one.choice_sdri_db))
    ahead = []
    for other in candidates:
        if not other.is_baseline or other is winner:
            continue
        pairs = list(zip(winner.confirmed_sdri_db, other.confirmed_sdri_db, strict=False))
        gains = [ours - theirs for ours, theirs in pairs]
        spread = statistics.stdev(gains) if len(gains) > 1 else None
        by = statistics.fmean(gains)
        more = None if spread is None else by > spread
        ahead.append({"of": other.name, "by_db": by, "spread_db": spread, "is_more_than_spread": more})
    return {
        "winner": winner.name,
        "words": winner.words,
        "is_baseline": winner.is_baseline,
        "schedule": winner.schedule,
        "num_seeds": len(winner.confirmed_sdri_db),
        "choice_sdri_db": statistics.fmean(winner.choice_sdri_db),
        "confirmed_sdri_db": statistics.fmean(winner.confirmed_sdri_db),
        "ahead": ahead,
    }


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
        if one["spread_db"] is None:
            sentences.append(f"It is {side}; with one seed the spread is not known.")
        else:
            more = "more than" if one["is_more_than_spread"] else "not more than"
            seeds = f"{one['spread_db']:.2f} dB over {found['num_seeds']} seeds"
            sentences.append(f"It is {side}: {more} the spread of {seeds}.")
    return " ".join(sentences)


def sharing(rows: Sequence[Row]) -> dict[str, Any]:
    """What all trials would have cost by themselves, and what they cost together."""
    last = [row for row in last_rows(rows) if row["cost_s"]]
    alone, made = sum(row["cost_s"] for row in last), sum(row["made_s"] for row in last)
    return {"num_trials": len(last), "alone_s": alone, "made_s": made, "fraction": made / alone if alone else None}


def pareto(rows: Sequence[Row]) -> list[str]:
    """Trials of which none other has a better SDRi at no more cost, or less cost at no worse SDRi."""
    last = [row for row in last_rows(rows) if row["sdri_db"] is not None and row["kind"] != "repeat"]

    def is_beaten(row: Row) -> bool:
        return any(
            other["sdri_db"] >= row["sdri_db"]
            and other["cost_s"] <= row["cost_s"]
            and (other["sdri_db"], -other["cost_s"]) != (row["sdri_db"], -row["cost_s"])
            for other in last
        )

    return [row["name"] for row in last if not is_beaten(row)]


def tables(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Table]:
    """Trials, the confirmation of the best, and what sharing saved."""
    front = set(pareto(rows))
    trials = [
        [
            *(row["name"], row["words"], row["state"], str(row["iteration"])),
            *(_number(row[name], ".2f") for name in ("sdri_db", "si_sdri_db")),
            _number(row["kept_h"], ".3f"),
            f"{row['num_kept'] / row['num_stems']:.0%}" if row["num_stems"] else "",
            _number(row["estimated_si_sdr_db"], ".1f"),
            _number(row["cost_s"] and row["cost_s"] / 3600.0, ".3f"),
            "yes" if row["name"] in front else "",
            row["error"] or "",
        ]
        for row in last_rows(rows)
        if row["kind"] != "repeat"
    ]
    columns = [
        *("trial", "schedule", "state", "iterations", "SDRi dB", "SI-SDRi dB", "kept h", "kept"),
        *("estimated SI-SDR dB", "cost h", "Pareto", "error"),
    ]
    shared = sharing(rows)
    fraction = "" if shared["fraction"] is None else f"{shared['fraction']:.2f}"
    return [
        Table(title="Trials", columns=columns, rows=trials),
        _confirmation(candidates),
        Table(
            title="Sharing",
            columns=["trials", "cost alone h", "made h", "fraction"],
            rows=[
                [str(shared["num_trials"]), *(f"{shared[name] / 3600:.3f}" for name in ("alone_s", "made_s")), fraction]
            ],
        ),
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
        more = {None: "one seed", True: "yes", False: "no"}[told["is_more_than_spread"]] if told else ""
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


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_report(
    out: Location, rows: Sequence[Row], candidates: Sequence[Candidate], *, settings: dict[str, Any], title: str
) -> dict[str, Any]:
    """Write ``trials.parquet``, ``report.md``, ``report.html``, ``best.yaml`` and ``summary.json``; returns the last.

    ``settings`` are those of the run that every trial was; ``best.yaml`` is it under the winner's schedule.
    """
    found = verdict(candidates)
    words, made = verdict_in_words(found), tables(rows, candidates)
    write_trials(rows, out / "trials.parquet")
    best = ""
    if found["winner"] is not None:
        best = yaml.safe_dump({**settings, "schedule": found["schedule"]}, sort_keys=False)
        write_bytes(out / "best.yaml", best.encode())
    schedule = yaml.safe_dump({"schedule": found.get("schedule", [])}, sort_keys=False)
    parts = [f"# {title}", words, *(f"## {table.title}\n\n{table.markdown()}" for table in made)]
    parts.append(f"## Best schedule\n\n```yaml\n{schedule}```\n")
    write_bytes(out / "report.md", "\n\n".join(parts).encode())
    write_bytes(out / "report.html", _page(title, words, made, schedule, rows).encode())
    values = {
        "verdict": {**found, "words": words},
        "sharing": sharing(rows),
        "pareto": pareto(rows),
        "candidates": [asdict(one) for one in candidates],
        "rows": list(rows),
    }
    write_json(out / "summary.json", values)
    return values


def _page(title: str, words: str, made: Sequence[Table], schedule: str, rows: Sequence[Row]) -> str:
    """One page that needs no network."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(words)}</p>", *map(_table, made)]
    parts += ["<h2>Best schedule</h2>", f"<pre>{html.escape(schedule)}</pre>"]
    script: bool | str = True  # of Plotly, with the first figure
    for name, figure in figures(rows).items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if isinstance(figure, str):
            parts.append(f"<p>{html.escape(figure)}</p>")
            continue
        parts.append(plotly.io.to_html(figure, full_html=False, include_plotlyjs=script))
        script = False
    style = (
        "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:left;border-bottom:1px solid #ccc}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>"


def figures(rows: Sequence[Row]) -> dict[str, plotly.graph_objects.Figure | str]:
    """Learning curves, parallel coordinates, importance and front; a sentence where there is too little to show."""
    drawn: dict[str, Callable[[], plotly.graph_objects.Figure]] = {
        "Learning curves": lambda: _curves(rows),
        "Parallel coordinates": lambda: optuna.visualization.plot_parallel_coordinate(
            _study(rows), target_name="SDRi dB"
        ),
        "Importance": lambda: optuna.visualization.plot_param_importances(_study(rows), target_name="SDRi dB"),
        "SDRi and cost": lambda: _front(rows),
    }
    found: dict[str, plotly.graph_objects.Figure | str] = {}
    for name, draw in drawn.items():
        try:
            found[name] = draw()
        except (ValueError, RuntimeError) as error:
            found[name] = f"There is too little to show it of ({error})."
    return found


def _curves(rows: Sequence[Row]) -> plotly.graph_objects.Figure:
    figure = plotly.graph_objects.Figure()
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] != "repeat"):
        some = [row for row in rows if row["name"] == name and row["kind"] != "repeat" and row["sdri_db"] is not None]
        if some:
            told = html.escape(f"{name}: {some[0]['words']}")
            places = {"x": [row["iteration"] for row in some], "y": [row["sdri_db"] for row in some]}
            figure.add_scatter(**places, name=told, mode="lines+markers")
    figure.update_layout(xaxis={"title": "iteration", "dtick": 1}, yaxis_title="SDRi dB")
    return figure


def _front(rows: Sequence[Row]) -> plotly.graph_objects.Figure:
    last, best = (
        [row for row in last_rows(rows) if row["sdri_db"] is not None and row["kind"] != "repeat"],
        pareto(rows),
    )
    figure = plotly.graph_objects.Figure()
    for is_best, name in ((False, "beaten"), (True, "front")):
        some = sorted((row for row in last if (row["name"] in best) == is_best), key=lambda row: row["cost_s"])
        figure.add_scatter(
            x=[row["cost_s"] / 3600.0 for row in some],
            y=[row["sdri_db"] for row in some],
            text=[html.escape(f"{row['name']}: {row['words']}") for row in some],
            mode="lines+markers" if is_best else "markers",
            name=name,
        )
    figure.update_layout(xaxis_title="cost h", yaxis_title="SDRi dB")
    return figure


def _study(rows: Sequence[Row]) -> optuna.Study:
    """The trials that were drawn, as Optuna has them; ``ValueError`` where there are less than two."""
    last = [row for row in last_rows(rows) if row["kind"] == "searched" and row["sdri_db"] is not None]
    if len(last) < 2:
        raise ValueError("two trials with figures are needed")
    params = [json.loads(row["params"]) for row in last]
    spaces: dict[str, list[Any]] = {}
    for some in params:
        for name, value in some.items():
            spaces.setdefault(name, []).append(value)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for row, some in zip(last, params, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=some,
                distributions={name: _distribution(spaces[name]) for name in some},
                value=row["sdri_db"],
            )
        )
    return study


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """One that has all of some values."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
    return optuna.distributions.FloatDistribution(min(numbers), max(*numbers, min(numbers) + 1e-9))
