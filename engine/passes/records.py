"""Records of a pass: which shards are done, what failed, what is missing, and the totals.

A shard is done when its record ``stems/<shard>.done.json`` exists; the record counts what is in the shard. A retry
(:func:`plan_retry`) appends new tasks whose rows are the failed clips. Two rules follow from that:

1. A failure stands unless a later task holds its clip.
2. The totals of a pass are the sums of the records, less the failures that no longer stand.

A clip of a retry task that is not done is therefore in neither: like any clip of a missing task, it is still to come.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.corpus.contents import claim_contents
from engine.corpus.table import Corpus
from engine.errors import DamagedError
from engine.passes.tasks import WHOLE, Slice, TaskCounts, TaskRow, Tasks
from engine.schema import CLIPS, FAILURES, FailureReason, FailureRow, clip_columns
from engine.storage.files import atomic_path, read_parquet
from engine.storage.fingerprints import read_sealed, write_sealed
from engine.storage.paths import Location

STEPS = ("decode", "separate", "assess", "score", "write")
"""Steps whose time is recorded; ``assess`` computes the scores that need a separator or a tagger."""
_Given = TypeVar("_Given")
_Result = TypeVar("_Result")
MANIFEST_TASK = -1
"""Stands for a task in failures of manifest rows that are no clips."""


class WrittenShard(TypedDict):
    """Part of a shard's record: the files."""

    num_stems: int
    num_failed: int
    """Failed queries."""
    sha256: str
    """Of the stem shard."""
    footer_sha256: str
    """Of the stem shard's Parquet footer: with the checksums of the pages that are read, it stands for ``sha256``."""
    etag: str | None
    """In S3: the object's tag, which the server derives from its bytes."""
    failures_sha256: str | None
    """Of the file of failures; null if there are none."""


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
    read_wait_s: NotRequired[float]
    """The part of ``decode_s`` in which no CPU worked for it."""
    write_wait_s: NotRequired[float]
    """The same of ``write_s``."""
    gpu_s: NotRequired[float]
    """Time in which the shard had the GPU of its worker; none without one."""


class _ClosedPass(TypedDict):
    """The shards of a closed pass, in its manifest."""

    shards: dict[str, str]


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
    read_wait_s: float = 0.0
    write_wait_s: float = 0.0
    gpu_s: float = 0.0
    """Time in which GPUs were busy, if there are any."""
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every stem shard, by the shard's name, in order."""
    footer_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every stem shard's footer, by the shard's name; none for shards of older versions."""
    num_shards: dict[int, int] = field(default_factory=dict)
    """Shards that a task must have, by task, for tasks with a shard that is done."""
    task_clips: Counter[int] = field(default_factory=Counter)
    """Clips by task, also those whose failure no longer stands."""

    def add(self, name: str, record: ShardRecord) -> None:
        """Add the counts of a shard."""
        for count in ("num_clips", "num_queries", "num_stems", "num_failed", "audio_s"):
            setattr(self, count, getattr(self, count) + record[count])
        for step in STEPS:
            self.step_s[step] += record[f"{step}_s"]  # type: ignore[literal-required]
        self.read_wait_s += record.get("read_wait_s", 0.0)
        self.write_wait_s += record.get("write_wait_s", 0.0)
        self.gpu_s += record.get("gpu_s", 0.0)
        self.sha256[name] = record["sha256"]
        if "footer_sha256" in record:
            self.footer_sha256[name] = record["footer_sha256"]
        task, _ = parse_shard_name(name)
        self.task_clips[task] += record["num_clips"]
        self.num_shards[task] = max(self.num_shards.get(task, 0), record["num_shards"])

    def subtract(self, failures: Sequence[FailureRow]) -> None:
        """Subtract failures of one shard."""
        self.num_clips -= len({row["clip_id"] for row in failures})
        for row in failures:
            self.num_queries -= row["num_queries"]
            self.num_failed -= row["num_queries"]


def shard_name(task: int, number: int) -> str:
    """Name of a shard: its task, and its number in the task."""
    return f"shard-{task:06d}-{number:04d}"


def parse_shard_name(name: str) -> tuple[int, int]:
    """Task and number of a shard."""
    _, task, number = name.split("-")
    return int(task), int(number)


def write_record(out: Location, name: str, record: ShardRecord) -> None:
    """Record that a shard is done; raises ``RuntimeError`` if its stems and failures are not all of its queries."""
    if not adds_up(record):
        raise RuntimeError(
            f"cannot record {name} ({record['num_stems']} stems and {record['num_failed']} failed queries are not its "
            f"{record['num_queries']} queries); report this with the separator that was used"
        )
    write_sealed(record_path(out, name), record)


def record_path(out: Location, name: str) -> Location:
    """The record of a shard."""
    return out / "stems" / f"{name}.done.json"


def adds_up(counts: Mapping[str, Any]) -> bool:
    """True if every query is a stem or failed."""
    return "num_queries" not in counts or counts["num_queries"] == counts["num_stems"] + counts["num_failed"]


def done_names(out: Location, task: int | None = None, *, part: Slice = WHOLE) -> list[str]:
    """Names of the shards that are done, in order; with ``task`` only those of one task, with ``part`` of a slice.

    A listing may lag behind what was written: the manifest of a closed pass, or the number of a task's shards that each
    of their records has, is believed instead.
    """
    prefix = "shard-" if task is None else f"shard-{task:06d}-"
    names = {path.name.removesuffix(".done.json") for path in (out / "stems").glob(f"{prefix}*.done.json")}
    if task is None:
        with contextlib.suppress(FileNotFoundError):
            names.update(read_sealed(out / "stems" / "manifest.json", _ClosedPass).get("shards", ()))
        return sorted(name for name in names if part.has(parse_shard_name(name)[0]))
    num_shards = max((record["num_shards"] for _, record in shard_records(out, sorted(names))), default=1)
    unlisted = {shard_name(task, number) for number in range(num_shards)} - names
    return sorted(names.union(name for name in unlisted if record_path(out, name).is_file()))


def shard_records(out: Location, names: Sequence[str] | None = None) -> Iterator[tuple[str, ShardRecord]]:
    """Names and records of some shards, by default of all that are done."""
    names = done_names(out) if names is None else names
    read = functools.partial(read_sealed, kind=ShardRecord)
    yield from zip(names, in_threads(read, [record_path(out, name) for name in names]), strict=True)


def in_threads(call: Callable[[_Given], _Result], given: Sequence[_Given]) -> Iterator[_Result]:
    """Results of many calls in order; each may be a request to a server, or the checksum of a large file."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        for start in range(0, len(given), 256):
            yield from pool.map(call, given[start : start + 256])


