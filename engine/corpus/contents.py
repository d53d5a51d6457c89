"""Contents of audio files: what a file is, whatever its folder and its times; kept with the work that used them.

The content of a file on a disk is its size with a hash of its beginning, middle and end (all of a small file), of an
object in S3 its size and ETag: ``benchmarks/scale/contents.md`` has the cost. A known limit: uncompressed files of one
size that differ only between those pieces are taken for the same. Compressed files differ in size, and FLAC has a hash
of its samples at its beginning. An object that S3 stores in parts, or encrypted with a key of its own, has another ETag
once it is copied in other parts or encrypted again, and then counts as another file.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import operator
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus.roots import resolve
from engine.corpus.table import chunks
from engine.errors import AudioError
from engine.storage.files import atomic_path, open_binary, parquet_file
from engine.storage.paths import Location, is_s3, location
from engine.storage.retry import retried
from engine.storage.s3 import object_tags

_PIECE_BYTES = 1 << 14
_NUM_PIECES = 3
_THREADS = 16
_AT_ONCE, _PER_THREAD = 8192, 64  # files that are compared together, and by one thread
_SETTLED_S = 10.0  # a file that changed less than this ago could change again at the same time by its clock
_NUM_SHOWN = 3
_ETAG = "etag-"
_CONTENTS = pa.schema([("path", pa.string()), ("content", pa.string()), ("seen", pa.string())])

_Value = TypeVar("_Value")


class FileRow(TypedDict):
    """A file as it was when a folder was begun; one row of the Parquet file that :func:`claim_contents` writes."""

    path: str
    """As in the manifest."""
    content: str | None
    """Equal for equal files; null: there was no such file, or it could not be read."""
    seen: str | None
    """Size, times and number on its disk: if they are the same, so is the content. Null in S3 and for new files."""


def contents_of(paths: Sequence[str]) -> list[str | None]:
    """The contents of files by absolute path or address; null for what is no file that can be read."""
    return [row["content"] for row, _ in _compared("", (_Pair(path, None, True) for path in paths))]


def claim_contents(
    record: Location,
    root: str,
    paths: Iterable[str],
    *,
    what: str,
    may_change: Callable[[set[str]], set[str]] | None = None,
    remedy: str = "restore them, or give another folder",
    keep: bool = True,
) -> str:
    """Store the contents of files in ``record`` (Parquet) or compare them with those stored; returns a fingerprint.

    ``paths``, in order and without repeats, start from ``root``. Without ``may_change`` all must be the same. With it,
    a file that was missing may appear and others may be gone, and of those that were replaced it returns the ones that
    were allowed to be. Raises ``ValueError`` that names the others; ``what`` is such as "clips of a run". Without
    ``keep`` nothing is written, and if something would be, the fingerprint is empty.
    """
    changed, digest, is_new, num_files = set[str](), hashlib.sha256(), not record.is_file(), 0
    strict, is_same = may_change is None and not is_new, not is_new
    with tempfile.TemporaryFile() as aside:
        with pq.ParquetWriter(aside, _CONTENTS) as writer:
            pairs = _joined(() if is_new else _recorded(record), paths)
            for some in chunks(_compared(root, pairs, strict=strict), _AT_ONCE):
                rows = [row for row, _ in some]
                for row, outcome in some:
                    digest.update(f"{row['path']}\0{row['content']}\n".encode())
                    is_same &= outcome == "same"
                    if outcome == "replaced":
                        changed.add(row["path"])
                num_files += len(rows)
                writer.write_table(pa.Table.from_pylist(rows, schema=_CONTENTS))
        if refused := sorted(changed - (may_change(changed) if may_change and changed else set())):
            names = ", ".join(map(repr, refused[:_NUM_SHOWN])) + (", ..." if len(refused) > _NUM_SHOWN else "")
            change = "replaced, added or removed" if strict else "replaced"
            raise ValueError(
                f"the {what} must be those that it was begun with, got {len(refused)} of {num_files} files that were "
                f"{change} since: {names}; {remedy}"
            )
        if not is_same and not keep:
            return ""
        if not is_same:
            aside.seek(0)
            with atomic_path(record) as target, target.open("wb") as file:
                shutil.copyfileobj(aside, file)
    return digest.hexdigest()[:16]


def _recorded(record: Location) -> Iterator[FileRow]:
    with parquet_file(record) as file:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            yield from batch.to_pylist()


class _Pair(NamedTuple):
    """A file to compare with its recorded row."""

    path: str
    before: FileRow | None
    is_wanted: bool
    """False: it is only recorded."""


def _joined(recorded: Iterable[FileRow], paths: Iterable[str]) -> Iterator[_Pair]:
    """The files in the record, among the paths, or both; each is in order."""
    rows = ((row["path"], row) for row in recorded)
    merged = heapq.merge(rows, zip(paths, itertools.repeat(None)), key=operator.itemgetter(0))
    for path, group in itertools.groupby(merged, key=operator.itemgetter(0)):
        found = [row for _, row in group]
        yield _Pair(path, found[0], None in found)


_Outcome = Literal["same", "noted", "replaced"]


def _compared(root: str, pairs: Iterable[_Pair], *, strict: bool = False) -> Iterator[tuple[FileRow, _Outcome]]:
    """The files as they are now; ``noted``: the row is to be stored, but the file is not another one.

    Files that have not changed by their disk's account are not opened. With ``strict`` a file that is there only before
    or only now is another one too; without it, the row of one that is gone stays, for it may come back.
    """

    def compared(pair: _Pair, path: str, tags: dict[str, str]) -> tuple[FileRow, _Outcome]:
        before, now = pair.before, _examined(path, pair, tags)
        if before == now:
            return now, "same"
        if before is None or before["content"] is None:
            return now, "replaced" if strict else "noted"
        if now["content"] is None:
            return (now, "replaced") if strict else (before, "same")
        return now, "noted" if _is_same(before["content"], now["content"], path) else "replaced"

    def mapped(function: Callable[..., _Value], *columns: Sequence[Any]) -> Iterator[_Value]:
        parts = [list(chunks(column, _PER_THREAD)) for column in columns]
        return itertools.chain.from_iterable(pool.map(lambda *some: list(map(function, *some)), *parts))

    with ThreadPoolExecutor(_THREADS) as pool:
        for some in chunks(pairs, _AT_ONCE):
            paths = list(mapped(lambda pair: _located(root, pair.path), some))
            tags = object_tags(filter(is_s3, paths))
            yield from mapped(lambda pair, path, tags=tags: compared(pair, path, tags), some, paths)


def _located(root: str, path: str) -> str:
    """The file that a path means; empty for one that may not be opened."""
    try:
        found = retried(lambda: resolve(root, path))
        location(found)  # an address without a bucket is an error
        return found
    except (AudioError, OSError, ValueError):
        return ""


def _examined(path: str, pair: _Pair, tags: dict[str, str]) -> FileRow:
    """The row of a file as it is now."""
    unknown = FileRow(path=pair.path, content=None, seen=None)
    if not pair.is_wanted or not path:
        return unknown
    if is_s3(path):
        return unknown | {"content": tags.get(path)}
    try:
        status = os.stat(path)
        seen = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
        if pair.before is not None and pair.before["seen"] == seen:
            return pair.before
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
            return unknown
        is_settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S
        return FileRow(path=pair.path, content=retried(lambda: _hashed(path)), seen=seen if is_settled else None)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return unknown


def _hashed(path: str) -> str:
    """Size and hash of a file, or of an object in S3, by its pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) if not is_s3(path) else open_binary(path) as file:
        num_bytes = file.seek(0, os.SEEK_END)
        is_small = num_bytes <= _NUM_PIECES * _PIECE_BYTES
        for number in range(1 if is_small else _NUM_PIECES):
            file.seek(0 if is_small else (num_bytes - _PIECE_BYTES) * number // (_NUM_PIECES - 1))
            digest.update(file.read(num_bytes if is_small else _PIECE_BYTES))
    return f"{num_bytes}-{digest.hexdigest()}"


def _is_same(old: str, new: str, path: str) -> bool:
    """True for equal contents, also if the file was moved from a disk to S3, or back."""
    (size, _, old_hash), (new_size, _, new_hash) = old.partition("-"), new.partition("-")
    if old == new or size != new_size or old_hash.startswith(_ETAG) == new_hash.startswith(_ETAG):
        return old == new
    if new_hash.startswith(_ETAG):
        return _hashed(path) == old
    with open(path, "rb") as file:  # of an object that was written at once, the ETag is the MD5
        return hashlib.file_digest(file, "md5").hexdigest() == old_hash.removeprefix(_ETAG)
