"""What a search found: its trials as a table on disk, the verdict on its winner, and the report."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import plotly.io
import yaml

from engine.cli.tables import Table
from engine.storage.files import write_bytes, write_json
from engine.storage.paths import Location
from tune.search.figures import figures
from tune.search.verdict import (
    Candidate,
    Row,
    _front_rows,
    _std,
    last_rows,
    pareto,
    sharing,
    verdict,
    verdict_in_words,
    write_trials,
)


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
