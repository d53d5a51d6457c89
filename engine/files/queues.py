"""Samples that wait for their turn. Shape legend: ``T`` samples, ``R`` rows (channels or stems)."""

from __future__ import annotations

import numpy as np

from engine.audio.sndfile import Samples


class SampleQueue:
    """Samples ``[R, T]`` of some rows, in the order in which they came."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.size = num_rows, 0
        self._parts: list[Samples] = []

    def append(self, samples_RT: Samples) -> None:
        """Add samples at the end."""
        self._parts.append(samples_RT)
        self.size += samples_RT.shape[1]

    def take(self, size: int) -> Samples:
        """Remove the first ``size`` samples, which must be there."""
        taken, missing = [np.zeros((self.num_rows, 0), np.float32)], size
        while missing:
            first = self._parts[0]
            taken.append(first[:, :missing])
            if first.shape[1] > missing:
                self._parts[0] = first[:, missing:]
            else:
                self._parts.pop(0)
            missing -= taken[-1].shape[1]
        self.size -= size
        return np.ascontiguousarray(np.concatenate(taken, axis=1))
