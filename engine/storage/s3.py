"""Objects of S3 and what speaks its protocol, as the part of ``pathlib.Path`` that this project uses.

Credentials come from boto3's standard chain alone (environment, profile, instance role) and are never read here. The
endpoint and region are boto3's too: ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or a profile.
"""

from __future__ import annotations

import email.utils
import errno
import fnmatch
import functools
import io
import posixpath
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import boto3.exceptions
import boto3.s3.transfer
import botocore.exceptions

from engine.storage.s3_client import _CHANGED, _NOT_THERE, _asked, _code, client

SCHEME = "s3://"
_BUFFER_BYTES = 1 << 18  # of a reader: a header is one request, ten seconds of compressed audio one more
_PART_BYTES = 1 << 24  # larger objects are written in parts of this size
_TRANSFER = boto3.s3.transfer.TransferConfig(
    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4
)


class Stat(NamedTuple):
    """What a listing says of an object."""

    name: str
    """Last part of its key; of a prefix that others share, its name."""
    is_file: bool
    num_bytes: int


class S3Path:
    """``s3://bucket/key``: an object, or the prefix of others; ``open(path)`` is an error (no ``__fspath__``)."""

    def __init__(self, uri: str) -> None:
        bucket, _, key = uri.removeprefix(SCHEME).removeprefix("s3:/").partition("/")
        if not bucket:
            raise ValueError(f"an S3 address is s3://bucket/key, {uri!r} names no bucket: add it")
        key = posixpath.normpath(key.lstrip("/")) if key.strip("/") else ""
        if key.split("/")[0] == "..":
            raise ValueError(f"{uri!r} climbs out of its bucket: write the address without ..")
        self.bucket, self.key = bucket, "" if key == "." else key

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Path({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: S3Path) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(f"{SCHEME}{self.bucket}/{self.key}/{name}")

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
        """From the name's last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> S3Path:
        """What the key is in; a bucket is its own parent."""
        return S3Path(f"{SCHEME}{self.bucket}/{posixpath.dirname(self.key)}")

    def resolve(self) -> S3Path:
        """Itself: there are no links."""
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix needs no making."""

    def _head(self) -> dict[str, Any] | None:
        def head() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = client().head_object(Bucket=self.bucket, Key=self.key)
            except botocore.exceptions.ClientError as error:
                if _code(error) in _NOT_THERE:
                    return None
                raise
            return found

        return _asked(self, head)

    def is_file(self) -> bool:
        """Whether there is an object of this key."""
        return bool(self.key) and self._head() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below this prefix."""
        return next(self._pages(max_keys=1), None) is not None

    def exists(self) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def num_bytes(self) -> int:
        """Size of the object; ``FileNotFoundError`` where there is none."""
        return int(self._found()["ContentLength"])

    def _found(self) -> dict[str, Any]:
        head = self._head() if self.key else None
        if head is None:
            raise FileNotFoundError(f"{self} does not exist; check bucket and key")
        return head

    def _pages(self, *, delimiter: str = "", max_keys: int = 1000) -> Iterator[dict[str, Any]]:
        prefix = f"{self.key}/" if self.key else ""
        arguments = {"Bucket": self.bucket, "Prefix": prefix, "Delimiter": delimiter, "MaxKeys": max_keys}
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):  # by hand: boto3's own iterator cannot go on after an error
            if "NextContinuationToken" in page:
                arguments["ContinuationToken"] = page["NextContinuationToken"]
            page = _asked(self, lambda: client().list_objects_v2(**arguments))
            if page.get("Contents") or page.get("CommonPrefixes"):
                yield page

    def children(self) -> Iterator[Stat]:
        """What is directly below, a page of the listing at a time."""
        for page in self._pages(delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                yield Stat(posixpath.basename(entry["Prefix"].rstrip("/")), False, 0)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # what some tools put down as a folder
                    yield Stat(posixpath.basename(entry["Key"]), True, entry["Size"])

    def files(self) -> Iterator[str]:
        """All objects below, as keys relative to this prefix, in the order of their bytes, a page at a time."""
        start = len(self.key) + 1 if self.key else 0
        for page in self._pages():
            yield from (entry["Key"][start:] for entry in page.get("Contents", ()) if not entry["Key"].endswith("/"))

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """The files that ``Path.glob`` would find, without ``**``."""
        first, _, rest = pattern.partition("/")
        for child in self.children():
            if fnmatch.fnmatchcase(child.name, first) and child.is_file == (not rest):
                found = self / child.name
                yield from found.glob(rest) if rest else (found,)

    def open(self) -> io.BufferedReader:
        """The object for reading in ranges, seekable; ``FileNotFoundError`` where there is none.

        Where another takes its place before all is read, reading on raises ``OSError``: no bytes of both are mixed.
        """
        head = self._found()
        return io.BufferedReader(_Ranges(self, int(head["ContentLength"]), head["ETag"]), _BUFFER_BYTES)

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self._get()[0]

    def _get(self, **arguments: str) -> tuple[bytes, dict[str, Any]]:
        def get() -> tuple[bytes, dict[str, Any]]:
            found: dict[str, Any] = client().get_object(Bucket=self.bucket, Key=self.key, **arguments)
            with found["Body"] as body:
                return body.read(), found

        return _asked(self, get)

    def read_text(self) -> str:
        """The whole object as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        _put(self, Body=data)

    def upload(self, file: Path) -> None:
        """Write a local file, in parts where it is large; the object appears when all of them are there."""

        def upload() -> None:
            try:
                client().upload_file(str(file), self.bucket, self.key, Config=_TRANSFER)
            except boto3.exceptions.S3UploadFailedError as error:  # which hides what the server answered
                raise (error.__context__ or error) from None

        _asked(self, upload)

    def create(self, data: bytes) -> bool:
        """Write an object that is not there yet; false where another was first."""
        return _put(self, Body=data, IfNoneMatch="*")

    def replace_same(self, data: bytes, *, etag: str) -> bool:
        """Write over the object that had this tag; false where it is another by now, or gone."""
        return _put(self, Body=data, IfMatch=etag)

    def tagged(self) -> Tagged | None:
        """The object with the tag and age of this version of it; null where there is none."""
        try:
            data, found = self._get()
        except FileNotFoundError as error:
            if isinstance(error.__cause__, botocore.exceptions.ClientError) and _code(error.__cause__) in _NOT_THERE:
                return None
            raise  # there is no such bucket
        now = found["ResponseMetadata"]["HTTPHeaders"].get("date")
        now_s = email.utils.parsedate_to_datetime(now).timestamp() if now else time.time()
        return Tagged(data, found["ETag"], max(0.0, now_s - found["LastModified"].timestamp()))

    def remove_all(self) -> None:
        """Delete all objects below this prefix, a page at a time."""
        for page in self._pages():
            keys = [{"Key": entry["Key"]} for entry in page["Contents"]]
            _asked(self, functools.partial(self._delete, keys))

    def _delete(self, keys: list[dict[str, str]]) -> None:
        done = client().delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        if done.get("Errors"):  # of single objects, in an answer that says 200
            raise botocore.exceptions.ClientError({"Error": done["Errors"][0]}, "DeleteObjects")

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object; S3 does not say whether there was one."""
        _asked(self, lambda: client().delete_object(Bucket=self.bucket, Key=self.key))


class Tagged(NamedTuple):
    """A version of a small object."""

    data: bytes
    etag: str
    age_s: float
    """Since it was written, in whole seconds; both times are the server's, whatever the clock here says."""


def _put(path: S3Path, **arguments: Any) -> bool:  # noqa: ANN401
    def put() -> bool:
        try:
            client().put_object(Bucket=path.bucket, Key=path.key, **arguments)
        except botocore.exceptions.ClientError as error:
            changed = "IfNoneMatch" in arguments and _code(error) in _CHANGED
            changed |= "IfMatch" in arguments and _code(error) in _CHANGED | _NOT_THERE
            if not changed:
                raise
            return False
        return True

    return _asked(path, put)


class _Ranges(io.RawIOBase):
    """An object read by ranges."""

    def __init__(self, path: S3Path, num_bytes: int, etag: str) -> None:
        super().__init__()
        self.name = str(path)
        self._path, self._num_bytes, self._etag, self._at = path, num_bytes, etag, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, f"cannot go to byte {start + offset}", self.name)
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        wanted = min(len(buffer), self._num_bytes - self._at)
        if wanted <= 0:
            return 0
        data = self._get(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _get(self, num_bytes: int) -> bytes:
        wanted = f"bytes={self._at}-{self._at + num_bytes - 1}"
        data, _ = self._path._get(Range=wanted, IfMatch=self._etag)
        if len(data) != num_bytes:
            raise OSError(
                f"{self._path}: the server sent {len(data)} bytes for the range {wanted}; it has to know ranges"
            )
        return data
