"""Shards on the way from step to step; Ray Data carries each in a table of one row, its arrays in a cell of their own.

A shard is copied once when it is packed, into the one buffer of its arrays, and not at all when it is unpacked: arrays
of an unpacked shard cannot be written to.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engine.passes.records import ShardRecord
from engine.schema import DecodedClip, FailureRow

Counts = dict[str, float]
"""Counts and times of a shard so far, by their names in :class:`ShardRecord`; every step adds its own."""
_CELL, _ARRAYS, _ENDS = "shard", "arrays", "ends"
_ALIGNMENT = 64


class WorkerUse(NamedTuple):
    """Use of the worker that separated a shard."""

    worker: str
    """Host and device."""
    batch_fill_fraction: float
    """Fraction of the separator's batches that was audio, not padding."""
    vram_bytes: int
    """Largest GPU memory in use; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class DecodedShard:
    """A shard after decoding."""

    name: str
    clips: list[DecodedClip]
    failures: list[FailureRow]
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class SeparatedShard:
    """A shard after separation."""

    name: str
    clips: Iterable[Any]
    """:class:`engine.scoring.stored.ScoredClip`, or what a pass that does not separate makes of a clip.

    On a CPU they are scored one after the other when they are taken, so that few are in memory.
    """
    failures: list[FailureRow]
    """Complete when all clips are taken."""
    counts: Counts
    use: WorkerUse


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Report of a shard that is on disk, from the worker that wrote it to the process of the pass."""

    name: str
    record: ShardRecord
    failed: Mapping[tuple[str, str], int]
    """Failed queries by step and class of error."""
    use: WorkerUse


def pack(value: DecodedShard | SeparatedShard | ShardReport) -> pa.Table:
    """A table of one row that holds the value."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    ends = np.cumsum([0, *(-(-part.size // _ALIGNMENT) * _ALIGNMENT for part in parts)])
    arrays = np.empty(ends[-1], np.uint8)
    for first, part in zip(ends[:-1], parts, strict=True):
        arrays[first : first + part.size] = part
    sizes = [[int(end), int(first) + part.size] for (first, end), part in zip(pairwise(ends), parts, strict=True)]
    return pa.table(
        {
            _CELL: pa.array([data], pa.large_binary()),
            _ARRAYS: _one_cell(pa.py_buffer(arrays)),
            _ENDS: pa.array([[number for pair in sizes for number in pair]], pa.list_(pa.int64())),
        }
    )


def _one_cell(data: pa.Buffer) -> pa.Array:
    """An array of one value, without a copy."""
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def unpack(row: pa.Table | Mapping[str, Any]) -> Any:  # noqa: ANN401 - any value that was packed
    """The value in such a table, or in its row as a mapping."""
    if not isinstance(row, pa.Table):
        return pickle.loads(row[_CELL])  # noqa: S301 - our own; a report has no arrays
    arrays, first, buffers = memoryview(_value(row[_ARRAYS])), 0, []
    numbers = iter(row[_ENDS][0].as_py())
    for next_first, end in zip(numbers, numbers, strict=True):
        buffers.append(arrays[first:end])
        first = next_first
    return pickle.loads(_value(row[_CELL]), buffers=buffers)  # noqa: S301 - our own


def _value(column: pa.ChunkedArray) -> pa.Buffer:
    """The one value of a column, without the copy that a scalar is."""
    (array,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = array.buffers()
    first, end = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2].tolist()
    return data.slice(first, end - first) if data is not None else pa.py_buffer(b"")
