"""Loading many sounds on threads that each have a decoder of their own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch

from engine.audio.decoder import Decoder, use_decoder

_MAX_THREADS = 16
_JOBS_OF_A_THREAD = 8  # a decoder takes half a second to start
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Loader:
    """Runs jobs on as many threads as torch may use here; their decoders stay until :meth:`close`."""

    def __init__(self) -> None:
        self._max_threads = min(_MAX_THREADS, torch.get_num_threads())
        self._threads: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[_Job], _Result], jobs: Iterable[_Job]) -> list[_Result]:
        """The result of every job; the first error ends all."""
        return list(self.results(function, list(jobs)))

    def results(self, function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
        """The result of every job in order; few jobs are begun before a result is wanted."""
        if self._max_threads == 1 or len(jobs) <= _JOBS_OF_A_THREAD:
            yield from map(function, jobs)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._max_threads, initializer=_begin)
        left, pending = iter(jobs), deque[Future[_Result]]()
        pending.extend(self._threads.submit(function, job) for job in itertools.islice(left, 2 * self._max_threads))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(self._threads.submit(function, job) for job in itertools.islice(left, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the threads and their decoders; another job starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def loaded(loads: Sequence[Callable[[], _Result]]) -> Iterator[_Result | ValueError | OSError]:
    """The result of every load, in order, or the ``ValueError`` or ``OSError`` that it raised; few are ahead."""
    with closing(Loader()) as loader:
        yield from loader.results(_attempt, loads)


def _attempt(load: Callable[[], _Result]) -> _Result | ValueError | OSError:
    try:
        return load()
    except (ValueError, OSError) as error:
        return error


def _begin() -> None:
    use_decoder(Decoder())
    torch.set_num_threads(1)  # several pools of OpenMP threads on the same cores wait for each other
