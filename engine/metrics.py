"""How close one signal is to another, in dB: pure, batched over leading dimensions, on any device.

Every function computes in float64 and returns float64. Results in dB are bounded to [-100, 100] and defined
for every finite input by one rule on the two energies whose ratio they are: no numerator gives -100,
otherwise no denominator gives +100. So a silent reference gives -100 whatever the estimate, silence
included: silence certifies nothing. Every function raises ValueError where the lengths differ or are zero;
leading dimensions broadcast.

Shape suffixes: B clips (any leading dimensions, or none), S stems of a clip, T samples, K frames or blocks,
N samples of a block, F frequency bins, L taps of the allowed filter or lags of a correlation. A signal
without suffix is [..., T], and what is made of it [...].
"""

from __future__ import annotations

import contextlib

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.functional import pad

MAX_DB = 100.0
FILTER_LENGTH = 512
_SINGULAR_LOAD = 1e-10  # keeps an exact copy above 100 dB: the load costs it at most load / 4 of its energy
_WORST_RESIDUAL = 1e-8  # of Levinson's recursion; on recordings it stays below 1e-10
_FRAME_S = 0.032
_WINDOW_S = 0.1
_ACTIVE_RATIO = 1e-4  # 40 dB below the loudest window
_MIN_FRAMES = 32
_FRAMES_AT_ONCE = 64
_COHERENCE_FLOOR = 1e-2


