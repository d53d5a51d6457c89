"""Records of a pass: which shards are done, what failed, what is missing, and the totals.

A shard is done when its record ``stems/<shard>.done.json`` exists; the record counts what is in the shard. A retry
(:func:`plan_retry`) appends new tasks whose rows are the failed clips. Two rules follow from that:

1. A failure stands unless a later task holds its clip.
2. The totals of a pass are the sums of the records, less the failures that no longer stand.

A clip of a retry task that is not done is therefore in neither: like any clip of a missing task, it is still to come.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.corpus.table import Corpus
from engine.passes.tasks import TaskRow, Tasks
from engine.schema import CLIPS, FAILURES, FailureRow, clip_columns
from engine.storage.files import atomic_path, read_parquet, read_record, write_json
from engine.storage.paths import Location

STEPS = ("decode", "separate", "assess", "score", "write")
"""Steps whose time is recorded; ``assess`` computes the scores that need a separator or a tagger."""
MANIFEST_TASK = -1
"""Stands for a task in failures of manifest rows that are no clips."""


class WrittenShard(TypedDict):
    """Part of a shard's record: the files."""

    num_stems: int
    num_failed: int
    """Failed queries."""
    sha256: str
    """Of the stem shard."""


class ShardRecord(WrittenShard):
    """Contents of ``stems/<shard>.done.json``."""

    num_shards: int
    """Shards of the shard's task, as far as was known."""
    num_clips: int
    """Clips with stems or failures in this shard; a file that cannot be opened is one clip."""
    num_queries: int
    audio_s: float
    decode_s: float
    separate_s: float
    assess_s: float
    score_s: float
    write_s: float


class PendingTask(TypedDict):
    """A task with missing shards, as :class:`engine.passes.decode.Decode` takes it."""

    task: int
    done: list[str]
    """Names of the task's shards that are done."""


@dataclass(kw_only=True)
class Totals:
    """Sums over the shards that are done, less the failures that no longer stand."""

    num_clips: int = 0
    num_queries: int = 0
    num_stems: int = 0
    num_failed: int = 0
    audio_s: float = 0.0
    step_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every stem shard, by the shard's name, in order."""
    num_shards: dict[int, int] = field(default_factory=dict)
    """Shards that a task must have, by task, for tasks with a shard that is done."""

    def add(self, name: str, record: ShardRecord) -> None:
        """Add the counts of a shard."""
        for count in ("num_clips", "num_queries", "num_stems", "num_failed", "audio_s"):
            setattr(self, count, getattr(self, count) + record[count])
        for step in STEPS:
            self.step_s[step] += record[f"{step}_s"]  # type: ignore[literal-required]
        self.sha256[name] = record["sha256"]
        task, _ = parse_shard_name(name)
        self.num_shards[task] = max(self.num_shards.get(task, 0), record["num_shards"])

    def subtract(self, failures: Sequence[FailureRow]) -> None:
        """Subtract failures of one shard."""
        self.num_clips -= len({row["clip_id"] for row in failures})
        for row in failures:
            self.num_queries -= row["num_queries"]
            self.num_failed -= row["num_queries"]


class FailureReason(TypedDict):
    """Failed queries of one step and class of error."""

    step: str
    error_class: str
    num_queries: int
    example: str
    """Path and message of one of them."""


def shard_name(task: int, number: int) -> str:
    """Name of a shard: its task, and its number in the task."""
    return f"shard-{task:06d}-{number:04d}"


def parse_shard_name(name: str) -> tuple[int, int]:
    """Task and number of a shard."""
    _, task, number = name.split("-")
    return int(task), int(number)


def write_record(out: Location, name: str, record: ShardRecord) -> None:
    """Record that a shard is done."""
    write_json(out / "stems" / f"{name}.done.json", record)


def done_names(out: Location, task: int | None = None) -> list[str]:
    """Names of the shards that are done, in order; with ``task`` only those of one task."""
    prefix = "shard-" if task is None else f"shard-{task:06d}-"
    return sorted(path.name.removesuffix(".done.json") for path in (out / "stems").glob(f"{prefix}*.done.json"))


def shard_records(out: Location, names: Sequence[str] | None = None) -> Iterator[tuple[str, ShardRecord]]:
    """Names and records of some shards, by default of all that are done."""
    names = done_names(out) if names is None else names
    read = functools.partial(read_record, kind=ShardRecord, needs=[])
    with ThreadPoolExecutor(max_workers=16) as pool:  # each file may be a request to a server
        for start in range(0, len(names), 256):
            some = names[start : start + 256]
            yield from zip(some, pool.map(read, [out / "stems" / f"{name}.done.json" for name in some]), strict=True)


