"""Tasks of a pass: the clips that one decoding task owns, in files that all workers can read.

``OUT/corpus/tasks-<first task>.parquet`` has one row group for each task. ``retry-<first task>.parquet`` has the tasks
that a retry appended; their numbers follow those of the existing tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.corpus.table import Corpus, chunks
from engine.passes.config import PassConfig
from engine.schema import CLIPS, ClipRow
from engine.storage.files import atomic_path, parquet_file, read_record, write_json
from engine.storage.paths import Location

_TASKS_PER_FILE = 1024
_TASK_ROWS = pa.schema(
    [
        *CLIPS,
        pa.field("is_cut", pa.bool_(), nullable=False),
        pa.field("tried_in", pa.list_(pa.int64()), nullable=False),
    ]
)


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


class Tasks:
    """The tasks in a folder ``OUT/corpus``."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def write(self, corpus: Corpus, *, rows_per_task: int, min_labels: int) -> TaskCounts:
        """Write the corpus' rows with enough labels, in the order of their ids, unless that was done before."""
        done = self.folder / "tasks.json"
        if not done.is_file():
            rows = corpus.sorted_clips(min_labels=min_labels)
            num_tasks, num_clips = self.write_rows(rows, rows_per_task=rows_per_task)
            num_set_aside = corpus.num_clips - num_clips
            write_json(done, TaskCounts(num_tasks=num_tasks, num_clips=num_clips, num_set_aside=num_set_aside))
        return read_record(done, TaskCounts)

    def write_rows(self, rows: Iterable[ClipRow], *, rows_per_task: int) -> tuple[int, int]:
        """Write clips as the tasks of the first attempt; returns the numbers of tasks and of clips."""
        tasks = chunks(({**row, "is_cut": False, "tried_in": []} for row in rows), rows_per_task)
        num_tasks = num_clips = 0
        for first_task in tasks:
            in_file = itertools.chain([first_task], itertools.islice(tasks, _TASKS_PER_FILE - 1))
            sizes = _write(self.folder / f"tasks-{num_tasks:06d}.parquet", in_file)
            num_tasks, num_clips = num_tasks + len(sizes), num_clips + sum(sizes)
        return num_tasks, num_clips

    def append(self, rows: Iterable[TaskRow], *, rows_per_task: int) -> int:
        """Append retry tasks, all in one file and so all or none of them; returns the number of clips."""
        return sum(_write(self.folder / f"retry-{self.num_tasks():06d}.parquet", chunks(rows, rows_per_task)))

    def num_tasks(self) -> int:
        """Number of all tasks, retries included."""
        for first, path in reversed(self._files()):
            with parquet_file(path) as file:
                return first + int(file.num_row_groups)
        return 0

    def rows(self, task: int) -> list[TaskRow]:
        """The clips of one task."""
        first, path = next(entry for entry in reversed(self._files()) if entry[0] <= task)
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

    def _files(self, kind: str = "*") -> list[tuple[int, Location]]:
        """The first task of every file, and the file."""
        return sorted((int(path.stem.split("-")[1]), path) for path in self.folder.glob(f"{kind}-*.parquet"))


def _write(path: Location, tasks: Iterable[Sequence[Mapping[str, object]]]) -> list[int]:
    """Write one row group for each task; returns the numbers of their rows."""
    sizes = []
    with atomic_path(path) as aside, pq.ParquetWriter(aside, _TASK_ROWS) as writer:
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
            "give clips that name several sounds, or set min_labels to 1 (engine.min_labels in a run)"
        )
    first = next(corpus.failure_tables()).to_pylist()[0]
    example = f"{first['path']!r}: {first['message']}"
    raise ValueError(f"some row must be a clip, got none of {corpus.num_failures}; correct the rows, such as {example}")
