"""TODO engine/scoring/energies.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_DB = 100.0


def ratio_db(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Ratio of two energies in dB by the rules of this module."""
    ratio_db = 10 * torch.log10(numerator / denominator)
    return torch.where(numerator > 0, ratio_db, -MAX_DB).clamp(-MAX_DB, MAX_DB)


def _energy(signal: Tensor) -> Tensor:
    return signal.square().sum(-1)


def _norm(signal: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(signal, dim=-1, dtype=torch.float64)
    return norm


def check_lengths(*signals: Tensor) -> None:
    """Raises ValueError unless the signals have one length, which is not zero."""
    lengths = [signal.shape[-1] if signal.ndim else 0 for signal in signals]
    if min(lengths) < 1 or len(set(lengths)) > 1:
        raise ValueError(f"signals must have one length of at least 1 sample, got {lengths}; cut or pad them")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two signals with the inner products that the ratios are made of, at scales where none overflows or vanishes.

    The products hold a ratio of energies up to 100 dB to 1e-4 dB: what float64 rounds is 1e-15 of the larger energy.
    """

    estimate: Tensor
    reference: Tensor
    gain: Tensor
    """By what the estimate was divided, relative to the reference, within 1e±30."""
    estimate_energy: Tensor
    product: Tensor
    reference_energy: Tensor

    @classmethod
    def of(cls, estimate: Tensor, reference: Tensor) -> _Pair:
        check_lengths(estimate, reference)
        products = _products(estimate, reference)
        gain = torch.ones_like(products[0])
        if not _is_safe(products[0], products[2]):
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
    """|x|², x·y and |y|² in float64; on a CPU row by row, which stay in cache: a third of the time."""
    first, second = _broadcast(first, second)
    if first.device.type != "cpu":
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


def _is_safe(*energies: Tensor) -> bool:
    """Whether no energy is so large or small that its square, or a sample's, is out of float64's range."""
    return all(bool(((energy > 1e-120) & (energy < 1e120)).all()) for energy in energies)


def peak(signal: Tensor) -> Tensor:
    """Largest magnitude, [B, 1]; a tiny number for silence, so that it divides."""
    largest = torch.maximum(signal.amax(-1, keepdim=True), -signal.amin(-1, keepdim=True))  # faster than abs
    return largest.clamp(min=torch.finfo(signal.dtype).tiny)
