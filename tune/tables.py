"""Tables of a run: the same rows for the terminal, for Markdown and for JSON."""

from __future__ import annotations

from typing import Any

from engine.cli.tables import _FLOOR, Table, _columns, _db, _limit, _pass, _shard, _values, tracks_table
from engine.corpus.read import read_corpus
from engine.selection.tracks import read_tracks
from engine.separators import read_description
from engine.storage.files import read_json
from engine.storage.paths import Name, location


def iterations_table(summary: dict[str, Any]) -> Table:
    """One row an iteration: what came in, what became of it, and the separator that came out.

    A query is one label of one clip: kept, rejected and failed add up to them.
    """
    rows = []
    for entry in summary["iterations"]:
        validation = entry["validation"] or {}
        names = ("num_clips", "num_set_aside", "num_queries", "num_kept")
        counts = (*(entry[name] for name in names), sum(entry["num_rejected"].values()))
        rows.append(
            [
                str(entry["iteration"]),
                *map(str, counts),
                str(entry["num_failed"]),
                f"{entry['kept_h']:.2f}",
                _db(validation.get("sdri_db")),
                _db(validation.get("si_sdri_db")),
                f"{entry['wall_s']:.0f}",
            ]
        )
    counted = ["clips", "set aside", "queries", "kept", "rejected", "failed", "kept h"]
    columns = ["", *counted, "SDRi dB", "SI-SDRi dB", "wall s"]
    return Table(title="Iterations", columns=columns, rows=rows)


def rules_table(summary: dict[str, Any]) -> Table:
    """One row for every rule of every iteration: its limit and how many stems it rejected, or a floor kept."""
    rows = [
        [str(entry["iteration"]), rule, _limit(limit), str(entry["num_rejected"].get(rule, 0))]
        if rule != _FLOOR
        else [str(entry["iteration"]), rule, _limit(limit), f"kept {entry.get('num_kept_by_floor', 0)}"]
        for entry in summary["iterations"]
        for rule, limit in entry["thresholds"].items()
        if limit is not None and rule.startswith(("min_", "max_", "label_"))
    ]
    return Table(title="Rules", columns=["iteration", "rule", "limit", "rejected"], rows=rows)


def run_tables(summary: dict[str, Any]) -> list[Table]:
    """All tables of a run."""
    return [iterations_table(summary), rules_table(summary), labels_table(summary)]


def labels_table(summary: dict[str, Any]) -> Table:
    """Validation SDRi / SI-SDRi in dB by label, a column an iteration."""
    entries = [entry for entry in summary["iterations"] if entry["validation"]]
    labels = sorted({label for entry in entries for label in entry["validation"]["by_label"]})
    rows = [[label, *(_pair(entry["validation"]["by_label"].get(label)) for entry in entries)] for label in labels]
    columns = ["label", *(f"iteration {entry['iteration']}" for entry in entries)]
    return Table(title="Validation SDRi / SI-SDRi dB by label", columns=columns, rows=rows)


def _pair(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['sdri_db']:.1f} / {figures['si_sdri_db']:.1f}"


def inspect(
    path: Name, *, class_map: Name | None = None, audio_root: Name | None = None
) -> tuple[list[Table], dict[str, Any]]:
    """Tables and plain values of whatever a path holds; ``ValueError`` if it is nothing that is known here."""
    path = location(path)
    if (path / "iterations").is_dir():
        summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else {"iterations": []}
        return run_tables(summary), {"kind": "run", **summary}
    if (path / "separator.json").is_file():
        return _values("checkpoint", read_description(path))
    if (path / "kept.parquet").is_file():
        read_tracks(path)
        manifest = read_json(path / "manifest.json")
        return [tracks_table(manifest)], {"kind": "tracks", **manifest}
    stems = path / "stems" if (path / "stems").is_dir() else path
    if (stems / "pass.json").is_file():
        return _pass(stems)
    if path.suffix == ".parquet" and path.is_file() and "audio_flac" in _columns(path):
        return _shard(path)
    corpus = read_corpus(path, class_map=class_map, audio_root=audio_root)
    labels: dict[str, int] = {}
    for table in corpus.sorted_clips():
        for label in table["labels"].combine_chunks().flatten().to_pylist():
            labels[label] = labels.get(label, 0) + 1
    value = {
        "num_rows": corpus.num_clips,
        "num_failed": corpus.num_failures,
        "labels": dict(sorted(labels.items())),
    }
    return _values("corpus", value)