def clips_in(out: Location, names: Sequence[str]) -> set[str]:
    """The ids of all clips with stems or a failure in some shards that are done."""
    ids, schema = set[str](), pa.schema([CLIPS.field("clip_id")])
    for name in names:
        ids.update(read_parquet(out / "stems" / f"{name}.parquet", schema=schema)["clip_id"].to_pylist())
        ids.update(row["clip_id"] for row in _failures_in(out, name))
    return ids


def _failures_in(out: Location, name: str) -> list[FailureRow]:
    path = out / "failures" / f"{name}.parquet"
    rows: list[FailureRow] = read_parquet(path, schema=FAILURES).to_pylist() if path.is_file() else []
    return rows


def write_manifest_failures(out: Location, corpus: Corpus) -> None:
    """Write the failures of manifest rows; at every start, for they can be corrected without changing the clips."""
    path = out / "failures" / "manifest.parquet"
    path.unlink(missing_ok=True)
    if corpus.num_failures:
        with atomic_path(path) as aside, pq.ParquetWriter(aside, FAILURES) as writer:
            for table in corpus.failure_tables():
                writer.write_table(table)


def failure_rows(out: Location) -> Iterator[tuple[int, FailureRow]]:
    """Every failure that stands, with its task (``MANIFEST_TASK``: a row of the manifest that is no clip)."""
    yield from ((MANIFEST_TASK, row) for row in _failures_in(out, "manifest"))
    done, retried = set(done_names(out)), Tasks(out / "corpus").retried()
    for name in sorted(path.stem for path in (out / "failures").glob("shard-*.parquet")):
        if name in done:
            task, _ = parse_shard_name(name)
            yield from ((task, row) for row in _failures_in(out, name) if _stands(row, task, retried))


def _stands(row: FailureRow, task: int, retried: dict[str, list[int]]) -> bool:
    """Rule 1 of this module."""
    return retried.get(row["clip_id"], [task])[-1] <= task


def read_totals(out: Location) -> Totals:
    """Totals of the shards that are done (rule 2 of this module)."""
    totals, retried = Totals(), Tasks(out / "corpus").retried()
    for name, record in shard_records(out):
        totals.add(name, record)
        if retried and record["num_failed"]:
            task, _ = parse_shard_name(name)
            totals.subtract([row for row in _failures_in(out, name) if not _stands(row, task, retried)])
    return totals


def missing_tasks(out: Location, totals: Totals) -> list[PendingTask]:
    """The tasks with missing shards."""
    done: dict[int, list[str]] = {}
    for name in totals.sha256:
        done.setdefault(parse_shard_name(name)[0], []).append(name)
    tasks = (PendingTask(task=task, done=done.get(task, [])) for task in range(Tasks(out / "corpus").num_tasks()))
    return [entry for entry in tasks if len(entry["done"]) < totals.num_shards.get(entry["task"], 1)]


def plan_retry(out: Location, *, rows_per_task: int) -> int:
    """Append tasks for every clip that failed as a whole; returns their number of clips.

    Rows of the manifest that are no clips are not retried, nor are labels that failed while other labels of their clip
    have stems. A closed pass is opened again.
    """
    tasks = Tasks(out / "corpus")
    retried = tasks.retried()
    rows = (
        TaskRow(**clip_columns(row), is_cut=row["is_cut"], tried_in=retried.get(row["clip_id"], [task]))
        for task, row in failure_rows(out)
        if task != MANIFEST_TASK and row["label"] is None
    )
    first = next(rows, None)
    if first is None:
        return 0
    (out / "stems" / "manifest.json").unlink(missing_ok=True)  # before: tasks of a closed pass would never be run
    return tasks.append(itertools.chain([first], rows), rows_per_task=rows_per_task)


def failure_reasons(out: Location, *, most: int = 10) -> list[FailureReason]:
    """Failed queries by step and class of error, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for _, row in failure_rows(out):
        key = (row["step"], row["error_class"])
        counts[key] += row["num_queries"]
        examples.setdefault(key, f"{row['path']}: {row['message']}"[:300])
    return [
        FailureReason(step=step, error_class=kind, num_queries=number, example=examples[step, kind])
        for (step, kind), number in counts.most_common(most)
    ]
