"""Files that appear whole or not at all, on a local or shared file system, and words for names that are wrong."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` only when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.chmod(0o644)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as aside:
        aside.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write ``value`` as readable JSON, atomically; numbers that are not finite are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401 - JSON is any shape
    """The JSON value in a file; a file that is not JSON is a ``ValueError`` that names it."""
    try:
        return json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it and run the step again") from None


def write_parquet(path: str | os.PathLike[str], table: pa.Table, *, rows_per_group: int = 64) -> None:
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


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """Sixteen hexadecimal digits that stand for any JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names, nearest first where one is near."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(options[:30]) + (f" and {len(options) - 30} more" if len(options) > 30 else "")
