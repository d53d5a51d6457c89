"""Tasks of a pass: the clips that one decoding task owns, in files that all workers can read.

``OUT/corpus/tasks-<first task>.parquet`` has one row group for each task. ``retry-<first task>.parquet`` has the tasks
that a retry appended; their numbers follow those of the existing tasks.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.corpus.table import Corpus, chunks
from engine.errors import DamagedError
from engine.passes.config import PassConfig
from engine.schema import CLIPS, ClipRow
from engine.storage.files import atomic_path, parquet_file, require_intact, sha256_file
from engine.storage.fingerprints import read_sealed, write_sealed
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)
_TASKS_PER_FILE = 1024
_TASK_ROWS = pa.schema(
    [
        *CLIPS,
        pa.field("is_cut", pa.bool_(), nullable=False),
        pa.field("tried_in", pa.list_(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Slice:
    """A share of a pass's tasks, for one of several commands that work on the pass at the same time."""

    number: int = 1
    """From 1."""
    count: int = 1
    """Slices of the pass; the only slice of one is the whole pass."""

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, task: int) -> bool:
        """True for the slice's own tasks; neighbours belong to different slices, so that all have as much to do."""
        return task % self.count == self.number - 1

    def name(self, what: str) -> str:
        """The slice's own name for something that a pass has once."""
        return what if self.count == 1 else f"{what}-{self.number}-of-{self.count}"

    def all(self) -> list[Slice]:
        """All slices of the same count."""
        return [Slice(number, self.count) for number in range(1, self.count + 1)]


WHOLE = Slice()
"""The whole pass."""


class TaskRow(ClipRow):
    """A clip as a task owns it."""

    is_cut: bool
    """A retried clip whose times were fixed when its file was cut: it must not be cut again."""
    tried_in: list[int]
    """Earlier tasks in which the clip failed, oldest first; empty in the first attempt."""


class TaskCounts(TypedDict):
    """Contents of ``OUT/corpus/tasks.json``, which is written when all tasks of the first attempt are on disk."""

    num_tasks: int
    num_clips: int
    """Rows of the manifest in those tasks, before recordings are cut."""
    num_set_aside: int
    """Rows with fewer than ``min_labels`` labels."""
    sha256: NotRequired[dict[str, str]]
    """Checksum of every file of tasks, retries included, by its name; this and no listing says which there are."""


_COUNTS = ("num_tasks", "num_clips", "num_set_aside")


