"""Tables of runs, and reports of whatever a path holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.cli.reports import (
    DAMAGED,
    checkpoint_report,
    is_checkpoint,
    is_shard,
    pass_report,
    shard_report,
    values_report,
)
from engine.cli.tables import FLOOR, Report, Table, db_text, label_tables, limit_text, tracks_table
from engine.corpus.read import read_corpus
from engine.errors import DamagedError
from engine.passes.labels.label import read_label_summary
from engine.passes.shards import damaged_files
from engine.selection.labels.update import counts_of, read_labels
from engine.selection.tracks import Selection, read_tracks
from engine.separators import read_description, require_fingerprint
from engine.separators.clap import read_clap
from engine.storage.files import check_record, read_parquet, read_record
from engine.storage.paths import Location, Name, location
from engine.taggers import read_tagger
from tune.run import RunSummary

if TYPE_CHECKING:
    from train.evaluation.figures import Evaluation
    from tune.steps.iteration import IterationRecord

_MOST_CHANGES = 40


def run_tables(summary: RunSummary) -> list[Table]:
    """All tables of a run; raises ``ValueError`` for a summary without some figure, as others may have left it."""
    check_record(summary, RunSummary, "summary.json", remedy="delete the iteration's iteration.json, and start again")
    tables = [iterations_table(summary), moves_table(summary), rules_table(summary), labels_table(summary)]
    return [table for table in tables if table.rows]


def iterations_table(summary: RunSummary) -> Table:
    """Outcome of every iteration, in one row each: its queries (one for each label of a clip) and its separator.

    Kept, rejected and failed queries add up to all queries.
    """
    counted = ["clips", "set aside", "queries", "kept", "rejected", "failed", "kept h"]
    columns = ["", *counted, "SDRi dB", "SI-SDRi dB", "wall s"]
    return Table(title="Iterations", columns=columns, rows=[_iteration_row(one) for one in summary["iterations"]])


def _iteration_row(record: IterationRecord) -> list[str]:
    validation = record["validation"]
    counts = (record["num_clips"], record["num_set_aside"], record["num_queries"], record["num_kept"])
    return [
        str(record["iteration"]),
        *map(str, (*counts, sum(record["num_rejected"].values()), record["num_failed"])),
        f"{record['kept_h']:.2f}",
        db_text(validation["sdri_db"] if validation else None),
        db_text(validation["si_sdri_db"] if validation else None),
        f"{record['wall_s']:.0f}",
    ]


def moves_table(summary: RunSummary) -> Table:
    """Labels of the clips in every iteration, if they may move: kept and added ones are those after it."""
    names = ("before", "kept", "dropped", "relabelled", "added", "after", "tentative", "unlabelled")
    rows = [
        [
            str(record["iteration"]),
            *(str(record["labels"][f"num_{name}"]) for name in names),  # type: ignore[literal-required]
            str(record.get("num_events", 0)),
        ]
        for record in summary["iterations"]
        if "labels" in record
    ]
    columns = ["", *names[:-1], "clips without", "single events"]
    return Table(title="Labels of the clips", columns=columns, rows=rows)


def rules_table(summary: RunSummary) -> Table:
    """Every rule of every iteration: its limit, and the number of stems that it rejected or, for a floor, kept."""
    rows = [
        [str(record["iteration"]), rule, limit_text(limit), _rule_outcome(record, rule)]
        for record in summary["iterations"]
        for rule, limit in record["thresholds"].items()
        if limit is not None and rule.startswith(("min_", "max_", "label_"))
    ]
    return Table(title="Rules", columns=["iteration", "rule", "limit", "rejected"], rows=rows)


def _rule_outcome(record: IterationRecord, rule: str) -> str:
    if rule == FLOOR:
        return f"kept {record.get('num_kept_by_floor', 0)}"
    return str(record["num_rejected"].get(rule, 0))


def labels_table(summary: RunSummary) -> Table:
    """Validation SDRi and SI-SDRi in dB by label, one column per iteration."""
    validations = {one["iteration"]: one["validation"] for one in summary["iterations"] if one["validation"]}
    labels = sorted({label for validation in validations.values() for label in validation["by_label"]})
    rows = [[label, *(_label_cell(validation, label) for validation in validations.values())] for label in labels]
    columns = ["label", *(f"iteration {number}" for number in validations)]
    return Table(title="Validation SDRi / SI-SDRi dB by label", columns=columns, rows=rows)


def _label_cell(validation: Evaluation, label: str) -> str:
    figures = validation["by_label"].get(label)
    return "" if figures is None else f"{figures['sdri_db']:.1f} / {figures['si_sdri_db']:.1f}"


def inspect(path: Name, **reading: Any) -> Report:  # noqa: ANN401 - the options of read_corpus
    """Report of a run, a pass, labels, tracks, a stem shard, a checkpoint (of others too) or a corpus.

    ``reading`` are the options of :func:`engine.corpus.read.read_corpus`.

    Raises ``ValueError`` if the path holds none of them.
    """
    path = location(path)
    if (path / "iterations").is_dir():
        summary: RunSummary = {"iterations": []}
        if (path / "summary.json").is_file():
            summary = read_record(path / "summary.json", RunSummary)
        damaged = _damaged_in_run(path)
        return run_tables(summary), {"kind": "run", **summary, **({DAMAGED: damaged} if damaged else {})}
    if (report := _model_report(path)) is not None:
        return report
    if (path / "changes.parquet").is_file():
        return _labels_report(path)
    if (path / "kept.parquet").is_file():
        read_tracks(path)  # raises if the selection is unfinished
        selection = read_record(path / "manifest.json", Selection)
        return [tracks_table(selection)], {"kind": "tracks", **selection}
    stems = path / "stems" if (path / "stems").is_dir() else path
    if (stems / "pass.json").is_file():
        return pass_report(stems)
    return shard_report(path) if is_shard(path) else _corpus_report(path, **reading)


def _labels_report(folder: Location) -> Report:
    """Report of the labels of an iteration: their counts, and the first changes with what decided them."""
    manifest = read_labels(folder)
    rows = read_parquet(folder / "changes.parquet").slice(0, _MOST_CHANGES).to_pylist()
    cells = [
        [
            f"{row['path']} {row['start_s'] or 0.0:g} s",
            row["label"] if row["new_label"] is None else f"{row['label']} to {row['new_label']}",
            row["change"],
            f"{row['probability']:.2f}",
            f"{row['limit']:g}",
            ", ".join(f"{name} {value:.1f}" for name, value in row["evidence"]),
        ]
        for row in rows
    ]
    counts, value = values_report("labels", dict(counts_of(manifest)))
    columns = ["clip", "label", "change", "probability", "limit", "evidence"]
    title = f"The first {len(cells)} of all changes (changes.parquet has the others)"
    return [*counts, *([Table(title=title, columns=columns, rows=cells)] if cells else [])], value


def _model_report(path: Location) -> Report | None:
    """Report of a separator, an encoder or a tagger of this project or another; None for anything else."""
    if (path / "separator.json").is_file():
        require_fingerprint(path)
        return values_report("checkpoint", read_description(path))
    for kind, read in (("clap", read_clap), ("tagger", read_tagger)):
        if (path / f"{kind}.json").is_file():
            return values_report(kind, read(path))
    return checkpoint_report(path) if is_checkpoint(path) else None


def _damaged_in_run(run: Location) -> list[str]:
    """Files of a run's passes, selections and separators that are missing or damaged."""
    found = []
    for stems in [*run.glob("iterations/*/stems/pass.json"), *run.glob("iterations/0/tags/stems/pass.json")]:
        folder = stems.parent.parent
        name = folder.name if folder.name != "tags" else "0/tags"
        found += [f"iterations/{name}/{file}" for file in damaged_files(folder)]
    checks: dict[str, Callable[[Location], object]] = {
        "separator/separator.json": require_fingerprint,
        "labels/manifest.json": read_labels,
        "tracks/manifest.json": read_tracks,
    }
    for kind, check in checks.items():
        for file in run.glob(f"iterations/*/{kind}"):
            try:
                check(file.parent)
            except DamagedError:
                found.append(f"iterations/{file.parent.parent.name}/{file.parent.name}")
    return sorted(found)


def _corpus_report(path: Location, **reading: Any) -> Report:  # noqa: ANN401 - the options of read_corpus
    """Report of a corpus; of one that ``clearsep label`` wrote, how it was labelled."""
    if (summary := read_label_summary(path)) is not None:
        return label_tables(summary), {"kind": "labelled corpus", **summary}
    corpus = read_corpus(path, **reading)
    labels = Counter(label for row in corpus.sorted_clips() for label in row["labels"])
    counts = {"num_rows": corpus.num_clips, "num_failed": corpus.num_failures, "labels": dict(sorted(labels.items()))}
    return values_report("corpus", counts)
