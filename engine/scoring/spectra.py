"""Scores of a clip's stems over time and frequency, from one set of spectra: pure, batched, on any device.

metrics.py compares signals; these scores compare how the stems divide the points of the clip's spectrogram. They use
single precision: a score below 40 dB is exact to 1e-3 dB. Values in dB are bounded to [-100, 100] as in metrics.py.

Shape suffixes: B clips (any leading dimensions, or none), S stems of a clip, T samples, F bins, N frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.scoring.energies import check_lengths, is_on_cpu, peak, ratio_db

_FRAME_S = 0.064
_MIN_FRAMES = 30
_VALUES_AT_ONCE = 2**18
_COHERENCE_FLOOR = 1e-2


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Sums over a clip's spectra, in float64, of Hann frames of 64 ms that overlap by half.

    Clips shorter than 1 s have shorter frames, at least 30 of them.

    X is the mixture's spectrum and S a stem's, at a common scale; q = |S| / Σ|S| is the stem's share of all stems at a
    point, 0 where all are silent; m = min(|S|, |X|) q is the magnitude that the stem's mask takes from the mixture.
    """

    taken_BS: Tensor
    """Σ m²"""
    doubtful_BS: Tensor
    """Σ m (|X| - m)"""
    shared_BS: Tensor
    """Σ q Re(S X*)"""
    share_BS: Tensor
    """Σ q² |X|²"""
    contested_BS: Tensor
    """Σ min(|S|, Σ|S| - |S|)²: energy that the other stems claim too"""
    stem_BS: Tensor
    """Σ |S|², summed in the same order as shared and share, so that equal values stay equal"""
    stem_BSF: Tensor
    """Σ |S|² over frames"""
    mixture_B1F: Tensor
    """Σ |X|² over frames"""
    cross_2BSF: Tensor
    """Σ S X* over frames, real and imaginary part"""
    between_2BPF: Tensor
    """Σ S R* over frames, for every two stems: adjacent stems first, then those further apart"""

    @classmethod
    def of(cls, *, stems_BST: Tensor, mixture_BT: Tensor, sample_rate_hz: int) -> Spectra:
        """Raises ValueError if lengths differ or are zero, or if the rate is not positive."""
        if sample_rate_hz < 1:
            raise ValueError(f"sample_rate_hz must be positive, got {sample_rate_hz}; pass the rate of the stems")
        check_lengths(stems_BST, mixture_BT)
        signals = torch.cat([mixture_BT[..., None, :], stems_BST], -2)
        signals = (signals / peak(signals).amax(-2, keepdim=True)).float()
        hop = max(1, min(round(_FRAME_S / 2 * sample_rate_hz), signals.shape[-1] // _MIN_FRAMES))
        frames = pad(signals, (hop, hop + -signals.shape[-1] % hop)).unfold(-1, 2 * hop, hop)
        window = torch.hann_window(2 * hop, device=signals.device)
        at_once = frames.shape[-2]
        if is_on_cpu(signals):  # a few frames at a time, so that they stay in cache
            at_once = max(1, _VALUES_AT_ONCE * at_once // frames.numel())
        sums: dict[str, Tensor] = {}
        for first in range(0, frames.shape[-2], at_once):
            spectra = torch.fft.rfft(frames[..., first : first + at_once, :] * window)
            for name, value in _sums(torch.view_as_real(spectra).movedim(-1, 0).contiguous()).items():
                sums[name] = sums[name] + value if first else value.double()
        return cls(**sums)


def _sums(spectra: Tensor) -> dict[str, Tensor]:
    """The sums over some frames, from real and imaginary parts [2, B, 1 + S, N, F] of the mixture and the stems."""
    power = torch.addcmul(spectra[0] * spectra[0], spectra[1], spectra[1])
    magnitude = power.sqrt()
    mixture_B1NF, stems_BSNF = magnitude[..., :1, :, :], magnitude[..., 1:, :, :]
    mixture_power_B1NF, power_BSNF = power[..., :1, :, :], power[..., 1:, :, :]
    mixture_2B1NF, stems_2BSNF = spectra[..., :1, :, :], spectra[..., 1:, :, :]
    overlap_BSNF, turned_BSNF = _cross(stems_2BSNF, mixture_2B1NF)
    apart = range(1, stems_BSNF.shape[-3])
    between = [_cross(stems_2BSNF[..., by:, :, :], stems_2BSNF[..., :-by, :, :]) for by in apart]
    total_B1NF = stems_BSNF.sum(-3, keepdim=True)
    share_BSNF = stems_BSNF / total_B1NF.clamp(min=torch.finfo(total_B1NF.dtype).tiny)
    taken_BSNF = torch.minimum(stems_BSNF, mixture_B1NF) * share_BSNF
    claimed_BSNF = torch.minimum(stems_BSNF, total_B1NF - stems_BSNF)
    return {
        "taken_BS": _energy(taken_BSNF),
        "doubtful_BS": _total(taken_BSNF * (mixture_B1NF - taken_BSNF)),
        "shared_BS": _total(overlap_BSNF * share_BSNF),
        "share_BS": _total(mixture_power_B1NF * share_BSNF * share_BSNF),
        "contested_BS": _energy(claimed_BSNF),
        "stem_BS": _total(power_BSNF),
        "stem_BSF": power_BSNF.sum(-2),
        "mixture_B1F": mixture_power_B1NF.sum(-2),
        "cross_2BSF": torch.stack([overlap_BSNF.sum(-2), turned_BSNF.sum(-2)]),
        "between_2BPF": torch.stack(
            [torch.cat([part.sum(-2) for part in parts], -2) for parts in zip(*between, strict=True)]
        )
        if between
        else spectra.new_zeros(2, *spectra.shape[1:-3], 0, spectra.shape[-1]),
    }


def _cross(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of a spectrum times the conjugate of another."""
    (real, imaginary), (other_real, other_imaginary) = first, second
    overlap = torch.addcmul(real * other_real, imaginary, other_imaginary)
    turned = torch.addcmul(imaginary * other_real, real, other_imaginary, value=-1)
    return overlap, turned


def _total(values_BSNF: Tensor) -> Tensor:
    """Sum over bins in single precision, then over frames in double precision."""
    return values_BSNF.sum(-1).double().sum(-1)


def _energy(values_BSNF: Tensor) -> Tensor:
    """Sum of squares, over frames in double precision."""
    energy_BS: Tensor = torch.linalg.vector_norm(values_BSNF, dim=-1).double().square().sum(-1)
    return energy_BS


def mask_snr_db(spectra: Spectra) -> Tensor:
    """SNR of each stem that is expected from the stems' masks, [B, S]: 10 log10(Σ q²|X|² / Σ q(1-q)|X|²).

    q is the mask that makes the stem from the mixture, min(1, |S|/|X|), times the stem's share of all stems at the
    point, |S| / Σ|S|. If q is the probability that the point belongs to the source, q(1-q)|X|² is the variance of the
    energy taken. Two stems that are both half of the mixture have -4.8; a binary mask that no other stem contradicts
    has 100, whether it is right or wrong. A silent stem has -100.
    """
    return ratio_db(spectra.taken_BS, spectra.doubtful_BS)


def share_si_sdr_db(spectra: Spectra) -> Tensor:
    """SI-SDR of each stem's spectrogram against the stem's share of the clip, X |S| / Σ|S|, [B, S].

    It is low if the stems of a clip contradict each other, or if dividing up the rest of the clip would change them.
    The share is that of Liutkus & Badeau 2015 (with their alpha = 1). A silent stem has -100.
    """
    target_BS = spectra.shared_BS.square() / torch.where(spectra.share_BS > 0, spectra.share_BS, 1.0)
    return ratio_db(target_BS, (spectra.stem_BS - target_BS).clamp(min=0))


def contested_db(spectra: Spectra) -> Tensor:
    """Energy of each stem that the other stems of its clip claim too, relative to its energy, [B, S], at most 0 dB.

    At each point the others claim the sum of their magnitudes, up to the stem's. A copy has 0; a stem that no other
    overlaps, a silent stem and an only stem have -100.
    """
    return ratio_db(spectra.contested_BS, spectra.stem_BS).clamp(max=0.0)  # rounding can give a little more than 0


def mixture_coherence_fraction(spectra: Spectra) -> Tensor:
    """Coherence of each stem with its mixture, [B, S] in 0..1: Σ_f |Sxy| / Σ_f √(Sxx Syy) over Welch spectra.

    A copy at any gain or polarity has 1, silence 0. If the other stems of the clip are disjoint from it in time or
    frequency, a stem has the square root of its fraction of the mixture there.
    """
    bound_BS = (spectra.stem_BSF * spectra.mixture_B1F).sqrt().sum(-1)
    cross_BS = torch.hypot(*spectra.cross_2BSF).sum(-1)
    return (cross_BS / torch.where(bound_BS > 0, bound_BS, 1.0)).clamp(0.0, 1.0)


def coherence_fraction(spectra: Spectra) -> Tensor | None:
    """Coherence of each stem with the most similar other stem of its clip, [B, S] in 0..1; None for one stem.

    Σ_f |Sxy| / Σ_f √(Sxx Syy) over Welch spectra. In the denominator Sxx and Syy are raised by 1/100 of their mean over
    frequency, so that leakage of the window between distant tones does not count, and the ratio is scaled so that a
    copy has 1 at any gain or polarity. A copy delayed by 2 ms has 0.99, disjoint bands about 0, and silence 0, even
    with itself. Independent noise has about 0.9 / √frames: 0.11 for 2 s, 0.05 for 10 s, and more if both stems are loud
    in a few frames only. Exact to 1e-6, the precision of the float32 column.
    """
    num_stems = spectra.stem_BSF.shape[-2]
    if num_stems == 1:
        return None
    root_BSF = (spectra.stem_BSF + _COHERENCE_FLOOR * spectra.stem_BSF.mean(-1, keepdim=True)).sqrt()
    apart = range(1, num_stems)
    bound_BP = torch.cat([(root_BSF[..., by:, :] * root_BSF[..., :-by, :]).sum(-1) for by in apart], -1)
    bound_BP = bound_BP / (1 + _COHERENCE_FLOOR)
    cross_BP = torch.hypot(*spectra.between_2BPF).sum(-1)
    coherence_BP = (cross_BP / torch.where(bound_BP > 0, bound_BP, 1.0)).clamp(0.0, 1.0)
    coherence_BSS = coherence_BP.new_zeros(*coherence_BP.shape[:-1], num_stems, num_stems)
    for by, of_pairs in zip(apart, torch.split(coherence_BP, list(range(num_stems - 1, 0, -1)), -1), strict=True):
        for side in (by, -by):
            coherence_BSS.diagonal(side, -2, -1).copy_(of_pairs)
    return coherence_BSS.amax(-1)
