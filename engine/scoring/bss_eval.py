"""BSS-eval SDR. The solver is our own because it takes a fifth of the time of a library (benchmarks/speed/scoring.md).

Correlations come from short transforms and the filter from Levinson's recursion (Scheibler 2022, "SDR - medium rare
with fast computations").

Shape suffixes: B rows, T samples, K blocks, N samples of a block, F frequency bins, L taps of the filter or lags.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.scoring import energies
from engine.scoring.energies import MAX_DB, SignalPair, energy, ratio_db

_SINGULAR_LOAD = (
    1e-10  # of the diagonal; it costs a copy of the reference load / 4 of its energy: it stays above 100 dB
)
_WORST_RESIDUAL = 1e-8  # accepted from Levinson's recursion; on recordings it stays below 1e-10
_ROUNDING = 1e-15  # error of a correlation relative to the energies
_WORST_ERROR = 1e-4  # accepted relative error of an energy: 4e-4 dB
_SAMPLES_AT_ONCE = 2**18


def pair_bss_sdr_db(pair: SignalPair, filter_length: int) -> Tensor:
    """BSS-eval SDR of a pair (see ``metrics.bss_sdr_db``)."""
    cross_BL, auto_BL = _correlations(pair.estimate, pair.reference, filter_length)
    filter_BL = _solve_toeplitz(auto_BL, cross_BL)
    target = (filter_BL * _toeplitz_product(auto_BL, filter_BL)).sum(-1)
    rest = pair.estimate_energy - 2 * (filter_BL * cross_BL).sum(-1) + target
    largest = pair.estimate_energy.sqrt() + filter_BL.abs().sum(-1) * pair.reference_energy.sqrt()
    wanted = torch.maximum(rest, target * 10 ** (-MAX_DB / 10))
    is_rough = _ROUNDING * largest.square() > _WORST_ERROR * wanted  # a filter with large taps, or above about 90 dB
    if not energies.is_on_cpu(filter_BL) or is_rough.any():  # on a GPU it takes less time than to wait for the answer
        exact = _energies(pair.estimate, pair.reference, filter_BL)
        target, rest = (torch.where(is_rough, *both) for both in zip(exact, (target, rest), strict=True))
    return ratio_db(target, rest.clamp(min=0))


def _correlations(estimate: Tensor, reference: Tensor, filter_length: int) -> tuple[Tensor, Tensor]:
    """Σ_t e[t] s[t - l] and Σ_t s[t] s[t - l] for the lags l of the filter, [B, L] each.

    Computed by short transforms, a few at a time, that stay in cache: a third of the time of one long transform.
    """
    cross_BF = auto_BF = estimate.new_zeros((), dtype=torch.complex128)
    num_fft = _num_fft(filter_length)
    for estimate_BKN, reference_BKN, history_BKN in _blocks(estimate, reference, filter_length):
        history_BKF = torch.fft.rfft(history_BKN)
        cross_BF = cross_BF + torch.linalg.vecdot(history_BKF, torch.fft.rfft(estimate_BKN, num_fft), dim=-2)
        auto_BF = auto_BF + torch.linalg.vecdot(history_BKF, torch.fft.rfft(reference_BKN, num_fft), dim=-2)
    cross_BL, auto_BL = (_first_lags(spectrum, filter_length) for spectrum in (cross_BF, auto_BF))
    return cross_BL, auto_BL


def _first_lags(spectrum_BF: Tensor, filter_length: int) -> Tensor:
    """Lags of the filter in order, from the cross spectrum of blocks and histories that begin L - 1 samples earlier."""
    lags_BN: Tensor = torch.fft.irfft(spectrum_BF)
    return lags_BN.roll(filter_length - 1, -1)[..., :filter_length]


def _energies(estimate: Tensor, reference: Tensor, filter_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of the filtered reference, made by overlap-save, and of the rest of the estimate."""
    filter_length = filter_BL.shape[-1]
    filter_BF = torch.fft.rfft(filter_BL, _num_fft(filter_length))
    target = rest = filter_BL.new_zeros(())
    for estimate_BKN, _, history_BKN in _blocks(estimate, reference, filter_length):
        blocks_BKN = torch.fft.irfft(torch.fft.rfft(history_BKN) * filter_BF[..., None, :])
        target_BKN = blocks_BKN[..., filter_length - 1 :]
        target = target + energy(target_BKN).sum(-1)
        rest = rest + energy(estimate_BKN - target_BKN).sum(-1)
    return target, rest


def _num_fft(filter_length: int) -> int:
    return 8 << (filter_length - 1).bit_length()


