"""Objects in S3 with the part of ``pathlib.Path`` that this project uses.

It is our own because pyarrow.fs mixes the bytes of an old and a new object if one is replaced while it is read, lists a
missing bucket as empty, and raises the same ``OSError`` for errors that may pass and for errors that stay.

Credentials, endpoint and region come from boto3's standard chain (environment, profile, instance role):
``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION``.
"""

from __future__ import annotations

import bisect
import contextlib
import email.utils
import fnmatch
import functools
import io
import itertools
import posixpath
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import boto3.exceptions
import boto3.s3.transfer
import botocore.exceptions

from engine.storage.ranges import RangeFile
from engine.storage.s3_client import CONFLICT_CODES, MISSING_CODES, call_s3, client, error_code, missing_object

_SCHEME = "s3://"
_BUFFER_BYTES = 1 << 18  # of a reader: one request for a header, one more for ten seconds of compressed audio
_PART_BYTES = 1 << 24
_PAGE_KEYS = 1000  # S3's limit for a listing and for a deletion
_TRANSFER = boto3.s3.transfer.TransferConfig(
    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4
)


class Child(NamedTuple):
    """An object or prefix directly below another prefix."""

    name: str
    """Last part of the key or prefix."""
    is_file: bool


class ObjectVersion(NamedTuple):
    """One version of a small object."""

    data: bytes
    etag: str
    age_s: float
    """Whole seconds since it was written, by the server's clock."""


