"""Scores of a clip's stems over time and frequency, all of one set of spectra: pure, batched, on any device.

Where metrics.py compares signals, this looks at who claims which point of the clip's spectrogram. Single precision:
a score is good to 1e-3 dB below 40 dB, and bounded to [-100, 100] by the rules of metrics.py.

Shape suffixes: B clips (any leading dimensions, or none), S stems of a clip, T samples, F bins, N frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.metrics import checked, peak, ratio_db

_FRAME_S = 0.064


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Complex spectra of a clip and its stems: Hann frames of 64 ms, half overlapped, at a common scale."""

    stems_BSNF: Tensor
    mixture_B1NF: Tensor

    @classmethod
    def of(cls, *, stems_BST: Tensor, mixture_BT: Tensor, sample_rate_hz: int) -> Spectra:
        """Raises ValueError where lengths differ or are zero, or the rate is not positive."""
        if sample_rate_hz < 1:
            raise ValueError(f"sample_rate_hz must be positive, got {sample_rate_hz}; pass the rate of the stems")
        stems_BST, mixture_BT = checked(stems_BST, mixture_BT)
        scale_B11 = torch.maximum(peak(stems_BST).amax(-2, keepdim=True), peak(mixture_BT)[..., None])
        signals = (torch.cat([mixture_BT[..., None, :], stems_BST], -2) / scale_B11).float()
        hop = max(1, round(_FRAME_S / 2 * sample_rate_hz))
        padded = pad(signals, (hop, hop + -signals.shape[-1] % hop))
        window = torch.hann_window(2 * hop, device=padded.device)
        spectra = torch.fft.rfft(padded.unfold(-1, 2 * hop, hop) * window)
        return cls(stems_BSNF=spectra[..., 1:, :, :], mixture_B1NF=spectra[..., :1, :, :])

    @cached_property
    def magnitude_BSNF(self) -> Tensor:
        """Of the stems."""
        return _power(self.stems_BSNF).sqrt()

    @cached_property
    def share_BSNF(self) -> Tensor:
        """Each stem's part of all that the stems claim at a point, 0..1; 0 where none claims anything."""
        total_B1NF = self.magnitude_BSNF.sum(-3, keepdim=True)
        shares_BSNF: Tensor = self.magnitude_BSNF / torch.where(total_B1NF > 0, total_B1NF, 1.0)
        return shares_BSNF


def mask_snr_db(spectra: Spectra) -> Tensor:
    """The SNR that the separator's own masks expect of each stem, [B, S]: 10 log10(Σ q²|X|² / Σ q(1-q)|X|²).

    q is the mask that makes the stem of the mixture, min(1, |S|/|X|), times the stem's share of all that the clip's
    stems claim there, |S| / Σ|S|. If q is the chance that the point is the source's, q(1-q)|X|² is the variance of
    what is taken. So half of everything in both of two stems gives -4.8, and a binary mask that no other stem
    contradicts gives 100, right or wrong. A silent stem gives -100.
    """
    mixture_B1NF = _power(spectra.mixture_B1NF).sqrt()
    taken_BSNF = torch.minimum(spectra.magnitude_BSNF, mixture_B1NF) * spectra.share_BSNF
    return ratio_db(_total(taken_BSNF * taken_BSNF), _total(taken_BSNF * (mixture_B1NF - taken_BSNF)))


def share_si_sdr_db(spectra: Spectra) -> Tensor:
    """SI-SDR of each stem's spectrogram against the stem's share of the clip, X |S| / Σ|S|, [B, S].

    Low where the stems of a clip contradict each other, or where what they leave of the clip would change them. The
    share is that of Liutkus & Badeau 2015 (their alpha of 1). A silent stem gives -100.
    """
    stems, mixture = (torch.view_as_real(some) for some in (spectra.stems_BSNF, spectra.mixture_B1NF))
    overlap_BSNF = stems[..., 0] * mixture[..., 0] + stems[..., 1] * mixture[..., 1]
    product_BS = _total(overlap_BSNF * spectra.share_BSNF)
    share_BS = _total(_power(spectra.mixture_B1NF) * spectra.share_BSNF * spectra.share_BSNF)
    target_BS = product_BS.square() / torch.where(share_BS > 0, share_BS, 1.0)
    stem_BS = _total(spectra.magnitude_BSNF * spectra.magnitude_BSNF)
    return ratio_db(target_BS, (stem_BS - target_BS).clamp(min=0))


def contested_db(spectra: Spectra) -> Tensor:
    """Energy of each stem that the other stems of its clip claim too, relative to its own, [B, S], at most 0.

    At each point the others claim the sum of their magnitudes, as far as the stem reaches. A copy gives 0, disjoint
    stems -100, and so does a silent or an only stem.
    """
    magnitude_BSNF = spectra.magnitude_BSNF
    others_BSNF = magnitude_BSNF.sum(-3, keepdim=True) - magnitude_BSNF
    claimed_BSNF = torch.minimum(magnitude_BSNF, others_BSNF.clamp(min=0))
    return ratio_db(_total(claimed_BSNF * claimed_BSNF), _total(magnitude_BSNF * magnitude_BSNF))


def mixture_coherence_fraction(spectra: Spectra) -> Tensor:
    """How much each stem is a filtered copy of its mixture, [B, S] in 0..1: Σ_f |Sxy| / Σ_f √(Sxx Syy).

    Over Welch spectra of the frames. A copy at any gain or polarity gives 1, silence 0. A stem of a clip whose other
    stems are disjoint in time or frequency gives the square root of its part in the mixture there.
    """
    stems, mixture = spectra.stems_BSNF, spectra.mixture_B1NF
    cross_BSF = (stems * mixture.conj()).sum(-2).abs()
    bound_BSF = _power(stems).sum(-2).sqrt() * _power(mixture).sum(-2).sqrt()
    bound_BS = bound_BSF.sum(-1)
    return (cross_BSF.sum(-1) / torch.where(bound_BS > 0, bound_BS, 1.0)).clamp(0.0, 1.0).double()


def _power(spectra: Tensor) -> Tensor:
    parts = torch.view_as_real(spectra)
    return parts[..., 0] * parts[..., 0] + parts[..., 1] * parts[..., 1]


def _total(values_BSNF: Tensor) -> Tensor:
    """Over bins in single precision, over frames in double."""
    return values_BSNF.sum(-1).double().sum(-1)
