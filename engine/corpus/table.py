"""The rows of a corpus on disk: sorted by clip id however many they are, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.schema import CLIPS, FAILURES
from engine.storage.files import atomic_path
from engine.storage.paths import Location

Row = dict[str, Any]

_ROWS_IN_MEMORY = 50_000
_BATCH_ROWS = 2_000
_NUMBERED = pa.schema([*CLIPS, pa.field("row", pa.int64(), nullable=False)])  # its place in the manifest


class Spill:
    """Rows put down in any order, a file whenever there are many; read back in the order of a key."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._rows: list[Row] = []
        self._files: list[Path] = []

    def add(self, row: Row) -> None:
        """Take one more row."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory, sorted where the schema is of clips."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        if self._schema is _NUMBERED:
            table = table.sort_by([("clip_id", "ascending"), ("row", "ascending")])
        file = self._folder / f"{self._name}-{len(self._files):05d}.parquet"
        pq.write_table(table, file, row_group_size=_BATCH_ROWS)
        self._files.append(file)
        self._rows = []

    def tables(self) -> Iterator[pa.Table]:
        """The files' batches, one file after another."""
        self.flush()
        for file in self._files:
            yield from _batches(file)

    def merged(self) -> Iterator[Row]:
        """All rows in the order of clip id and row."""
        self.flush()
        runs = (itertools.chain.from_iterable(map(pa.Table.to_pylist, _batches(file))) for file in self._files)
        return heapq.merge(*runs, key=lambda row: (row["clip_id"], row["row"]))

    def remove(self) -> None:
        """Delete the files."""
        for file in self._files:
            file.unlink()
        self._files = []


def _batches(file: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            yield pa.Table.from_batches([batch])


class Corpus:
    """Clips and the rows that could not become one; together they are the rows of the source.

    They lie in a temporary folder of this machine, which goes when this object does.
    """

    root: str
    """Absolute folder (or address) that relative paths start from."""
    num_clips: int
    num_failures: int
    fingerprint: str
    """Of the clips' ids."""

    def __init__(self, root: str) -> None:
        self.root, self.num_clips, self.num_failures, self.fingerprint = root, 0, 0, ""
        folder = Path(tempfile.mkdtemp(prefix="clearsep-corpus-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._incoming = Spill(folder, "incoming", _NUMBERED)
        self._failures = Spill(folder, "failures", FAILURES)
        self._sorted = folder / "clips.parquet"

    def add_clip(self, row: Row) -> None:
        """Put down a row of ``CLIPS`` and its ``row``."""
        self._incoming.add(row)

    def add_failure(self, row: Row) -> None:
        """Put down a row of ``FAILURES``."""
        self._failures.add(row)
        self.num_failures += 1

    def close(self, repeated: Any) -> None:  # noqa: ANN401 - a function of a row
        """Sort the clips; a clip that comes again is a failure, which ``repeated`` makes of its row."""
        digest, before = hashlib.sha256(), None
        with pq.ParquetWriter(self._sorted, _NUMBERED) as writer:
            for rows in _chunks(self._incoming.merged(), _BATCH_ROWS):
                fresh = []
                for row in rows:
                    if row["clip_id"] == before:
                        self.add_failure(repeated(row))
                        continue
                    before = row["clip_id"]
                    digest.update(before.encode())
                    fresh.append(row)
                self.num_clips += len(fresh)
                writer.write_table(pa.Table.from_pylist(fresh, schema=_NUMBERED))
        self._incoming.remove()
        self.fingerprint = digest.hexdigest()[:16]

    @property
    def clips(self) -> pa.Table:
        """All clips (schema ``CLIPS``) in the order of the source, in memory."""
        return pq.read_table(self._sorted).sort_by("row").select(CLIPS.names).cast(CLIPS)

    def sorted_clips(self) -> Iterator[pa.Table]:
        """The clips in the order of their ids, some at a time."""
        for table in _batches(self._sorted):
            yield table.select(CLIPS.names).cast(CLIPS)

    @property
    def failures(self) -> pa.Table:
        """All failures (schema ``FAILURES``), in memory."""
        return pa.concat_tables([FAILURES.empty_table(), *self.failure_tables()])

    def failure_tables(self) -> Iterator[pa.Table]:
        """The failures, some at a time."""
        for table in self._failures.tables():
            yield table.cast(FAILURES)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def write_failures(path: Location, tables: Iterable[pa.Table]) -> None:
    """Write failure rows, some at a time."""
    with atomic_path(path) as aside, pq.ParquetWriter(aside, FAILURES) as writer:
        for table in tables:
            writer.write_table(table)
