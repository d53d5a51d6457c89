"""Metrics of the similarity of two signals, in dB: pure, batched over leading dimensions, on any device.

Every function returns float64. Values in dB are computed in float64, the fraction in float32. Values in dB are ratios
of two energies, bounded to [-100, 100] and defined for every finite input: a numerator of 0 gives -100, otherwise a
denominator of 0 gives +100. So a silent reference gives -100 for any estimate, even a silent one. Every function raises
ValueError if lengths differ or are zero; leading dimensions broadcast.

Shape suffixes: B clips (any leading dimensions, or none), S stems of a clip, T samples. A signal without suffix has
shape [..., T], and a metric of it [...].

>>> reference = torch.randn(2, 8000)
>>> cs.metrics.snr_db(estimate=0.5 * reference, reference=reference)
tensor([6.0206, 6.0206], dtype=torch.float64)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.scoring.bss_eval import pair_bss_sdr_db
from engine.scoring.energies import SignalPair, check_lengths, energy, is_scaled, norm, peak, ratio_db

FILTER_LENGTH = 512
"""Taps of BSS-eval's filter."""
_WINDOW_S = 0.1
_ACTIVE_RATIO = 1e-4  # 40 dB below the loudest window


def snr_db(*, estimate: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio, which depends on gain, spectrum and delay: 10 log10(|s|² / |s - e|²).

    AudioSep's papers call it SDR. A silent estimate of a reference that is not silent gives 0.
    """
    return _snr_db(SignalPair.of(estimate, reference))


def si_sdr_db(*, estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant SDR, means not removed (Le Roux et al. 2019, "SDR - half-baked or well done?", eq. 4).

    A silent estimate gives -100.
    """
    return _si_sdr_db(SignalPair.of(estimate, reference))


def bss_sdr_db(*, estimate: Tensor, reference: Tensor, filter_length: int = FILTER_LENGTH) -> Tensor:
    """BSS-eval v3 SDR: energy of the part of the estimate that an FIR filter makes of the reference, against the rest.

    Vincent et al. 2006 with one source, by the normal equations of Scheibler 2022 ("SDR - medium rare with fast
    computations"). Equal to torchmetrics' `signal_distortion_ratio` at its defaults. If the reference does not
    determine the filter (a tone), the ratio is that of the filter found. A clip may be shorter than the filter. A
    silent estimate gives -100. Raises ValueError for a filter without taps.
    """
    if filter_length < 1:
        raise ValueError(f"filter_length must be at least 1 sample, got {filter_length}; BSS-eval uses 512")
    return pair_bss_sdr_db(SignalPair.of(estimate, reference), filter_length)


def re_sdr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """ClearSep's Re-SDR: `bss_sdr_db` of the stems' sum against the mixture (arXiv 2504.17782).

    It measures whether the stems are complete, not whether they are separated; it ignores gain, and often an absent
    source.
    """
    return bss_sdr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def re_si_sdr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """ClearSep's Re-SISDR: `si_sdr_db` of the stems' sum against the mixture (arXiv 2504.17782).

    It measures whether the stems are complete, not whether they are separated; it ignores gain.
    """
    return si_sdr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def remix_snr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """`snr_db` of the stems' sum against the mixture: completeness, including the gain."""
    return snr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def remix_scores_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`re_sdr_db`, `re_si_sdr_db` and `remix_snr_db`, computed from one sum of the stems."""
    pair = SignalPair.of(_remix(stems_BST), mixture_BT)
    return pair_bss_sdr_db(pair, FILTER_LENGTH), _si_sdr_db(pair), _snr_db(pair)


def level_db(*, signal: Tensor, reference: Tensor) -> Tensor:
    """Energy of a signal relative to a reference's, 10 log10(|x|² / |s|²).

    A silent signal gives -100 for any reference; any other signal gives +100 for a silent reference.
    """
    check_lengths(signal, reference)
    energies = [norm(one).square() for one in (signal, reference)]
    if not is_scaled(*energies):
        return ratio_db(*energies)
    peak_B1, reference_peak_B1 = peak(signal.double()), peak(reference.double())
    gain = (peak_B1 / reference_peak_B1)[..., 0].clamp(1e-30, 1e30)
    return ratio_db((gain * norm(signal / peak_B1)).square(), norm(reference / reference_peak_B1).square())


def active_fraction(signal: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Fraction [...] of a signal's 0.1 s windows with an energy within 40 dB of the loudest window; 0 for silence."""
    check_lengths(signal)
    window = min(signal.shape[-1], max(1, round(_WINDOW_S * sample_rate_hz)))
    padded = pad((signal / peak(signal)).float(), (0, -signal.shape[-1] % window))
    energies = energy(padded.unfold(-1, window, window))
    loudest = energies.amax(-1, keepdim=True)
    active: Tensor = (energies > _ACTIVE_RATIO * loudest) & (loudest > 0)
    return active.double().mean(-1)


def _snr_db(pair: SignalPair) -> Tensor:
    loudest = torch.maximum(pair.gain, torch.ones_like(pair.gain))
    gain, unit = pair.gain / loudest, 1 / loudest
    reference = unit.square() * pair.reference_energy
    rest = reference - 2 * unit * gain * pair.product + gain.square() * pair.estimate_energy
    return ratio_db(reference, rest.clamp(min=0))


def _si_sdr_db(pair: SignalPair) -> Tensor:
    target = pair.product.square() / torch.where(pair.reference_energy > 0, pair.reference_energy, 1.0)
    return ratio_db(target, (pair.estimate_energy - target).clamp(min=0))


def _remix(stems_BST: Tensor) -> Tensor:
    return stems_BST.sum(-2, dtype=torch.float64)
