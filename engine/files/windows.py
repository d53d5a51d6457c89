"""Separation of a stream in windows that overlap; stems are cross-faded where windows meet, far from their ends.

The cross-fade takes the middle half of an overlap, and the two weights add up to 1: a separator that gives the same
samples in both windows gives them in the joined stem too, at the same level and phase.

Shape legend: ``T`` samples, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.audio.sndfile import Samples
from engine.scoring.sharing import share_mixture
from engine.separators import Query, Separator
from engine.separators.batching import BatchedSeparator, SeparationRequest

_WINDOW_S, _OVERLAP_S = 10.0, 1.0  # for a separator that does not state its own


class WindowedSeparator:
    """Takes the samples of a mixture as they come, and gives those of its stems with a delay of at most a window.

    A window is a chunk of the separator (``chunk_s``, ``overlap_s``). The last one is as long as the others, so that
    the end of a recording has context too; a recording that fits a window is separated in one piece.
    """

    def __init__(
        self,
        separator: Separator,
        queries: Sequence[str | Query],
        *,
        divides: bool = False,
        batch_s: float = 0.0,
        device: str = "cpu",
    ) -> None:
        """``batch_s`` is the most audio in one call, in seconds; a window for one query at least.

        ``divides``: the mixture is divided among its stems (:func:`~engine.scoring.sharing.share_mixture`); the
        stems as they were follow these as ``Q`` more rows.
        """
        window_s = float(getattr(separator, "chunk_s", _WINDOW_S))
        overlap_s = float(getattr(separator, "overlap_s", _OVERLAP_S))
        self._window = max(2, round(window_s * separator.sample_rate_hz))
        self._overlap = min(self._window // 2, max(1, round(overlap_s * separator.sample_rate_hz)))
        self._fade = max(1, self._overlap // 2)
        self._margin = (self._overlap - self._fade) // 2
        self._in_T = (np.sin(np.pi / 2 * (np.arange(self._fade) + 0.5) / self._fade) ** 2).astype(np.float32)
        self._queries, self._divides = queries, divides
        batch_s = max(window_s, batch_s)
        self._at_once = max(1, int(batch_s / window_s / len(queries)))
        self._batched = BatchedSeparator(separator=separator, batch_s=batch_s, device=device)
        self._held_T = np.zeros(0, np.float32)
        self._begin = self._start = self._done = 0
        """Positions of the first sample held, of the next window, and of the next sample of the stems."""
        self._tail_QT: Samples | None = None
        """The last stems where the next window fades in."""

    def push(self, mix_T: Samples) -> Iterator[tuple[Samples, Samples]]:
        """Yield the next samples of the mixture ``[T]`` and its stems ``[Q, T]`` as far as they can be known."""
        self._held_T = np.concatenate([self._held_T, mix_T])
        step, end = self._window - self._overlap, self._begin + len(self._held_T)
        while end > self._start + self._window + (self._at_once - 1) * step:
            starts = [self._start + number * step for number in range(self._at_once)]
            for start, stems_QT in zip(starts, self._separate(starts, self._window), strict=True):
                yield self._joined(start, stems_QT, start + step + self._margin)
                self._start = start + step
        self._forget(min(self._start, end - self._window))

    def finish(self) -> Iterator[tuple[Samples, Samples]]:
        """Yield the rest."""
        step, end = self._window - self._overlap, self._begin + len(self._held_T)
        while end > self._start + self._window:
            (stems_QT,) = self._separate([self._start], self._window)
            yield self._joined(self._start, stems_QT, self._start + step + self._margin)
            self._start += step
        if end > self._done:
            first = max(0, end - self._window)
            (stems_QT,) = self._separate([first], end - first)
            yield self._joined(first, stems_QT, end)

    def _separate(self, starts: Sequence[int], size: int) -> list[Samples]:
        """Stems ``[Q, T]`` of windows."""
        windows = [torch.from_numpy(self._held_T[start - self._begin :][:size]) for start in starts]
        requests = [SeparationRequest(samples_T=one_T, query=query) for one_T in windows for query in self._queries]
        stems = np.split(stems_of(self._batched, requests), len(windows))
        return [self._divided(*pair) for pair in zip(windows, stems, strict=True)] if self._divides else stems

    def _divided(self, mixture_T: torch.Tensor, stems_QT: Samples) -> Samples:
        """The shares of a mixture, and after them the stems."""
        rate_hz = self._batched.separator.sample_rate_hz
        shares_QT = share_mixture(mixture_T=mixture_T, stems_ST=torch.from_numpy(stems_QT), sample_rate_hz=rate_hz)
        return np.concatenate([shares_QT.numpy(), stems_QT])

    def _joined(self, start: int, stems_QT: Samples, stop: int) -> tuple[Samples, Samples]:
        """The mixture and its stems up to ``stop``, of a window's stems and the tail of those before."""
        new_QT = stems_QT[:, self._done - start : stop - start]
        if self._tail_QT is not None:
            new_QT = new_QT.copy()
            new_QT[:, : self._fade] = self._in_T * new_QT[:, : self._fade] + self._in_T[::-1] * self._tail_QT
        self._tail_QT = stems_QT[:, stop - start : stop - start + self._fade]
        mix_T = self._held_T[self._done - self._begin : stop - self._begin]
        self._done = stop
        return mix_T, new_QT

    def _forget(self, before: int) -> None:
        """Drop the samples that no window needs."""
        if before > self._begin:
            self._held_T = self._held_T[before - self._begin :].copy()
            self._begin = before


def stems_of(batched: BatchedSeparator, requests: Sequence[SeparationRequest]) -> Samples:
    """The stems ``[Q, T]`` of requests of one length; raises the first exception of those that failed."""
    stems: list[torch.Tensor] = []
    for answer in batched.separate(requests):
        if isinstance(answer, Exception):
            raise answer
        stems.append(answer)
    stems_QT: Samples = torch.stack(stems).cpu().numpy()
    return stems_QT