class S3Path:
    """``s3://bucket/key``: an object or the prefix of others; ``open(path)`` is an error (no ``__fspath__``).

    S3 compares keys byte by byte: ``//``, ``./``, ``../`` and backslashes are characters of a key like others. Only one
    slash at the end, as people write it after a prefix, is left out.
    """

    def __init__(self, uri: str) -> None:
        bucket, _, key = uri.removeprefix(_SCHEME).removeprefix("s3:/").partition("/")
        if not bucket:
            raise ValueError(f"an S3 address must be s3://bucket/key, got {uri!r} without a bucket; add it")
        self.bucket, self.key = bucket, key.removesuffix("/")

    def __str__(self) -> str:
        key = f"{self.key}/" if self.key.endswith("/") else self.key
        return f"{_SCHEME}{self.bucket}/{key}" if key else f"{_SCHEME}{self.bucket}"

    def __repr__(self) -> str:
        return f"S3Path({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: S3Path) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(f"{_SCHEME}{self.bucket}/{self._prefix}{name}")

    @property
    def _prefix(self) -> str:
        """The beginning of the keys below this one."""
        return f"{self.key}/" if self.key else ""

    @property
    def name(self) -> str:
        """Last part of the key."""
        return posixpath.basename(self.key)

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> S3Path:
        """The prefix that contains the key; a bucket is its own parent."""
        return S3Path(f"{_SCHEME}{self.bucket}/{self.key.rpartition('/')[0]}/")

    def resolve(self) -> S3Path:
        """Return the path without ``.`` and ``..``, as ``Path.resolve`` does; S3 has no links."""
        parts: list[str] = []
        for part in self.key.split("/"):
            if part == ".." and not parts:
                raise ValueError(f"an S3 address must stay in its bucket, got {str(self)!r}; write it without ..")
            if part == "..":
                parts.pop()
            elif part != ".":
                parts.append(part)
        return S3Path(f"{_SCHEME}{self.bucket}/{'/'.join(parts)}/")

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a prefix exists as soon as an object below it does."""

    def _head(self) -> dict[str, Any] | None:
        def head() -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = client().head_object(Bucket=self.bucket, Key=self.key)
            except botocore.exceptions.ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise
            return answer

        return call_s3(self, head)

    def is_file(self) -> bool:
        """Return true if there is an object with this key."""
        return bool(self.key) and self._head() is not None

    def is_dir(self) -> bool:
        """Return true if there are objects below this prefix."""
        return next(self._pages(max_keys=1), None) is not None

    def exists(self) -> bool:
        """Return true if there is an object with this key or below this prefix."""
        return self.is_file() or self.is_dir()

    def _pages(self, *, delimiter: str = "", max_keys: int | None = None) -> Iterator[dict[str, Any]]:
        """The pages of a listing that are not empty; boto3's own iterator cannot continue after an error."""
        arguments = {
            "Bucket": self.bucket,
            "Prefix": self._prefix,
            "Delimiter": delimiter,
            "MaxKeys": max_keys or _PAGE_KEYS,
        }
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            if "NextContinuationToken" in page:
                arguments["ContinuationToken"] = page["NextContinuationToken"]
            page = call_s3(self, lambda: client().list_objects_v2(**arguments))
            if page.get("Contents") or page.get("CommonPrefixes"):
                yield page

    def children(self) -> Iterator[Child]:
        """The objects and prefixes directly below, one page of the listing at a time."""
        start = len(self._prefix)
        for page in self._pages(delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                yield Child(entry["Prefix"][start:-1], is_file=False)
            for key in _object_keys(page):
                yield Child(key[start:], is_file=True)

    def files(self) -> Iterator[str]:
        """The keys of all objects below, relative to this prefix, in the order of their bytes, one page at a time."""
        for page in self._pages():
            yield from (key[len(self._prefix) :] for key in _object_keys(page))

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """The files that ``Path.glob`` would find, without ``**``."""
        first, _, rest = pattern.partition("/")
        for child in self.children():
            if child.name and fnmatch.fnmatchcase(child.name, first) and child.is_file == (not rest):
                path = self / child.name
                yield from path.glob(rest) if rest else (path,)

    def open(self) -> io.BufferedReader:
        """Open the object for reading in ranges, seekable.

        If the object is replaced before all of it is read, the next read raises ``OSError``.
        """
        head = self._head() if self.key else None
        if head is None:
            raise missing_object(self)
        return io.BufferedReader(_ObjectFile(self, int(head["ContentLength"]), head["ETag"]), _BUFFER_BYTES)

    def read_bytes(self) -> bytes:
        """Read the object."""
        return self.get()[0]

    def get(self, **arguments: str) -> tuple[bytes, dict[str, Any]]:
        """Read the object, or a range of it, with ``arguments`` of S3's GetObject; returns the answer too."""

        def get() -> tuple[bytes, dict[str, Any]]:
            answer: dict[str, Any] = client().get_object(Bucket=self.bucket, Key=self.key, **arguments)
            with answer["Body"] as body:
                return body.read(), answer

        return call_s3(self, get)

    def read_text(self) -> str:
        """Read the object as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Write a small object, completely or not at all."""
        self._put(data)

    def upload(self, file: Path) -> None:
        """Write a local file, in parts if it is large; the object appears when all parts are there."""

        def upload() -> None:
            try:
                client().upload_file(str(file), self.bucket, self.key, Config=_TRANSFER)
            except boto3.exceptions.S3UploadFailedError as error:  # it hides the server's answer
                raise (error.__context__ or error) from None

        call_s3(self, upload)

    def create(self, data: bytes) -> bool:
        """Write a new object; returns false if there is one already."""
        return self._put(data, conflicts=CONFLICT_CODES, IfNoneMatch="*")

    def replace_version(self, data: bytes, *, etag: str) -> bool:
        """Replace the version of the object with this tag; returns false if it was replaced or deleted."""
        return self._put(data, conflicts=CONFLICT_CODES | MISSING_CODES, IfMatch=etag)

    def _put(self, data: bytes, *, conflicts: frozenset[str] = frozenset(), **condition: str) -> bool:
        def put() -> bool:
            try:
                client().put_object(Bucket=self.bucket, Key=self.key, Body=data, **condition)
            except botocore.exceptions.ClientError as error:
                if error_code(error) not in conflicts:
                    raise
                return False
            return True

        return call_s3(self, put)

    def etag(self) -> str:
        """The object's tag, which the server derives from its bytes; raises ``FileNotFoundError`` if there is none."""
        head = self._head()
        if head is None:
            raise missing_object(self)
        return str(head["ETag"])

    def read_version(self) -> ObjectVersion | None:
        """Read the object with its tag and age; null if there is none."""
        try:
            data, answer = self.get()
        except FileNotFoundError as error:
            cause = error.__cause__
            if isinstance(cause, botocore.exceptions.ClientError) and error_code(cause) in MISSING_CODES:
                return None
            raise  # there is no such bucket
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now_s = email.utils.parsedate_to_datetime(now).timestamp() if now else time.time()
        return ObjectVersion(data, answer["ETag"], max(0.0, now_s - answer["LastModified"].timestamp()))

    def remove_all(self) -> None:
        """Delete all objects below this prefix, one page at a time."""
        for page in self._pages():
            keys = [{"Key": entry["Key"]} for entry in page["Contents"]]
            call_s3(self, functools.partial(self._delete, keys))

    def _delete(self, keys: list[dict[str, str]]) -> None:
        answer = client().delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        if answer.get("Errors"):  # of single objects, although the status is 200
            raise botocore.exceptions.ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object; it is no error if there is none."""
        call_s3(self, lambda: client().delete_object(Bucket=self.bucket, Key=self.key))


def object_tags(addresses: Iterable[str]) -> dict[str, str]:
    """Size and ETag, such as ``1024-etag-d41d8cd9``, of the objects with some addresses; others are left out.

    Objects are listed, a thousand for each request, and what lies between those that are wanted is skipped.
    """
    places = {address: (path.bucket, path.key) for address in addresses if (path := S3Path(address))}
    tags = {
        bucket: _tags_in(bucket, sorted({key for _, key in group}))
        for bucket, group in itertools.groupby(sorted(places.values()), key=lambda place: place[0])
    }
    return {address: tags[bucket][key] for address, (bucket, key) in places.items() if key in tags[bucket]}


def _tags_in(bucket: str, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    wanted, position, root = set(keys), 0, S3Path(f"{_SCHEME}{bucket}")
    while position < len(keys):
        arguments: dict[str, Any] = {"Bucket": bucket, "StartAfter": keys[position][:-1]}
        last = ""
        while last < keys[position]:
            try:
                page = call_s3(root, lambda: client().list_objects_v2(**arguments))  # noqa: B023 - called at once
            except PermissionError:  # objects may be readable one by one where listing is not allowed
                return found | _tags_of_each(bucket, keys[position:])
            except (FileNotFoundError, ValueError):  # there is no such bucket, or cannot be
                return found
            entries = page.get("Contents", [])
            found |= {entry["Key"]: _tag(entry["Size"], entry["ETag"]) for entry in entries if entry["Key"] in wanted}
            if not page.get("IsTruncated"):
                return found
            last = entries[-1]["Key"]
            arguments["ContinuationToken"] = page["NextContinuationToken"]
        position = bisect.bisect_right(keys, last)
    return found


def _tags_of_each(bucket: str, keys: list[str]) -> dict[str, str]:
    def tag(key: str) -> str | None:
        with contextlib.suppress(PermissionError):  # S3's answer about an object that may not exist
            if (head := S3Path(f"{_SCHEME}{bucket}/{key}")._head()) is not None:
                return _tag(head["ContentLength"], head["ETag"])
        return None

    with ThreadPoolExecutor(16) as pool:
        return {key: one for key, one in zip(keys, pool.map(tag, keys), strict=True) if one is not None}


def _tag(num_bytes: int, etag: str) -> str:
    return f"{num_bytes}-etag-" + etag.strip('"')


def _object_keys(page: dict[str, Any]) -> Iterator[str]:
    """The keys in a page of a listing, without the empty objects that some tools write for folders."""
    return (entry["Key"] for entry in page.get("Contents", ()) if not entry["Key"].endswith("/"))


class _ObjectFile(RangeFile):
    """One version of an object, read in ranges."""

    def __init__(self, path: S3Path, num_bytes: int, etag: str) -> None:
        super().__init__(str(path), num_bytes)
        self._path, self.etag = path, etag

    def read_range(self, start: int, num_bytes: int) -> bytes:
        data, _ = self._path.get(Range=f"bytes={start}-{start + num_bytes - 1}", IfMatch=self.etag)
        if len(data) != num_bytes:
            raise OSError(
                f"cannot read {self._path} (the server sent {len(data)} bytes for a range of {num_bytes}); "
                "use a server that supports ranges"
            )
        return data
