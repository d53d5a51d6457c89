"""Read and write JSON, Parquet and binary files, locally and in S3; every file is written completely or not at all."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from engine.cli.display import shown
from engine.errors import DamagedError
from engine.settings import rule_of
from engine.storage.documents import MAX_BYTES, bounded, parse_json
from engine.storage.paths import Location, Name, location

_LEFTOVER = re.compile(r"\..+\.(parquet|json|jsonl|yaml|safetensors|pt|csv|html|md|flac|wav|tar|onnx)\.[a-z0-9_]{8}")
_known_intact: set[tuple[str, str, object]] = set()  # path, checksum and version of files that were compared
_tidied: set[str] = set()  # folders in which this process has looked for leftovers
_AGAIN = "delete it and run the step again"
Record = TypeVar("Record")


def open_binary(path: Name) -> BinaryIO:
    """Open a seekable file for reading; an object in S3 is read in ranges."""
    source = location(path)
    return source.open("rb") if isinstance(source, Path) else cast(BinaryIO, source.open())


def parquet_file(path: Location, *, read_dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file, to read only the columns and row groups that are needed; each page's checksum is compared.

    A page that is damaged raises ``OSError``; :func:`write_parquet` writes the checksums, other writers may not. The
    texts of the columns ``read_dictionary`` are read as numbers into a list of the different ones.
    """
    source = path if isinstance(path, Path) else open_binary(path)
    return pq.ParquetFile(source, read_dictionary=list(read_dictionary), page_checksum_verification=True)


def read_parquet(path: Location, *, schema: pa.Schema | None = None, sha256: str | None = None) -> pa.Table:
    """Read a Parquet file; with ``schema``, only its columns, with its types.

    Raises :class:`DamagedError` if the file has another checksum than ``sha256``.
    """
    if sha256 is not None:
        require_intact(path, sha256)
    with parquet_file(path) as file:
        table = file.read(columns=schema.names if schema is not None else None)
    return table.cast(schema) if schema is not None else table


@contextmanager
def atomic_path(path: Name) -> Iterator[Path]:
    """Give a temporary local path to write to; the file replaces ``path`` if the block ends without an error.

    Afterwards the file and its name are on the disk, so that a power cut leaves the old file or the new one. What
    killed writers have left in a folder is deleted after a process has first written there.
    """
    target = location(path)
    if isinstance(target, Path):
        _make_folder(target.parent)
    folder = target.parent if isinstance(target, Path) else _upload_folder()
    handle, temporary = _temporary_file(folder, f".{target.name}.")
    try:
        yield temporary
        if not isinstance(target, Path):
            target.upload(temporary)
            return
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
        if str(target.parent) not in _tidied:
            _tidied.add(str(target.parent))
            remove_leftovers(target.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _temporary_file(folder: Path, prefix: str) -> tuple[int, Path]:
    """A new file, and a handle that locks it as long as it is open, so that it is no leftover."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=prefix)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # another process may have taken it for a leftover before it was locked
            return handle, Path(name)
        os.close(handle)


def temporary_folder(prefix: str, *, owner: object) -> Path:
    """A new folder in TMPDIR that is deleted together with its owner; those of killed processes are deleted now."""
    folder, handle = _new_folder(prefix)
    weakref.finalize(owner, _remove_locked, folder, handle)
    return folder


@contextmanager
def folder_for_block(prefix: str) -> Iterator[Path]:
    """The same for the length of a ``with`` block."""
    folder, handle = _new_folder(prefix)
    try:
        yield folder
    finally:
        _remove_locked(folder, handle)


def _new_folder(prefix: str) -> tuple[Path, int]:
    """A new folder in TMPDIR with the handle that holds its lock, which a living process has on all of its folders."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}????????"):
        with _locked(left) as is_left:
            if is_left:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a leftover
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.is_dir():  # another process may have taken it for a leftover before it was locked
            return folder, handle
        os.close(handle)


def _remove_locked(folder: Path, handle: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)


@functools.cache
def _upload_folder() -> Path:
    """The folder in which this process writes objects before their upload."""
    return temporary_folder("clearsep-upload-", owner=_upload_folder)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """True if this process holds the lock of a file or folder while the block runs, so that no writer lives."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        os.close(handle)


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
    """Delete the temporary files of killed writers in a folder; a living writer holds a lock on its own."""
    if isinstance(folder, Path):  # in S3 there are none
        for path in folder.glob(".*.????????"):
            if _LEFTOVER.fullmatch(path.name):
                with _locked(path) as is_left:
                    if is_left:
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
        pq.write_table(
            table,
            temporary,
            row_group_size=rows_per_group,
            compression=compression,
            use_dictionary=others,
            write_page_checksum=True,
        )


def _column_path(field: pa.Field) -> str:
    """The name that Parquet uses for the values of a column."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def sha256_file(path: Name) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_footer(path: Name) -> str:
    """The hexadecimal SHA-256 of a Parquet file's footer, which says where its columns are; pages have their own."""
    with open_binary(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read()).hexdigest()


def version_of(path: Location) -> object:
    """A value that changes if a local file is written again; an object in S3 is taken to stay while a process lives."""
    if not isinstance(path, Path):
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def require_intact(path: Location, sha256: str, *, digest: Callable[[Name], str] = sha256_file) -> None:
    """Raise :class:`DamagedError` if a file has another checksum than was recorded; compared once in a process."""
    entry = (str(path), sha256, version_of(path))
    if entry not in _known_intact:
        if digest(path) != sha256:
            raise damaged(path)
        _known_intact.add(entry)


def damaged(path: Location) -> DamagedError:
    """The error for a file whose bytes are not those that were recorded."""
    return DamagedError(
        f"cannot use {path} (its bytes are not those that were recorded when it was written); start the command that "
        "wrote it again, which replaces it"
    )
