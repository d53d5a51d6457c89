"""Tables of trainings and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.cli.tables import Table, db_text

if TYPE_CHECKING:
    from train.task import TrainingRecord

_FIGURES = {
    "SDR dB": "sdr_db",
    "SDRi dB": "sdri_db",
    "BSS SDR dB": "bss_sdr_db",
    "BSS SDRi dB": "bss_sdri_db",
    "SI-SDR dB": "si_sdr_db",
    "SI-SDRi dB": "si_sdri_db",
    "absent dB": "false_extraction_db",
    "CAPI-SDRi dB": "capi_sdri_db",
    "same-label SDRi dB": "same_label_sdri_db",
}
_MAX_LABELS = 60


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """One row for all stems, one per label (if at most 60), and for a published list the figures of its paper."""
    figures = {column: name for column, name in _FIGURES.items() if name in report}
    entries = [("all", report), *(report["by_label"].items() if len(report["by_label"]) <= _MAX_LABELS else ())]
    rows = [
        [label, str(row["num_stems"]), *(db_text(row[name]) for name in figures.values())] for label, row in entries
    ]
    if "median" in report:
        rows.insert(1, ["all, median", "", *(db_text(report["median"][name]) for name in figures.values())])
        bounds = [report["confidence_95"][name] for name in figures.values()]
        rows.insert(1, ["all, 95 %", "", *("" if each is None else f"{each[0]:.2f}..{each[1]:.2f}" for each in bounds)])
    title = f"{report['num_mixtures']} mixtures"
    if "capi_sdri_db" in report:
        title += f", {report['num_same_label']} with two sources of one label: {report['num_missed_sources']} sources "
        title += f"missed, {report['num_false_positives']} false positives"
    if "paper" in report:
        paper = report["paper"]
        rows.append([f"paper: {paper['rule']}", "", *(db_text(paper.get(name)) for name in figures.values())])
        title += f" of {report['list']} ({report['format']}), {report['num_failed']} failed"
        title += "".join(f" ({reason}: {count})" for reason, count in report["num_failed_by_reason"].items())
    return Table(title=title, columns=["label", "stems", *figures], rows=rows)


def curve_table(record: TrainingRecord) -> Table:
    """Learning curve of a training, one row per validation."""
    names = ("step", "loss_db", "sdri_db", "si_sdri_db")
    points: list[Mapping[str, Any]] = [dict(point) for point in record["curve"]]
    rows = [[f"{point[name]:.6g}" if name in point else "" for name in names] for point in points]
    return Table(title=f"Learning curve, {record['steps']} steps", columns=names, rows=rows)
