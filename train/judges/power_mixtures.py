"""Training mixtures of the tagger, as mel powers of single-source clips.

The power of a mixture is the sum of its sources' powers, except for cross terms that average out within a mel band.
The clips are therefore turned into mel powers once, and all augmentation of a source (gain, pitch, tempo, colour,
filters, a separator's mask, leakage) happens there. All that is random in a batch is drawn by numpy, so that it does
not depend on the device; the whole batch is then made at once on the device where the powers are.

Shape legend: B mixtures, R sources of all mixtures, Q some of the mixtures, C clips, N spectral frames, K mel bands,
J knots of a curve, M tagged frames, L labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

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
_FILTERED, _NOISY = 0.3, 0.3  # fractions of the sources and of the mixtures
_CELL = 4  # frames and bands in which the smooth error of a mask is the same

Numbers = NDArray[Any]


class PowerMixer:
    """Draws mixtures, as the mel powers of their sources, from single-source clips by label."""

    def __init__(self, powers: Sequence[Sequence[Tensor]], config: TaggerConfig, *, num_frames: int) -> None:
        """``powers`` are those of the clips of every label, ``[N, K]`` on one device."""
        clips = [power_NK for of_label in powers for power_NK in of_label]
        self.config, self.num_frames = config, num_frames
        self.power_NK = torch.cat([*clips, torch.zeros_like(clips[0][:1])])  # the last frame is silent
        self._clips = _Stretches([len(of_label) for of_label in powers])
        self._frames = _Stretches([len(power_NK) for power_NK in clips])
        active = [_active_frames(power_NK) for power_NK in clips]
        self._active, self._active_frames = _Stretches([len(one) for one in active]), np.concatenate(active)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Mixtures ``[B, N, K]`` and the energy of each label in each tagged frame ``[B, M, L]``."""
        rng, device = np.random.default_rng([self.config.seed, 3, step]), self.power_NK.device
        num_labels, num_bands = len(self._clips.sizes), self.power_NK.shape[1]
        num_B = np.minimum(rng.choice([3, 2, 1], self.config.batch_size, p=[0.25, 0.5, 0.25]), num_labels)
        num_B = -np.sort(-num_B)  # so that the first mixtures have a second source, and the first of them a third
        sources = self._draw_sources(rng, num_B).to(device)
        mask = _draw_mask(rng, self.config, num_frames=self.num_frames, num_bands=num_bands).to(device)
        noise = _draw_noise(rng, self.config, num_frames=self.num_frames, num_bands=num_bands).to(device)
        sizes = [int((num_B > number).sum()) for number in range(num_B[0])]
        source_RNK = _masked(mask, sources.rendered(self.power_NK), sources.mixture_R, sizes)
        mix_BNK = _mixed(source_RNK, sizes)
        noise_QNK = noise.power_QNK * mix_BNK[noise.mixture_Q].mean((1, 2), keepdim=True)
        energy_RM = source_RNK.sum(2).view(len(source_RNK), -1, FRAMES_PER_TAG).sum(2)
        energy_BLM = energy_RM.new_zeros(len(mix_BNK), num_labels, energy_RM.shape[1])
        energy_BLM[sources.mixture_R, sources.label_R] = energy_RM
        return mix_BNK.index_add(0, noise.mixture_Q, noise_QNK), energy_BLM.transpose(1, 2)

    def _draw_sources(self, rng: np.random.Generator, num_B: Numbers) -> _Sources:
        """Crops around active moments, with random pitch, tempo and colour; first those of the first sources."""
        config = self.config
        order_BL = rng.random((len(num_B), len(self._clips.sizes))).argsort(1)
        number_R = np.concatenate([np.full((num_B > i).sum(), i) for i in range(num_B[0])])
        mixture_R = np.concatenate([np.flatnonzero(num_B > i) for i in range(num_B[0])])
        label_R = order_BL[mixture_R, number_R]
        clip_R, (num,) = self._clips.draw(rng, label_R), label_R.shape
        filtered_R = rng.random(num) < _FILTERED  # by a low or high pass of random slope
        return _Sources(
            mixture_R=torch.from_numpy(mixture_R),
            label_R=torch.from_numpy(label_R),
            frame_RN=torch.from_numpy(self._draw_frames(rng, clip_R)),
            bands_R=_floats(rng.uniform(-1.0, 1.0, num) * config.pitch_fraction * self.power_NK.shape[1]),
            knots_db_RJ=_floats(rng.normal(0.0, config.colour_db, (num, 6))),
            slope_db_R=_floats(rng.uniform(-60.0, 60.0, num) * filtered_R),
            slope_from_R=_floats(rng.uniform(-1.0, 1.0, num)),
            gain_R=_floats(10.0 ** (rng.uniform(-1.0, 1.0, num) * config.gain_db / 10.0)),
        )

    def _draw_frames(self, rng: np.random.Generator, clip_R: Numbers) -> Numbers:
        """Numbers of the frames of crops ``[R, N]`` among those of all clips; the silent one after a clip's end."""
        num, num_frames_R = len(clip_R), self._frames.sizes[clip_R]
        stride_R = FINER * 2.0 ** rng.uniform(-0.3, 0.3, num)
        moment_R = self._active_frames[self._active.draw(rng, clip_R)]
        first_R = moment_R - stride_R * rng.integers(self.num_frames, size=num)
        last_R = num_frames_R - 1 - stride_R * (self.num_frames - 1)
        first_R = np.minimum(np.maximum(first_R, 0.0), np.maximum(last_R, 0.0))
        frame_RN = np.rint(first_R[:, None] + stride_R[:, None] * np.arange(self.num_frames)).astype(np.int64)
        is_inside_RN = frame_RN < num_frames_R[:, None]
        return np.where(is_inside_RN, self._frames.firsts[clip_R, None] + frame_RN, len(self.power_NK) - 1)


