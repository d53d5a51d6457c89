"""The folder for the files of a Ray that we start: short, of mode 0700, removed in the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RayStartError

_PREFIX = "csray-"
_LONGEST_SOCKET = "/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_MAX_SOCKET_BYTES = 103  # macOS; Linux has four more
_MAX_BASE_BYTES = _MAX_SOCKET_BYTES - len(f"/{_PREFIX}12345678{_LONGEST_SOCKET}")
_ROOM_BYTES = 4 << 20
_OLD_S = 60.0  # a younger folder may belong to a process that has yet to lock it


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in ``RAY_TMPDIR``, where it stays, or among the temporary files (``/tmp`` if their path is long).

    Removes those of processes that were killed. Raises :exc:`RayStartError` if there is no room or no right to write.
    """
    given = os.environ.get("RAY_TMPDIR")
    folder = _made(given)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        if not given:
            _remove(folder)


def _made(given: str | None) -> Path:
    base = Path(given or "/tmp").absolute()
    try:
        if not given and len(os.fsencode(tempfile.gettempdir())) <= _MAX_BASE_BYTES:
            base = Path(tempfile.gettempdir())
        if len(os.fsencode(base)) > _MAX_BASE_BYTES:
            raise RayStartError(
                f"RAY_TMPDIR must have at most {_MAX_BASE_BYTES} bytes (names of Ray's sockets have a maximum length), "
                f"got {len(os.fsencode(base))}: {base}; set it to a shorter folder"
            )
        _remove_leftovers(base)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            (folder / "room").write_bytes(bytes(_ROOM_BYTES))
            (folder / "room").unlink()
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise RayStartError(
            f"cannot start Ray on this machine ({base}: {error.strerror}); make it writable and free some space, or "
            f"set RAY_TMPDIR to another folder (of at most {_MAX_BASE_BYTES} bytes)"
        ) from None
    return folder


def _remove_leftovers(base: Path) -> None:
    """Remove the folders of this user's processes that ended without doing so; running ones hold a lock."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(lock)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _OLD_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path, limit_s: float = 5.0) -> None:
    """Remove a folder in which processes that are just ending may still write."""
    deadline = time.monotonic() + limit_s
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
