"""TODO engine/corpus/sources.py."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from engine.corpus.clips import _path, _Row, _text, resolve
from engine.corpus.rows import _csv_rows, _folder_rows
from engine.storage.paths import Name, location

SOURCES = pa.schema([("path", pa.string()), ("label", pa.string()), ("fold", pa.int32())])


def read_sources(path: Name, *, folds: Collection[int] | None = None) -> pa.Table:
    """Single-source clips as ``SOURCES`` (absolute path, label, fold) from a CSV or a folder by label.

    The CSV has columns path, label and optionally fold (0 where absent); others are ignored.

    Raises ValueError for a missing file or column, a bad row, and folds that no row is in.
    """
    place = location(path)
    if not place.exists():
        raise ValueError(f"sources are a CSV or folder that exists, not {str(place)!r}: check the path")
    root = source_root(path)
    rows = _folder_rows(place) if place.is_dir() else _csv_rows(place, required=[("path",), ("label",)])
    sources = [_source_row(row, root, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not sources:
        raise ValueError(f"sources have at least one row, {str(path)!r} has none: add clips")
    kept = [row for row in sources if folds is None or row["fold"] in folds]
    if not kept:
        known = sorted({row["fold"] for row in sources})  # type: ignore[type-var]
        raise ValueError(f"some row is in the folds asked, none in {list(folds or [])}: {path} has folds {known}")
    return pa.Table.from_pylist(kept, schema=SOURCES)


def source_root(path: Name) -> str:
    """The folder that relative paths in a list start from: the list's own, or the folder itself."""
    place = location(path)
    return str(place if place.is_dir() else place.parent)


def _source_row(row: _Row | ValueError, root: str, where: str) -> _Row:
    try:
        if isinstance(row, ValueError):
            raise row
        if isinstance(row.get("error"), ValueError):
            raise row["error"]  # type: ignore[misc]
        path, label, fold = _path(row), _text(row.get("label"), "label").strip(), row.get("fold") or 0
        if not label:
            raise ValueError("a source has a label, this row has none: fill label")
        return {"path": resolve(root, path), "label": label, "fold": int(str(fold))}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def part_of(sources: pa.Table, part: int, num_parts: int, *, inside: bool = True) -> pa.Table:
    """The rows of one of ``num_parts`` parts of each label's clips, or all others.

    In the order of their paths, so that what was cut of one recording and is named alike stays together for the most.
    """
    order = sources.append_column("row", pa.array(range(len(sources)))).sort_by(
        [("label", "ascending"), ("path", "ascending")]
    )
    by_label: dict[str, list[int]] = {}
    for row in order.select(["label", "row"]).to_pylist():
        by_label.setdefault(row["label"], []).append(row["row"])
    chosen = {row for rows in by_label.values() for row in np.array_split(rows, num_parts)[part].tolist()}
    return sources.filter(pa.array([(row in chosen) == inside for row in range(len(sources))]))
