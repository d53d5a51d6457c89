"""A lock on an output folder, so that one process at a time writes to it; a killed process leaves it free.

On a file system it is two locks of the kernel. One is a name of this machine for the folder, which nobody can delete;
it keeps out all processes of the machine, even if the lock file is deleted. The other is on the lock file and keeps out
other machines and containers that share the file system. The holder looks after the file: if it was deleted, the holder
puts it back within ``WATCH_S``, and stops if another process has locked the new one.

The lock in S3 is our own because the known libraries take a lock server or a table of a database for it; here it is one
object that its holder renews, written only under S3's conditions (``If-Match``, ``If-None-Match``).
"""

from __future__ import annotations

import abc
import errno
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
from typing import TYPE_CHECKING, TextIO, TypedDict, cast

from engine.cli.display import MAX_MESSAGE, shown
from engine.errors import INTERRUPT_HANDLED, InUseError, LockLostError
from engine.storage.paths import Location

if TYPE_CHECKING:
    from engine.storage.s3 import S3Path

_LOGGER = logging.getLogger(__name__)
RENEW_S = 15.0
"""Interval at which the holder of a lock in S3 renews it."""
STALE_S = 60.0
"""Without renewal for this long, by the server's clock, the holder of a lock in S3 counts as gone."""
WATCH_S = 1.0
"""Interval at which the holder of a lock file sees whether it is still there."""
STOP_S = 30.0
"""A process that lost its lock is killed if it does not end within this time."""
_POLL_S = 1.0  # between two attempts to get a lock, when waiting for it
_RELEASE_S = 20.0  # longest wait for the release of a lock


class _Holder(TypedDict, total=False):
    """The content of a lock."""

    host: str
    pid: int
    processes: str
    """Name of the space of process ids; see :func:`_process_space`."""
    since: str
    token: str
    """In S3: identifies this hold of the lock."""
    renewed: float
    """In S3: Unix time of the last renewal, for readers only."""
    released: float
    """In S3: Unix time of the release; there are no other fields then."""


@contextmanager
def lock(out: Location, name: str, *, wait: bool = False, what: str | None = None) -> Iterator[None]:
    """Hold the lock ``.<name>.lock`` of an output folder for the length of a ``with`` block.

    ``what`` is locked, for messages; null: the folder.

    On a file system the kernel keeps the lock until the process ends; in S3 it is an object that its holder renews.
    If another process holds it, raises :class:`InUseError`, or with ``wait`` waits until it is free. If another process
    takes the lock over, because it was not renewed for ``STALE_S`` or its file was deleted, the block is interrupted
    and :class:`LockLostError` is raised.
    """
    path, what = out / f".{name}.lock", what or str(out)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(_hold_file(path, what) if isinstance(path, Path) else _hold_object(path, what))
                break
            except InUseError:
                if not wait:
                    raise
                time.sleep(_POLL_S)
        yield


def holder_of(out: Location, name: str) -> str | None:
    """The process that holds a lock, in words; null if nobody does, as far as can be seen without taking it.

    A process of another machine that ended without a word holds a lock file as long as nobody else takes it.
    """
    path = out / f".{name}.lock"
    if isinstance(path, Path):
        holder, age_s = _parse(path.read_bytes()) if path.is_file() else _Holder(), 0.0
    else:
        version = path.read_version()
        holder, age_s = (_parse(version.data), version.age_s) if version is not None else (_Holder(), 0.0)
    return None if "pid" not in holder or _is_gone(holder, age_s) else _describe(holder)


def _this_process() -> _Holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "processes": _process_space(), "since": since}


def _process_space() -> str:
    """A name for the process ids of this machine or container; other machines use the same numbers."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _describe(holder: _Holder) -> str:
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}" if "pid" in holder else "another run"


def _in_use(out: str, holder: _Holder, more: str = "") -> InUseError:
    cause = f"{out} is in use by {_describe(holder)}{more}"
    return InUseError(f"cannot start ({cause}); wait until it ends, or give another folder")


def _parse(text: str | bytes) -> _Holder:
    try:
        holder = json.loads(text)
    except ValueError:  # it is being written
        return {}
    return cast(_Holder, holder) if isinstance(holder, dict) else {}


@contextmanager
def _hold_file(path: Path, out: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as of_machine:
        status = path.parent.stat()
        try:
            of_machine.bind(f"\0clearsep/{status.st_dev}/{status.st_ino}/{path.name}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(out, _parse(path.read_bytes()) if path.is_file() else {}) from None
            # Otherwise such names are not allowed here: the lock on the file has to do.
        with _kept(_FileKeeper(path, out)):
            yield


@contextmanager
def _hold_object(path: S3Path, out: str) -> Iterator[None]:
    own = _Holder(**_this_process(), token=uuid.uuid4().hex)
    _take(path, out, own)
    with _kept(_Renewer(path, out, own)):
        yield


@contextmanager
def _kept(keeper: _Keeper) -> Iterator[None]:
    """Let a keeper run while the block runs; raises ``LockLostError`` if it finds the lock lost."""
    keeper.start()
    try:
        yield
    except KeyboardInterrupt:
        if keeper.loss is None:
            raise
        INTERRUPT_HANDLED.set()
    finally:
        keeper.end()
    if keeper.loss is not None:
        raise LockLostError(keeper.loss)


class _Keeper(threading.Thread, abc.ABC):
    """Looks after a held lock at an interval; interrupts the main thread if another process has taken it over."""

    def __init__(self, path: Location, out: str) -> None:
        super().__init__(daemon=True, name=f"lock {path}")
        self._out = out
        self._done = threading.Event()
        self.loss: str | None = None
        """Error message if another process holds the lock now."""

    @abc.abstractmethod
    def interval_s(self) -> float:
        """Time between two looks."""

    @abc.abstractmethod
    def renew(self) -> None:
        """See to the lock once; sets ``loss`` if another process holds it."""

    @abc.abstractmethod
    def release(self) -> None:
        """Release the lock if it is still this process's."""

    def run(self) -> None:
        while not self._done.wait(self.interval_s()):
            try:
                self.renew()
            except Exception as error:  # noqa: BLE001 - after any error the lock has to be renewed the next time
                _LOGGER.warning("cannot renew the %s (%s); trying again", self.name, error)
            if self.loss is not None:
                self._interrupt()
                return
        self.release()

    def _interrupt(self) -> None:
        """Interrupt the main thread as Ctrl-C does; kill the process if it does not end."""
        if self._done.is_set():
            return
        if callable(signal.getsignal(signal.SIGINT)):
            os.kill(os.getpid(), signal.SIGINT)
            if self._done.wait(STOP_S):
                return
        sys.stderr.write(f"error: {shown(self.loss, most=MAX_MESSAGE)}\n")
        sys.stderr.flush()
        os._exit(1)

    def end(self) -> None:
        """Release the lock if this process still holds it; a lock that cannot be released becomes stale."""
        self._done.set()
        self.join(_RELEASE_S)
        if self.is_alive() and self.loss is None:
            self._warn(f"no answer in {_RELEASE_S:.0f} s")

    def _warn(self, cause: object) -> None:
        _LOGGER.warning("cannot release the %s (%s); it is free in %.0f s", self.name, cause, STALE_S)