class _Stretches:
    """Stretches of a sequence, one after another."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes)
        self.firsts = np.cumsum(self.sizes) - self.sizes

    def draw(self, rng: np.random.Generator, stretch_R: Numbers) -> Numbers:
        """A position in each of some stretches."""
        position_R: Numbers = self.firsts[stretch_R] + rng.integers(self.sizes[stretch_R])
        return position_R


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """Draws for a batch."""

    def to(self, device: torch.device) -> Self:
        """The same on a device, without waiting for it."""
        if device.type != "cuda":
            return self
        tensors = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        pinned = ((name, one.pin_memory() if one.numel() else one) for name, one in tensors)
        return dataclasses.replace(self, **{name: one.to(device, non_blocking=True) for name, one in pinned})


@dataclass(frozen=True, kw_only=True)
class _Sources(_Drawn):
    mixture_R: Tensor
    label_R: Tensor
    frame_RN: Tensor
    bands_R: Tensor
    """The sound is moved up by so many mel bands."""
    knots_db_RJ: Tensor
    slope_db_R: Tensor
    slope_from_R: Tensor
    gain_R: Tensor

    def rendered(self, power_NK: Tensor) -> Tensor:
        """Powers ``[R, N, K]`` with a mean of the gain.

        Pitch and colour are one matrix for each source: bands are interpolated linearly, and each has a gain.
        """
        num_bands, num_knots = power_NK.shape[1], self.knots_db_RJ.shape[1]
        line_K = torch.linspace(0.0, 1.0, num_bands, device=power_NK.device)
        gain_db_RK = self.knots_db_RJ @ _interpolation(line_K * (num_knots - 1), num_knots)
        slope_RK = (2 * line_K - 1 - self.slope_from_R[:, None]).clamp(min=0.0)
        gain_RK = 10.0 ** ((gain_db_RK + self.slope_db_R[:, None] * slope_RK) / 10.0)
        from_RK = (line_K * (num_bands - 1) - self.bands_R[:, None]).clamp(0.0, num_bands - 1)
        crop_RNK = power_NK[self.frame_RN]
        change_RKK = _interpolation(from_RK, num_bands) * gain_RK[:, None]
        mean_R11 = (crop_RNK.mean(1, keepdim=True) @ change_RKK).mean(2, keepdim=True)
        return crop_RNK @ (change_RKK * (self.gain_R[:, None, None] / mean_R11.clamp(min=1e-20)))


@dataclass(frozen=True, kw_only=True)
class _Mask(_Drawn):
    """Masks of an imperfect separator."""

    mixture_Q: Tensor
    error_db_QNK: Tensor
    least_Q: Tensor


def _draw_mask(rng: np.random.Generator, config: TaggerConfig, *, num_frames: int, num_bands: int) -> _Mask:
    """Smooth errors, musical noise and an offset, and the least gain."""
    mixture_Q = np.flatnonzero(rng.random(config.batch_size) < config.mask_rate)
    num = len(mixture_Q)
    cells = rng.normal(0.0, 1.0, (num, num_frames // _CELL + 1, num_bands // _CELL + 1)).astype(np.float32)
    error_QNK = rng.standard_normal((num, num_frames, num_bands), dtype=np.float32)
    error_QNK *= _floats(rng.uniform(0.0, 6.0, (num, 1, 1))).numpy()
    cells *= _floats(rng.uniform(0.0, 12.0, (num, 1, 1))).numpy()
    cells += _floats(rng.normal(0.0, 6.0, (num, 1, 1))).numpy()
    error_QNK += cells.repeat(_CELL, 1)[:, :num_frames].repeat(_CELL, 2)[:, :, :num_bands]
    least_Q = 10.0 ** (rng.uniform(-40.0, -5.0, num) / 20.0)
    return _Mask(
        mixture_Q=torch.from_numpy(mixture_Q), error_db_QNK=torch.from_numpy(error_QNK), least_Q=_floats(least_Q)
    )


def _masked(mask: _Mask, source_RNK: Tensor, mixture_R: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sources after the mask of some mixtures: their first source's Wiener mask, with errors."""
    total_BNK = _mixed(source_RNK, sizes)
    fraction_QNK = source_RNK[mask.mixture_Q] / (total_BNK[mask.mixture_Q] + 1e-12)
    odds_QNK = fraction_QNK / (1.0 - fraction_QNK + 1e-6) * 10.0 ** (mask.error_db_QNK / 10.0)
    mask_QNK = torch.maximum(odds_QNK / (1.0 + odds_QNK), mask.least_Q[:, None, None])
    gain_BNK = torch.ones_like(total_BNK).index_copy(0, mask.mixture_Q, mask_QNK.square())
    return source_RNK * gain_BNK[mixture_R]