class Tasks:
    """The tasks in a folder ``OUT/corpus``."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def write(self, corpus: Corpus, *, rows_per_task: int, min_labels: int) -> TaskCounts:
        """Write the corpus' rows with enough labels, in the order of their ids, unless that was done before.

        Files that are missing or damaged are written again; retry tasks are left as they are.
        """
        counts = self.counts()
        if counts is None or "sha256" not in counts or not all(self._intact(counts["sha256"], "tasks-")):
            retries = [path.name for _, path in self._files("retry")]
            num_tasks, num_clips = self.write_rows(
                corpus.sorted_clips(min_labels=min_labels), rows_per_task=rows_per_task
            )
            counts = TaskCounts(
                num_tasks=num_tasks,
                num_clips=num_clips,
                num_set_aside=corpus.num_clips - num_clips,
                sha256={},
            )
            names = [_file_name("tasks", first) for first in range(0, num_tasks, _TASKS_PER_FILE)]
            self._record(counts, [*names, *retries])
        return {
            "num_tasks": counts["num_tasks"],
            "num_clips": counts["num_clips"],
            "num_set_aside": counts["num_set_aside"],
        }

    def write_rows(self, rows: Iterable[ClipRow], *, rows_per_task: int) -> tuple[int, int]:
        """Write clips as the tasks of the first attempt; returns the numbers of tasks and of clips."""
        tasks = chunks(({**row, "is_cut": False, "tried_in": []} for row in rows), rows_per_task)
        num_tasks = num_clips = 0
        for first_task in tasks:
            in_file = itertools.chain([first_task], itertools.islice(tasks, _TASKS_PER_FILE - 1))
            sizes = _write(self.folder / _file_name("tasks", num_tasks), in_file)
            num_tasks, num_clips = num_tasks + len(sizes), num_clips + sum(sizes)
        return num_tasks, num_clips

    def append(self, rows: Iterable[TaskRow], *, rows_per_task: int) -> int:
        """Append retry tasks, all in one file and so all or none of them; returns the number of clips."""
        name, counts = _file_name("retry", self.num_tasks()), self.counts()
        num_clips = sum(_write(self.folder / name, chunks(rows, rows_per_task)))
        if counts is not None:
            self._record(counts, [name])
        return num_clips

    def remove_damaged_retries(self) -> int | None:
        """Remove the first damaged file of retry tasks and all later ones; returns its first task, null if none is.

        The clips of those tasks then count as failed again, so that a retry can be planned again.
        """
        counts = self.counts()
        if counts is None or all(self._intact(counts.get("sha256", {}), "retry-")):
            return None
        sha256 = counts["sha256"]
        names = sorted(name for name in sha256 if name.startswith("retry-"))
        first = names.index(next(name for name in names if not all(self._intact({name: sha256[name]}, "retry-"))))
        for name in names[first:]:
            del sha256[name]
        write_sealed(self.folder / "tasks.json", counts)
        for name in names[first:]:
            (self.folder / name).unlink(missing_ok=True)
        return _first_task(names[first])

    def damaged(self) -> list[str]:
        """Names of the files of tasks that are missing or damaged."""
        if self.counts() is None and any(self.folder.glob("tasks*")):
            return ["tasks.json"]
        sha256 = self._sha256()
        return [name for name, is_intact in zip(sha256, self._intact(sha256, ""), strict=True) if not is_intact]

    def num_rows(self) -> Iterator[tuple[int, int]]:
        """Every task of the first attempt with the number of its rows."""
        for first, path in self._files("tasks"):
            with parquet_file(path) as file:
                for group in range(file.num_row_groups):
                    yield first + group, file.metadata.row_group(group).num_rows

    def counts(self) -> TaskCounts | None:
        """The content of ``tasks.json``; null if there is none or if it is damaged, so that it is written again."""
        path = self.folder / "tasks.json"
        try:
            return read_sealed(path, TaskCounts, needs=_COUNTS) if path.is_file() else None
        except DamagedError as error:
            _LOGGER.warning(str(error))
            return None

    def _sha256(self) -> dict[str, str]:
        """The recorded checksums of files, by name."""
        counts = self.counts()
        return counts.get("sha256", {}) if counts is not None else {}

    def _record(self, counts: TaskCounts, names: Sequence[str]) -> None:
        """Add files with their checksums to ``tasks.json``."""
        sha256 = counts.get("sha256", {}) | {name: sha256_file(self.folder / name) for name in names}
        write_sealed(self.folder / "tasks.json", {**counts, "sha256": sha256})

    def _intact(self, sha256: Mapping[str, str], prefix: str) -> Iterator[bool]:
        """For each recorded file whose name begins with ``prefix``: it is there, with its checksum."""
        for name in (name for name in sha256 if name.startswith(prefix)):
            try:
                require_intact(self.folder / name, sha256[name])
                yield True
            except (DamagedError, FileNotFoundError):
                yield False

    def num_tasks(self) -> int:
        """Number of all tasks, retries included."""
        for first, path in reversed(self._files()):
            with parquet_file(path) as file:
                return first + int(file.num_row_groups)
        return 0

    def rows(self, task: int) -> list[TaskRow]:
        """The clips of one task."""
        first, path = next(entry for entry in reversed(self._files()) if entry[0] <= task)
        sha256 = self._sha256()
        if path.name in sha256:
            require_intact(path, sha256[path.name])
        with parquet_file(path) as file:
            rows: list[TaskRow] = file.read_row_group(task - first).to_pylist()
        return rows

    def retried(self) -> dict[str, list[int]]:
        """The ids of all clips in retry tasks, each with the tasks that held it, oldest first."""
        held: dict[str, list[int]] = {}
        for first, path in self._files("retry"):
            with parquet_file(path) as file:
                for group in range(file.num_row_groups):
                    for row in file.read_row_group(group, columns=["clip_id", "tried_in"]).to_pylist():
                        held[row["clip_id"]] = [*row["tried_in"], first + group]
        return held

    def _files(self, kind: str = "") -> list[tuple[int, Location]]:
        """The first task of every file, and the file."""
        counts = self.counts()
        if counts is not None and "sha256" in counts:
            names = list(counts["sha256"])
        else:
            names = [path.name for path in self.folder.glob("*-*.parquet")]
        return sorted((_first_task(name), self.folder / name) for name in names if name.startswith(kind))


def _file_name(kind: str, first_task: int) -> str:
    return f"{kind}-{first_task:06d}.parquet"


def _first_task(name: str) -> int:
    return int(name.partition(".")[0].split("-")[1])


def _write(path: Location, tasks: Iterable[Sequence[Mapping[str, object]]]) -> list[int]:
    """Write one row group for each task; returns the numbers of their rows."""
    sizes = []
    with atomic_path(path) as aside, pq.ParquetWriter(aside, _TASK_ROWS, write_page_checksum=True) as writer:
        for rows in tasks:
            writer.write_table(pa.Table.from_pylist(rows, schema=_TASK_ROWS), row_group_size=len(rows))
            sizes.append(len(rows))
    return sizes


def require_clips(corpus: Corpus, config: PassConfig) -> None:
    """Raise ``ValueError`` if a corpus has no clip to separate."""
    if next(corpus.sorted_clips(min_labels=config.min_labels), None) is not None:
        return
    if corpus.num_clips:
        raise ValueError(
            f"at least one clip must have {config.min_labels} or more labels, got none of {corpus.num_clips} clips; "
            "give clips that name several sounds, or set min_labels to 1 (`--set min_labels=1`)"
        )
    first = next(corpus.failure_tables()).to_pylist()[0]
    example = f"{first['path']!r}: {first['message']}"
    raise ValueError(f"some row must be a clip, got none of {corpus.num_failures}; correct the rows, such as {example}")