def snr_db(*, estimate: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio, which sees gain, shape and delay: 10 log10(|s|² / |s - e|²).

    AudioSep's papers call it SDR. A silent estimate of a reference that is not silent gives 0.
    """
    estimate, reference = checked(estimate, reference)
    peak_B1 = torch.maximum(peak(estimate), peak(reference))
    estimate, reference = estimate / peak_B1, reference / peak_B1
    return ratio_db(_energy(reference), _energy(reference - estimate))


def si_sdr_db(*, estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant SDR, means not removed (Le Roux et al. 2019, "SDR - half-baked or well done?", eq. 4).

    A silent estimate gives -100.
    """
    estimate, reference = _at_unit_peaks(estimate, reference)
    energy = _energy(reference)
    gain = (estimate * reference).sum(-1) / torch.where(energy > 0, energy, 1.0)
    target = gain[..., None] * reference
    return ratio_db(_energy(target), _energy(estimate - target))


def bss_sdr_db(*, estimate: Tensor, reference: Tensor, filter_length: int = FILTER_LENGTH) -> Tensor:
    """BSS-eval v3 SDR: the part of the estimate that one FIR filter makes of the reference, against the rest.

    Vincent et al. 2006 with one source, by the normal equations of Scheibler 2022 ("SDR - medium rare with
    fast computations"). Equal to torchmetrics' `signal_distortion_ratio` at its defaults. The energies are
    those of the filter found, so a reference that leaves it undetermined (a tone) still gets a ratio that
    some filter reaches. A clip may be shorter than the filter. A silent estimate gives -100. Raises
    ValueError for a filter without taps.
    """
    if filter_length < 1:
        raise ValueError(f"filter_length must be at least 1 sample, got {filter_length}; BSS-eval has 512")
    estimate, reference = _at_unit_peaks(estimate, reference)
    estimate_BKN, reference_BKN, history_BKF = _blocks(estimate, reference, filter_length)
    cross_BL = _correlation(estimate_BKN, history_BKF, filter_length)
    auto_BL = _correlation(reference_BKN, history_BKF, filter_length)
    target_BKN = _filtered(history_BKF, _solve_toeplitz(auto_BL, cross_BL))
    return ratio_db(_energy(target_BKN).sum(-1), _energy(estimate_BKN - target_BKN).sum(-1))


def re_sdr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """ClearSep's Re-SDR: `bss_sdr_db` of the stems' sum against the mixture (arXiv 2504.17782).

    Says that the stems are complete, not that they are separated; forgives gain, and often an absent source.
    """
    return bss_sdr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def re_si_sdr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """ClearSep's Re-SISDR: `si_sdr_db` of the stems' sum against the mixture (arXiv 2504.17782).

    Says that the stems are complete, not that they are separated; forgives gain.
    """
    return si_sdr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def remix_snr_db(*, stems_BST: Tensor, mixture_BT: Tensor) -> Tensor:
    """`snr_db` of the stems' sum against the mixture: completeness that also sees the gain."""
    return snr_db(estimate=_remix(stems_BST), reference=mixture_BT)


def level_db(*, signal: Tensor, reference: Tensor) -> Tensor:
    """Energy of a signal relative to a reference's, 10 log10(|x|² / |s|²).

    A silent signal gives -100 whatever the reference; one that is not, against a silent reference, +100.
    """
    signal, reference = checked(signal, reference)
    peak_B1, reference_peak_B1 = peak(signal), peak(reference)
    gain = (peak_B1 / reference_peak_B1)[..., 0].clamp(1e-30, 1e30)
    return ratio_db(gain.square() * _energy(signal / peak_B1), _energy(reference / reference_peak_B1))


def coherence_fraction(first_BT: Tensor, second_BT: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Coherence of two signals, [B] in 0..1: `pairwise_coherence` of just these two."""
    first_BT, second_BT = checked(first_BT, second_BT)
    stems_BST = torch.stack([first_BT + 0 * second_BT, second_BT + 0 * first_BT], dim=-2)  # broadcast
    return pairwise_coherence(stems_BST, sample_rate_hz=sample_rate_hz)[..., 0, 1]


def pairwise_coherence(stems_BST: Tensor, *, sample_rate_hz: int) -> Tensor:
    """How much every two stems of a clip are filtered copies of each other, [B, S, S] in 0..1.

    Σ_f |Sxy| / Σ_f √(Sxx Syy) over Welch spectra: Hann frames of 32 ms, half overlapped. In the denominator
    Sxx and Syy are raised by 1/100 of their mean over frequency, lest what leaks through the window between
    tones far apart count, and the ratio is rescaled so that a copy is 1 at any gain or polarity; delayed by
    2 ms it is 0.97. Disjoint bands tend to 0; silence is 0, with itself too. Independent noise is not 0 but
    about 0.9 / √frames: 0.08 for 2 s, 0.03 for 10 s, and more where both stems are loud in a few frames
    only. Clips under 0.5 s have shorter frames, at least 32 of them.
    """
    if sample_rate_hz < 1:
        raise ValueError(f"sample_rate_hz must be positive, got {sample_rate_hz}; pass the rate of the stems")
    (stems_BST,) = checked(stems_BST)
    cross_BFSS = _cross_spectra(stems_BST / peak(stems_BST), sample_rate_hz)
    power_BFS = cross_BFSS.diagonal(dim1=-2, dim2=-1).real
    root_BFS = (power_BFS + _COHERENCE_FLOOR * power_BFS.mean(-2, keepdim=True)).sqrt()
    bound_BSS = root_BFS.mT @ root_BFS / (1 + _COHERENCE_FLOOR)
    return (cross_BFSS.abs().sum(-3) / torch.where(bound_BSS > 0, bound_BSS, 1.0)).clamp(0.0, 1.0)


def active_fraction(signal: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Share [...] of a signal's 0.1 s windows whose energy is within 40 dB of the loudest; 0 for silence."""
    (signal,) = checked(signal)
    window = min(signal.shape[-1], max(1, round(_WINDOW_S * sample_rate_hz)))
    padded = pad(signal / peak(signal), (0, -signal.shape[-1] % window))
    energy = _energy(padded.unfold(-1, window, window))
    loudest = energy.amax(-1, keepdim=True)
    active: Tensor = (energy > _ACTIVE_RATIO * loudest) & (loudest > 0)
    return active.double().mean(-1)


def _cross_spectra(signal_BST: Tensor, sample_rate_hz: int) -> Tensor:
    """Welch cross spectra [B, F, S, S], unscaled, of Hann frames padded so that every sample weighs the same.

    A few frames at a time: what one step leaves is still in cache for the next, and memory stays small.
    """
    num_samples = signal_BST.shape[-1]
    hop = max(1, min(round(_FRAME_S * sample_rate_hz) // 2, num_samples // _MIN_FRAMES))
    padded_BST = pad(signal_BST, (hop, hop + (-num_samples) % hop))
    window = torch.hann_window(2 * hop, dtype=torch.float64, device=signal_BST.device)
    cross_BFSS = signal_BST.new_zeros((), dtype=torch.complex128)
    frames_BSKN = padded_BST.unfold(-1, 2 * hop, hop)
    for start in range(0, frames_BSKN.shape[-2], _FRAMES_AT_ONCE):
        some_BSKN = frames_BSKN[..., start : start + _FRAMES_AT_ONCE, :] * window
        spectra_BFSK = torch.fft.rfft(some_BSKN).movedim(-1, -3).contiguous()
        cross_BFSS = cross_BFSS + spectra_BFSK @ spectra_BFSK.mH
    return cross_BFSS


def _blocks(estimate: Tensor, reference: Tensor, filter_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both in blocks [B, K, N], and the spectra [B, K, F] of the reference's with the past a filter sees.

    The blocks go on for the filter's tail. Small transforms stay in cache: half the time of one long one.
    """
    num_past = filter_length - 1
    num_fft = 8 << num_past.bit_length()
    block = num_fft - num_past
    num_blocks = -(-(reference.shape[-1] + num_past) // block)
    tail = num_blocks * block - reference.shape[-1]
    padded = pad(reference, (num_past, tail))
    history_BKF = torch.fft.rfft(padded.unfold(-1, num_fft, block))
    estimate_BKN = pad(estimate, (0, tail)).unfold(-1, block, block)
    return estimate_BKN, padded[..., num_past:].unfold(-1, block, block), history_BKF


def _correlation(signal_BKN: Tensor, history_BKF: Tensor, filter_length: int) -> Tensor:
    """Σ_t x[t] s[t - l] for the lags l of the filter, [B, L]."""
    num_fft = signal_BKN.shape[-1] + filter_length - 1
    signal_BKF = torch.fft.rfft(signal_BKN, num_fft)
    cross_BF = (signal_BKF.conj() * history_BKF).sum(-2)
    cross_BN: Tensor = torch.fft.irfft(cross_BF, num_fft)
    return cross_BN[..., :filter_length].flip(-1)


def _filtered(history_BKF: Tensor, filter_BL: Tensor) -> Tensor:
    """The reference through the filter, [B, K, N], by overlap-save."""
    num_fft = 2 * (history_BKF.shape[-1] - 1)
    filter_BF = torch.fft.rfft(filter_BL, num_fft)
    blocks_BKN: Tensor = torch.fft.irfft(history_BKF * filter_BF[..., None, :], num_fft)
    return blocks_BKN[..., filter_BL.shape[-1] - 1 :]


def _solve_toeplitz(auto_BL: Tensor, cross_BL: Tensor) -> Tensor:
    """Filter [B, L] with Toeplitz(auto) filter = cross; zero for a silent reference.

    By Levinson's recursion, on the CPU: a fifth of Cholesky's time. It fails where rounding makes the matrix
    indefinite (a slow tone, a band-limited clip), which its residual shows; only there Cholesky's loads the diagonal.
    """
    power_B1 = torch.where(auto_BL[..., :1] > 0, auto_BL[..., :1], 1.0)
    shape, num_lags = cross_BL.shape, cross_BL.shape[-1]
    auto_BL = (auto_BL / power_B1).expand(shape).reshape(-1, num_lags).clone()
    auto_BL[:, 0] = 1.0  # of a silent reference too
    cross_BL = (cross_BL / power_B1).reshape(-1, num_lags)
    filter_BL = _levinson(auto_BL, cross_BL)
    failed_B = ~(_residual(auto_BL, cross_BL, filter_BL) <= _WORST_RESIDUAL)
    if failed_B.any():
        matrix_BLL = _toeplitz(auto_BL[failed_B])
        filter_BL[failed_B] = torch.cholesky_solve(cross_BL[failed_B, :, None], _cholesky(matrix_BLL))[..., 0]
    return filter_BL.view(shape)


def _levinson(auto_BL: Tensor, cross_BL: Tensor) -> Tensor:
    filter_BL = np.full(cross_BL.shape, np.nan)
    for row, pair in enumerate(zip(auto_BL.cpu().numpy(), cross_BL.cpu().numpy(), strict=True)):
        with contextlib.suppress(np.linalg.LinAlgError):  # stays NaN
            filter_BL[row] = scipy.linalg.solve_toeplitz(*pair, check_finite=False)
    return torch.from_numpy(filter_BL).to(auto_BL.device)


def _residual(auto_BL: Tensor, cross_BL: Tensor, filter_BL: Tensor) -> Tensor:
    """|Toeplitz(auto) filter - cross| / |cross|, by a circular convolution."""
    num_lags = auto_BL.shape[-1]
    circle = torch.cat([auto_BL, auto_BL.flip(-1)[:, :-1]], -1)  # lags from 0 to L - 1 and from 1 - L to -1
    spectra = torch.fft.rfft(circle) * torch.fft.rfft(filter_BL, circle.shape[-1])
    error_BL = torch.fft.irfft(spectra, circle.shape[-1])[:, :num_lags] - cross_BL
    error_B, cross_B = (torch.linalg.vector_norm(lags, dim=-1) for lags in (error_BL, cross_BL))
    residual_B: Tensor = error_B / cross_B.clamp(min=torch.finfo(cross_B.dtype).tiny)
    return residual_B


def _toeplitz(auto_BL: Tensor) -> Tensor:
    even = torch.cat([auto_BL.flip(-1), auto_BL[:, 1:]], -1)  # lags from 1 - L to L - 1
    return even.unfold(-1, auto_BL.shape[-1], 1).flip(-2).contiguous()


def _cholesky(matrix_BLL: Tensor) -> Tensor:
    """Lower factors of matrices with unit diagonal; each that rounding made indefinite is loaded, alone."""
    factor_BLL: Tensor
    factor_BLL, failed_B = torch.linalg.cholesky_ex(matrix_BLL)
    if failed_B.any():
        load_B1 = _SINGULAR_LOAD * (failed_B > 0).to(matrix_BLL.dtype)[..., None]
        matrix_BLL.diagonal(dim1=-2, dim2=-1).add_(load_B1)
        factor_BLL = torch.linalg.cholesky(matrix_BLL)
    return factor_BLL


def _remix(stems_BST: Tensor) -> Tensor:
    return stems_BST.sum(-2, dtype=torch.float64)


def ratio_db(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Ratio of two energies in dB by the rules of this module."""
    ratio_db = 10 * torch.log10(numerator / denominator)
    return torch.where(numerator > 0, ratio_db, -MAX_DB).clamp(-MAX_DB, MAX_DB)


def _energy(signal: Tensor) -> Tensor:
    return signal.square().sum(-1)


def checked(*signals: Tensor) -> tuple[Tensor, ...]:
    """The signals in float64, once they are known to have one length, which is not zero."""
    lengths = [signal.shape[-1] if signal.ndim else 0 for signal in signals]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        raise ValueError(f"signals must have one length of at least 1 sample, got {lengths}; cut or pad them")
    return tuple(signal.to(torch.float64) for signal in signals)


def _at_unit_peaks(estimate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both with peak 1, for ratios that see neither's gain: no energy overflows or vanishes."""
    estimate, reference = checked(estimate, reference)
    return estimate / peak(estimate), reference / peak(reference)


def peak(signal: Tensor) -> Tensor:
    """Largest magnitude, [B, 1]; a tiny number for silence, so that it divides."""
    return signal.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
