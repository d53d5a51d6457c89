"""Inputs as a user names them (files, folders, globs, addresses in S3), and names of the files with their stems."""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.corpus.rows import AUDIO_SUFFIXES, audio_files
from engine.storage.files import open_binary
from engine.storage.paths import Location, is_s3, location

RESIDUAL = "residual"
"""Name of the mixture without its stems."""
STEM_MARK, HEAD_BYTES = "clearsep ", 4096
"""The beginning of a comment in every stem, and where in the file it is."""
_MAX_NAME_BYTES = 80
_WILDCARDS = "*?["


@dataclass(frozen=True, kw_only=True)
class AudioInput:
    """A recording to separate."""

    source: str
    """Its path or address, as the user gave it."""
    name: str
    """Beginning of the names of its stems; in a folder of inputs with the folders between."""
    contents: str = ""
    """Checksum of its bytes, if it has no path of its own."""

    @property
    def shown(self) -> str:
        """The source for people; ``-`` for standard input, whose copy is gone after the command."""
        return "-" if self.contents else self.source

    @property
    def identity(self) -> list[object]:
        """Equal for inputs that need not be separated again."""
        path = location(self.source)
        if self.contents or not isinstance(path, Path):
            return [self.contents or str(path)]
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns]


def find_inputs(names: Sequence[str], *, out: Location | None = None) -> list[AudioInput]:
    """The recordings that names, folders and globs stand for, in order, each once.

    In a folder these are the files with the suffix of a sound format, at any depth. Stems that an earlier command wrote
    into the folder ``out`` are inputs only by their own name, so that a command can be repeated on a folder that has
    its outputs. Raises ``ValueError`` for a file that is not there, and for a folder or a glob that has no recording.
    """
    found: dict[str, AudioInput] = {}
    for name in names:
        for one in _found(name):
            if one.source == name or out is None or not _is_stem_in(out, location(one.source)):
                found.setdefault(str(location(one.source)), one)
    if names and not found:
        raise ValueError(f"there is no recording in {out} but stems of earlier commands; name the files")
    inputs = list(found.values())
    names_used = distinct([one.name for one in inputs], [str(location(one.source)) for one in inputs])
    return [AudioInput(source=one.source, name=name) for one, name in zip(inputs, names_used, strict=True)]


def _is_stem_in(out: Location, path: Location) -> bool:
    if not str(path).startswith(f"{str(out).rstrip('/')}/"):
        return False
    with open_binary(path) as file:
        return STEM_MARK.encode() in file.read(HEAD_BYTES)


def _found(name: str) -> Iterator[AudioInput]:
    path = location(name)
    if path.is_file():
        yield _input(name, posixpath.basename(name))
    elif path.is_dir():
        inside = list(audio_files(path))
        if not inside:
            suffixes = " ".join(sorted(AUDIO_SUFFIXES))
            raise ValueError(f"there is no recording in folder {name!r} ({suffixes}); name its files")
        yield from (_input(posixpath.join(name, one), one) for one in inside)
    elif any(sign in name for sign in _WILDCARDS):
        matches = sorted(_matches(name))
        if not matches:
            raise ValueError(f"there is no file that {name!r} matches; check the pattern and the current folder")
        yield from (_input(one, posixpath.basename(one)) for one in matches)
    else:
        raise ValueError(f"there is no file or folder {name!r}; check the path")


def _matches(pattern: str) -> Iterable[str]:
    if not is_s3(pattern):
        return [one for one in glob.glob(pattern, recursive=True) if os.path.isfile(one)]
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in _WILDCARDS))
    return map(str, location("/".join(parts[:first])).glob("/".join(parts[first:])))


def _input(source: str, inside: str) -> AudioInput:
    parts = posixpath.splitext(inside)[0].split("/")
    return AudioInput(source=source, name="/".join(safe_name(part) for part in parts))


def safe_name(text: str) -> str:
    """A text as a part of a file's name on any system: letters, digits, ``-``, ``_`` and dots inside.

    >>> from engine.files.names import safe_name
    >>> safe_name("dog bark, far: away/..")
    'dog_bark_far_away'
    """
    plain = "".join(c if c.isalnum() or c in "-_." else " " for c in unicodedata.normalize("NFC", text))
    name = "_".join(plain.split()).strip("._")
    data = name.encode()
    if len(data) > _MAX_NAME_BYTES:
        name = f"{data[: _MAX_NAME_BYTES - 9].decode(errors='ignore')}-{_digest(text)}"
    return name or _digest(text)


def distinct(names: Sequence[str], identities: Sequence[str], *, reserved: Sequence[str] = ()) -> list[str]:
    """The names; equal ones, in whatever case, and reserved ones get a checksum of their identity."""
    counts = Counter([*(name.casefold() for name in names), *reserved])
    return [
        name if counts[name.casefold()] == 1 else f"{name}-{_digest(identity)}"
        for name, identity in zip(names, identities, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
