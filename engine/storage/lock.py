"""One run at a time on an output folder: the second is told no, and one that was killed does not lock the next out."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.storage.paths import Location

if TYPE_CHECKING:
    from engine.storage.s3 import S3Path

_LOGGER = logging.getLogger(__name__)
RENEW_S = 15.0
"""How often the holder of a lock in S3 says that it lives."""
STALE_S = 60.0
"""A lock in S3 that was not renewed for so long, by the server's clock, is of a holder that is gone."""
STOP_S = 30.0
"""A holder that lost its lock ends its work within this time, or is ended."""
_POLL_S = 1.0  # between two looks at a lock that is waited for
_RELEASE_S = 20.0  # how long the end of a block waits for its lock to be given back


class InUseError(ValueError):
    """Another holds the lock."""


@contextmanager
def lock(out: Location, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``.<name>.lock`` of an output folder for the length of a ``with`` block.

    On a file system the lock is the kernel's (``flock``) and goes with the process, however it ends; in S3 it is an
    object that its holder renews. Where another holds it, raises :class:`InUseError`, or with ``wait`` waits until that
    one is done or gone. A holder in S3 that was silent for ``STALE_S`` may find that another has taken its place: the
    block is interrupted and ends with ``RuntimeError``.
    """
    path = out / f".{name}.lock"
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(_held_file(path, out) if isinstance(path, Path) else _held_object(path, out))
                break
            except InUseError:
                if not wait:
                    raise
                time.sleep(_POLL_S)
        yield


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "processes": _processes(), "since": since}


def _processes() -> str:
    """What tells a machine's or a container's processes from those of others, whose numbers are the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}" if "pid" in holder else "another run"


def _refusal(out: Location, holder: dict[str, Any]) -> InUseError:
    return InUseError(f"{out} is in use by {_who(holder)}; wait until it ends, or give another folder")


@contextmanager
def _held_file(path: Path, out: Location) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(out, _read(file.read())) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_me()))
        file.flush()
        yield


def _read(text: str | bytes) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:  # it is being written
        return {}
    return holder if isinstance(holder, dict) else {}


@contextmanager
def _held_object(path: S3Path, out: Location) -> Iterator[None]:
    mine = {**_me(), "token": uuid.uuid4().hex}
    _take(path, out, mine)
    renewer = _Renewer(path, out, mine)
    renewer.start()
    try:
        yield
    except KeyboardInterrupt:
        if renewer.loss is None:
            raise
    finally:
        renewer.end()
    if renewer.loss is not None:
        raise RuntimeError(renewer.loss)


class _Renewer(threading.Thread):
    """Says every ``RENEW_S`` that the holder lives, as long as that is so; interrupts its work where it lost the lock.

    Every write is conditional on what was there before: nothing of another holder is ever written over.
    """

    def __init__(self, path: S3Path, out: Location, mine: dict[str, Any]) -> None:
        super().__init__(daemon=True, name=f"lock {path}")
        self._path, self._out, self._mine = path, out, mine
        self._done = threading.Event()
        self.loss: str | None = None
        """In words, where another holds the lock now."""

    def run(self) -> None:
        while not self._done.wait(RENEW_S):
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - whatever it was, the lock has to be renewed next time
                _LOGGER.warning("the lock %s was not renewed: %s; it is tried again", self._path, error)
            if self.loss is not None:
                self._interrupt()
                return
        self._release()

    def _renew(self) -> None:
        found = self._path.tagged()
        if found is None:  # deleted by hand: as long as nobody has taken it, it is put back
            self._path.create(_record(self._mine))
        elif self._is_mine(found.data):
            self._path.replace_same(_record(self._mine), etag=found.etag)  # false where it changed: seen next time

    def _is_mine(self, data: bytes) -> bool:
        holder = _read(data)
        if holder.get("token") != self._mine["token"]:
            self.loss = (
                f"{self._out} was taken over by {_who(holder)}, as this process ({self._mine['pid']} on "
                f"{self._mine['host']}) had not been heard of for {STALE_S:.0f} s; it stops, the other goes on"
            )
        return self.loss is None

    def _interrupt(self) -> None:
        """Interrupt the main thread as Ctrl-C does; what does not end upon that is ended."""
        if self._done.is_set():
            return
        if callable(signal.getsignal(signal.SIGINT)):
            os.kill(os.getpid(), signal.SIGINT)
            if self._done.wait(STOP_S):
                return
        sys.stderr.write(f"error: {self.loss}\n")
        sys.stderr.flush()
        os._exit(1)

    def end(self) -> None:
        """Give the lock back, where it is still this holder's; where that cannot be done it ends by going stale."""
        self._done.set()
        self.join(_RELEASE_S)
        if self.is_alive() and self.loss is None:
            _LOGGER.warning("the lock %s was not given back in %.0f s; it goes stale", self._path, _RELEASE_S)

    def _release(self) -> None:
        try:
            found = self._path.tagged()
            if found is not None and self._is_mine(found.data):
                self._path.replace_same(json.dumps({"released": time.time()}).encode(), etag=found.etag)
        except (OSError, ValueError) as error:
            _LOGGER.warning("the lock %s was not given back: %s; it goes stale", self._path, error)


def _record(mine: dict[str, Any]) -> bytes:
    return json.dumps({**mine, "renewed": time.time()}).encode()


def _take(path: S3Path, out: Location, mine: dict[str, Any]) -> None:
    """Create the object, or take it from a holder that is gone: of this machine without its process, or silent."""
    found = path.tagged()
    if found is None:
        path.create(_record(mine))
    else:
        holder = _read(found.data)
        if not _is_gone(holder, found.age_s):
            labels_present = f"it was last heard of {found.age_s:.0f} s ago; after {STALE_S:.0f} s it counts as gone"
            raise InUseError(f"{_refusal(out, holder)} ({labels_present})")
        path.replace_same(_record(mine), etag=found.etag)
    # Whether the write was the first is read from the object: an answer that was lost on its way says no by itself.
    now = path.tagged()
    holder = _read(now.data) if now else {}
    if holder.get("token") != mine["token"]:
        raise _refusal(out, holder)


def _is_gone(holder: dict[str, Any], age_s: float) -> bool:
    if "released" in holder or age_s > STALE_S:
        return True
    return holder.get("processes") == _processes() and not _lives(int(holder["pid"]))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