def clips_in(out: Location, names: Sequence[str]) -> set[str]:
    """The ids of all clips with stems or a failure in some shards that are done."""
    ids, schema = set[str](), pa.schema([CLIPS.field("clip_id")])
    for name, record in shard_records(out, names):
        ids.update(read_parquet(out / "stems" / f"{name}.parquet", schema=schema)["clip_id"].to_pylist())
        ids.update(row["clip_id"] for row in _failures_in(out, name, record))
    return ids


def _failures_in(out: Location, name: str, record: ShardRecord) -> list[FailureRow]:
    """The failures of a shard; the file that an interrupted attempt may have left is none if the record counts none."""
    if not record["num_failed"]:
        return []
    path, sha256 = out / "failures" / f"{name}.parquet", record.get("failures_sha256")
    rows: list[FailureRow] = read_parquet(path, schema=FAILURES, sha256=sha256).to_pylist()
    return rows


def write_manifest_failures(out: Location, corpus: Corpus) -> None:
    """Write the failures of manifest rows; at every start, for they can be corrected without changing the clips."""
    path = out / "failures" / "manifest.parquet"
    if not corpus.num_failures:
        path.unlink(missing_ok=True)
    else:
        with atomic_path(path) as aside, pq.ParquetWriter(aside, FAILURES, write_page_checksum=True) as writer:
            for table in corpus.failure_tables():
                writer.write_table(table)


def claim_files(
    out: Location, corpus: Corpus, *, min_labels: int, retry_failed: bool = False, keep: bool = True
) -> bool:
    """Keep the contents of the corpus' files with a pass, or compare them with those that it was begun with.

    Returns false if something is to be kept, but ``keep`` is false.

    A file of which all clips failed may be replaced, and one that was missing may appear; with ``retry_failed`` every
    file without a stem may be replaced, for the pass may have stopped before it came to all that are broken. Raises
    ``ValueError`` for others: a pass never has stems of two corpora.
    """
    record = out / "corpus" / "contents.parquet"
    if not record.is_file() and (out / "corpus" / "tasks.json").is_file():
        raise ValueError(
            f"{out} must have the contents of its corpus' files to be started again, got a pass of an older version, "
            "which may be of other files; start it in another folder (what is finished can still be filtered)"
        )
    digest = claim_contents(
        record,
        corpus.root,
        corpus.files(min_labels=min_labels),
        what=f"files of the corpus of {out}",
        may_change=functools.partial(_may_change, out, retry_failed),
        remedy="restore them, or give another folder (--retry-failed allows other files where there are no stems yet)",
        keep=keep,
    )
    return bool(digest)


def _may_change(out: Location, retry_failed: bool, paths: set[str]) -> set[str]:
    column = pa.schema([CLIPS.field("path")])

    def found(shard: tuple[str, ShardRecord]) -> tuple[set[str], set[str]]:
        name, record = shard
        stems = read_parquet(out / "stems" / f"{name}.parquet", schema=column)["path"].to_pylist()
        failures = _failures_in(out, name, record)
        return paths.intersection(stems), paths.intersection(row["path"] for row in failures)

    separated, failed = (
        set().union(*some) for some in zip((set(), set()), *in_threads(found, list(shard_records(out))), strict=True)
    )
    return (paths if retry_failed else failed) - separated


