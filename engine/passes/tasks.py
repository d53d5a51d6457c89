"""TODO engine/passes/tasks.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus.table import Corpus, Row, _chunks
from engine.schema import CLIPS
from engine.storage.files import atomic_path, parquet_file, read_json, write_json
from engine.storage.paths import Location

_TASKS_PER_FILE = 1024


class Tasks:
    """The clips of a pass in files of a folder that all workers reach: row group ``n`` of a file is one task's rows."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def write(self, corpus: Corpus, *, rows_per_task: int, min_labels: int) -> dict[str, int]:
        """Write the rows with labels enough, in the order of their ids; what is there already stays."""
        done = self.folder / "tasks.json"
        if done.is_file():
            return dict(read_json(done))
        rows = (row for table in corpus.sorted_clips() for row in table.to_pylist() if len(row["labels"]) >= min_labels)
        num_tasks, num_clips = self.write_rows(rows, rows_per_task=rows_per_task)
        counts = {"num_tasks": num_tasks, "num_clips": num_clips, "num_set_aside": corpus.num_clips - num_clips}
        write_json(done, counts)
        return counts

    def write_rows(self, rows: Iterable[Row], *, rows_per_task: int) -> tuple[int, int]:
        """Write rows of ``CLIPS`` in their order; returns how many tasks and clips they are."""
        num_tasks = num_clips = 0
        for number, tasks in enumerate(_files(_chunks(rows, rows_per_task))):
            with atomic_path(self._file(number)) as aside, pq.ParquetWriter(aside, CLIPS) as writer:
                for task in tasks:
                    writer.write_table(pa.Table.from_pylist(task, schema=CLIPS), row_group_size=rows_per_task)
                    num_tasks, num_clips = num_tasks + 1, num_clips + len(task)
        return num_tasks, num_clips

    def rows(self, task: int) -> list[Row]:
        """The rows of one task."""
        with parquet_file(self._file(task // _TASKS_PER_FILE)) as file:
            rows: list[Row] = file.read_row_group(task % _TASKS_PER_FILE).to_pylist()
        return rows

    def _file(self, number: int) -> Location:
        return self.folder / f"clips-{number:05d}.parquet"


def _files(tasks: Iterator[list[Row]]) -> Iterator[Iterator[list[Row]]]:
    """Tasks in groups of a file each, without holding one."""
    for first in tasks:
        yield itertools.chain([first], itertools.islice(tasks, _TASKS_PER_FILE - 1))
