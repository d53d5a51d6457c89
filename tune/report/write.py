"""Writes the report of a run or of a pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from engine.cli.tables import Table, limit_text
from engine.storage.files import write_bytes
from engine.storage.paths import Location, Name, location
from tune.report.collect import MOST_CHANGES, PassFacts, RunFacts, collect_pass, collect_run
from tune.report.compare import compare
from tune.report.listen import failed_clips, judged_stems, played_clips, sounds
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
from tune.report.truth import Truth

_LOGGER = logging.getLogger(__name__)
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
    lacks: Sequence[str]
    truth: str


def write_run_report(
    path: Name,
    out: Name | None = None,
    *,
    max_mb: float = MAX_MB,
    against: Name | None = None,
    truth: Name | None = None,
) -> Location:
    """Write the report of a run or of a closed pass to ``out``, by default ``report.html`` in its folder.

    ``max_mb`` is the most audio in it, in megabytes; ``against`` is another run to compare a run with, and
    ``truth`` a folder of true sources (:class:`tune.report.truth.Truth`). Raises ``ValueError`` if the path is neither,
    or not finished.
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
            f"{folder} must be a run, a pass or a search (without --against and --truth), got a path without "
            "iterations/, stems/ and trials.parquet; give its folder"
        )
    if truth is not None and next(location(truth).glob("*"), None) is None:
        raise ValueError(f"--truth must be a folder of true sources, got {truth}; give one with CLIP/LABEL.flac in it")
    other = collect_run(location(against)) if against is not None else None
    known = Truth(folder=location(truth)) if truth is not None else None
    write_bytes(target, _page(facts, max_mb, other, known).encode())
    for note in _lacks([facts, *facts.passes], other):
        _LOGGER.warning(note)
    return target


def _lacks(some: Sequence[RunFacts | PassFacts], other: RunFacts | None = None) -> list[str]:
    """Sentences about what is left out of a run and of passes, and of the run that it is compared with."""
    theirs: list[RunFacts | PassFacts] = [other, *other.passes] if other is not None else []
    named = [*((one, one.name) for one in some), *((one, f"{one.name} of the other") for one in theirs)]
    return [note for one, name in named for note in one.left_out.notes(one.folder, name)]


def _page(facts: RunFacts, max_mb: float, other: RunFacts | None, truth: Truth | None) -> str:
    clips, plots = played_clips(facts, max_mb=max_mb, other=other, truth=truth), learning(facts)
    means = [truth.sentence(one) if truth is not None else "" for one in facts.passes]
    labels, spent = labels_table(facts), list(times(facts))
    lacks = _lacks(facts.passes, other)
    failed = failed_clips(facts.passes[-1]) if facts.passes else None
    is_listened = clips or lacks or (failed is not None and failed.rows)
    compared = compare(facts, other) if other is not None else None
    passes = [_pass_part(one, facts.is_run, mean) for one, mean in zip(facts.passes, means, strict=True)]
    parts = [
        *([("gain", "Gain")] if plots else []),
        *([("compared", "Compared")] if compared is not None else []),
        *((f"pass-{number}", one.title) for number, one in enumerate(passes, 1)),
        *([("listen", "Listen")] if is_listened else []),
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
        is_listened=is_listened,
        failed=failed,
        lacks=lacks,
        lacks_of_run=_lacks([facts]),
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


def _pass_part(one: PassFacts, is_run: bool, truth: str) -> _PassPart:
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
        lacks=_lacks([one]),
        truth=truth,
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
