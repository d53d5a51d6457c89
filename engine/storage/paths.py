"""Names of files and folders: local paths, or ``s3://`` addresses of objects in S3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from engine.storage.s3 import S3Path

Location: TypeAlias = "Path | S3Path"
"""A file or folder: an absolute local path, or an address in S3."""
Name: TypeAlias = "str | os.PathLike[str] | S3Path"
"""A user's or caller's name of a location."""


def is_s3(path: Name) -> bool:
    """Return true for an address in S3, also if ``Path`` has removed one of its slashes."""
    return str(path).startswith("s3:/")


def location(name: Name) -> Location:
    """The location with a name: ``s3://bucket/key``, or a local path, which is made absolute."""
    if not is_s3(name):
        return Path(os.path.abspath(str(name)))
    from engine.storage.s3 import S3Path

    return S3Path(str(name))


def relative_name(path: Location, *, folder: Location) -> str:
    """The name of ``path`` relative to ``folder``, so that both can be moved together.

    It is the full name if they are on different file systems or in different buckets, or if a key has an empty part.
    """
    if is_s3(folder) != is_s3(path):
        return str(path)
    if not is_s3(folder):
        return os.path.relpath(str(path), str(folder))
    (bucket, _, key), (folder_bucket, _, prefix) = (
        str(one).removeprefix("s3://").partition("/") for one in (path, folder)
    )
    is_plain = bucket == folder_bucket and "//" not in f"/{key}/{prefix}"
    return os.path.relpath(f"/{key}", f"/{prefix}") if is_plain else str(path)


def resolve_name(name: str, *, folder: Location) -> Location:
    """The location with a name that :func:`relative_name` returned."""
    return location(name) if is_s3(name) or name.startswith("/") else (folder / name).resolve()
