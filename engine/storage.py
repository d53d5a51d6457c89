"""Files that appear whole or not at all, on a local or shared file system or in S3, and words for wrong names.

A *location* is a ``Path`` or an ``S3Path``: what is written for one works for the other.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from engine.s3 import S3Path  # boto3 is loaded where an address of S3 is used

Location: TypeAlias = "Path | S3Path"
Name: TypeAlias = "str | os.PathLike[str] | S3Path"
"""What a user or a caller names a location with."""


def is_s3(path: Name) -> bool:
    """Whether it is an address of S3 (a ``Path`` of one has lost a slash)."""
    return str(path).startswith("s3:/")


def location(path: Name) -> Location:
    """The location that a user's words name: ``s3://bucket/key``, or a path made absolute."""
    if not is_s3(path):
        return Path(os.path.abspath(str(path)))
    from engine.s3 import S3Path

    return S3Path(str(path))


def beside(folder: Location, other: Location) -> str:
    """``other`` as seen from ``folder``: relative within one file system or bucket, so that both can move together."""
    if is_s3(folder) != is_s3(other):
        return str(other)
    return os.path.relpath(str(other), str(folder)) if not is_s3(folder) else _beside_s3(folder, other)


def _beside_s3(folder: Location, other: Location) -> str:
    ours, theirs = (str(place).removeprefix("s3://").split("/") for place in (folder, other))
    return str(other) if ours[0] != theirs[0] else os.path.relpath("/".join(theirs), "/".join(ours))


def found_beside(folder: Location, relative: str) -> Location:
    """The location that :func:`beside` put in words."""
    return location(relative) if is_s3(relative) or relative.startswith("/") else (folder / relative).resolve()


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


def fingerprint(value: object) -> str:
    """Sixteen hexadecimal digits that stand for any JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words how two mappings differ, such as ``settings (clip_s 3.0, not 10.0)``; empty where they do not."""
    told = []
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
            told.append(f"{name} ({', '.join(f'{key} {_change(before.get(key), now.get(key))}' for key in keys)})")
        else:
            told.append(f"{name} ({_change(before, now)})")
    return " and ".join(told)


def _change(before: object, now: object) -> str:
    return f"{_short(before)}, not {_short(now)}"


def _short(value: object) -> str:
    words = json.dumps(value, default=str)
    return words if len(words) <= 60 else f"{words[:57]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names, nearest first where one is near."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(options[:30]) + (f" and {len(options) - 30} more" if len(options) > 30 else "")
