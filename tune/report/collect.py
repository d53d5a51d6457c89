"""Gathers all that a report shows from the files of a run or of a pass; reads no audio."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from engine.passes.records import failure_reasons, failure_rows
from engine.passes.shards import PassSummary, read_manifest, summary_of
from engine.schema import FailureReason, FailureRow
from engine.selection.labels.table import ChangeRow
from engine.selection.tracks import Selection
from engine.separators import read_description
from engine.storage.documents import MAX_SETTINGS_BYTES, bounded
from engine.storage.files import open_binary, parquet_file, read_record, require_intact
from engine.storage.paths import Location
from train.task import TrainingRecord
from tune.report.stems import LeftOut, Stems, open_stems
from tune.run import RunSummary
from tune.steps.iteration import IterationRecord

MOST_CHANGES = 40
"""Changes of labels that are shown for each iteration."""
_MOST_FAILURES = 2  # that are shown for each step and error, of labels and of whole clips


@dataclass(frozen=True, kw_only=True)
class PassFacts:
    """A pass, alone or as an iteration of a run, with what was selected, learned and measured after it."""

    folder: Location
    number: int | None
    """The iteration; null: the pass is alone."""
    summary: PassSummary
    selection: Selection | None
    stems: Stems
    failures: Sequence[FailureReason]
    failed: Sequence[FailureRow]
    """Examples of the failures: few of every step and error."""
    record: IterationRecord | None
    training: TrainingRecord | None
    changes: Sequence[ChangeRow]
    left_out: LeftOut

    @property
    def name(self) -> str:
        """The pass in words."""
        return "the pass" if self.number is None else f"iteration {self.number}"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run, or a pass alone, which has no records of iterations."""

    folder: Location
    records: Sequence[IterationRecord]
    """The finished iterations, the seed first."""
    passes: Sequence[PassFacts]
    seed_training: TrainingRecord | None
    config: str
    """The resolved settings as YAML; empty for a pass."""
    left_out: LeftOut

    @property
    def is_run(self) -> bool:
        """False for a pass alone."""
        return bool(self.records)

    @property
    def name(self) -> str:
        """The run in words."""
        return "the run"


def collect_run(folder: Location) -> RunFacts:
    """The facts of a run with at least one finished iteration; raises ``ValueError`` without one."""
    left_out = LeftOut()
    records = left_out.read("summary.json", _records, folder) or [*_records_of_iterations(folder, left_out)]
    if not records:
        raise ValueError(
            f"cannot report {folder} (none of its iterations is finished); run the command of the run until one is"
        )
    passes = []
    for record in records:
        number, out = record["iteration"], _iteration(folder, record["iteration"])
        if (out / "stems" / "manifest.json").is_file():
            one = left_out.read(f"iteration {number}", _collect, out, record)
            passes += [one] if one is not None else []
    return RunFacts(
        folder=folder,
        records=records,
        passes=passes,
        seed_training=left_out.read("the seed", _training, _iteration(folder, 0)),
        config=left_out.read("config.yaml", _settings, folder / "config.yaml") or "",
        left_out=left_out,
    )


def collect_pass(folder: Location) -> RunFacts:
    """The facts of a pass that is closed, with the selection next to its stems if there is one.

    Raises ``ValueError`` for a pass that is not closed, or that only tags.
    """
    if "num_tagged" in read_manifest(folder / "stems"):
        raise ValueError(f"{folder} must be a pass that separates, got one that tags; give a pass of a separator")
    passes = [_collect(folder, None)]
    return RunFacts(folder=folder, records=[], passes=passes, seed_training=None, config="", left_out=LeftOut())


def _iteration(folder: Location, number: int) -> Location:
    return folder / "iterations" / str(number)


def _records(folder: Location) -> list[IterationRecord]:
    path = folder / "summary.json"
    return read_record(path, RunSummary, needs=["iterations"])["iterations"] if path.is_file() else []


def _records_of_iterations(folder: Location, left_out: LeftOut) -> Iterator[IterationRecord]:
    """The same records, each from its iteration's own file."""
    if "summary.json" in left_out.errors:
        paths = {int(path.parent.name): path for path in folder.glob("iterations/*/iteration.json")}
        read = functools.partial(read_record, kind=IterationRecord, needs=["iteration"])
        for number in sorted(paths):
            record = left_out.read(f"iterations/{number}/iteration.json", read, paths[number])
            if record is not None:
                yield record


def _collect(folder: Location, record: IterationRecord | None) -> PassFacts:
    stems, left_out = folder / "stems", LeftOut()
    needs = ("num_queries", "num_stems", "num_failed", "audio_h", "wall_s", "step_s", "fingerprint", "shards")
    manifest = read_manifest(stems, *needs)
    reasons, failed = left_out.read("failures", _failures, folder, left_out) or ([], [])
    selection = left_out.read("tracks", _selection, folder / "tracks")
    shards = [stems / f"{name}.parquet" for name in sorted(manifest["shards"])]
    return PassFacts(
        folder=folder,
        number=record["iteration"] if record is not None else None,
        summary=summary_of(manifest),
        selection=selection,
        stems=open_stems(shards, folder / "tracks" if selection is not None else None, left_out),
        failures=reasons,
        failed=failed,
        record=record,
        training=left_out.read("separator", _training, folder),
        changes=left_out.read("labels", _changes, folder / "labels" / "changes.parquet") or [],
        left_out=left_out,
    )


def _failures(folder: Location, left_out: LeftOut) -> tuple[list[FailureReason], list[FailureRow]]:
    """Counts of the failures by reason, and examples of each."""
    seen, examples = Counter[tuple[bool, str, str]](), list[FailureRow]()

    def rows() -> Iterator[FailureRow]:
        for _, row in failure_rows(folder, unreadable=left_out.errors):
            seen[kind := (row["label"] is None, row["step"], row["error_class"])] += 1
            if seen[kind] <= _MOST_FAILURES:
                examples.append(row)
            yield row

    return failure_reasons(rows()), examples


def _selection(tracks: Location) -> Selection | None:
    """The selection in a folder, if there is one; raises ``DamagedError`` if its verdicts are not those recorded."""
    if not (tracks / "manifest.json").is_file():
        return None
    needs = ["num_rejected", "thresholds", "num_kept", "sha256"]
    selection = read_record(tracks / "manifest.json", Selection, needs=needs)
    for name in ("kept.parquet", "rejected.parquet"):
        require_intact(tracks / name, selection["sha256"][name])
    return selection


def _training(folder: Location) -> TrainingRecord | None:
    """The last training of the separator in an iteration's folder; null without one."""
    if not (folder / "separator" / "separator.json").is_file():
        return None
    history = read_description(folder / "separator")["history"]
    return cast(TrainingRecord, history[-1]) if history else None


def _changes(path: Location) -> list[ChangeRow]:
    if not path.is_file():
        return []
    with parquet_file(path) as file:
        batch = next(file.iter_batches(batch_size=MOST_CHANGES), None)
    return cast("list[ChangeRow]", batch.to_pylist()) if batch is not None else []


def _settings(path: Location) -> str:
    if not path.is_file():
        return ""
    with open_binary(path) as file:
        return bounded(file, MAX_SETTINGS_BYTES).decode(errors="replace")