def _mixed(source_RNK: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums ``[B, N, K]`` of the first, second and third sources, of which there are so many."""
    first_BNK, *others = torch.split(source_RNK, list(sizes))
    mix_BNK: Tensor = first_BNK.clone()
    for other_QNK in others:
        mix_BNK[: len(other_QNK)] += other_QNK
    return mix_BNK


@dataclass(frozen=True, kw_only=True)
class _Noise(_Drawn):
    """Noise of nobody, relative to the mean power of the mixture."""

    mixture_Q: Tensor
    power_QNK: Tensor


def _draw_noise(rng: np.random.Generator, config: TaggerConfig, *, num_frames: int, num_bands: int) -> _Noise:
    """Steady noise of a random colour, 10 to 40 dB below the mixture."""
    mixture_Q = np.flatnonzero(rng.random(config.batch_size) < _NOISY)
    num = len(mixture_Q)
    curve_db = rng.normal(0.0, 8.0, (num, 4)) @ _interpolation(torch.linspace(0.0, 3.0, num_bands), 4).numpy()
    colour_QK = 10.0 ** (curve_db / 10.0)
    level_QK = colour_QK * (10.0 ** rng.uniform(-4.0, -1.0, (num, 1)) / colour_QK.mean(1, keepdims=True))
    power_QNK = rng.standard_gamma(4.0, (num, num_frames, num_bands), dtype=np.float32)
    power_QNK *= (0.25 * level_QK[:, None]).astype(np.float32)
    return _Noise(mixture_Q=torch.from_numpy(mixture_Q), power_QNK=torch.from_numpy(power_QNK))


def _interpolation(position_K: Tensor, num: int) -> Tensor:
    """Weights ``[..., num, K]`` with which a line of ``num`` values is read linearly at positions ``[..., K]``."""
    knot_J1 = torch.arange(num, device=position_K.device)[:, None]
    weight_JK: Tensor = (1.0 - (knot_J1 - position_K[..., None, :]).abs()).clamp(min=0.0)
    return weight_JK


def _active_frames(power_NK: Tensor) -> Numbers:
    energy_N = power_NK.sum(1).cpu().numpy()
    return np.flatnonzero(energy_N >= _FLOOR * energy_N.max())


def _floats(values: Numbers) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
