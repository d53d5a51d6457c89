"""Gathers all that a report shows from the files of a run or of a pass; reads no audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from engine.passes.records import FailureReason, failure_reasons
from engine.passes.shards import PassSummary, read_manifest, summary_of
from engine.selection.labels.table import ChangeRow
from engine.selection.tracks import Selection
from engine.separators import read_description
from engine.storage.documents import MAX_SETTINGS_BYTES, bounded
from engine.storage.files import open_binary, parquet_file, read_record
from engine.storage.paths import Location
from train.task import TrainingRecord
from tune.report.stems import Stems, open_stems
from tune.run import RunSummary
from tune.steps.iteration import IterationRecord

MOST_CHANGES = 40
"""Changes of labels that are shown for each iteration."""


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
    record: IterationRecord | None
    training: TrainingRecord | None
    changes: Sequence[ChangeRow]

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

    @property
    def is_run(self) -> bool:
        """False for a pass alone."""
        return bool(self.records)


def collect_run(folder: Location) -> RunFacts:
    """The facts of a run with at least one finished iteration; raises ``ValueError`` without one."""
    if not (folder / "summary.json").is_file():
        raise ValueError(
            f"cannot report {folder} (none of its iterations is finished); run the command of the run until one is"
        )
    records = read_record(folder / "summary.json", RunSummary, needs=["iterations"])["iterations"]
    folders = {record["iteration"]: folder / "iterations" / str(record["iteration"]) for record in records}
    passes = [
        _collect(folders[record["iteration"]], record) for record in records if _is_pass(folders[record["iteration"]])
    ]
    return RunFacts(
        folder=folder,
        records=records,
        passes=passes,
        seed_training=_training(folders[0]) if 0 in folders else None,
        config=_settings(folder / "config.yaml"),
    )


def collect_pass(folder: Location) -> RunFacts:
    """The facts of a pass that is closed, with the selection next to its stems if there is one.

    Raises ``ValueError`` for a pass that is not closed, or that only tags.
    """
    if "num_tagged" in read_manifest(folder / "stems"):
        raise ValueError(f"{folder} must be a pass that separates, got one that tags; give a pass of a separator")
    return RunFacts(folder=folder, records=[], passes=[_collect(folder, None)], seed_training=None, config="")


def _is_pass(folder: Location) -> bool:
    return (folder / "stems" / "manifest.json").is_file()


def _collect(folder: Location, record: IterationRecord | None) -> PassFacts:
    stems, tracks = folder / "stems", folder / "tracks"
    manifest = read_manifest(
        stems, "num_queries", "num_stems", "num_failed", "audio_h", "wall_s", "step_s", "fingerprint"
    )
    selection = None
    if (tracks / "manifest.json").is_file():
        selection = read_record(tracks / "manifest.json", Selection, needs=["num_rejected", "thresholds", "num_kept"])
    return PassFacts(
        folder=folder,
        number=record["iteration"] if record is not None else None,
        summary=summary_of(manifest),
        selection=selection,
        stems=open_stems(stems, tracks if selection is not None else None),
        failures=failure_reasons(folder),
        record=record,
        training=_training(folder),
        changes=_changes(folder / "labels" / "changes.parquet"),
    )


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
