"""Energies and inner products of signals, and their ratios in dB, for the metrics.

Ratios are bounded to [-100, 100] dB and defined for every finite input: a numerator of 0 gives -100, otherwise a
denominator of 0 gives +100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_DB = 100.0
"""Bound of every ratio in dB."""


def ratio_db(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Ratio of two energies in dB, bounded."""
    ratio_db = 10 * torch.log10(numerator / denominator)
    return torch.where(numerator > 0, ratio_db, -MAX_DB).clamp(-MAX_DB, MAX_DB)


def energy(signal: Tensor) -> Tensor:
    """Sum of squares over time, in the signal's precision."""
    return signal.square().sum(-1)


def norm(signal: Tensor) -> Tensor:
    """Root of the energy over time, in float64."""
    root: Tensor = torch.linalg.vector_norm(signal, dim=-1, dtype=torch.float64)
    return root


def check_lengths(*signals: Tensor) -> None:
    """Raise ValueError unless the signals have the same length of at least 1 sample."""
    lengths = [signal.shape[-1] if signal.ndim else 0 for signal in signals]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        raise ValueError(f"signals must have one length of at least 1 sample, got {lengths}; cut or pad them")


@dataclass(frozen=True, kw_only=True)
class SignalPair:
    """Two signals with the inner products for the ratios, scaled so that none overflows or underflows.

    A ratio of energies of up to 100 dB is exact to 1e-4 dB: float64 rounds by 1e-15 of the larger energy.
    """

    estimate: Tensor
    reference: Tensor
    gain: Tensor
    """Divisor of the estimate relative to that of the reference, within 1e±30."""
    estimate_energy: Tensor
    product: Tensor
    reference_energy: Tensor

    @classmethod
    def of(cls, estimate: Tensor, reference: Tensor) -> SignalPair:
        """Raises ValueError if lengths differ or are zero; leading dimensions broadcast."""
        check_lengths(estimate, reference)
        products = _products(estimate, reference)
        gain = torch.ones_like(products[0])
        if is_scaled(products[0], products[2]):
            estimate, reference = estimate.double(), reference.double()
            peak_B1, reference_peak_B1 = peak(estimate), peak(reference)
            gain = (peak_B1 / reference_peak_B1)[..., 0].clamp(1e-30, 1e30).expand(gain.shape)
            estimate, reference = estimate / peak_B1, reference / reference_peak_B1
            products = _products(estimate, reference)
        return cls(
            estimate=estimate,
            reference=reference,
            gain=gain,
            estimate_energy=products[0],
            product=products[1],
            reference_energy=products[2],
        )


def _products(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|x|², x·y and |y|² in float64; on a CPU row by row, so that a row stays in cache: a third of the time."""
    first, second = _broadcast(first, second)
    if not is_on_cpu(first):
        return _three_dots(first.double(), second.double())
    rows, others = (signal.reshape(-1, signal.shape[-1]) for signal in (first, second))
    dots = [_three_dots(row.double(), other.double()) for row, other in zip(rows, others, strict=True)]
    first_energy, product, second_energy = (
        torch.stack(column).view(first.shape[:-1]) for column in zip(*dots, strict=True)
    )
    return first_energy, product, second_energy


def _broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = np.broadcast_shapes(first.shape, second.shape)
    return first.expand(shape), second.expand(shape)


def _three_dots(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dot = torch.dot if first.ndim == 1 else torch.linalg.vecdot
    return dot(first, first), dot(first, second), dot(second, second)


def is_scaled(*energies: Tensor) -> bool:
    """True if signals must be scaled: squares of their energies and samples may not be within float64's range.

    Always true on a GPU, where scaling costs less than to wait for the answer.
    """
    return not (is_on_cpu(energies[0]) and all(bool(((value > 1e-120) & (value < 1e120)).all()) for value in energies))


def is_on_cpu(tensor: Tensor) -> bool:
    """True for the device where small steps that stay in cache are fast, and where a condition costs no wait."""
    return tensor.device.type == "cpu"


def peak(signal: Tensor) -> Tensor:
    """Largest magnitude, [B, 1]; for silence the smallest positive number, so that one can divide by it."""
    largest = torch.maximum(signal.amax(-1, keepdim=True), -signal.amin(-1, keepdim=True))  # faster than abs
    return largest.clamp(min=torch.finfo(signal.dtype).tiny)
