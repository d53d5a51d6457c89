"""Rows of every kind of corpus, unchecked: CSV, JSONL and Parquet manifests, and folders by label."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from engine.corpus.clips import ManifestRow
from engine.storage.documents import MAX_DESCRIPTION_BYTES, parse_json
from engine.storage.files import open_binary, parquet_file
from engine.storage.paths import Location

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .au .caf .w64 .wma".split()
)
_MAX_LINE = 1 << 26  # characters of a line or a CSV cell: enough for any row, and an unclosed quote ends there
_CLIP_COLUMNS = (("path",), ("labels", "label"))


def _lines(path: Location) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark; ValueError for a line that no memory should hold."""
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            while line := file.readline(_MAX_LINE):
                if len(line) == _MAX_LINE:
                    raise ValueError(
                        f"lines of {str(path)!r} must have less than {_MAX_LINE:,} characters, got more; check it"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {str(path)!r} as UTF-8 text ({error}); convert it") from error


def csv_cells(path: Location, *, skip_spaces: bool = False) -> Iterator[list[str]]:
    """The cells of every line of a CSV file that is not empty."""
    csv.field_size_limit(_MAX_LINE)
    reader = csv.reader(_lines(path), skipinitialspace=skip_spaces, strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        cause = f"near line {reader.line_num}: {error}"
        raise ValueError(f"cannot read {str(path)!r} as CSV ({cause}); check its quotes") from error


def _require_columns(columns: Collection[str], path: Location, required: Sequence[tuple[str, ...]]) -> None:
    for names in required:
        if not any(name in columns for name in names):
            raise ValueError(
                f"{str(path)!r} must have a column {' or '.join(names)}, got {sorted(columns)}; rename one"
            )


def csv_rows(path: Location, required: Sequence[tuple[str, ...]] = _CLIP_COLUMNS) -> Iterator[ManifestRow | ValueError]:
    """Rows of a CSV with a header; ValueError without one column of each group in ``required``."""
    table = csv_cells(path)
    header = [name.strip() for name in next(table, [])]
    if header and header[0].startswith("#"):
        raise ValueError(f"cannot read the class codes of {str(path)!r}; give class_map (index,mid,display_name)")
    _require_columns(header, path, required)
    for cells in table:
        row: ManifestRow = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            rule = f"a row must have at most {len(header)} cells, one for each column"
            row["error"] = ValueError(f"{rule}, got {len(cells)}; quote cells with commas")
        yield row


def _jsonl_rows(path: Location) -> Iterator[ManifestRow | ValueError]:
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, most=MAX_DESCRIPTION_BYTES, any_number=True)
        except ValueError as error:
            yield ValueError(f"cannot read line {number} as JSON ({error}); correct it")
            continue
        if isinstance(row, dict):
            columns.update(row)
            yield row
        else:
            yield ValueError(f"each line must be a JSON object, got {line[:80]!r} in line {number}; correct it")
    if columns:
        _require_columns(columns, path, _CLIP_COLUMNS)


def _parquet_rows(path: Location) -> Iterator[ManifestRow | ValueError]:
    try:
        with parquet_file(path) as file:
            _require_columns(file.schema_arrow.names, path, _CLIP_COLUMNS)
            names = [n for n in ("path", "labels", "label", "start_s", "end_s") if n in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot read {str(path)!r} as Parquet ({error}); write it again") from error


MANIFEST_READERS = {".csv": csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
"""Readers of manifests by suffix."""


def audio_files(root: Location) -> Iterator[str]:
    """Audio files below ``root`` by suffix, without hidden ones, as sorted relative paths."""
    for file in _local_files(root) if isinstance(root, Path) else root.files():
        is_hidden = any(name.startswith(".") for name in file.split("/"))
        if not is_hidden and posixpath.splitext(file)[1].lower() in AUDIO_SUFFIXES:
            yield file


def _local_files(folder: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files first, then folders; links are followed, but not to a folder that the link is in."""
    try:
        status = folder.stat()
        with os.scandir(folder) as listing:
            entries = sorted((entry.name, _is_folder(entry)) for entry in listing)
    except OSError as error:
        raise ValueError(f"cannot read folder {str(folder)!r} ({error}); check its permissions") from error
    if (identity := (status.st_dev, status.st_ino)) in above:
        return
    yield from (inside + name for name, is_folder in entries if not is_folder)
    for name, is_folder in entries:
        if is_folder and not name.startswith("."):
            yield from _local_files(folder / name, f"{inside}{name}/", above | {identity})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def folder_rows(root: Location) -> Iterator[ManifestRow | ValueError]:
    """One row for each audio file, labelled by its folder; files directly in ``root`` have no label and so fail."""
    for path in audio_files(root):
        label, slash, _ = path.partition("/")
        yield {"path": path, "label": label if slash else ""}
