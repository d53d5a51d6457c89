"""Single-source clips: recordings that hold one labelled sound each."""

from __future__ import annotations

import contextlib
import functools
import os
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import pyarrow as pa

from engine.corpus.clips import ManifestRow, path_of
from engine.corpus.columns import Columns
from engine.corpus.contents import claim_contents, contents_of
from engine.corpus.labels import label_of
from engine.corpus.roots import Root, find, resolve
from engine.corpus.rows import folder_rows, manifest_rows
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, is_s3

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
        names = [unicodedata.normalize("NFC", name) for name in self.names]
        rows = zip(names, self.labels, contents_of(self.table["path"].to_pylist()), strict=True)
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


def read_sources(
    path: Name,
    *,
    folds: Collection[int] | None = None,
    audio_root: Name | None = None,
    columns: Mapping[str, str] | str | None = None,
    allow_outside: bool = False,
) -> SourceClips:
    """Read single-source clips from a CSV (or JSONL or Parquet) list, or from a folder with a subfolder for each label.

    The list has columns path, label and optionally fold (0 if absent), or others that ``columns`` names; the rest is
    ignored. ``folds`` keeps only clips of these folds. ``audio_root``, ``columns`` and ``allow_outside`` are those of
    :func:`read_corpus`.

    Raises ValueError for a missing file or column, for a bad row, and if no clip is in ``folds``.

    >>> clips = cs.read_sources("clips.csv", columns="path=path,label=label")
    >>> len(clips)
    4
    """
    source = find(path)
    if not source.exists():
        raise ValueError(f"sources must be a CSV or folder, got {str(source)!r} which does not exist; check the path")
    is_folder = source.is_dir()
    folder = find(audio_root) if audio_root is not None else source if is_folder else source.parent
    root = Root(str(folder), is_confined=not is_folder and not allow_outside)
    rows = folder_rows(source) if is_folder else manifest_rows(source, Columns(columns), ("path",), ("label",))
    sources = [_source_row(row, root, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not sources:
        raise ValueError(f"sources must have at least one row, got none in {str(path)!r}; add clips")
    kept = [row for row in sources if folds is None or row["fold"] in folds]
    if not kept:
        known = sorted({row["fold"] for row in sources})
        raise ValueError(f"folds must include one of {known}, got {list(folds or [])} for {path}; choose other folds")
    return SourceClips(pa.Table.from_pylist(kept, schema=SOURCES), str(root))


def _source_row(row: ManifestRow | ValueError, root: Root, where: str) -> SourceRow:
    try:
        if isinstance(row, ValueError):
            raise row
        if isinstance(row.get("error"), ValueError):
            raise row["error"]  # type: ignore[misc]
        path, label = path_of(row), label_of(row.get("label"))
        if not label:
            raise ValueError("a source must have a label, got none; fill in label")
        root.require_inside(path)
        return {"path": resolve(root, path), "label": label, "fold": _fold_of(row.get("fold"))}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fold_of(value: object) -> int:
    """The fold in a cell, 0 if it is empty; 1.0 is 1, as programs write it that know of missing folds."""
    text = str(value if value is not None else "").strip()
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text or 0)
        if number == int(number) and abs(number) < 2**31:
            return int(number)
    raise ValueError(f"fold must be a whole number or empty, got {text[:40]!r}; correct the row")


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
