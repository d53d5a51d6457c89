"""ClearSep's training loss, made finite for silent targets, and what a batch of queries costs.

Shape legend: B batch or queries, G groups of queries, M mixtures, N stems, K assignments, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.data.config import MAX_QUERIES, MixConfig
from train.data.mixer import Batch

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


def clearsep_losses(*, estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """-0.9 SNR - 0.1 SI-SNR in dB ``[B]`` (ClearSep, CLAPSep); a silent reference counts its SNR alone.

    All are ``[B, T]``; the result can be differentiated everywhere.
    """
    snr_B = soft_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    si_snr_B = soft_si_snr_db(estimate=estimate, reference=reference, mixture=mixture)
    silent_B = reference.square().sum(-1) == 0.0
    return -(0.9 * snr_B + 0.1 * torch.where(silent_B, snr_B, si_snr_B))


def clearsep_loss(*, estimate: Tensor, reference: Tensor, mixture: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of :func:`clearsep_losses`, a scalar; each counts as ``weight`` ``[B]``, of mean 1, says."""
    losses_B = clearsep_losses(estimate=estimate, reference=reference, mixture=mixture)
    return losses_B.mean() if weight is None else (weight * losses_B).mean()


def batch_loss(batch: Batch, stems_BT: Tensor, mix: MixConfig) -> Tensor:
    """What stems cost: the loss of the sum of every group, and of that of whole mixtures where the config weighs it."""
    group_B = best_groups(batch, stems_BT) if mix.mixit_assignment == "best" else batch.group_B
    estimate_GT, mix_GT = batch.regroup(stems_BT, group_B)
    loss = clearsep_loss(estimate=estimate_GT, reference=batch.target_GT, mixture=mix_GT, weight=batch.weight_G)
    if mix.consistency_weight > 0.0:
        loss = loss + mix.consistency_weight * consistency_loss(batch, stems_BT)
    return loss


def consistency_loss(batch: Batch, stems_BT: Tensor) -> Tensor:
    """The loss of the sum of all stems of a mixture against it, where all its sounds are asked for; the others cost 0.

    The mean is over all mixtures, so that it weighs a mixture as much as its target does (mixture consistency after
    Wisdom et al. 2019, here as a loss and not a projection).
    """
    num_mixtures = int(batch.mixture_G.max()) + 1
    mixture_B = batch.mixture_G[batch.group_B]
    empty_MT = batch.target_GT.new_zeros(num_mixtures, batch.target_GT.shape[-1])
    summed_MT = empty_MT.index_add(0, mixture_B, stems_BT)
    mix_MT = empty_MT.index_copy(0, mixture_B, batch.mix_BT)
    whole_M = torch.zeros_like(mix_MT[:, 0]).index_copy(0, batch.mixture_G, batch.whole_G.to(mix_MT.dtype))
    return (whole_M * clearsep_losses(estimate=summed_MT, reference=mix_MT, mixture=mix_MT)).sum() / num_mixtures


@torch.no_grad()
def best_groups(batch: Batch, stems_BT: Tensor) -> Tensor:
    """The group of every query ``[B]`` if each stem of a mixture of two clips goes to the clip where it fits best.

    Where a mixture has a single target the queries stay with it.
    """
    group_B = batch.group_B.clone()
    for first in torch.nonzero(batch.mixture_G.diff() == 0).flatten().tolist():
        if bool((batch.weight_G[first : first + 2] > 0.0).all()):  # not the rest that only consistency asks for
            is_of_both_B = (batch.group_B == first) | (batch.group_B == first + 1)
            assigned_N = best_assignment(
                stems_NT=stems_BT[is_of_both_B],
                target_2T=batch.target_GT[first : first + 2],
                mixture_T=batch.mix_BT[is_of_both_B][0],
            )
            group_B[is_of_both_B] = first + assigned_N
    return group_B


@torch.no_grad()
def best_assignment(*, stems_NT: Tensor, target_2T: Tensor, mixture_T: Tensor) -> Tensor:
    """To which of two targets each stem belongs, 0 or 1 ``[N]``: the least loss of all ``2**N`` ways (MixIT).

    Wisdom et al. 2020, arXiv 2006.12701, with this loss. ``ValueError`` for more stems than can be tried.
    """
    num_stems = len(stems_NT)
    if num_stems > MAX_QUERIES:
        raise ValueError(f"{num_stems} stems are to be assigned; give {MAX_QUERIES} at most, or assign them by label")
    numbers_K1 = torch.arange(2**num_stems, device=stems_NT.device)[:, None]
    second_KN = (numbers_K1 >> torch.arange(num_stems, device=stems_NT.device)) & 1
    summed_KT = second_KN.to(stems_NT.dtype) @ stems_NT
    parts = (stems_NT.sum(0) - summed_KT, summed_KT)
    losses_K = sum(
        clearsep_losses(estimate=part_KT, reference=target_T[None].expand_as(part_KT), mixture=mixture_T[None])
        for part_KT, target_T in zip(parts, target_2T, strict=True)
    )
    return second_KN[torch.as_tensor(losses_K).argmin()]