def failure_rows(out: Location, *, unreadable: dict[str, str] | None = None) -> Iterator[tuple[int, FailureRow]]:
    """Every failure that stands, with its task (``MANIFEST_TASK``: a row of the manifest that is no clip).

    With ``unreadable``, shards that cannot be read are left out; it gets their names, each with its error.
    """

    def read(name: str) -> list[FailureRow]:
        try:
            return _failures_in(out, name, read_sealed(record_path(out, name), ShardRecord))
        except (OSError, ValueError) as error:
            if unreadable is None:
                raise
            unreadable[name] = str(error)
            return []

    of_manifest = out / "failures" / "manifest.parquet"
    if of_manifest.is_file():
        yield from ((MANIFEST_TASK, row) for row in read_parquet(of_manifest, schema=FAILURES).to_pylist())
    retried, names = Tasks(out / "corpus").retried(), done_names(out)
    for name, rows in zip(names, in_threads(read, names), strict=True):
        task, _ = parse_shard_name(name)
        yield from ((task, row) for row in rows if _stands(row, task, retried))


def _stands(row: FailureRow, task: int, retried: dict[str, list[int]]) -> bool:
    """Rule 1 of this module."""
    return retried.get(row["clip_id"], [task])[-1] <= task


def read_totals(out: Location, reported: Iterable[str] = (), *, part: Slice = WHOLE) -> Totals:
    """Totals of the shards of a slice that are done (rule 2 of this module).

    ``reported`` are names of shards that workers have reported: a listing may lag behind. A shard that is listed or
    reported counts if its files are there.
    """
    totals, retried = Totals(), Tasks(out / "corpus").retried()
    names = sorted({*done_names(out, part=part), *reported})
    for name, record in zip(names, in_threads(functools.partial(find_record, out), names), strict=True):
        if record is None:
            continue
        totals.add(name, record)
        if retried and record["num_failed"]:
            task, _ = parse_shard_name(name)
            totals.subtract([row for row in _failures_in(out, name, record) if not _stands(row, task, retried)])
    return totals


def find_record(out: Location, name: str) -> ShardRecord | None:
    """The record of a shard, or null if it is damaged or if it or a file that it records is not there."""
    try:
        record = read_sealed(record_path(out, name), ShardRecord)
    except (FileNotFoundError, DamagedError):
        return None
    folders = ("stems", "failures") if record["num_failed"] else ("stems",)
    return record if all((out / folder / f"{name}.parquet").is_file() for folder in folders) else None


def require_complete(out: Location, totals: Totals, corpus: Corpus, counts: TaskCounts, *, part: Slice = WHOLE) -> None:
    """Raise ``RuntimeError`` unless the clips of a corpus, of its tasks and of the shards that are done agree.

    A clip that is cut becomes several, so a task must have at least as many clips as rows. With ``part`` the totals are
    those of a slice, and only its tasks must be complete.
    """
    rows = dict(Tasks(out / "corpus").num_rows())
    lacking = [task for task, number in rows.items() if part.has(task) and totals.task_clips[task] < number]
    problems = []
    if missing := sorted({*lacking, *(entry["task"] for entry in missing_tasks(out, totals, part=part))}):
        problems.append(f"shards or clips of {len(missing)} tasks are missing, the first is {missing[0]}")
    if (found := sum(rows.values()) + counts["num_set_aside"]) != corpus.num_clips:
        problems.append(f"the tasks have {found} of the corpus' {corpus.num_clips} clips")
    if totals.num_queries != totals.num_stems + totals.num_failed:
        problems.append(
            f"{totals.num_stems} stems and {totals.num_failed} failed queries are not all {totals.num_queries} queries"
        )
    if problems:
        raise RuntimeError(
            f"cannot close the pass in {out} ({'; '.join(problems)}); start the same command again, without "
            "--slice, or start the pass in another folder"
        )


def missing_tasks(out: Location, totals: Totals, *, part: Slice = WHOLE) -> list[PendingTask]:
    """A slice's tasks with missing shards."""
    done: dict[int, list[str]] = {}
    for name in totals.sha256:
        done.setdefault(parse_shard_name(name)[0], []).append(name)
    numbers = filter(part.has, range(Tasks(out / "corpus").num_tasks()))
    tasks = (PendingTask(task=task, done=done.get(task, [])) for task in numbers)
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


def failure_reasons(failures: Iterable[FailureRow], *, most: int = 10) -> list[FailureReason]:
    """Failed queries by step and class of error, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for row in failures:
        key = (row["step"], row["error_class"])
        counts[key] += row["num_queries"]
        examples.setdefault(key, f"{row['path']}: {row['message']}"[:300])
    return [
        FailureReason(step=step, error_class=kind, num_queries=number, example=examples[step, kind])
        for (step, kind), number in counts.most_common(most)
    ]
