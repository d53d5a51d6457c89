"""Read and write JSON, Parquet and binary files, locally and in S3; every file is written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from engine.storage.paths import Location, Name, location


def open_binary(path: Name) -> BinaryIO:
    """Open a seekable file for reading; an object in S3 is read in ranges."""
    source = location(path)
    return source.open("rb") if isinstance(source, Path) else cast(BinaryIO, source.open())


def parquet_file(path: Location, *, read_dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file, to read only the columns and row groups that are needed.

    The texts of the columns ``read_dictionary`` are read as numbers into a list of the different ones.
    """
    source = path if isinstance(path, Path) else open_binary(path)
    return pq.ParquetFile(source, read_dictionary=list(read_dictionary))


def read_parquet(path: Location, *, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file; with ``schema``, only its columns, with its types."""
    with parquet_file(path) as file:
        table = file.read(columns=schema.names if schema is not None else None)
    return table.cast(schema) if schema is not None else table


@contextmanager
def atomic_path(path: Name) -> Iterator[Path]:
    """Give a temporary local path to write to; the file replaces ``path`` if the block ends without an error.

    Afterwards the file and its name are on the disk, so that a power cut leaves the old file or the new one.
    """
    target = location(path)
    if isinstance(target, Path):
        _make_folder(target.parent)
    handle, name = tempfile.mkstemp(dir=target.parent if isinstance(target, Path) else None, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not isinstance(target, Path):
            target.upload(temporary)
            return
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut too."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Write a file's bytes, or the names of the files in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Location) -> None:
    """Delete a folder and everything in it; what cannot be deleted stays."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError):
        folder.remove_all()


def remove_leftovers(folder: Location) -> None:
    """Delete the temporary files of killed writers in a folder; the caller must hold the folder's lock."""
    if isinstance(folder, Path):  # in S3 there are none
        for path in folder.glob(".*.????????"):
            if path.suffixes[-2:-1] in ([".parquet"], [".json"], [".yaml"], [".safetensors"], [".pt"]):
                path.unlink(missing_ok=True)


def write_bytes(path: Name, data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Name, value: object) -> None:
    """Write ``value`` as indented JSON, atomically; raises ``ValueError`` for NaN and infinity."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Name) -> Any:  # noqa: ANN401 - JSON is any shape
    """Read a JSON file; raises ``ValueError`` if it is not JSON."""
    try:
        return json.loads(location(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); delete it and run the step again") from None


def write_parquet(path: Name, table: pa.Table, *, rows_per_group: int = 64) -> None:
    """Write a table atomically, in small row groups so that a reader of one stem's audio reads little else.

    Binary columns are not compressed: they hold encoded audio, which would not get smaller.
    """
    others = [_column_path(field) for field in table.schema if not pa.types.is_binary(field.type)]
    compression = dict.fromkeys(table.schema.names, "none") | dict.fromkeys(others, "zstd")
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=rows_per_group, compression=compression, use_dictionary=others)


def _column_path(field: pa.Field) -> str:
    """The name that Parquet uses for the values of a column."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def sha256_file(path: Name) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
