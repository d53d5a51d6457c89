"""The report of a search: tables, verdict and figures as Markdown, as one HTML page and as values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import yaml
from typing_extensions import TypedDict

from engine.cli.display import MAX_MESSAGE, markdown
from engine.cli.tables import Table
from engine.settings import Tree
from engine.storage.files import read_record, write_bytes, write_json
from engine.storage.paths import Location
from tune.report.page import only_warned, render
from tune.report.parts import Figure, duration_text
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
    schedule = _schedule_text(found)
    if found is not None:
        best = {**settings, "schedule": [_without_nulls(one) for one in found["schedule"]]}
        parts.append(f"## Best schedule\n\n```yaml\n{schedule}```")
        write_bytes(out / "best.yaml", yaml.safe_dump(best, sort_keys=False).encode())
    write_bytes(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    summary: SearchSummary = {
        "verdict": found,
        "verdict_text": text,
        "sharing": sharing(rows),
        "pareto": [row["name"] for row in pareto_rows(rows)],
        "candidates": list(candidates),
        "rows": rows,
    }
    write_json(out / "summary.json", summary)
    with only_warned(out):
        write_bytes(out / "report.html", _page(summary, title, schedule).encode())
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


def _page(summary: SearchSummary, title: str, schedule: str) -> str:
    """The page of a search: tables and figures in one order, for a reader who starts at the verdict."""
    trials, confirmation, shared, front = search_tables(summary)
    drawn = figures(summary["rows"])
    sections = [
        ("confirmation", "Confirmation", [confirmation]),
        *((name.split()[0].lower(), name, some) for name, some in drawn.items()),
        ("front", "Pareto front", [front]),
        ("trials", "Trials", [trials]),
        ("sharing", "Sharing", [shared]),
    ]
    return render(
        "search.html.jinja",
        kind="report of a search",
        title=title,
        lead=summary["verdict_text"],
        figures=list(_glance(summary)),
        parts=[*((id_, name) for id_, name, _ in sections), ("origin", "Origin")],
        sections=sections,
        schedule=schedule,
    )


def _glance(summary: SearchSummary) -> Iterator[Figure]:
    """The figures at the top."""
    found, shared = summary["verdict"], summary["sharing"]
    if found is not None:
        seeds = f"{found['num_seeds']} seed{'s' if found['num_seeds'] != 1 else ''}"
        value = f"{found['confirmed_sdri_db']:.2f}"
        yield Figure(name="SDRi of the winner", value=value, unit="dB", note=f"confirmed with {seeds}")
        for lead in found["leads"]:
            more = {True: "more than the spread", False: "not more than the spread", None: "spread unknown"}
            note = f"over {lead['over']}: {more[lead['is_more_than_spread']]}"
            yield Figure(name="Lead", value=f"{lead['by_db']:+.2f}", unit="dB", note=note)
    last = last_rows(summary["rows"])
    stopped = sum(row["state"] != "finished" for row in last)
    yield Figure(
        name="Trials", value=str(len(last)), note=f"{stopped} stopped or failed" if stopped else "all finished"
    )
    value, unit = duration_text(shared["built_s"]).split(" ")
    note = f"{shared['ratio']:.0%} of what they cost alone" if shared["ratio"] is not None else ""
    yield Figure(name="Time", value=value, unit=unit, note=note)


def write_search_page(search: Location, out: Location) -> None:
    """Write the page of a finished search again, from its summary; raises ``ValueError`` if it is not finished."""
    if not (search / "summary.json").is_file():
        raise ValueError(f"cannot report {search} (the search is not finished); run the command of the search again")
    summary = read_record(search / "summary.json", SearchSummary)
    write_bytes(out, _page(summary, search.name, _schedule_text(summary["verdict"])).encode())


def _schedule_text(found: Verdict | None) -> str:
    """The winner's schedule as YAML; empty without a winner."""
    if found is None:
        return ""
    return yaml.safe_dump({"schedule": [_without_nulls(one) for one in found["schedule"]]}, sort_keys=False)
