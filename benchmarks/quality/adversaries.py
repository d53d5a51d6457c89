"""Adversarial stems: what a bad separator might make of a clip, most of them with perfect remix scores.

Shape suffixes: S stems of a clip, T samples, F bins, N frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """A clip, its sources and what else an adversary may use."""

    truth_ST: Tensor
    """The true sources; their sum is the clip."""
    others_ST: Tensor
    """For each source another recording of the same label, with the same energy."""
    sample_rate_hz: int
    rng: np.random.Generator

    @property
    def mix_T(self) -> Tensor:
        """The clip."""
        return self.truth_ST.sum(0)


def _spectra(signals: Tensor) -> Tensor:
    window = torch.hann_window(_SIZE)
    return torch.stft(signals, _SIZE, _SIZE // 4, window=window, pad_mode="constant", return_complex=True)


def _signals(spectra: Tensor, length: int) -> Tensor:
    return torch.istft(spectra, _SIZE, _SIZE // 4, window=torch.hann_window(_SIZE), length=length)


def _masked(case: Case, masks_SFN: Tensor) -> Tensor:
    return _signals(_spectra(case.mix_T) * masks_SFN, len(case.mix_T))


def _random(case: Case, *shape: int) -> Tensor:
    return torch.from_numpy(case.rng.random(shape, dtype=np.float32))


def _mixture_and_silence(case: Case) -> Tensor:
    stems_ST = torch.zeros_like(case.truth_ST)
    stems_ST[case.rng.integers(len(stems_ST))] = case.mix_T
    return stems_ST


def _random_masks(case: Case) -> Tensor:
    frames = _spectra(case.mix_T).shape
    weights = _random(case, len(case.truth_ST), *frames)
    return _masked(case, weights / weights.sum(0))


def _shared_artefact(case: Case) -> Tensor:
    """The true sources with one noise in the first two of them, in opposite polarity and as loud as the first."""
    noise_T = _random(case, len(case.mix_T)) - 0.5
    noise_T *= case.truth_ST[0].norm() / noise_T.norm()
    stems_ST = case.truth_ST.clone()
    stems_ST[0] += noise_T
    stems_ST[1] -= noise_T
    return stems_ST


def _leak(level_db: float) -> Callable[[Case], Tensor]:
    """The true sources, each with a part of itself moved to the next, so that their sum stays the clip."""

    def stems(case: Case) -> Tensor:
        gain = 10.0 ** (level_db / 20.0)
        moved = gain / (1.0 + gain)
        return (1.0 - moved) * case.truth_ST + moved * case.truth_ST.roll(1, 0)

    return stems


def _shifted(case: Case) -> Tensor:
    return torch.nn.functional.pad(case.truth_ST, (case.sample_rate_hz // 500, 0))[:, : case.truth_ST.shape[1]]


def _one_absent(case: Case) -> Tensor:
    stems_ST = case.truth_ST.clone()
    stems_ST[case.rng.integers(len(stems_ST))] = 0.0
    return stems_ST


def _low_passed(case: Case) -> Tensor:
    spectrum_SF = torch.fft.rfft(case.truth_ST)
    hz_F = torch.fft.rfftfreq(case.truth_ST.shape[1], 1.0 / case.sample_rate_hz)
    return torch.fft.irfft(spectrum_SF * (hz_F < 1000.0), case.truth_ST.shape[1])


def _one_flipped(case: Case) -> Tensor:
    stems_ST = case.truth_ST.clone()
    stems_ST[case.rng.integers(len(stems_ST))] *= -1.0
    return stems_ST


def _loudest_half_second(case: Case) -> Tensor:
    width = case.sample_rate_hz // 2
    stems_ST = torch.zeros_like(case.truth_ST)
    for stem_T, source_T in zip(stems_ST, case.truth_ST, strict=True):
        energy = torch.nn.functional.avg_pool1d(source_T.square()[None], width, 160)[0]
        first = 160 * int(energy.argmax())
        stem_T[first : first + width] = source_T[first : first + width]
    return stems_ST


def _gated_noise(case: Case) -> Tensor:
    """Noise with the envelope and the energy of each source."""
    envelope_ST = torch.nn.functional.avg_pool1d(case.truth_ST.square(), 801, 1, 400)[
        :, : case.truth_ST.shape[1]
    ].sqrt()
    noise_ST = envelope_ST * (_random(case, *case.truth_ST.shape) - 0.5)
    gain_S1 = case.truth_ST.norm(dim=1, keepdim=True) / noise_ST.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return noise_ST * gain_S1


def _musical_noise(case: Case) -> Tensor:
    """Binary masks that assign each point of the spectrogram to a random stem."""
    frames = _spectra(case.mix_T).shape
    owner_FN = torch.from_numpy(case.rng.integers(len(case.truth_ST), size=tuple(frames)))
    return _masked(case, torch.stack([(owner_FN == s).float() for s in range(len(case.truth_ST))]))


def _half_right_masks(case: Case) -> Tensor:
    """Binary masks that are right at two points of three and assign the rest to another stem."""
    magnitude_SFN = _spectra(case.truth_ST).abs()
    owner_FN = magnitude_SFN.argmax(0)
    wrong_FN = _random(case, *owner_FN.shape) < 1.0 / 3.0
    owner_FN = torch.where(wrong_FN, (owner_FN + 1) % len(case.truth_ST), owner_FN)
    return _masked(case, torch.stack([(owner_FN == s).float() for s in range(len(case.truth_ST))]))


ADVERSARIES: Mapping[str, Callable[[Case], Tensor]] = {
    "oracle (true sources)": lambda case: case.truth_ST,
    "oracle with noise at -20 dB": lambda case: (
        case.truth_ST
        + 0.1
        * case.truth_ST.std(1, keepdim=True)
        * torch.from_numpy(case.rng.standard_normal(case.truth_ST.shape)).float()
    ),
    "mixture and silence": _mixture_and_silence,
    "mixture divided evenly": lambda case: case.mix_T.expand_as(case.truth_ST) / len(case.truth_ST),
    "labels swapped": lambda case: case.truth_ST.roll(1, 0),
    "random masks": _random_masks,
    "artefact of 0 dB in both": _shared_artefact,
    "all at 0.3": lambda case: 0.3 * case.truth_ST,
    "leak at -6 dB": _leak(-6.0),
    "leak at -12 dB": _leak(-12.0),
    "delayed by 2 ms": _shifted,
    "one source absent": _one_absent,
    "another recording of the label": lambda case: case.others_ST,
    "low-passed at 1 kHz": _low_passed,
    "one polarity flipped": _one_flipped,
    "loudest half-second only": _loudest_half_second,
    "gated noise": _gated_noise,
    "musical noise": _musical_noise,
    "binary masks, a third wrong": _half_right_masks,
}
"""By name. Thresholds should keep the two oracles and reject the others."""