class _FileKeeper(_Keeper):
    """Holds a lock file; one that was deleted is put back, unless its folder is gone or another process has it."""

    def __init__(self, path: Path, out: str) -> None:
        super().__init__(path, out)
        self._path = path
        self._file = self._open()

    def interval_s(self) -> float:
        return WATCH_S

    def _open(self) -> TextIO:
        """The lock file, locked and with this process in it; ``InUseError`` if another process has it."""
        while True:
            file = open(self._path, "a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    raise _in_use(self._out, _parse(file.read())) from None
            if self._is_at_path(file):  # else it was deleted or replaced before it was locked
                break
            file.close()
        file.truncate(0)
        file.write(json.dumps(_this_process()))
        file.flush()
        return file

    def _is_at_path(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        if self._is_at_path(self._file) or not self._path.parent.is_dir():
            return
        try:
            file = self._open()
        except InUseError:
            self.loss = (
                f"cannot continue ({self._out} was taken over by {_describe(_parse(self._path.read_bytes()))}, because "
                f"the lock file {self._path.name} was deleted or replaced); wait until the other process ends"
            )
            return
        self._file.close()
        self._file = file
        _LOGGER.warning("the lock file %s was deleted or replaced; it is locked again", self._path)

    def release(self) -> None:
        self._file.truncate(0)  # it names nobody
        self._file.close()


class _Renewer(_Keeper):
    """Renews a lock in S3 every ``RENEW_S``.

    Every write has a condition on the version that was read, so that another holder's lock is never overwritten.
    """

    def __init__(self, path: S3Path, out: str, own: _Holder) -> None:
        super().__init__(path, out)
        self._path, self._own = path, own

    def interval_s(self) -> float:
        return RENEW_S

    def renew(self) -> None:
        version = self._path.read_version()
        if version is None:  # deleted by hand: put it back unless another process has taken it
            self._path.create(_content(self._own))
        elif self._is_own(version.data):  # a change since then is seen at the next renewal
            self._path.replace_version(_content(self._own), etag=version.etag)

    def _is_own(self, data: bytes) -> bool:
        holder = _parse(data)
        if holder.get("token") != self._own["token"]:
            self.loss = (
                f"cannot continue ({self._out} was taken over by {_describe(holder)}, because this process "
                f"({self._own['pid']} on {self._own['host']}) did not renew its lock for {STALE_S:.0f} s); "
                "wait until the other process ends"
            )
        return self.loss is None

    def release(self) -> None:
        try:
            version = self._path.read_version()
            if version is not None and self._is_own(version.data):
                self._path.replace_version(json.dumps({"released": time.time()}).encode(), etag=version.etag)
        except (OSError, ValueError) as error:
            self._warn(error)


def _content(own: _Holder) -> bytes:
    return json.dumps({**own, "renewed": time.time()}).encode()


def _take(path: S3Path, out: str, own: _Holder) -> None:
    """Create the lock, or take it over if it was released, is stale or its process on this machine has ended."""
    version = path.read_version()
    if version is None:
        path.create(_content(own))
    else:
        holder = _parse(version.data)
        if not _is_gone(holder, version.age_s):
            age = f"renewed its lock {version.age_s:.0f} s ago and counts as gone after {STALE_S:.0f} s"
            raise _in_use(out, holder, f", which {age}")
        path.replace_version(_content(own), etag=version.etag)
    # The answers to the writes are not used: after a lost answer, the retry of a write that succeeded returns false.
    now = path.read_version()
    holder = _parse(now.data) if now else {}
    if holder.get("token") != own["token"]:
        raise _in_use(out, holder)


def _is_gone(holder: _Holder, age_s: float) -> bool:
    if "released" in holder or age_s > STALE_S:
        return True
    return holder.get("processes") == _process_space() and not _is_alive(int(holder["pid"]))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
