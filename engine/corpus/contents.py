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
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus.clips import resolve
from engine.corpus.table import chunks
from engine.storage.files import atomic_path, open_binary, parquet_file
from engine.storage.paths import Location, is_s3
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
    rows = (FileRow(path=path, content=None, seen=None) for path in paths)
    return [now["content"] for _, now in _compared("", ((row, None) for row in rows))]


def claim_contents(
    record: Location,
    root: str,
    paths: Iterable[str],
    *,
    what: str,
    may_change: Callable[[set[str]], set[str]] | None = None,
) -> str:
    """Store the contents of files in ``record`` (Parquet) or compare them with those stored; returns a fingerprint.

    ``paths``, in order and without repeats, start from ``root``. Without ``may_change`` all must be the same. With it,
    a file that was missing may appear and others may be gone, and of those that were replaced it returns the ones that
    were allowed to be. Raises ``ValueError`` that names the others; ``what`` is such as "clips of a run".
    """
    changed, digest, is_new, num_files = set[str](), hashlib.sha256(), not record.is_file(), 0
    with tempfile.TemporaryDirectory(prefix="clearsep-contents-") as folder:
        aside = Path(folder) / "contents.parquet"
        with pq.ParquetWriter(aside, _CONTENTS) as writer:
            pairs = _joined(() if is_new else _recorded(record), paths)
            is_same = not is_new
            for some in chunks(_compared(root, pairs), _AT_ONCE):
                rows = []
                for before, now in some:
                    is_gone = before is not None and now["content"] is None and may_change is not None
                    row = before if before is not None and is_gone else now  # it may come back
                    rows.append(row)
                    is_same &= before == row
                    digest.update(f"{row['path']}\0{row['content']}\n".encode())
                    if not is_new and _is_other(root, before, row, strict=may_change is None):
                        changed.add(row["path"])
                num_files += len(rows)
                writer.write_table(pa.Table.from_pylist(rows, schema=_CONTENTS))
        if refused := sorted(changed - (may_change(changed) if may_change and changed else set())):
            names = ", ".join(map(repr, refused[:_NUM_SHOWN])) + (", ..." if len(refused) > _NUM_SHOWN else "")
            exception = " (only a file all of whose clips failed may be replaced)" if may_change else ""
            raise ValueError(
                f"the {what} must be the files that it was begun with, got {len(refused)} of {num_files} that were "
                f"replaced since: {names}{exception}; restore them, or give another folder"
            )
        if not is_same:
            with atomic_path(record) as target:
                shutil.copyfile(aside, target)
    return digest.hexdigest()[:16]


def _recorded(record: Location) -> Iterator[FileRow]:
    with parquet_file(record) as file:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            yield from batch.to_pylist()


def _joined(recorded: Iterable[FileRow], paths: Iterable[str]) -> Iterator[tuple[FileRow, FileRow | None]]:
    """Every file as it is to be examined, with its recorded row; also files that are only recorded."""
    wanted = (FileRow(path=path, content=None, seen=None) for path in paths)
    merged = heapq.merge(
        zip(itertools.repeat(False), recorded), zip(itertools.repeat(True), wanted), key=lambda entry: entry[1]["path"]
    )
    for _, group in itertools.groupby(merged, key=lambda entry: entry[1]["path"]):
        found = dict(group)
        yield found.get(True) or found[False], found.get(False)


def _compared(root: str, pairs: Iterable[tuple[FileRow, FileRow | None]]) -> Iterator[tuple[FileRow | None, FileRow]]:
    """Recorded rows and the files as they are now; what has not changed by its disk's account is not opened."""

    def examined(some: Sequence[tuple[FileRow, FileRow | None]], tags: dict[str, str]) -> list[FileRow]:
        return [_examined(resolve(root, row["path"]), row["path"], before, tags) for row, before in some]

    with ThreadPoolExecutor(_THREADS) as pool:
        for some in chunks(pairs, _AT_ONCE):
            paths = [resolve(root, row["path"]) for row, _ in some]
            tags = object_tags([path for path in paths if is_s3(path)])
            parts = list(chunks(some, _PER_THREAD))
            rows = itertools.chain.from_iterable(pool.map(examined, parts, itertools.repeat(tags)))
            yield from zip((before for _, before in some), rows, strict=True)


def _examined(path: str, name: str, before: FileRow | None, tags: dict[str, str]) -> FileRow:
    """The row of a file as it is now."""
    if is_s3(path):
        return FileRow(path=name, content=tags.get(path), seen=None)
    try:
        status = os.stat(path)
        seen = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
        if before is not None and before["seen"] == seen:
            return before
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
            return FileRow(path=name, content=None, seen=None)
        is_settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S
        return FileRow(path=name, content=retried(lambda: _hashed(path)), seen=seen if is_settled else None)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return FileRow(path=name, content=None, seen=None)


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


def _is_other(root: str, before: FileRow | None, now: FileRow, *, strict: bool) -> bool:
    """True if a file was replaced; with ``strict`` also if it is there only before or only now."""
    old, new = before["content"] if before else None, now["content"]
    if before is None or old is None or new is None:
        return strict and (before is None or old != new)
    if old == new:
        return False
    (size, _, old_hash), (new_size, _, new_hash) = old.partition("-"), new.partition("-")
    if size != new_size or old_hash.startswith(_ETAG) == new_hash.startswith(_ETAG):
        return True
    path = resolve(root, now["path"])  # it was moved from a disk to S3, or back
    if new_hash.startswith(_ETAG):
        return _hashed(path) != old
    with open(path, "rb") as file:  # of an object that was written at once, the ETag is the MD5
        return hashlib.file_digest(file, "md5").hexdigest() != old_hash.removeprefix(_ETAG)
