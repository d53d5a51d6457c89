"""TODO engine/storage/paths.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from engine.storage.s3 import S3Path

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
    from engine.storage.s3 import S3Path

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
