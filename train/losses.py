"""ClearSep's training loss, made finite for silent targets.

Shape legend: B batch, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-3  # of the mixture's energy: errors more than 30 dB below the mixture stop counting


def _decibels(ratio: Tensor) -> Tensor:
    return 10.0 * torch.log10(ratio)


def soft_snr_db(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """SNR ``[B]`` with both energies raised by 1/1000 of the mixture's: silence has a value, 0 when it is met."""
    floor_B = _FLOOR * mixture.square().sum(-1) + 1e-12
    error_B = (estimate - reference).square().sum(-1)
    return _decibels((reference.square().sum(-1) + floor_B) / (error_B + floor_B))


def soft_si_snr_db(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """The same after the reference is scaled to fit the estimate (Le Roux et al. 2019)."""
    energy_B1 = reference.square().sum(-1, keepdim=True) + 1e-12
    scale_B1 = (estimate * reference).sum(-1, keepdim=True) / energy_B1
    return soft_snr_db(estimate=estimate, reference=scale_B1 * reference, mixture=mixture)


def clearsep_loss(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """Mean of -0.9 SNR - 0.1 SI-SNR in dB (ClearSep, CLAPSep); a silent reference counts its SNR alone.

    All are ``[B, T]``; the result is a scalar that can be differentiated everywhere.
    """
    snr_B = soft_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    si_snr_B = soft_si_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    silent_B = reference.square().sum(-1) == 0.0
    return -(0.9 * snr_B + 0.1 * torch.where(silent_B, snr_B, si_snr_B)).mean()
