"""The report of a search: tables, verdict and figures as Markdown, as one HTML page and as values."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

import jinja2
import markupsafe
import plotly.graph_objects
import plotly.io
import yaml

from engine.cli.display import MAX_MESSAGE, markdown, shown
from engine.cli.tables import Table
from engine.settings import Tree
from engine.storage.files import write_bytes, write_json
from engine.storage.paths import Location
from tune.search.figures import figures
from tune.search.verdict import (
    Candidate,
    Lead,
    Sharing,
    TrialRow,
    Verdict,
    deviation,
    last_rows,
    pareto_rows,
    sharing,
    verdict,
    verdict_text,
    write_trials,
)


class SearchSummary(TypedDict):
    """Summary of a search, as ``summary.json`` has it."""

    verdict: Verdict | None
    verdict_text: str
    sharing: Sharing
    pareto: list[str]
    """Names of the trials on the Pareto front of SDRi and cost, best first."""
    candidates: list[Candidate]
    rows: list[TrialRow]


def search_tables(summary: SearchSummary) -> list[Table]:
    """The tables of a search's summary."""
    return tables(summary["rows"], summary["candidates"])


def tables(rows: Sequence[TrialRow], candidates: Sequence[Candidate]) -> list[Table]:
    """Trials, confirmation of the best, saving by sharing, and the Pareto front."""
    shared = sharing(rows)
    saved = [str(shared["num_trials"]), _hours(shared["cost_alone_s"]), _hours(shared["built_s"])]
    front = [
        [row["name"], row["description"], _number(row["sdri_db"], ".2f"), _hours(row["cost_s"])]
        for row in pareto_rows(rows)
    ]
    return [
        _trials_table(rows),
        _confirmation_table(candidates),
        Table(
            title="Sharing",
            columns=["trials", "cost alone h", "built h", "built / alone"],
            rows=[[*saved, _number(shared["ratio"], ".2f")]],
        ),
        Table(title="Pareto front", columns=["trial", "schedule", "SDRi dB", "cost h"], rows=front),
    ]


def _trials_table(rows: Sequence[TrialRow]) -> Table:
    cells = [
        [
            *(row["name"], row["description"], row["state"], str(row["iteration"])),
            *(_number(row["sdri_db"], ".2f"), _number(row["si_sdri_db"], ".2f"), _number(row["kept_h"], ".3f")),
            f"{(row['num_kept'] or 0) / row['num_stems']:.0%}" if row["num_stems"] else "",
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
    return Table(title="Trials", columns=columns, rows=cells)


def _confirmation_table(candidates: Sequence[Candidate]) -> Table:
    found = verdict(candidates)
    leads = {lead["over"]: lead for lead in found["leads"]} if found else {}
    rows = []
    for one in sorted(candidates, key=lambda one: -statistics.fmean(one["choice_sdri_db"])):
        lead = leads.get(one["name"])
        by = f"{lead['by_db']:+.2f}" if lead else ("winner" if found and one["name"] == found["winner"] else "")
        figures_db = _spread(one["choice_sdri_db"]), _spread(one["confirmed_sdri_db"])
        rows.append([one["name"], one["description"], *figures_db, by, _significance(lead) if lead else ""])
    columns = ["", "schedule", "SDRi dB, choice", "SDRi dB, confirmed", "lead of the winner dB", "more than the spread"]
    return Table(title="Confirmation", columns=columns, rows=rows)


def _significance(lead: Lead) -> str:
    if lead["is_more_than_spread"] is None:
        return "one seed" if lead["paired_db"] is not None else "seeds differ"
    return "yes" if lead["is_more_than_spread"] else "no"


def _spread(values: Sequence[float]) -> str:
    spread = deviation(values)
    return f"{statistics.fmean(values):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600.0:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_report(
    out: Location, rows: Sequence[TrialRow], candidates: Sequence[Candidate], *, settings: Tree, title: str
) -> SearchSummary:
    """Write ``trials.parquet``, ``report.md``, ``report.html``, ``best.yaml`` and ``summary.json``; returns the last.

    ``settings`` are those of the run that every trial was; ``best.yaml`` has them with the winner's schedule.
    """
    rows = [_finite(row) for row in rows]
    found = verdict(candidates)
    text, made = verdict_text(found), tables(rows, candidates)
    write_trials(rows, out / "trials.parquet")
    parts = [f"# {markdown(title)}", markdown(text, most=MAX_MESSAGE)]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in made]
    schedule = ""
    if found is not None:
        best = {**settings, "schedule": [_without_nulls(one) for one in found["schedule"]]}
        schedule = yaml.safe_dump({"schedule": best["schedule"]}, sort_keys=False)
        parts.append(f"## Best schedule\n\n```yaml\n{schedule}```")
        write_bytes(out / "best.yaml", yaml.safe_dump(best, sort_keys=False).encode())
    write_bytes(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    page = _page(title=title, verdict=text, tables=made, schedule=schedule, figures=list(figures(rows).items()))
    write_bytes(out / "report.html", page.encode())
    summary: SearchSummary = {
        "verdict": found,
        "verdict_text": text,
        "sharing": sharing(rows),
        "pareto": [row["name"] for row in pareto_rows(rows)],
        "candidates": list(candidates),
        "rows": rows,
    }
    write_json(out / "summary.json", summary)
    return summary


def _finite(row: TrialRow) -> TrialRow:
    """A row with null for figures that are not finite, which JSON does not have and which cannot be compared."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in cast(Mapping[str, Any], row).items()
    }
    return cast(TrialRow, values)


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - walks any JSON-like value
    """A threshold that is null is off, as is one that is not set."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}


def _page(**values: Any) -> str:  # noqa: ANN401 - the values of the template
    """One page that needs no network."""
    loader = jinja2.PackageLoader("tune.search", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_finalized
    )
    environment.filters |= {"figure": _figure_html(), "shown": shown}
    return environment.get_template("report.html.jinja").render(**values)


def _finalized(value: object) -> object:
    """A value as the page has it: foreign text, if it is not HTML of ours."""
    return value if isinstance(value, markupsafe.Markup) else shown(value, most=MAX_MESSAGE)


def _figure_html() -> Callable[[plotly.graph_objects.Figure], str]:
    """Writes figures as HTML; the first brings Plotly itself along."""
    numbers = itertools.count()

    def html(figure: plotly.graph_objects.Figure) -> str:
        number = next(numbers)
        text: str = plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{number}")
        return text

    return html
