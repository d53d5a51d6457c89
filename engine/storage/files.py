"""Read and write JSON, Parquet and binary files, locally and in S3; every file is written completely or not at all."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from engine.cli.display import shown
from engine.settings import rule_of
from engine.storage.documents import MAX_BYTES, bounded, parse_json
from engine.storage.paths import Location, Name, location

_AGAIN = "delete it and run the step again"
Record = TypeVar("Record")


def open_binary(path: Name) -> BinaryIO:
    """Open a seekable file for reading; an object in S3 is read in ranges."""
    source = location(path)
    return source.open("rb") if isinstance(source, Path) else cast(BinaryIO, source.open())


def parquet_file(path: Location) -> pq.ParquetFile:
    """Open a Parquet file, to read only the columns and row groups that are needed."""
    return pq.ParquetFile(path if isinstance(path, Path) else open_binary(path))


def read_parquet(path: Location, *, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file; with ``schema``, only its columns, with its types."""
    with parquet_file(path) as file:
        table = file.read(columns=schema.names if schema is not None else None)
    return table.cast(schema) if schema is not None else table


@contextmanager
def atomic_path(path: Name) -> Iterator[Path]:
    """Give a temporary local path to write to; the file replaces ``path`` if the block ends without an error."""
    target = location(path)
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent if isinstance(target, Path) else None, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not isinstance(target, Path):
            target.upload(temporary)
            return
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
            if path.suffixes[-2:-1] in ([".parquet"], [".json"], [".yaml"], [".safetensors"]):
                path.unlink(missing_ok=True)


def write_bytes(path: Name, data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Name, value: object) -> None:
    """Write ``value`` as indented JSON, atomically; raises ``ValueError`` for NaN and infinity."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Name, *, most_bytes: int = MAX_BYTES, remedy: str = _AGAIN) -> Any:  # noqa: ANN401 - any shape
    """Read a JSON file; raises ``ValueError`` if it is not JSON or has more than ``most_bytes``."""
    try:
        with open_binary(path) as file:
            return parse_json(bounded(file, most_bytes))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); {remedy}") from None


def read_record(
    path: Name, kind: type[Record], *, needs: Collection[str] | None = None, remedy: str = _AGAIN
) -> Record:
    """Read a JSON file that has the fields of a ``TypedDict``; raises ``ValueError`` that names a wrong one.

    ``needs`` are those that must be there, by default all.
    """
    return check_record(read_json(path, remedy=remedy), kind, path, needs=needs, remedy=remedy)


def check_record(
    value: object, kind: type[Record], path: Name, *, needs: Collection[str] | None = None, remedy: str
) -> Record:
    """The value of a file as the ``TypedDict`` that it must be; raises ``ValueError`` that names the wrong field."""
    hashable: Any = kind
    try:
        _adapter(hashable).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "missing" and needs is not None and len(problem["loc"]) == 1 and key not in needs:
                continue
            if problem["type"] == "missing":
                message = f"{path} must have {key}, got a file without it"
            elif problem["type"] == "extra_forbidden":
                message = f"{path} must have no {key}, got it"
            else:
                what = f"{key} of {path}" if key else str(path)
                message = f"{what} must be {rule_of(problem)}, got {shown(repr(problem['input']), most=80)}"
            raise ValueError(f"{message}; {remedy}") from None
    return cast(Record, value)


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:  # noqa: ANN401 - any type
    return pydantic.TypeAdapter(kind)


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
