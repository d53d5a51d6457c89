"""Separation in batches measured in seconds of audio; a batch that fails or does not fit in memory is halved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import as_exception
from engine.separators.base import Separator
from engine.separators.queries import Query, as_query
from engine.storage.retry import ATTEMPTS, is_transient, retried

_GROWTH = 1.1  # of a batch that fitted, each time


@dataclass(frozen=True, kw_only=True)
class SeparationRequest:
    """A mixture, samples ``[T]`` (float32), and the query to separate from it."""

    samples_T: np.ndarray
    query: str | Query


@dataclass(kw_only=True)
class BatchedSeparator:
    """A separator with its device and batch size; it learns how much fits, so that one pass can use different GPUs."""

    separator: Separator
    batch_s: float
    """Most audio in one call of the separator, in seconds, padding included."""
    device: str = "cpu"
    autocast: bool = False
    """Separate in 16-bit floating point."""
    fits_s: float = math.inf
    """Size in seconds of a batch that fitted when a larger one did not; it grows by 10 % with every call."""

    def separate(self, requests: Sequence[SeparationRequest]) -> list[np.ndarray | Exception]:
        """The stem ``[T]`` of every request, or the exception that separating it raised; others are unaffected."""
        self.fits_s *= _GROWTH
        batch_samples = self._batch_samples
        stems: dict[int, np.ndarray | Exception] = {}
        for positions in pack((len(request.samples_T) for request in requests), batch_samples=batch_samples):
            stems |= zip(positions, self._run([requests[i] for i in positions]), strict=True)
        return [stems[position] for position in range(len(requests))]

    @property
    def _batch_samples(self) -> int:
        return max(1, int(min(self.batch_s, self.fits_s) * self.separator.sample_rate_hz))

    def fill_fraction(self, num_samples: Sequence[int]) -> float:
        """Fraction of the batches for queries of these lengths that is audio, not padding or unused room."""
        batch_samples = self._batch_samples
        batches = pack(num_samples, batch_samples=batch_samples)
        room = sum(max(batch_samples, num_samples[batch[0]]) for batch in batches)
        return sum(num_samples) / room if room else 0.0

    def _run(self, batch: list[SeparationRequest]) -> list[np.ndarray | Exception]:
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

    def _retry(self, request: SeparationRequest, outcome: Exception) -> np.ndarray | Exception:
        """Separate a request again that failed with ``outcome``, if that is an error that may pass."""
        if not is_transient(outcome):
            return outcome
        time.sleep(1.0)

        def again() -> np.ndarray:
            stems = self._attempt([request])
            if isinstance(stems, Exception):
                raise stems
            return stems[0]

        try:
            return retried(again, attempts=ATTEMPTS - 1)
        except BaseException as error:  # noqa: BLE001 - whatever a separator raises costs this query
            return as_exception(error)

    def _attempt(self, batch: list[SeparationRequest]) -> list[np.ndarray] | Exception:
        """Stems of a batch, or the error without its traceback, which would keep the batch in memory."""
        lengths = [len(request.samples_T) for request in batch]
        try:
            with torch.autocast(self.device, enabled=self.autocast):
                stems_BT = self.separator.separate(_stack(batch), [request.query for request in batch], lengths=lengths)
            stems = _checked(stems_BT, batch)
        except BaseException as error:  # noqa: BLE001 - whatever a separator raises costs its queries
            return as_exception(error)
        return [stem_T[:length] for stem_T, length in zip(stems, lengths, strict=True)]


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


def _checked(stems_BT: object, batch: list[SeparationRequest]) -> np.ndarray:
    """The result of a separator as float32 in memory; raises for anything but finite samples for every query."""
    if not isinstance(stems_BT, Tensor) or not stems_BT.is_floating_point():
        got = stems_BT.dtype if isinstance(stems_BT, Tensor) else type(stems_BT).__name__
        raise TypeError(f"a separator must return a tensor of floating-point stems, got {got}; correct the separator")
    shape = (len(batch), max(len(request.samples_T) for request in batch))
    if tuple(stems_BT.shape) != shape:
        raise ValueError(
            f"stems of a separator must have shape [B, T] = {shape}, got {tuple(stems_BT.shape)}; correct the separator"
        )
    stems: np.ndarray = stems_BT.detach().float().cpu().numpy()
    for stem_T, request in zip(stems, batch, strict=True):
        if not np.isfinite(stem_T[: len(request.samples_T)]).all():
            name = as_query(request.query).text
            raise ValueError(f"a stem must be finite, got NaN or infinite samples for {name!r}; drop the clip")
    return stems


def _stack(batch: list[SeparationRequest]) -> Tensor:
    mix_BT = np.zeros((len(batch), max(len(request.samples_T) for request in batch)), dtype=np.float32)
    for row, request in enumerate(batch):
        mix_BT[row, : len(request.samples_T)] = request.samples_T
    return torch.from_numpy(mix_BT)
