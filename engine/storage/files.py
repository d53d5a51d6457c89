"""Files that appear whole or not at all, on a local or shared file system or in S3, and words for wrong names.

A *location* is a ``Path`` or an ``S3Path``: what is written for one works for the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from engine.storage.paths import Location, Name, location


def open_binary(path: Name) -> BinaryIO:
    """A file for reading, seekable; an object of S3 is read in ranges."""
    place = location(path)
    return place.open("rb") if isinstance(place, Path) else cast(BinaryIO, place.open())


class Watched(io.RawIOBase):
    """A file object that remembers the first error of a read: libsndfile takes an error for the end of the file.

    It seeks only before it reads, so that asking for the size costs the buffer below nothing.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__()
        self.name, self._file, self._at = name, file, 0
        self._num_bytes = file.seek(0, io.SEEK_END)
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        try:
            self._file.seek(self._at)
            data = self._file.read(len(buffer))
        except Exception as error:
            self.error = self.error or error
            raise
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def parquet_file(path: Location) -> pq.ParquetFile:
    """A Parquet file, of which only the columns and row groups that are asked for are read."""
    return pq.ParquetFile(path if isinstance(path, Path) else open_binary(path))


def read_parquet(path: Location, *, schema: pa.Schema | None = None) -> pa.Table:
    """A whole Parquet file."""
    with parquet_file(path) as file:
        table = file.read(columns=schema.names if schema is not None else None)
    return table.cast(schema) if schema is not None else table


@contextmanager
def atomic_path(path: Name) -> Iterator[Path]:
    """A local path to write to; what is there takes the place of ``path`` only when the block ends without an error."""
    target = location(path)
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent if isinstance(target, Path) else None, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        if not isinstance(target, Path):
            target.upload(aside)
            return
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.chmod(0o644)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def remove_tree(folder: Location) -> None:
    """Delete a folder and all in it, as far as that is possible."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError):
        folder.remove_all()


def remove_leftovers(folder: Location) -> None:
    """Delete what writers that were killed left half written in a folder; nobody else may be writing there."""
    if isinstance(folder, Path):  # in S3 nothing is half written
        for path in folder.glob(".*.????????"):
            if path.suffixes[-2:-1] in ([".parquet"], [".json"], [".yaml"], [".safetensors"]):
                path.unlink(missing_ok=True)


def write_bytes(path: Name, data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as aside:
        aside.write_bytes(data)


def write_json(path: Name, value: object) -> None:
    """Write ``value`` as readable JSON, atomically; numbers that are not finite are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Name) -> Any:  # noqa: ANN401 - JSON is any shape
    """The JSON value in a file; a file that is not JSON is a ``ValueError`` that names it."""
    try:
        return json.loads(location(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it and run the step again") from None


def write_parquet(path: Name, table: pa.Table, *, rows_per_group: int = 64) -> None:
    """Write a table atomically; small row groups keep one stem's audio cheap to reach.

    Binary columns hold coded audio, which does not get smaller: they are stored as they are.
    """
    others = [_leaf(field) for field in table.schema if not pa.types.is_binary(field.type)]
    compression = dict.fromkeys(table.schema.names, "none") | dict.fromkeys(others, "zstd")
    with atomic_path(path) as aside:
        pq.write_table(table, aside, row_group_size=rows_per_group, compression=compression, use_dictionary=others)


def _leaf(field: pa.Field) -> str:
    """How Parquet names the values of a column."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def sha256_file(path: Name) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
