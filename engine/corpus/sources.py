"""Single-source clips: recordings that hold one labelled sound each."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import pyarrow as pa

from engine.corpus.clips import ManifestRow, path_of, resolve, text_of
from engine.corpus.contents import claim_contents, contents_of
from engine.corpus.rows import csv_rows, folder_rows
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, is_s3, location

SOURCES = pa.schema([("path", pa.string()), ("label", pa.string()), ("fold", pa.int32())])

_CLIPS_FILE = "clean.parquet"


class SourceRow(TypedDict):
    """One row of ``SOURCES``."""

    path: str
    """Absolute path or address."""
    label: str
    fold: int


@dataclass(frozen=True)
class SourceClips:
    """Single-source clips, read and checked, for training, calibration and evaluation."""

    table: pa.Table
    """Rows of ``SOURCES``."""
    root: str
    """Folder or address that the list's relative paths start from."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> list[str]:
        """Label of every clip."""
        labels: list[str] = self.table["label"].to_pylist()
        return labels

    @property
    def names(self) -> list[str]:
        """Path of every clip, relative to the root; the address of one in another place in S3."""
        inside = self.root.rstrip("/") + "/"
        return [
            path.removeprefix(inside) if path.startswith(inside) or is_s3(path) else os.path.relpath(path, self.root)
            for path in self.table["path"].to_pylist()
        ]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all labels, contents and paths relative to the root, so the folder may move."""
        rows = zip(self.names, self.labels, contents_of(self.table["path"].to_pylist()), strict=True)
        return fingerprint(list(rows))

    def claim(self, record: Location, *, what: str) -> None:
        """Store the clips' contents in ``record`` (Parquet), or raise ``ValueError`` that names those that changed."""
        claim_contents(record, self.root, sorted(set(self.names)), what=what)

    def keep_with(self, folder: Location) -> None:
        """Store the clips' contents with a model that was trained on them, for :meth:`require_same_as`."""
        (folder / _CLIPS_FILE).unlink(missing_ok=True)
        self.claim(folder / _CLIPS_FILE, what=f"clips of {folder}")

    def require_same_as(self, folder: Location) -> None:
        """Raise ``ValueError`` that names the clips that differ from those of a model's training, if it kept them."""
        if (folder / _CLIPS_FILE).is_file():
            self.claim(folder / _CLIPS_FILE, what=f"clips of {folder}")

    def part(self, number: int, num_parts: int) -> SourceClips:
        """One of ``num_parts`` parts of each label's clips, counted from 0."""
        return replace(self, table=_part_of(self.table, number, num_parts))

    def without(self, number: int, num_parts: int) -> SourceClips:
        """All but one of ``num_parts`` parts of each label's clips."""
        return replace(self, table=_part_of(self.table, number, num_parts, inside=False))


def read_sources(path: Name, *, folds: Collection[int] | None = None) -> SourceClips:
    """Read single-source clips from a CSV, or from a folder with a subfolder for each label.

    The CSV has columns path, label and optionally fold (0 if absent); other columns are ignored. ``folds`` keeps only
    clips of these folds.

    Raises ValueError for a missing file or column, for a bad row, and if no clip is in ``folds``.
    """
    source = location(path)
    if not source.exists():
        raise ValueError(f"sources must be a CSV or folder, got {str(source)!r} which does not exist; check the path")
    root = str(source if source.is_dir() else source.parent)
    rows = folder_rows(source) if source.is_dir() else csv_rows(source, required=[("path",), ("label",)])
    sources = [_source_row(row, root, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not sources:
        raise ValueError(f"sources must have at least one row, got none in {str(path)!r}; add clips")
    kept = [row for row in sources if folds is None or row["fold"] in folds]
    if not kept:
        known = sorted({row["fold"] for row in sources})
        raise ValueError(f"folds must include one of {known}, got {list(folds or [])} for {path}; choose other folds")
    return SourceClips(pa.Table.from_pylist(kept, schema=SOURCES), root)


def _source_row(row: ManifestRow | ValueError, root: str, where: str) -> SourceRow:
    try:
        if isinstance(row, ValueError):
            raise row
        if isinstance(row.get("error"), ValueError):
            raise row["error"]  # type: ignore[misc]
        path, label, fold = path_of(row), text_of(row.get("label"), "label").strip(), row.get("fold") or 0
        if not label:
            raise ValueError("a source must have a label, got none; fill in label")
        return {"path": resolve(root, path), "label": label, "fold": int(str(fold))}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _part_of(sources: pa.Table, part: int, num_parts: int, *, inside: bool = True) -> pa.Table:
    """The rows of one of ``num_parts`` parts of each label's clips, or all other rows.

    Clips are divided in the order of their paths, so clips of one recording with similar names mostly stay together.
    """
    order = sources.append_column("row", pa.array(range(len(sources)))).sort_by(
        [("label", "ascending"), ("path", "ascending")]
    )
    by_label: dict[str, list[int]] = {}
    for row in order.select(["label", "row"]).to_pylist():
        by_label.setdefault(row["label"], []).append(row["row"])
    chosen = {row for rows in by_label.values() for row in np.array_split(rows, num_parts)[part].tolist()}
    return sources.filter(pa.array([(row in chosen) == inside for row in range(len(sources))]))
