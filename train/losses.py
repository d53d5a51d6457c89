"""ClearSep's training loss, made finite for silent targets.

Shape legend: B batch or queries, G groups of queries, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.batch import Batch

_FLOOR = 1e-3  # of the mixture's energy: errors more than 30 dB below the mixture stop counting


def _decibels(ratio: Tensor) -> Tensor:
    return 10.0 * torch.log10(ratio)


def soft_snr_db(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """SNR ``[B]`` with 1/1000 of the mixture's energy added to both energies; a silent estimate of silence has 0 dB."""
    floor_B = _FLOOR * mixture.square().sum(-1) + 1e-12
    error_B = (estimate - reference).square().sum(-1)
    return _decibels((reference.square().sum(-1) + floor_B) / (error_B + floor_B))


def soft_si_snr_db(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """The same after scaling the reference to fit the estimate (Le Roux et al. 2019)."""
    energy_B1 = reference.square().sum(-1, keepdim=True) + 1e-12
    scale_B1 = (estimate * reference).sum(-1, keepdim=True) / energy_B1
    return soft_snr_db(estimate=estimate, reference=scale_B1 * reference, mixture=mixture)


def clearsep_losses(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """-0.9 SNR - 0.1 SI-SNR in dB ``[B]`` (ClearSep, CLAPSep); for a silent reference only the SNR counts.

    All arguments are ``[B, T]``; the result is differentiable everywhere.
    """
    snr_B = soft_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    si_snr_B = soft_si_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    silent_B = reference.square().sum(-1) == 0.0
    return -(0.9 * snr_B + 0.1 * torch.where(silent_B, snr_B, si_snr_B))


def clearsep_loss(*, estimate: Tensor, reference: Tensor, mixture: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of :func:`clearsep_losses`, a scalar; ``weight`` ``[B]`` has a mean of 1."""
    losses_B = clearsep_losses(estimate=estimate, reference=reference, mixture=mixture)
    return losses_B.mean() if weight is None else (weight * losses_B).mean()


def batch_loss(batch: Batch, stems_BT: Tensor, group_B: Tensor | None = None) -> Tensor:
    """Loss of the sum of each group's stems against its target; ``group_B`` replaces the groups of the batch."""
    estimate_GT, mix_GT = batch.regroup(stems_BT, group_B)
    return clearsep_loss(estimate=estimate_GT, reference=batch.target_GT, mixture=mix_GT, weight=batch.weight_G)
