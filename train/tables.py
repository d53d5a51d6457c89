"""TODO train/tables.py."""

from __future__ import annotations

from typing import Any

from engine.cli.tables import Table, _db


def evaluation_table(report: dict[str, Any]) -> Table:
    """One row for all, one a label unless there are more than 60, and one of what a list's paper reports."""
    shown = {
        "SDR dB": "sdr_db",
        "SDRi dB": "sdri_db",
        "BSS SDR dB": "bss_sdr_db",
        "BSS SDRi dB": "bss_sdri_db",
        "SI-SDR dB": "si_sdr_db",
        "SI-SDRi dB": "si_sdri_db",
        "absent dB": "false_extraction_db",
    }
    columns = [column for column, name in shown.items() if name in report]
    entries = [("all", report), *(report["by_label"].items() if len(report["by_label"]) <= 60 else ())]
    rows = [[label, str(row["num_stems"]), *(_db(row[shown[column]]) for column in columns)] for label, row in entries]
    if "median" in report:
        rows.insert(1, ["all, median", "", *(_db(report["median"][shown[column]]) for column in columns)])
        bounds = [report["confidence_95"][shown[column]] for column in columns]
        rows.insert(1, ["all, 95 %", "", *("" if each is None else f"{each[0]:.2f}..{each[1]:.2f}" for each in bounds)])
    title = f"{report['num_mixtures']} mixtures"
    if "paper" in report:
        paper = report["paper"]
        rows.append([f"paper: {paper['rule']}", "", *(_db(paper.get(shown[column])) for column in columns)])
        title += f" of {report['list']} ({report['format']}), {report['num_failed']} failed"
        title += "".join(f" ({reason}: {count})" for reason, count in report["num_failed_by_reason"].items())
    return Table(title=title, columns=["label", "stems", *columns], rows=rows)
