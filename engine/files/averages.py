"""Scores of the stems of a recording of any length: means over windows, and ratios of energies over all of it.

Shape legend: ``T`` samples, ``Q`` stems.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from engine.audio.levels import is_silent
from engine.audio.sndfile import Samples
from engine.files.queues import SampleQueue
from engine.schema import ESTIMATES, SCORES
from engine.scoring.estimator import SiSdrEstimator
from engine.scoring.scores import Scores, score_clip

WINDOW_S = 10.0
"""Length of the windows that are scored: that of a clip."""
_MIN_WINDOW_S = 1.0
_MAX_WINDOWS = 64  # of a long recording every second window is scored, every fourth and so on


class ScoreAverages:
    """Takes a mixture and its stems block by block, at the separator's rate."""

    def __init__(self, num_stems: int, *, sample_rate_hz: int, estimator: SiSdrEstimator | None) -> None:
        self._rate_hz, self._estimator, self._num_stems = sample_rate_hz, estimator, num_stems
        self._waiting = SampleQueue(1 + num_stems)
        self._window = round(WINDOW_S * sample_rate_hz)
        self._scored: list[list[Scores]] = []
        """The scores of every ``_stride``-th window."""
        self._stride, self._num_windows = 1, 0
        self._energies_Q, self._mix_energy, self._rest_energy = np.zeros(num_stems), 0.0, 0.0

    def push(self, mix_T: Samples, stems_QT: Samples) -> None:
        """Add samples."""
        self._energies_Q += np.square(stems_QT, dtype=np.float64).sum(1)
        self._mix_energy += float(np.square(mix_T, dtype=np.float64).sum())
        self._rest_energy += float(np.square(mix_T - stems_QT.sum(0), dtype=np.float64).sum())
        self._waiting.append(np.concatenate([mix_T[None], stems_QT]))
        while self._waiting.size >= self._window:
            self._add(self._waiting.take(self._window))

    def scores(self) -> list[Scores]:
        """The scores of each stem; None for what needs another separator or is undefined in all windows."""
        if self._waiting.size >= min(self._window, _MIN_WINDOW_S * self._rate_hz) or not self._num_windows:
            self._add(self._waiting.take(self._waiting.size))
        remix_snr_db = _db(self._mix_energy, self._rest_energy)
        return [
            self._means([window[number] for window in self._scored])
            | {"remix_snr_db": remix_snr_db, "stem_level_db": _db(energy, self._mix_energy)}
            for number, energy in enumerate(self._energies_Q)
        ]

    def _add(self, window: Samples) -> None:
        """Score a window if it is its turn; silence and nothing have no scores."""
        number, self._num_windows = self._num_windows, self._num_windows + 1
        if number % self._stride or not window.size or is_silent(window[0], sample_rate_hz=self._rate_hz):
            return
        mix_T, stems_QT = torch.from_numpy(window[0]), torch.from_numpy(window[1:])
        self._scored.append(score_clip(mixture_T=mix_T, stems_ST=stems_QT, sample_rate_hz=self._rate_hz))
        if len(self._scored) >= _MAX_WINDOWS:
            self._scored, self._stride = self._scored[::2], 2 * self._stride

    def _means(self, rows: list[Scores]) -> Scores:
        names = [*SCORES.names, *(ESTIMATES.names if self._estimator is not None else ())]
        if self._estimator is not None and rows:
            estimates = self._estimator.estimate(pa.Table.from_pylist(rows, schema=SCORES)).to_pylist()
            rows = [row | estimate for row, estimate in zip(rows, estimates, strict=True)]
        values = {name: [value for row in rows if (value := row[name]) is not None] for name in names}
        return {name: float(np.mean(known)) if known else None for name, known in values.items()}


def _db(energy: float, reference: float) -> float:
    """A ratio in dB with the bounds of :mod:`engine.scoring.metrics`."""
    if not energy or not reference:
        return -100.0 if not energy else 100.0
    return float(np.clip(10 * np.log10(energy / reference), -100.0, 100.0))
