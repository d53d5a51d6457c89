"""The stems of a pass by column, kept and rejected: values of all of them, whole rows of few; no audio.

One column of all stems is in memory at a time, so that a pass of a million clips takes seconds.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import SCORES
from engine.selection.index import INDEX, KEPT, REJECTED, read_index
from engine.storage.files import parquet_file
from engine.storage.paths import Location

MOST_SHARDS = 1000
"""Shards of a pass without a selection that are read: evenly drawn, some 75,000 stems."""
_MOST_NAMED = 10  # shards that are left out
_Result = TypeVar("_Result")
_IDENTITY = ("shard", "row", "first_row", "num_stems", "clip_id", "path", "label", "sample_rate_hz", "num_samples")


class LeftOut:
    """Files that a report leaves out because they cannot be read, each with its error; shards of a pass by name."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def read(self, name: str, call: Callable[..., _Result], *given: object) -> _Result | None:
        """The result of a call that reads a file; null if it cannot be read."""
        try:
            return call(*given)
        except (OSError, ValueError) as error:  # DamagedError and what pyarrow raises are among them
            self.errors.setdefault(name, str(error))
            return None

    def notes(self, folder: Location, name: str) -> list[str]:
        """Sentences for the page about what is left out of ``name``, the pass or run in a folder."""
        shards = sorted(file for file in self.errors if file.startswith("shard-"))
        others = ((file, error) for file, error in self.errors.items() if file not in shards)
        found = [f"{file} of {name} cannot be read and is left out: {error}." for file, error in others]
        if not shards:
            return found
        more = f" and {len(shards) - _MOST_NAMED} more" if len(shards) > _MOST_NAMED else ""
        count = f"{len(shards)} shards of {name} are" if len(shards) > 1 else f"1 shard of {name} is"
        return [
            f"{count} damaged or missing, so that clips are left out: {', '.join(shards[:_MOST_NAMED])}{more}. "
            f"`clearsep inspect {folder}` lists all damaged files. `clearsep separate-corpus ... -o {folder}`, "
            "with the corpus, separator, tagger and settings of this pass, makes them again.",
            *found,
        ]


class StemRow(TypedDict, total=False):
    """A stem with its scores (float or null, by the names of ``SCORES`` and ``ESTIMATES``) and its verdict."""

    shard: str
    row: int
    first_row: int
    num_stems: int
    clip_id: str
    path: str
    label: str
    sample_rate_hz: int
    num_samples: int
    scores: dict[str, float | None]
    rejected_by: str | None
    """Null: kept, or not judged."""
    rejected_value: float | None
    rejected_limit: float | None
    kept_by_floor: bool | None


class _Table(Protocol):
    """Rows of stems, in a file or in memory."""

    def column(self, name: str) -> pa.ChunkedArray | None:
        """A column of all rows; null if there is none of this name."""

    def rows(self, numbers: Sequence[int]) -> list[StemRow]:
        """Some rows."""


class _File:
    """Rows of a Parquet file, such as ``kept.parquet``."""

    def __init__(self, path: Location) -> None:
        self._path = path

    def column(self, name: str) -> pa.ChunkedArray | None:
        """See ``_Table``; labels and rules are read as numbers into a list of the different ones."""
        texts = [name] if name in ("label", "rejected_by") else []
        try:
            with parquet_file(self._path, read_dictionary=texts) as file:
                return file.read(columns=[name])[name] if name in file.schema_arrow.names else None
        except KeyError:  # of a text that the file does not have
            return None

    def rows(self, numbers: Sequence[int]) -> list[StemRow]:
        """Read only the row groups that have the rows."""
        with parquet_file(self._path) as file:
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            groups = np.searchsorted(ends, numbers, side="right")
            tables = {int(group): file.read_row_group(int(group)) for group in np.unique(groups)}
        starts = {group: int(ends[group]) - len(table) for group, table in tables.items()}
        return [
            _stem_row(tables[int(group)].slice(number - starts[int(group)], 1))
            for number, group in zip(numbers, groups, strict=True)
        ]


