"""Loading many sounds at once, on threads that each have a decoder of their own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import joblib
import torch

from engine.audio.decoder import Decoder, shared_decoder, use_decoder

_MOST_THREADS = 8
_LOADS_FOR_A_THREAD = 64  # starting a decoder takes about as long as these

_Loaded = TypeVar("_Loaded")


def loaded(loads: Sequence[Callable[[], _Loaded]]) -> Iterator[_Loaded | ValueError | OSError]:
    """The result of every load, in order, or the ``ValueError`` or ``OSError`` that it raised; few are ahead."""
    num_threads = min(joblib.cpu_count(), _MOST_THREADS, 1 + len(loads) // _LOADS_FOR_A_THREAD)
    if num_threads == 1:
        yield from map(_attempt, loads)
        return
    decoders = [shared_decoder(), *(Decoder() for _ in range(num_threads - 1))]
    free = iter(decoders)

    def begin() -> None:
        torch.set_num_threads(1)
        use_decoder(next(free))

    pool = ThreadPoolExecutor(max_workers=num_threads, initializer=begin)
    try:
        left = iter(loads)
        pending: deque[Future[_Loaded | ValueError | OSError]] = deque()
        pending.extend(pool.submit(_attempt, load) for load in itertools.islice(left, 2 * num_threads))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(_attempt, load) for load in itertools.islice(left, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        for decoder in decoders[1:]:
            decoder.close()


def _attempt(load: Callable[[], _Loaded]) -> _Loaded | ValueError | OSError:
    try:
        return load()
    except (ValueError, OSError) as error:
        return error
