"""The index of a pass: identity and scores of its stems without their audio, and Parquet files of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.passes.shards import read_columns
from engine.schema import ESTIMATES, SCORES, STEMS
from engine.selection.filter import VERDICT
from engine.storage.paths import Location

INDEX = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # file name in the folder of the stems
        pa.field("row", pa.int32(), nullable=False),  # row of the stem in that file
        pa.field("first_row", pa.int32(), nullable=False),  # row of the first stem of its clip
        pa.field("num_stems", pa.int32(), nullable=False),  # stems of its clip
        *(STEMS.field(name) for name in ("clip_id", "path", "labels", "label", "sample_rate_hz", "num_samples")),
        *SCORES,
        *ESTIMATES,
    ]
)
"""Columns of every stem of a pass."""
KEPT = pa.schema([*INDEX, VERDICT.field("kept_by_floor")])
"""Columns of ``kept.parquet``."""
REJECTED = pa.schema([*INDEX, *(VERDICT.field(f"rejected_{name}") for name in ("by", "value", "limit"))])
"""Columns of ``rejected.parquet``."""
_ROWS_PER_GROUP = 16_384


def read_index(shards: Iterable[Location]) -> Iterator[pa.Table]:
    """One table of ``INDEX`` for each shard of a pass; scores that the pass did not compute are null."""
    columns = [name for name in INDEX.names if name in STEMS.names]
    for shard in shards:
        table = read_columns(shard, columns)
        first, count = _clips(table["clip_id"].to_pylist())
        values = {"shard": [shard.name] * len(table), "row": range(len(table)), "first_row": first, "num_stems": count}
        arrays = {field.name: pa.nulls(len(table), field.type) for field in INDEX if field.name not in values}
        arrays |= {name: pa.array(column, INDEX.field(name).type) for name, column in values.items()}
        arrays |= {name: table[name] for name in table.column_names}
        yield pa.table({name: arrays[name] for name in INDEX.names}, schema=INDEX)


def _clips(clip_ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """For every row the first row and the number of rows of its clip, whose rows are adjacent."""
    first: list[int] = []
    for row, clip_id in enumerate(clip_ids):
        first.append(first[-1] if row and clip_id == clip_ids[row - 1] else row)
    sizes = Counter(first)
    return first, [sizes[row] for row in first]


class IndexWriter:
    """Writes many small tables as one Parquet file with large row groups, because each group costs memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._writer = schema, pq.ParquetWriter(path, schema)
        self._tables: list[pa.Table] = []
        self._num_rows = 0

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, index: pa.Table, verdicts: pa.Table, keep: pa.ChunkedArray) -> pa.Table:
        """Write the rows where ``keep`` is true, with the columns of index and verdicts; returns them."""
        columns = {name: (verdicts if name in verdicts.column_names else index)[name] for name in self._schema.names}
        rows = pa.table(columns, schema=self._schema).filter(keep)
        self._tables.append(rows)
        self._num_rows += len(rows)
        if self._num_rows >= _ROWS_PER_GROUP:
            self._flush()
        return rows

    def _flush(self) -> None:
        if self._num_rows:
            self._writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._num_rows = [], 0
