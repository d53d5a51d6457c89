"""Training mixtures of the tagger, as mel powers of single-source clips.

The power of a mixture is the sum of its sources' powers, except for cross terms that average out within a mel band.
The clips are therefore turned into mel powers once, and all augmentation of a source (gain, pitch, tempo, colour,
filters, a separator's mask, leakage) happens there, at almost no cost compared with the network.

Shape legend: B mixtures, S sources, N spectral frames, K mel bands, M tagged frames, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.taggers.network import FRAMES_PER_TAG

if TYPE_CHECKING:
    from train.judges.tagger import TaggerConfig

FINER = 4
"""Frames of the stored powers in one frame of the network."""
_FLOOR = 1e-4  # of the loudest frame: a frame above it is active

Powers = NDArray[np.float32]


class PowerMixer:
    """Draws mixtures, as the mel powers of their sources, from single-source clips by label."""

    def __init__(self, powers: Sequence[Sequence[Powers]], config: TaggerConfig, *, num_frames: int) -> None:
        self.powers, self.config, self.num_frames = powers, config, num_frames
        energies = [[power_NK.sum(1) for power_NK in clips] for clips in powers]
        self.active = [[np.flatnonzero(e_N >= _FLOOR * e_N.max()) for e_N in clips] for clips in energies]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Mixtures ``[B, N, K]`` and the energy of each label in each tagged frame ``[B, M, L]``."""
        rng = np.random.default_rng([self.config.seed, 3, step])
        made = [self._mixture(rng) for _ in range(self.config.batch_size)]
        mixes_BNK, energies_BML = (np.stack(arrays) for arrays in zip(*made, strict=True))
        return torch.from_numpy(mixes_BNK), torch.from_numpy(energies_BML)

    def _mixture(self, rng: np.random.Generator) -> tuple[Powers, Powers]:
        num_sources = min(int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25])), len(self.powers))
        labels = rng.permutation(len(self.powers))[:num_sources]
        sources_SNK = np.stack([self._source(rng, int(label)) for label in labels])
        sources_SNK *= 10.0 ** (rng.uniform(-1.0, 1.0, (num_sources, 1, 1)) * self.config.gain_db / 10.0)
        if rng.random() < self.config.mask_rate:
            sources_SNK = sources_SNK * _separator_mask(rng, sources_SNK)
        mix_NK = sources_SNK.sum(0)
        if rng.random() < 0.3:
            mix_NK = mix_NK + _noise(rng, mix_NK)
        energy_MS = sources_SNK.sum(2).reshape(num_sources, -1, FRAMES_PER_TAG).sum(2).T
        energy_ML = np.zeros((len(energy_MS), len(self.powers)), np.float32)
        energy_ML[:, labels] = energy_MS
        return mix_NK.astype(np.float32), energy_ML

    def _source(self, rng: np.random.Generator, label: int) -> Powers:
        """A crop ``[N, K]`` around an active moment with a mean power of 1 and random pitch, tempo and colour."""
        number = int(rng.integers(len(self.powers[label])))
        power_NK, active = self.powers[label][number], self.active[label][number]
        step = FINER * 2.0 ** rng.uniform(-0.3, 0.3)
        moment, position = int(active[rng.integers(len(active))]), int(rng.integers(self.num_frames))
        last = len(power_NK) - 1 - step * (self.num_frames - 1)
        first = min(max(moment - step * position, 0.0), max(last, 0.0))
        frames = np.rint(first + step * np.arange(self.num_frames)).astype(np.int64)
        crop_NK = power_NK[np.minimum(frames, len(power_NK) - 1)] * (frames < len(power_NK))[:, None]
        num_bands = crop_NK.shape[1]
        gains_db_K = _curve(rng, num_bands, knots=6, deviation=self.config.colour_db)
        if rng.random() < 0.3:  # a low or high pass of random slope
            slope_db = rng.uniform(-60.0, 60.0)
            gains_db_K = gains_db_K + slope_db * np.clip(np.linspace(-1, 1, num_bands) - rng.uniform(-1, 1), 0, None)
        bands = rng.uniform(-1.0, 1.0) * self.config.pitch_fraction * num_bands
        crop_NK = _shifted(crop_NK, bands) * 10.0 ** (gains_db_K / 10.0)
        levelled_NK: Powers = (crop_NK / max(crop_NK.mean(), 1e-20)).astype(np.float32)
        return levelled_NK


def _curve(rng: np.random.Generator, num: int, *, knots: int, deviation: float) -> NDArray[np.float64]:
    """A smooth random line ``[num]``."""
    return np.interp(np.linspace(0, knots - 1, num), np.arange(knots), rng.normal(0.0, deviation, knots))


def _shifted(power_NK: Powers, bands: float) -> Powers:
    """The same sound moved up or down by some mel bands, interpolated linearly between bands."""
    steps, rest = math.floor(bands), bands - math.floor(bands)
    num_bands = power_NK.shape[1]
    padded_NK = np.pad(power_NK, ((0, 0), (abs(steps) + 1, abs(steps) + 1)), mode="edge")
    first = abs(steps) + 1 - steps
    moved: Powers = (1 - rest) * padded_NK[:, first : first + num_bands]
    return moved + rest * padded_NK[:, first - 1 : first - 1 + num_bands]


def _separator_mask(rng: np.random.Generator, sources_SNK: Powers) -> Powers:
    """Power gains ``[N, K]``: the first source's Wiener mask with smooth errors, holes and a floor."""
    total_NK = sources_SNK.sum(0) + 1e-12
    fraction_NK = sources_SNK[0] / total_NK
    num_frames, num_bands = fraction_NK.shape
    knots = rng.normal(0.0, rng.uniform(0.0, 12.0), (num_frames // 4 + 2, num_bands // 4 + 2))
    error_db = knots.repeat(4, 0)[:num_frames].repeat(4, 1)[:, :num_bands]
    error_db = error_db + rng.normal(0.0, rng.uniform(0.0, 6.0), fraction_NK.shape)  # musical noise
    odds = fraction_NK / (1.0 - fraction_NK + 1e-6) * 10.0 ** ((error_db + rng.normal(0.0, 6.0)) / 10.0)
    mask_NK = np.maximum(odds / (1.0 + odds), 10.0 ** (rng.uniform(-40.0, -5.0) / 20.0))
    gains_NK: Powers = np.square(mask_NK).astype(np.float32)
    return gains_NK


def _noise(rng: np.random.Generator, mix_NK: Powers) -> Powers:
    """Steady noise of a random colour, without a label, 10 to 40 dB below the mixture."""
    colour_K = 10.0 ** (_curve(rng, mix_NK.shape[1], knots=4, deviation=8.0) / 10.0)
    noise_NK = colour_K / colour_K.mean() * rng.gamma(4.0, 0.25, mix_NK.shape)
    level: Powers = mix_NK.mean() * 10.0 ** (rng.uniform(-4.0, -1.0)) * noise_NK
    return level
