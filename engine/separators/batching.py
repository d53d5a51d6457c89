"""Separation in batches measured in seconds of audio; a batch that fails or does not fit in memory is halved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import as_exception
from engine.separators.base import Separator, padded_rows, small_tensor
from engine.separators.queries import Query, as_query
from engine.storage.retry import ATTEMPTS, is_transient, retried

FIRST_S = 80.0
"""Audio in a batch where no size is given: always on a CPU, and at first on a GPU."""
_GROWTH = 1.1  # of a batch that fitted, each time
_WORTH, _NUM_TIMED = 1.1, 4  # more throughput that a batch twice as large must bring; batches of one size until then


@dataclass(frozen=True, kw_only=True)
class SeparationRequest:
    """A mixture, samples ``[T]`` (float32) on any device, and the query to separate from it.

    Requests with the same tensor share a mixture, of which what no query changes is computed once.
    """

    samples_T: Tensor
    query: str | Query


@dataclass(kw_only=True)
class SizeSearch:
    """Search for the size of batches: it doubles while full batches become faster and there is memory and work."""

    size_s: float = field(default=FIRST_S, init=False)
    is_over: bool = field(default=False, init=False)
    _rates: list[float] = field(default_factory=list, init=False)
    """Audio per second of the full batches of this size."""
    _best_of_half: float = field(default=0.0, init=False)

    def add(self, rate: float, *, waiting_s: float) -> None:
        """Take the rate of a full batch, one of those for ``waiting_s`` of audio."""
        self._rates.append(rate)
        if self.is_over or len(self._rates) < _NUM_TIMED:
            return
        best = max(self._rates)
        if best < _WORTH * self._best_of_half:
            self.size_s, self.is_over = self.size_s / 2, True
        elif not _has_room():
            self.is_over = True
        elif waiting_s >= 2 * self.size_s:
            self.size_s, self._best_of_half, self._rates = 2 * self.size_s, best, []


def _has_room() -> bool:
    """The GPU has as much memory again as this process uses, if there is a GPU."""
    return not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] >= torch.cuda.memory_reserved()


@dataclass(kw_only=True)
class BatchedSeparator:
    """A separator with its device and batch size; it learns how much fits, so that one pass can use different GPUs."""

    separator: Separator
    device: str = "cpu"
    autocast: bool = False
    """Separate in 16-bit floating point."""
    batch_s: float | None = None
    """Most audio in one call of the separator, in seconds, padding included; None: found on a GPU, 80 on a CPU."""
    fits_s: float = math.inf
    """Size in seconds of a batch that fitted when a larger one did not; it grows by 10 % with every call."""
    search: SizeSearch = field(default_factory=SizeSearch, init=False)

    @property
    def size_s(self) -> float:
        """Most audio in one call at present, in seconds."""
        return min(self.search.size_s if self.batch_s is None else self.batch_s, self.fits_s)

    def separate(self, requests: Sequence[SeparationRequest]) -> list[Tensor | Exception]:
        """The stem ``[T]`` (float32) of every request on :attr:`device`, or the exception that separating it raised."""
        self.fits_s *= _GROWTH
        batch_samples, num_samples = self._batch_samples, [len(request.samples_T) for request in requests]
        stems: dict[int, Tensor | Exception] = {}
        for positions in pack(num_samples, batch_samples=batch_samples):
            started, longest = time.perf_counter(), num_samples[positions[0]]
            stems |= zip(positions, self._run([requests[i] for i in positions]), strict=True)
            if self._is_searching and (len(positions) + 1) * longest > batch_samples:
                rate = len(positions) * longest / (time.perf_counter() - started)
                self.search.add(rate, waiting_s=sum(num_samples) / self.separator.sample_rate_hz)
        return [stems[position] for position in range(len(requests))]

    @property
    def _is_searching(self) -> bool:
        return self.batch_s is None and self.device == "cuda" and self.fits_s == math.inf

    @property
    def _batch_samples(self) -> int:
        return max(1, int(self.size_s * self.separator.sample_rate_hz))

    def fill_fraction(self, num_samples: Sequence[int]) -> float:
        """Fraction of the batches for queries of these lengths that is audio, not padding or unused room."""
        batch_samples = self._batch_samples
        batches = pack(num_samples, batch_samples=batch_samples)
        room = sum(max(batch_samples, num_samples[batch[0]]) for batch in batches)
        return sum(num_samples) / room if room else 0.0

    def _run(self, batch: list[SeparationRequest]) -> list[Tensor | Exception]:
        outcome = self._attempt(batch)
        if not isinstance(outcome, Exception):
            return list(outcome)
        if len(batch) == 1:
            return [self._retry(batch[0], outcome)]
        if self.device == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        if isinstance(outcome, (torch.OutOfMemoryError, MemoryError)):
            longest = max(len(request.samples_T) for request in batch)
            self.fits_s = min(self.fits_s, (len(batch) - half) * longest / self.separator.sample_rate_hz)
        return self._run(batch[:half]) + self._run(batch[half:])

    def _retry(self, request: SeparationRequest, outcome: Exception) -> Tensor | Exception:
        """Separate a request again that failed with ``outcome``, if that is an error that may pass."""
        if not is_transient(outcome):
            return outcome
        time.sleep(1.0)

        def again() -> Tensor:
            stems = self._attempt([request])
            if isinstance(stems, Exception):
                raise stems
            return stems[0]

        try:
            return retried(again, attempts=ATTEMPTS - 1)
        except BaseException as error:  # noqa: BLE001 - whatever a separator raises costs this query
            return as_exception(error)

    def _attempt(self, batch: list[SeparationRequest]) -> list[Tensor] | Exception:
        """Stems of a batch, or the error without its traceback, which would keep the batch in memory."""
        try:
            with torch.autocast(self.device, enabled=self.autocast):
                stems_BT = self._call(batch)
                lengths = [len(request.samples_T) for request in batch]
                _require_finite(stems_BT, lengths, batch)
        except BaseException as error:  # noqa: BLE001 - whatever a separator raises costs its queries
            return as_exception(error)
        return [stem_T[:length] for stem_T, length in zip(stems_BT, lengths, strict=True)]

    def _call(self, batch: list[SeparationRequest]) -> Tensor:
        """Stems ``[B, T]`` of the separator, as float32 on the device."""
        queries = [request.query for request in batch]
        mixtures = {id(request.samples_T): request.samples_T for request in batch}
        places = {mixture: place for place, mixture in enumerate(mixtures)}
        rows = [places[id(request.samples_T)] for request in batch]
        lengths = [len(samples_T) for samples_T in mixtures.values()]
        if getattr(self.separator, "shares_mixtures", False):
            mix_MT = padded_rows(list(mixtures.values()), self.device)
            stems_BT = self.separator.separate(mix_MT, queries, lengths=lengths, rows=rows)  # type: ignore[call-arg]
        else:
            mix_BT = padded_rows([request.samples_T for request in batch], "cpu")
            stems_BT = self.separator.separate(mix_BT, queries, lengths=[lengths[row] for row in rows])
        _require_shape(stems_BT, (len(batch), max(lengths)))
        return stems_BT.detach().to(self.device, torch.float32)


def pack(num_samples: Iterable[int], *, batch_samples: int) -> Iterator[list[int]]:
    """Pack positions into batches, longest first; queries x longest <= ``batch_samples`` unless there is one query."""
    sizes = list(num_samples)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * sizes[batch[0]] > batch_samples:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _require_shape(stems_BT: object, shape: tuple[int, int]) -> None:
    if not isinstance(stems_BT, Tensor) or not stems_BT.is_floating_point():
        got = stems_BT.dtype if isinstance(stems_BT, Tensor) else type(stems_BT).__name__
        raise TypeError(f"a separator must return a tensor of floating-point stems, got {got}; correct the separator")
    if tuple(stems_BT.shape) != shape:
        raise ValueError(
            f"stems of a separator must have shape [B, T] = {shape}, got {tuple(stems_BT.shape)}; correct the separator"
        )


def _require_finite(stems_BT: Tensor, lengths: Sequence[int], batch: list[SeparationRequest]) -> None:
    """Raises for the first stem with a sample that is not finite before its end; waits for the device once."""
    if math.isfinite(stems_BT.sum()):  # a quick check that most batches pass
        return
    is_good_BT = stems_BT.isfinite()
    if min(lengths) < stems_BT.shape[1]:
        times_T = torch.arange(stems_BT.shape[1], device=stems_BT.device)
        is_good_BT |= times_T >= small_tensor(lengths, stems_BT.device)[:, None]
    for is_good, request in zip(is_good_BT.all(1).tolist(), batch, strict=True):
        if not is_good:
            name = as_query(request.query).text
            raise ValueError(f"a stem must be finite, got NaN or infinite samples for {name!r}; drop the clip")
