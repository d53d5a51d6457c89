"""The root of a list: which file a path of the list means, and whether that file is inside."""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import unicodedata
from collections.abc import Iterator

from engine.errors import AudioError
from engine.storage.paths import Location, Name, location

_SCHEME = "s3://"
_MAX_SPELLINGS = 64  # of one path that mixes Unicode forms


class Root(str):
    """The folder or address that the paths of a list start from, and what these paths may do.

    It is a ``str`` so that it goes wherever the name of a folder does; a plain ``str`` as a root confines nothing.
    """

    is_confined: bool
    """Files outside are refused, also if a link inside leads to them."""
    is_audioset: bool
    """A file that is named like a video may be its segment: see :func:`engine.corpus.audioset.located`."""

    def __new__(cls, folder: str, *, is_confined: bool = True, is_audioset: bool = False) -> Root:
        """Return a root with the name of a folder."""
        root = super().__new__(cls, folder)
        root.is_confined, root.is_audioset = is_confined, is_audioset
        return root

    def require_inside(self, path: str) -> None:
        """Raise AudioError for a path of a manifest that leaves the root, by its text; no file is opened.

        Only an absolute path that begins differently is compared by what its folders' links lead to.
        """
        if not self.is_confined or (".." not in path and not path.startswith(("/", "\\", _SCHEME))):
            return
        if not self.startswith(_SCHEME):
            plain = _joined(self, path.replace("\\", "/"))
            is_inside = posixpath.normpath(plain).startswith(_prefix(self)) or _is_below(self, plain)
        elif path.startswith(_SCHEME):
            is_inside = path.startswith(_prefix(self))
        else:
            is_inside = not path.startswith("/") and not _climbs(path)
        if not is_inside:
            raise _outside(self, path, "climbs out" if _climbs(path) else "is outside")


def resolve(root: str, path: str) -> str:
    """The file that a path means: absolute paths and ``s3://`` addresses as they are, others under ``root``.

    If there is no such file, its name in the other Unicode form is tried, and with slashes for backslashes. Under a
    root in S3, a path is the rest of a key, whatever its characters. Raises AudioError for a file outside a
    :class:`Root`, also if a link leads there.
    """
    found = _joined(root, path if root.startswith(_SCHEME) else path.replace("\\", "/"))
    if not path.isascii() or "\\" in path or path != path.strip():
        found = next((name for name in _spellings(root, path) if _exists(name)), found)
    if isinstance(root, Root) and root.is_confined and not _is_below(root, found):
        raise _outside(root, path, "is outside or a link that leads out")
    return found


def find(name: Name) -> Location:
    """The location with a user's name of a list or folder, in another Unicode form if there is only that one."""
    return location(resolve("/", str(location(name))))


def _prefix(root: str) -> str:
    return root.removesuffix("/") + "/"


def _joined(root: str, path: str) -> str:
    is_absolute = path.startswith(_SCHEME) or (path.startswith("/") and not root.startswith(_SCHEME))
    return path if is_absolute else _prefix(root) + path


def _climbs(path: str) -> bool:
    return posixpath.normpath(path.replace("\\", "/")).split("/")[0] == ".."


def _is_below(root: str, path: str) -> bool:
    if root.startswith(_SCHEME) or path.startswith(_SCHEME):
        return path.startswith(_prefix(root))
    return _prefix(os.path.realpath(path)).startswith(_prefix(_real_folder(root)))


@functools.lru_cache(maxsize=16)
def _real_folder(root: str) -> str:
    return os.path.realpath(root)


def _outside(root: str, path: str, how: str) -> AudioError:
    """The refusal of a path, which says nothing of what is in the file."""
    remedy = "give --allow-outside (allow_outside in settings) if you trust the list, or another --audio-root"
    return AudioError(f"a path must stay below the root {str(root)!r}, got {path[:200]!r} which {how}; {remedy}")


def _spellings(root: str, path: str) -> Iterator[str]:
    """The path as it is, in the other Unicode forms of its parts, with slashes for backslashes, and without spaces."""
    for name in dict.fromkeys((path, path.replace("\\", "/"), path.replace("\\", "/").strip())):
        parts = [
            dict.fromkeys((part, *(unicodedata.normalize(f, part) for f in ("NFC", "NFD")))) for part in name.split("/")
        ]
        for spelled in itertools.islice(itertools.product(*parts), _MAX_SPELLINGS):
            yield _joined(root, "/".join(spelled))


def _exists(name: str) -> bool:
    if not name.startswith(_SCHEME):
        return os.path.exists(name)
    try:
        return location(name).exists()
    except PermissionError:  # S3's answer for a missing object, without the right to list
        return False
    except OSError as error:
        raise AudioError(f"cannot look for {name} ({error}); start the same command again") from error
