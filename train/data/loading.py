"""Threads that read sounds, each with a decoder of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engine.audio.decoder import Decoder, shared_decoder

_MAX_THREADS = 16
_JOBS_OF_A_THREAD = 8  # a decoder takes half a second to start
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class _Own(threading.local):
    decoder: Decoder | None = None


_OWN = _Own()


def thread_decoder() -> Decoder:
    """The decoder of a thread of a :class:`Loader`; in any other thread that of the process."""
    return _OWN.decoder or shared_decoder()


class Loader:
    """Runs jobs on as many threads as torch may use here; their decoders stay until :meth:`close`."""

    def __init__(self) -> None:
        self._max_threads = min(_MAX_THREADS, torch.get_num_threads())
        self._threads: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[_Job], _Result], jobs: Iterable[_Job]) -> list[_Result]:
        """The result of every job; the first error ends all."""
        jobs = list(jobs)
        if self._max_threads == 1 or len(jobs) <= _JOBS_OF_A_THREAD:
            return list(map(function, jobs))
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._max_threads, initializer=_begin)
        return list(self._threads.map(function, jobs))

    def close(self) -> None:
        """End the threads and their decoders; another job starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def _begin() -> None:
    _OWN.decoder = Decoder()
    torch.set_num_threads(1)  # several pools of OpenMP threads on the same cores wait for each other
