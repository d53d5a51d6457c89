"""TODO engine/corpus/rows.py."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from engine.corpus.clips import _Row
from engine.storage.files import open_binary, parquet_file
from engine.storage.paths import Location

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .au .caf .w64 .wma".split()
)
_MAX_CELL = 1 << 26  # of a CSV: a quote that is never closed ends there, a long list of labels does not


def _lines(path: Location) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark."""
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"a manifest is UTF-8 text, {str(path)!r} is not ({error}): convert it") from error


def _cells(path: Location, *, skip_spaces: bool = False) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(_lines(path), skipinitialspace=skip_spaces, strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is no CSV near line {reader.line_num} ({error}): check its quotes") from error


_CLIP_COLUMNS = [("path",), ("labels", "label")]


def _check_columns(columns: Collection[str], path: Location, required: list[tuple[str, ...]]) -> None:
    for names in required:
        if not any(name in columns for name in names):
            raise ValueError(f"{str(path)!r} needs a column {' or '.join(names)}, it has {sorted(columns)}: rename one")


def _csv_rows(path: Location, required: list[tuple[str, ...]] = _CLIP_COLUMNS) -> Iterator[_Row | ValueError]:
    table = _cells(path)
    header = [name.strip() for name in next(table, [])]
    if header and header[0].startswith("#"):
        raise ValueError(f"AudioSet's CSV {str(path)!r} names classes by code: give class_map (index,mid,display_name)")
    _check_columns(header, path, required)
    for cells in table:
        row: _Row = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            row["error"] = ValueError(f"{len(cells)} cells under {len(header)} columns: quote cells with commas")
        yield row


def _jsonl_rows(path: Location) -> Iterator[_Row | ValueError]:
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"each line is one JSON object, line {number} is not ({error}): correct it")
            continue
        if isinstance(row, dict):
            columns.update(row)
            yield row
        else:
            yield ValueError(f"each line is one JSON object, line {number} is {line[:80]!r}: correct it")
    if columns:
        _check_columns(columns, path, _CLIP_COLUMNS)


def _parquet_rows(path: Location) -> Iterator[_Row | ValueError]:
    try:
        with parquet_file(path) as file:
            _check_columns(file.schema_arrow.names, path, _CLIP_COLUMNS)
            names = [n for n in ("path", "labels", "label", "start_s", "end_s") if n in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is no Parquet file ({error}): write it again") from error


_MANIFESTS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _audio_files(root: Location) -> Iterator[str]:
    """Audio files below ``root`` by suffix, hidden ones left out, as sorted relative paths."""
    for file in _local_files(root) if isinstance(root, Path) else root.files():
        hidden = any(part.startswith(".") for part in file.split("/"))
        if not hidden and posixpath.splitext(file)[1].lower() in AUDIO_SUFFIXES:
            yield file


def _local_files(folder: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files first, then folders; links are followed, but not to a folder that the link is in."""
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted((entry.name, _is_folder(entry)) for entry in found)
    except OSError as error:
        raise ValueError(f"a corpus's folders can be read, {str(folder)!r} cannot ({error}): check it") from error
    if (identity := (status.st_dev, status.st_ino)) in above:
        return
    yield from (inside + name for name, is_folder in entries if not is_folder)
    for name, is_folder in entries:
        if is_folder and not name.startswith("."):
            yield from _local_files(folder / name, f"{inside}{name}/", above | {identity})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _folder_rows(root: Location) -> Iterator[_Row | ValueError]:
    """Files directly in the folder become rows without a label: accounted for, not guessed."""
    for path in _audio_files(root):
        label, slash, _ = path.partition("/")
        yield {"path": path, "label": label if slash else ""}
