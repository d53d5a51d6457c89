"""Batches from what was drawn: cut, change speed and colour, set levels and add up, for all crops at once.

Everything is an operation on tensors that runs on either device by the same code and never waits for a card.

Shape legend: C crops, W samples that a crop needs of its sound, T samples, F bins, K knots of a colouring, V windows, S
signals (mixtures, then targets).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn

from train.data.batch import Batch
from train.data.drawn import NUM_KNOTS, SPEEDS, DrawnBatch

if TYPE_CHECKING:
    from train.data.config import MixConfig

_WINDOW_S = 0.1
_ACTIVE_RATIO = 1e-4  # power of an active window relative to the loudest, as in engine/audio/levels.py


class Renderer:
    """Turns drawn batches into tensors on its device."""

    def __init__(self, config: MixConfig, *, sample_rate_hz: int, device: torch.device) -> None:
        self.device, self.num_samples = device, round(config.segment_s * sample_rate_hz)
        self.window = max(1, round(_WINDOW_S * sample_rate_hz))
        self.resample = [torchaudio.transforms.Resample(*pair).to(device) for pair in SPEEDS]
        places_F = np.linspace(0.0, NUM_KNOTS - 1.0, self.num_samples // 2 + 1)
        between_KF = np.stack([np.interp(places_F, range(NUM_KNOTS), row_K) for row_K in np.eye(NUM_KNOTS)])
        self.log_gain_KF = torch.from_numpy(between_KF * math.log(10.0) / 20.0).float().to(device)
        starts = range(0, self.num_samples, self.window)
        self.lengths_V = torch.tensor([min(self.window, self.num_samples - start) for start in starts]).to(device)

    @torch.no_grad()
    def __call__(self, drawn: DrawnBatch) -> Batch:
        """The batch; ``drawn`` may be in CPU memory."""
        drawn = drawn.to(self.device)
        crop_CT = self._coloured(self._cut(drawn), drawn.knots_db_CK)
        level_C = self._levels(crop_CT)[drawn.level_C]
        crop_CT *= (drawn.rms_C / level_C.clamp(min=1e-8))[:, None]
        num = drawn.num_mixtures
        signal_ST = crop_CT.new_zeros(num + len(drawn.weight_G), self.num_samples)
        for terms in drawn.terms:
            signal_ST.index_add_(0, terms.signal_Q, crop_CT.index_select(0, terms.crop_Q), alpha=terms.sign)
        return Batch(
            mix_BT=signal_ST[:num].index_select(0, drawn.mixture_G.index_select(0, drawn.group_B)),
            target_GT=signal_ST[num:],
            index_B=drawn.index_B,
            group_B=drawn.group_B,
            weight_G=drawn.weight_G,
            mixture_G=drawn.mixture_G,
            is_complete_G=drawn.is_complete_G,
            query_BE=drawn.query_BE,
            rivals=drawn.rivals,
            pairs=drawn.pairs,
        )

    def _cut(self, drawn: DrawnBatch) -> Tensor:
        """All crops ``[C, T]`` at their speed."""
        cut, row = [], 0
        for part in drawn.parts:
            rows = slice(row, row := row + part.num_crops)
            up, down = SPEEDS[part.speed]
            num_C = drawn.num_C[rows]
            crop_CW = part.samples_N.unfold(0, part.width, 1)[drawn.first_C[rows]]
            crop_CW = self._ended(crop_CW, num_C) if part.is_short else crop_CW
            crop_CT = self._resampled(crop_CW, part.speed)[:, : self.num_samples]
            cut.append(self._ended(crop_CT, -(-num_C * down // up)) if part.is_short else crop_CT)
        return torch.cat(cut)

    def _ended(self, crop_CT: Tensor, num_C: Tensor) -> Tensor:
        """Crops with zeros after some number of samples."""
        return crop_CT.masked_fill(torch.arange(crop_CT.shape[1], device=self.device) >= num_C[:, None], 0.0)

    def _resampled(self, crop_CW: Tensor, speed: int) -> Tensor:
        """Crops at a speed, longer than needed; as a matrix product, for a card rounds convolutions to fewer bits."""
        if speed == 0:
            return crop_CW
        up, filters = SPEEDS[speed][0], self.resample[speed]
        padded = nn.functional.pad(crop_CW, (filters.width, filters.width + up))
        kernel: Tensor = filters.kernel[:, 0].T
        return (padded.unfold(1, len(kernel), up) @ kernel).flatten(1)

    def _coloured(self, crop_CT: Tensor, knots_db_CK: Tensor | None) -> Tensor:
        if knots_db_CK is None:
            return crop_CT
        spectrum_CF = torch.fft.rfft(crop_CT)
        torch.view_as_real(spectrum_CF).mul_((knots_db_CK @ self.log_gain_KF).exp()[..., None])
        coloured_CT: Tensor = torch.fft.irfft(spectrum_CF, self.num_samples)
        return coloured_CT

    def _levels(self, crop_CT: Tensor) -> Tensor:
        """RMS ``[C]`` over the active windows, as :func:`engine.audio.levels.active_rms`."""
        missing = len(self.lengths_V) * self.window - self.num_samples
        energy_CV = nn.functional.pad(crop_CT, (0, missing)).view(len(crop_CT), -1, self.window).square().sum(2)
        power_CV = energy_CV / self.lengths_V
        active_CV = (power_CV > 0.0) & (power_CV >= _ACTIVE_RATIO * power_CV.amax(1, keepdim=True))
        return ((energy_CV * active_CV).sum(1) / (self.lengths_V * active_CV).sum(1).clamp(min=1)).sqrt()
