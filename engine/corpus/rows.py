"""Rows of every kind of corpus, unchecked: CSV, JSONL and Parquet manifests, and folders by label."""

from __future__ import annotations

import csv
import io
import itertools
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from engine.corpus.clips import ManifestRow
from engine.corpus.columns import Columns
from engine.corpus.labels import MAX_LABELS, separator_of
from engine.schema import MAX_TEXT
from engine.storage.documents import MAX_DESCRIPTION_BYTES, parse_json
from engine.storage.files import open_binary, parquet_file
from engine.storage.paths import Location

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .au .caf .w64 .wma".split()
)
_MAX_CELL = 1 << 26  # characters of a CSV cell: enough for any list of labels, and an unclosed quote ends there
_BATCH_ROWS = 64  # of a Parquet file, whose cells may be far larger than the file
_COLUMN_NAME = re.compile(r"[\w .;|\t-]{1,80}")  # other text is of a file that is no list, and not shown
_CLIP_COLUMNS = (("path",), ("labels", "label"))
Required = Sequence[tuple[str, ...]]
"""Columns that a list must have: one of each group."""


def _lines(path: Location) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark; ValueError for a line that no memory should hold."""
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            while line := file.readline(_MAX_CELL + 1):
                if len(line) > _MAX_CELL:
                    raise ValueError(
                        f"a line must have at most {_MAX_CELL} characters, got more in {str(path)!r}; cut it"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {str(path)!r} as UTF-8 text ({error}); convert it") from error


def csv_cells(path: Location, *, skip_spaces: bool = False) -> Iterator[list[str]]:
    """The cells of every line of a CSV file that is not empty."""
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(_lines(path), skipinitialspace=skip_spaces, strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        cause = f"near line {reader.line_num}: {error}"
        raise ValueError(f"cannot read {str(path)!r} as CSV ({cause}); check its quotes") from error


def _require_columns(columns: Collection[str], path: Location, required: Required) -> None:
    for names in required:
        if not any(name in columns for name in names):
            found = [name for name in sorted(columns) if _COLUMN_NAME.fullmatch(name)][:20]
            raise ValueError(
                f"{str(path)!r} must have a column {' or '.join(names)}, got {found}; rename one, or name it with "
                f"--columns {names[0]}=COLUMN"
            )


def csv_rows(path: Location, required: Required = _CLIP_COLUMNS) -> Iterator[ManifestRow | ValueError]:
    """Rows of a CSV; ValueError without one column of each group in ``required``.

    It has a header, unless all required columns are numbers: these count its columns from 1.
    """
    table = csv_cells(path)
    header = [name.strip() for name in next(table, [])]
    if all(name.isdecimal() for names in required for name in names):
        table = itertools.chain([header] if header else [], table)
        header = [str(number) for number in range(1, len(header) + 1)]
    if header and header[0].startswith("#"):
        raise ValueError(f"cannot read the class codes of {str(path)!r}; give class_map (index,mid,display_name)")
    _require_columns(header, path, required)
    for cells in table:
        row: ManifestRow = dict(zip(header, map(str.strip, cells), strict=False))
        if len(cells) > len(header):
            rule = f"a row must have at most {len(header)} cells, one for each column"
            row["error"] = ValueError(f"{rule}, got {len(cells)}; quote cells with commas")
        yield row


def _jsonl_rows(path: Location, required: Required) -> Iterator[ManifestRow | ValueError]:
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if len(line) > MAX_DESCRIPTION_BYTES:
            yield ValueError(
                f"a row must have at most {MAX_DESCRIPTION_BYTES} characters, got {len(line)} in line {number}; cut it"
            )
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
            yield ValueError(
                f"each line must be a JSON object, got a {type(row).__name__} in line {number}; correct it"
            )
    if columns:
        _require_columns(columns, path, required)


def _parquet_rows(path: Location, required: Required) -> Iterator[ManifestRow | ValueError]:
    try:
        with parquet_file(path) as file:
            columns = [file.schema.column(number) for number in range(len(file.schema))]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
            _require_columns(file.schema_arrow.names, path, required)
            wanted = {"path", "labels", "label", "start_s", "end_s", "fold"}.union(*required)
            names = [name for name in file.schema_arrow.names if name in wanted]
        # Equal texts stay one: a file of some KiB may repeat a text until no memory has room for it.
        with parquet_file(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                yield from _short_rows(pa.RecordBatch.from_arrays(list(map(_short_texts, batch.columns)), names))
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot read {str(path)!r} as Parquet ({error}); write it again") from error


def _short_texts(column: pa.Array) -> pa.Array:
    """A column whose texts are cut after the first character that is too many, for the checks that follow."""
    if isinstance(column, pa.ListArray):
        return pa.ListArray.from_arrays(column.offsets, _short_texts(column.values), mask=column.is_null())
    if not isinstance(column, pa.DictionaryArray) or not pa.types.is_string(column.dictionary.type):
        return column
    texts = pc.utf8_slice_codeunits(column.dictionary, 0, MAX_TEXT + 1)
    return pa.DictionaryArray.from_arrays(column.indices, texts)


def _short_rows(batch: pa.RecordBatch) -> Iterator[ManifestRow | ValueError]:
    """The rows of a batch; a row with a list of too many items is an error before it becomes Python objects."""
    lengths = [pc.list_value_length(column).to_pylist() for column in batch.columns if pa.types.is_list(column.type)]
    begin = 0
    for number in range(len(batch)):
        num_items = max((length[number] or 0 for length in lengths), default=0)
        if num_items > MAX_LABELS:
            yield from batch.slice(begin, number - begin).to_pylist()
            yield ValueError(f"a clip must have at most {MAX_LABELS} labels, got {num_items}; check the row")
            begin = number + 1
    yield from batch.slice(begin).to_pylist()


_READERS = {".csv": csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def manifest_rows(path: Location, columns: Columns, *groups: tuple[str, ...]) -> Iterator[ManifestRow | ValueError]:
    """Rows of a CSV, JSONL or Parquet list under this project's names; it must have a column of each of ``groups``.

    It is read twice: how the labels in a cell are separated is decided for the whole column.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"a manifest must end in {', '.join(_READERS)}, got {path.suffix!r}; convert it")

    def read() -> Iterator[ManifestRow | ValueError]:
        rows = reader(path, columns.required(*groups))
        return (columns.taken(row) if isinstance(row, dict) else row for row in rows)

    separator = separator_of(row.get("labels") for row in read() if isinstance(row, dict))
    return ({**row, "separator": separator} if isinstance(row, dict) else row for row in read())


def audio_files(root: Location) -> Iterator[str]:
    """Audio files below ``root`` by suffix, without hidden ones, as sorted relative paths."""
    for file in _local_files(root) if isinstance(root, Path) else root.files():
        is_hidden = any(name.strip(".") and name.startswith(".") for name in file.split("/"))
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
    """One row for each audio file, labelled by its folder; files directly in ``root`` have no label.

    In S3 a key may have empty parts and dots for parts, which name nothing.
    """
    for path in audio_files(root):
        folders = [name for name in path.split("/")[:-1] if name.strip(".")]
        yield {"path": path, "label": folders[0] if folders else ""}
