"""A corpus on disk: its clips sorted by id, and its failures, in memory that does not grow with the number of rows."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.schema import CLIPS, FAILURES, ClipRow, FailureRow, failure
from engine.storage.files import temporary_folder

_ROWS_IN_MEMORY = 50_000
_BATCH_ROWS = 2_000
_NUMBERED = pa.schema([*CLIPS, pa.field("row", pa.int64(), nullable=False)])
_FILES = pa.schema([CLIPS.field("path")])
_Row = TypeVar("_Row")


class NumberedRow(ClipRow):
    """A clip and its position in the manifest."""

    row: int
    """Number of the row, from 1."""


class _Spill:
    """Rows added in any order, written to files of limited size; read back in order of some columns, if there are."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, *, order: Sequence[str] = ()) -> None:
        self._folder, self._name, self._schema, self._order = folder, name, schema, order
        self._rows: list[Any] = []
        self._files: list[Path] = []

    def add(self, row: Mapping[str, object]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROWS_IN_MEMORY:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        if self._order:
            table = table.sort_by([(name, "ascending") for name in self._order])
        file = self._folder / f"{self._name}-{len(self._files):05d}.parquet"
        pq.write_table(table, file, row_group_size=_BATCH_ROWS)
        self._files.append(file)
        self._rows = []

    def tables(self) -> Iterator[pa.Table]:
        """The rows in the order of the files."""
        self._flush()
        for file in self._files:
            yield from _batches(file)

    def merged(self) -> Iterator[Any]:
        """The rows in their order."""
        self._flush()
        runs = (itertools.chain.from_iterable(map(pa.Table.to_pylist, _batches(file))) for file in self._files)
        return heapq.merge(*runs, key=operator.itemgetter(*self._order))

    def remove(self) -> None:
        for file in self._files:
            file.unlink()
        self._files = []


def _batches(file: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            yield pa.Table.from_batches([batch])


class Corpus:
    """Clips, and failures for the rows that are no clips; together they are the rows of the source.

    They are in a temporary folder of this machine, which is deleted together with this object.
    """

    root: str
    """Absolute folder (or address) that relative paths start from."""
    num_clips: int
    num_failures: int
    num_failed_queries: int
    """Labels of the failures, at least one for each."""
    labels_move: bool
    """True if labels of the clips may move: a pass stores the evidence for that."""
    fingerprint: str
    """Sixteen hexadecimal digits of the clips' ids: independent of their order."""

    def __init__(self, root: str) -> None:
        self.root, self.fingerprint, self.labels_move = root, "", False
        self.num_clips = self.num_failures = self.num_failed_queries = 0
        folder = temporary_folder("clearsep-corpus-", owner=self)
        self._incoming = _Spill(folder, "incoming", _NUMBERED, order=("clip_id", "row"))
        self._failures = _Spill(folder, "failures", FAILURES)
        self._folder, self._sorted = folder, folder / "clips.parquet"

    def add_clip(self, row: NumberedRow) -> None:
        """Add a clip."""
        self.labels_move |= row.get("num_tentative") is not None
        self._incoming.add(row)

    def add_failure(self, row: FailureRow) -> None:
        """Add a row that is no clip."""
        self._failures.add(row)
        self.num_failures += 1
        self.num_failed_queries += row["num_queries"]

    def close(self) -> None:
        """Sort the clips; a clip that occurs again is a failure."""
        digest, before = hashlib.sha256(), None
        with pq.ParquetWriter(self._sorted, _NUMBERED) as writer:
            for rows in chunks(self._incoming.merged(), _BATCH_ROWS):
                fresh = []
                for row in rows:
                    if row["clip_id"] == before:
                        rule = "every clip must be in a corpus once"
                        error = ValueError(f"{rule}, got row {row['row']} which repeats one; remove it")
                        self.add_failure(failure(row, step="manifest", error=error, is_cut=False))
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

    def sorted_clips(self, *, min_labels: int = 1) -> Iterator[ClipRow]:
        """The clips with enough labels in the order of their ids, read a few at a time."""
        for table in _batches(self._sorted):
            yield from (row for row in table.select(CLIPS.names).to_pylist() if len(row["labels"]) >= min_labels)

    def labels(self, *, min_labels: int = 1) -> list[str]:
        """The different labels of the clips with enough labels, in order, read a few clips at a time."""
        found: set[str] = set()
        for table in _batches(self._sorted):
            kept = table.filter(pc.greater_equal(pc.list_value_length(table["labels"]), min_labels))
            found.update(pc.unique(pc.list_flatten(kept["labels"])).to_pylist())
        return sorted(found)

    def files(self, *, min_labels: int = 1) -> Iterator[str]:
        """The paths of the clips with enough labels, in order and once each, read a few at a time."""
        spill = _Spill(self._folder, "files", _FILES, order=("path",))
        for table in _batches(self._sorted):
            kept = table.filter(pc.greater_equal(pc.list_value_length(table["labels"]), min_labels))
            for path in pc.unique(kept["path"]).to_pylist():
                spill.add({"path": path})
        yield from (path for path, _ in itertools.groupby(row["path"] for row in spill.merged()))
        spill.remove()

    @property
    def failures(self) -> pa.Table:
        """All failures (schema ``FAILURES``), in memory."""
        return pa.concat_tables([FAILURES.empty_table(), *self.failure_tables()])

    def failure_tables(self) -> Iterator[pa.Table]:
        """The failures (schema ``FAILURES``), in tables of limited size."""
        for table in self._failures.tables():
            yield table.cast(FAILURES)


def chunks(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows in lists of ``size``, the last possibly shorter."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