def _blocks(estimate: Tensor, reference: Tensor, filter_length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Estimate and reference in blocks [B, K, N], and the reference's blocks with the L - 1 samples before each.

    In float64. The blocks extend over the filter's tail; on a CPU a few are returned at a time.
    """
    num_past = filter_length - 1
    num_fft = _num_fft(filter_length)
    block = num_fft - num_past
    num_blocks = -(-(reference.shape[-1] + num_past) // block)
    tail = num_blocks * block - reference.shape[-1]
    estimate, reference = pad(estimate, (num_past, tail)), pad(reference, (num_past, tail))
    num_rows = max(estimate.numel(), reference.numel()) // reference.shape[-1]
    at_once = max(1, _SAMPLES_AT_ONCE // (num_rows * num_fft)) if energies.is_on_cpu(estimate) else num_blocks
    for first in range(0, num_blocks, at_once):
        stretch = slice(first * block, min(first + at_once, num_blocks) * block + num_past)
        histories = (signal[..., stretch].double().unfold(-1, num_fft, block) for signal in (estimate, reference))
        estimate_BKN, history_BKN = histories
        yield estimate_BKN[..., num_past:], history_BKN[..., num_past:], history_BKN


def _solve_toeplitz(auto_BL: Tensor, cross_BL: Tensor) -> Tensor:
    """Filter [B, L] with Toeplitz(auto) filter = cross; zero for a silent reference.

    Levinson's recursion on the CPU takes a fifth of the time of Cholesky's factorisation. It fails if rounding makes
    the matrix indefinite (a slow tone, a band-limited clip), which its residual shows; such rows are solved by
    Cholesky's factorisation with a loaded diagonal. On a GPU, all are solved by that, together.
    """
    power_B1 = torch.where(auto_BL[..., :1] > 0, auto_BL[..., :1], 1.0)
    shape, num_lags = cross_BL.shape, cross_BL.shape[-1]
    auto_BL = (auto_BL / power_B1).expand(shape).reshape(-1, num_lags).clone()
    auto_BL[:, 0] = 1.0  # also for a silent reference
    cross_BL = (cross_BL / power_B1).reshape(-1, num_lags)
    if not energies.is_on_cpu(auto_BL):
        return _solve_by_cholesky(auto_BL, cross_BL).view(shape)
    filter_BL = _levinson(auto_BL, cross_BL)
    failed_B = ~(_residual(auto_BL, cross_BL, filter_BL) <= _WORST_RESIDUAL)
    if failed_B.any():
        filter_BL[failed_B] = _solve_by_cholesky(auto_BL[failed_B], cross_BL[failed_B])
    return filter_BL.view(shape)


def _solve_by_cholesky(auto_BL: Tensor, cross_BL: Tensor) -> Tensor:
    filter_BL1: Tensor = torch.cholesky_solve(cross_BL[..., None], _cholesky(_toeplitz(auto_BL)))
    return filter_BL1[..., 0]


def _levinson(auto_BL: Tensor, cross_BL: Tensor) -> Tensor:
    """Filters [B, L]; NaN for a singular matrix."""
    filter_BL = np.full(cross_BL.shape, np.nan)
    for row, pair in enumerate(zip(auto_BL.numpy(), cross_BL.numpy(), strict=True)):
        with contextlib.suppress(np.linalg.LinAlgError):
            filter_BL[row] = scipy.linalg.solve_toeplitz(*pair, check_finite=False)
    return torch.from_numpy(filter_BL)


def _residual(auto_BL: Tensor, cross_BL: Tensor, filter_BL: Tensor) -> Tensor:
    """|Toeplitz(auto) filter - cross| / |cross|."""
    error_BL = _toeplitz_product(auto_BL, filter_BL) - cross_BL
    error_B, cross_B = (torch.linalg.vector_norm(lags, dim=-1) for lags in (error_BL, cross_BL))
    residual_B: Tensor = error_B / cross_B.clamp(min=torch.finfo(cross_B.dtype).tiny)
    return residual_B


def _toeplitz_product(auto_BL: Tensor, filter_BL: Tensor) -> Tensor:
    """Toeplitz(auto) times filter, [B, L], by circular convolution."""
    num_lags = auto_BL.shape[-1]
    circle = torch.cat([auto_BL, auto_BL.new_zeros(*auto_BL.shape[:-1], 1), auto_BL.flip(-1)[..., :-1]], -1)
    spectra = torch.fft.rfft(circle) * torch.fft.rfft(filter_BL, circle.shape[-1])
    product: Tensor = torch.fft.irfft(spectra, circle.shape[-1])
    return product[..., :num_lags]


def _toeplitz(auto_BL: Tensor) -> Tensor:
    """Symmetric matrices [B, L, L]."""
    even = torch.cat([auto_BL.flip(-1), auto_BL[:, 1:]], -1)  # lags from 1 - L to L - 1
    return even.unfold(-1, auto_BL.shape[-1], 1).flip(-2).contiguous()


def _cholesky(matrix_BLL: Tensor) -> Tensor:
    """Lower factors of matrices with unit diagonal; the diagonal of those that are indefinite is loaded.

    On a GPU this waits for the first factors, once a batch: always to compute both would take longer.
    """
    factor_BLL: Tensor
    factor_BLL, failed_B = torch.linalg.cholesky_ex(matrix_BLL)
    if failed_B.any():
        load_B1 = _SINGULAR_LOAD * (failed_B > 0).to(matrix_BLL.dtype)[..., None]
        matrix_BLL.diagonal(dim1=-2, dim2=-1).add_(load_B1)
        factor_BLL, _ = torch.linalg.cholesky_ex(matrix_BLL)
    return factor_BLL
