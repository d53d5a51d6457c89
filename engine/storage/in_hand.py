"""Work that a worker has in hand, marked in small files, so that a clip that ends its worker is found and fails alone.

Ray replaces a worker that has died and repeats its work, without end, and does not say which work was begun. So a
worker creates a mark before it begins some work, and the next one to begin the same work finds a mark of every worker
that did not end it. Work that has ended ``MAX_DEATHS`` workers is done piece by piece, with a mark for the piece in
hand; a piece that has itself been alone in hand at as many deaths is left out. Marks count for one execution alone.

A worker may have several works in hand, one in each thread. If it ends, all of them have a mark; so each that has ended
a worker before is done alone in its worker, and what is innocent has no second death.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.errors import WorkerDiedError
from engine.storage.files import read_json, write_json
from engine.storage.paths import Location

MAX_DEATHS = 3
"""Workers that may end with the same work in hand before it is split, and with the same piece before it fails."""
_REMEDY = "remove or replace it, repair the model, or give the machine more memory"
_GRACE_S = 30.0  # after a time limit, for writing down the cause


class Part(NamedTuple):
    """Pieces of the work in hand to do together, by their positions."""

    positions: Sequence[int]
    error: WorkerDiedError | None = None
    """The piece must be left out: it has ended too many workers."""


class _Now(threading.local):
    """The work in hand of a thread."""

    work = marked = ""
    deaths = 0
    in_parts = False


class InHand:
    """The work in hand of one worker, with its marks in a folder; without a folder nothing is marked or limited."""

    def __init__(self, folder: Location | None = None) -> None:
        self.folder = folder
        self._now, self._turns, self._alarms = _Now(), _Turns(), _Alarms()

    def __reduce__(self) -> tuple[type[InHand], tuple[Location | None]]:
        return InHand, (self.folder,)

    @contextmanager
    def work(self, name: str, num_pieces: int) -> Iterator[None]:
        """Begin some work in this thread; if it has ended a worker, other threads have nothing in hand meanwhile."""
        has_ended = self.folder is not None and (self.folder / f"{name}.0").is_file()
        with self._turns.turn(alone=has_ended):
            self.begin(name, num_pieces)
            yield

    def begin(self, work: str, num_pieces: int | None = None) -> int:
        """Mark that some work begins, and return how many workers began it before and ended with it in hand.

        The marks of this thread's work before that are removed: it did not end with that in hand.
        Raises :class:`WorkerDiedError` if these are more than its pieces can explain.
        """
        if self._now.work:
            self.end(self._now.work, self._now.deaths)
        self._now.work, self._now.deaths = work, self._mark(work)
        deaths = self._now.deaths
        self._now.in_parts = deaths >= MAX_DEATHS
        if num_pieces is not None and deaths >= MAX_DEATHS * (num_pieces + 2):
            what = f"{work}: cannot finish it"
            raise self.error(what, deaths, "give the machine more memory")
        return deaths

    def parts(self, step: str, pieces: Sequence[tuple[str, str]]) -> Iterator[Part]:
        """The pieces of the work to do together: all at once, or each alone if the work has ended too many workers.

        A piece is a name without slashes and what a message calls it; ``step`` is the verb for what is done to it.
        """
        if not self._now.in_parts:
            yield Part(range(len(pieces)))
            return
        for position, (name, shown) in enumerate(pieces):
            deaths = self._mark(mark := f"{self._now.work}-{step}-{name}")
            if deaths < MAX_DEATHS:
                yield Part([position])
                self.end(mark, deaths)
            else:
                assert self.folder is not None, "without it there are no deaths"
                (self.folder / f"{mark}.{deaths}").unlink(
                    missing_ok=True
                )  # it is left out: no other death is its fault
                yield Part([position], self.error(f"{shown!r}: cannot {step} it", deaths, _REMEDY))

    def end(self, mark: str, deaths: int) -> None:
        """Remove the marks of work that is done."""
        if self.folder is not None:
            for number in range(deaths + 1):
                (self.folder / f"{mark}.{number}").unlink(missing_ok=True)

    def error(self, what: str, deaths: int, remedy: str) -> WorkerDiedError:
        """The error of the work that was marked last, with the cause if its workers knew it.

        Raises ``MemoryError`` if others keep the machine so full that Ray ends workers whatever they do.
        """
        note: dict[str, str] = {}
        if self.folder is not None and (path := self.folder / f"{self._now.marked}.cause").is_file():
            note = read_json(path)
        if not note and _memory_is_full():  # then not this work is at fault
            cause = f"the memory of the machine is full, and {deaths} workers ended"
            message = f"{what} ({cause}); end what else needs memory there, or take a machine with more"
            raise MemoryError(message)
        cause = note.get("cause", "it crashed or was killed, as for lack of memory")
        message = f"{what} ({deaths} workers ended with it alone in hand: {cause}); {remedy}"
        return WorkerDiedError(message, note.get("error_class", "WorkerDied"), attempts=deaths)

    @contextmanager
    def limit(self, limit_s: float, what: str) -> Iterator[None]:
        """End this process, which counts as a death, if the block takes longer."""
        if self.folder is None:
            yield
            return
        cause = f"{what} took longer than {limit_s:g} s"
        watch = threading.Timer(limit_s, self._end, (self._now.marked, "WorkerTimeout", cause))
        watch.daemon = True
        watch.start()
        try:
            with self._alarms.alarm(limit_s + _GRACE_S):
                yield
        finally:
            watch.cancel()

    def die(self, error_class: str, cause: str) -> None:
        """Note why, and end this process at once; Ray starts another one."""
        self._end(self._now.marked, error_class, cause)

    def _end(self, marked: str, error_class: str, cause: str) -> None:
        if self.folder is not None:
            try:
                write_json(self.folder / f"{marked}.cause", {"error_class": error_class, "cause": cause[:1000]})
            finally:
                os._exit(1)

    def _mark(self, name: str) -> int:
        if self.folder is None:
            return 0
        self._now.marked = name
        return next(number for number in itertools.count() if _create(self.folder / f"{name}.{number}"))


class _Turns:
    """Threads that work at the same time, except for those that must be alone, which keep others from beginning."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_at_work = self._num_alone = 0

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn."""
        with self._changed:
            self._num_alone += alone
            self._changed.wait_for(lambda: not (self._num_at_work if alone else self._num_alone))
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_alone -= alone
                self._num_at_work -= 1
                self._changed.notify_all()


class _Alarms:
    """Ends this process after the first of several times even if C code lets no thread run; a process has one timer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: list[float] = []

    @contextmanager
    def alarm(self, limit_s: float) -> Iterator[None]:
        """End this process if the block takes longer."""
        end = time.monotonic() + limit_s
        self._change(self._ends.append, end)
        try:
            yield
        finally:
            self._change(self._ends.remove, end)

    def _change(self, change: Callable[[float], None], end: float) -> None:
        with self._lock:
            change(end)
            if self._ends:
                left_s = max(1e-3, min(self._ends) - time.monotonic())
                faulthandler.dump_traceback_later(left_s, exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()


def _memory_is_full() -> bool:
    """More memory is in use, before any work is done, than Ray's memory monitor allows."""
    if sys.platform != "linux":
        return False
    with open("/proc/meminfo") as file:
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in file)}
    used_fraction = 1.0 - kilobytes["MemAvailable"] / kilobytes["MemTotal"]
    return used_fraction > float(os.environ.get("RAY_memory_usage_threshold", "0.95"))


def _create(path: Location) -> bool:
    """Create an empty file; false if there is one."""
    if not isinstance(path, Path):
        return path.create(b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.touch(exist_ok=False)
        return True
    return False