class _Memory:
    """Rows of a table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def column(self, name: str) -> pa.ChunkedArray | None:
        """See ``_Table``."""
        return self._table[name] if name in self._table.column_names else None

    def rows(self, numbers: Sequence[int]) -> list[StemRow]:
        """See ``_Table``."""
        return [_stem_row(self._table.slice(number, 1)) for number in numbers]


def _stem_row(table: pa.Table) -> StemRow:
    values = table.to_pylist()[0]
    names = [name for name in INDEX.names if name not in (*_IDENTITY, "labels")]
    row: StemRow = {name: values[name] for name in _IDENTITY}  # type: ignore[assignment]
    row["scores"] = {name: values.get(name) for name in names}
    for name in (*REJECTED.names[-3:], KEPT.names[-1]):
        row[name] = values.get(name)  # type: ignore[literal-required]
    return row


class Numbered(NamedTuple):
    """The place of a stem: kept or rejected, and the number of its row among those."""

    is_kept: bool
    number: int


class Stems:
    """All stems of a pass; without a selection all are counted as kept and ``is_judged`` is false."""

    def __init__(self, kept: _Table, rejected: _Table, *, is_judged: bool, fraction: float = 1.0) -> None:
        self._kept, self._rejected = kept, rejected
        self.is_judged = is_judged
        self.fraction = fraction
        """Fraction of the pass's shards that are read."""

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A score of the kept and of the rejected stems as float32; NaN where it is undefined."""
        return _floats(self._kept.column(name)), _floats(self._rejected.column(name))

    def rejections(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rule, value and limit of every rejected stem."""
        rules = np.asarray(_texts(self._rejected.column("rejected_by")), object)
        value_N, limit_N = (_floats(self._rejected.column(f"rejected_{name}")) for name in ("value", "limit"))
        return rules, value_N, limit_N

    def by_label(self) -> dict[str, tuple[int, int]]:
        """Kept and rejected stems of every label."""
        kept, rejected = (_counts(table.column("label")) for table in (self._kept, self._rejected))
        return {label: (kept[label], rejected[label]) for label in sorted({*kept, *rejected})}

    def identities(self) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Clip and label of the kept and of the rejected stems."""
        kept, rejected = (
            set(zip(*(_texts(table.column(name)) for name in ("clip_id", "label")), strict=True))
            for table in (self._kept, self._rejected)
        )
        return kept, rejected

    def rows(self, places: Sequence[Numbered]) -> list[StemRow]:
        """Some stems, in the order of their places."""
        found: dict[Numbered, StemRow] = {}
        for is_kept, table in ((True, self._kept), (False, self._rejected)):
            wanted = sorted({place for place in places if place.is_kept is is_kept})
            found |= zip(wanted, table.rows([place.number for place in wanted]), strict=True) if wanted else ()
        return [found[place] for place in places]

    def places(self, clip_ids: Sequence[str]) -> list[Numbered]:
        """The places of all stems of some clips; clips that are not there are left out."""
        wanted, places = pa.array(clip_ids, pa.string()), []
        for is_kept, table in ((True, self._kept), (False, self._rejected)):
            column = table.column("clip_id")
            if column is not None and len(column):
                numbers = np.flatnonzero(pc.is_in(column, wanted).to_numpy())
                places += [Numbered(is_kept, int(number)) for number in numbers]
        return places

    def of_clips(self, clip_ids: Sequence[str]) -> dict[str, list[StemRow]]:
        """All stems of some clips, by clip, in the order of a clip's rows; clips that are not there are left out."""
        found: dict[str, list[StemRow]] = {}
        for row in sorted(self.rows(self.places(clip_ids)), key=lambda row: row["row"]):
            found.setdefault(row["clip_id"], []).append(row)
        return found


def _floats(column: pa.ChunkedArray | None) -> np.ndarray:
    if column is None:
        return np.zeros(0, np.float32)
    values: np.ndarray = pc.fill_null(column, np.nan).to_numpy().astype(np.float32)
    return values


def _texts(column: pa.ChunkedArray | None) -> list[str]:
    found: list[str] = column.to_pylist() if column is not None else []
    return found


def _counts(column: pa.ChunkedArray | None) -> Counter[str]:
    if column is None:
        return Counter()
    return Counter({one["values"]: one["counts"] for one in pc.value_counts(column).to_pylist()})


def open_stems(shards: Sequence[Location], tracks: Location | None, left_out: LeftOut) -> Stems:
    """The stems in the shards of a closed pass, by the selection in ``tracks`` if there is one."""
    if tracks is not None:
        return Stems(_File(tracks / "kept.parquet"), _File(tracks / "rejected.parquet"), is_judged=True)
    step = max(1, -(-len(shards) // MOST_SHARDS))
    some = shards[::step]
    tables = [left_out.read(shard.stem, next, read_index([shard])) for shard in some]
    table = pa.concat_tables([INDEX.empty_table(), *(table for table in tables if table is not None)])
    fraction = len(some) / len(shards) if shards else 1.0
    return Stems(_Memory(table), _Memory(REJECTED.empty_table()), is_judged=False, fraction=fraction)


@functools.cache
def score_names() -> tuple[str, ...]:
    """Names of all scores and of the estimate, the estimate first."""
    return ("estimated_si_sdr_db", *SCORES.names)
