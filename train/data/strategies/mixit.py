"""Ablation: mixtures of two natural clips that are both targets, after MixIT (Wisdom et al. 2020, arXiv 2006.12701).

Shape legend: B queries, N stems of a mixture, K assignments, T samples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine.settings import Fraction, config
from train.data.batch import Batch
from train.data.drawn import Target, TrainingMixture
from train.data.mixer import Mixer
from train.data.strategies.natural_targets import draw_natural
from train.losses import batch_loss, clearsep_losses

MAX_QUERIES = 6
"""Queries of a mixture of two clips; all 2**6 assignments can be tried."""


@config
class MixIt:
    """Settings of mixtures of two natural clips."""

    fraction: Fraction = 0.33
    """Fraction of mixtures made of two natural clips that have no label in common."""
    assignment: Literal["labels", "best"] = "labels"
    """Which stems add up to which clip; ``labels``: as labelled; ``best``: the way with the least loss (MixIT)."""


class MixItMixer(Mixer):
    """Draws natural clips, alone or two at a time; for Self-Remixing too."""

    def natural_mixture(self, rng: np.random.Generator) -> TrainingMixture | None:
        settings = self.config.mixit or self.config.self_remix
        assert settings is not None
        clip_fraction = self.config.clip_fraction if self.pools["pairs"].by_label else 0.0
        two_fraction = settings.fraction if self.pools["natural"].by_label else 0.0
        if clip_fraction + two_fraction == 0.0:
            return None
        drawn = rng.random()
        if drawn < clip_fraction:
            return self.clip(rng)
        return self._two_clips(rng) if drawn < clip_fraction + two_fraction else None

    def _two_clips(self, rng: np.random.Generator) -> TrainingMixture | None:
        """Two clips without a common label, each a target; None if the first clip has no such partner."""
        first = draw_natural(rng, self.pools["natural"])
        partners = [
            sound
            for group in self.pools["natural"].by_label.values()
            for sound in group
            if sound.item.labels_present.isdisjoint(first.item.labels_present)
            and len(sound.item.labels) + len(first.item.labels) <= MAX_QUERIES
        ]
        if not partners:
            return None
        both = (first, partners[rng.integers(len(partners))])
        crops = tuple(self.cropper.crop(rng, sound)[0] for sound in both)
        targets = (Target(labels=sound.item.labels, crops=(crop,)) for sound, crop in zip(both, crops, strict=True))
        present = first.item.labels_present | both[1].item.labels_present
        return TrainingMixture(
            crops=crops,
            labels_present=present,
            sounding=present,
            targets=tuple(targets),
            is_complete=True,
        )


def mixit_loss(batch: Batch, stems_BT: Tensor) -> Tensor:
    """:func:`train.losses.batch_loss` under the best assignment of stems to clips."""
    return batch_loss(batch, stems_BT, best_groups(batch, stems_BT))


@torch.no_grad()
def best_groups(batch: Batch, stems_BT: Tensor) -> Tensor:
    """Group of every query ``[B]`` if each stem of a mixture of two clips goes to the clip that it fits best.

    The queries of a mixture with a single target keep their group.
    """
    group_B = batch.group_B.clone()
    for first in torch.nonzero(batch.mixture_G.diff() == 0).flatten().tolist():
        if bool((batch.weight_G[first : first + 2] > 0.0).all()):  # weight 0: queried for consistency only
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
    """Target of each stem, 0 or 1 ``[N]``, with the least loss of all ``2**N`` assignments.

    Raises ``ValueError`` for more than ``MAX_QUERIES`` stems.
    """
    num_stems = len(stems_NT)
    if num_stems > MAX_QUERIES:
        raise ValueError(
            f"a mixture must have at most {MAX_QUERIES} stems to assign, got {num_stems}; assign them by label"
        )
    numbers_K1 = torch.arange(2**num_stems, device=stems_NT.device)[:, None]
    second_KN = (numbers_K1 >> torch.arange(num_stems, device=stems_NT.device)) & 1
    summed_KT = second_KN.to(stems_NT.dtype) @ stems_NT
    sums = (stems_NT.sum(0) - summed_KT, summed_KT)
    losses_K = sum(
        clearsep_losses(estimate=sum_KT, reference=target_T[None].expand_as(sum_KT), mixture=mixture_T[None])
        for sum_KT, target_T in zip(sums, target_2T, strict=True)
    )
    return second_KN[torch.as_tensor(losses_K).argmin()]
