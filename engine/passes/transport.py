"""Shards on the way from step to step; Ray Data carries each in a table of one row with one binary cell."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from engine.passes.records import ShardRecord
from engine.schema import DecodedClip, FailureRow, SeparatedClip

Counts = dict[str, float]
"""Counts and times of a shard so far, by their names in :class:`ShardRecord`; every step adds its own."""
_CELL = "shard"


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
    clips: list[SeparatedClip]
    failures: list[FailureRow]
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
    return pa.table({_CELL: pa.array([pickle.dumps(value)], pa.large_binary())})


def unpack(row: pa.Table | Mapping[str, bytes]) -> Any:  # noqa: ANN401 - any value that was packed
    """The value in such a table, or in its row as a mapping."""
    return pickle.loads(row[_CELL][0].as_py() if isinstance(row, pa.Table) else row[_CELL])  # noqa: S301 - our own
