"""Writes the report of a run or of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from engine.cli.tables import Table, limit_text
from engine.storage.files import write_bytes
from engine.storage.paths import Location, Name, location
from tune.report.collect import MOST_CHANGES, PassFacts, RunFacts, collect_pass, collect_run
from tune.report.compare import Comparison, compare
from tune.report.listen import judged_stems, played_clips, sounds
from tune.report.page import render
from tune.report.parts import (
    FlowRow,
    distributions,
    flow,
    glance,
    labels_table,
    learning,
    sentence,
    times,
    without_secrets,
)
from tune.report.plots import Plot

MAX_MB = 25.0
"""Default of the most megabytes of audio in a report."""


_LABELS_CAPTION = (
    "Stems and tracks of the last pass, and SDRi in dB on the validation mixtures. A column’s name sorts by it."
)


@dataclass(frozen=True, kw_only=True)
class _PassPart:
    """The part of the page about a pass."""

    title: str
    flow: Sequence[FlowRow]
    ruled: Sequence[Plot]
    others: Sequence[Plot]
    sampled: str
    failures: Table
    changes: Sequence[Table]


def write_run_report(
    path: Name, out: Name | None = None, *, max_mb: float = MAX_MB, against: Name | None = None
) -> Location:
    """Write the report of a run or of a closed pass to ``out``, by default ``report.html`` in its folder.

    ``max_mb`` is the most audio in it, in megabytes; ``against`` is another run to compare a run with. Raises
    ``ValueError`` if the path is neither, or not finished.
    """
    folder = location(path)
    target = folder / "report.html" if out is None else location(out)
    if against is not None and not all((location(one) / "iterations").is_dir() for one in (path, against)):
        raise ValueError(f"--against must be a run to compare a run with, got {against} for {path}; give two runs")
    if (folder / "iterations").is_dir():
        facts = collect_run(folder)
    elif (folder / "stems").is_dir():
        facts = collect_pass(folder)
    else:
        raise ValueError(
            f"{folder} must be a run, a pass or a search, got a path without iterations/, stems/ and trials.parquet; "
            "give its folder"
        )
    compared = compare(facts, collect_run(location(against))) if against is not None else None
    write_bytes(target, _page(facts, max_mb, compared).encode())
    return target


def _page(facts: RunFacts, max_mb: float, compared: Comparison | None) -> str:
    clips, plots = played_clips(facts, max_mb=max_mb), learning(facts)
    labels, spent = labels_table(facts), list(times(facts))
    passes = [_pass_part(one, facts.is_run) for one in facts.passes]
    parts = [
        *([("gain", "Gain")] if plots else []),
        *([("compared", "Compared")] if compared is not None else []),
        *((f"pass-{number}", one.title) for number, one in enumerate(passes, 1)),
        *([("listen", "Listen")] if clips else []),
        *([("labels", "Labels")] if labels else []),
        *([("time", "Time")] if spent else []),
        ("origin", "Origin"),
    ]
    return render(
        "run.html.jinja",
        kind="report of a run" if facts.is_run else "report of a pass",
        title="/".join(PurePosixPath(str(facts.folder)).parts[-2:]),
        lead=sentence(facts),
        figures=glance(facts),
        parts=parts,
        plots=plots,
        compared=compared,
        clips=clips,
        sounds=sounds(clips),
        judged=judged_stems(clips),
        passes=passes,
        labels=labels,
        labels_caption=_LABELS_CAPTION,
        times=spent,
        fingerprints=_fingerprints(facts),
        config=without_secrets(facts.config),
        command=f"clearsep run {facts.folder}/config.yaml -o {facts.folder}"
        if facts.is_run
        else f"clearsep inspect {facts.folder}",
        command_note="The same run again, or what is left of it:" if facts.is_run else "All that is known of the pass:",
    )


def _pass_part(one: PassFacts, is_run: bool) -> _PassPart:
    ruled, others = distributions(one)
    read = one.stems.fraction
    reasons = [[row["step"], row["error_class"], f"{row['num_queries']:,}", row["example"]] for row in one.failures]
    return _PassPart(
        title=one.name.capitalize() if is_run else "Scores",
        flow=flow(one),
        ruled=ruled,
        others=others,
        sampled=f"From {read:.1%} of the shards, evenly drawn." if read < 1.0 else "",
        failures=Table(
            title=f"Failed queries of {one.name} by step and error",
            columns=["step", "error", "queries", "for example"],
            rows=reasons,
        ),
        changes=list(_changes(one)),
    )


def _changes(one: PassFacts) -> list[Table]:
    """Counts of the labels of the corpus, if they may move, and their first changes."""
    if one.record is None or "labels" not in one.record:
        return []
    counts = dict(one.record["labels"])
    names = [name for name in counts if name.startswith("num_")]
    title = f"Labels of {one.name}: before = kept + dropped + relabelled; after = kept + added"
    columns = [name.removeprefix("num_") for name in names]
    found = [Table(title=title, columns=columns, rows=[[str(counts[name]) for name in names]])]
    rows = [
        [
            row["path"],
            row["label"] if row["new_label"] is None else f"{row['label']} → {row['new_label']}",
            *(row["change"], f"{row['probability']:.2f}", limit_text(round(row["limit"], 3)), row["reason"]),
        ]
        for row in one.changes
    ]
    columns = ["clip", "label", "change", "probability", "limit", "decided by"]
    return [
        *found,
        *([Table(title=f"The first {MOST_CHANGES} changes of {one.name}", columns=columns, rows=rows)] if rows else []),
    ]


def _fingerprints(facts: RunFacts) -> Table:
    rows = []
    for one in facts.passes:
        prefix = f"{one.name}: " if facts.is_run else ""
        rows += [
            [f"{prefix}{name.removesuffix('_fingerprint').replace('fingerprint', 'pass')}", str(value)]
            for name, value in one.summary.items()
            if name.endswith("fingerprint")
        ]
        if one.selection is not None:
            rows.append([f"{prefix}selection", one.selection["fingerprint"]])
    return Table(title="Fingerprints", columns=["of", "fingerprint"], rows=rows)
