"""Ablation: mixture consistency, the loss of the sum of all stems against the mixture.

Shape legend: B queries, G groups of queries, M mixtures, T samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.settings import NonNegative, config
from train.data.batch import Batch
from train.data.drawn import Target, TrainingMixture
from train.data.mixer import Mixer
from train.losses import clearsep_losses


@config
class Consistency:
    """Settings of mixture consistency."""

    weight: NonNegative = 0.5
    """Weight of the consistency loss relative to the loss of the targets."""


class ConsistencyMixer(Mixer):
    """Queries natural clips for all their labels, so that the stems should add up to the clip."""

    def clip(self, rng: np.random.Generator) -> TrainingMixture:
        made = super().clip(rng)
        (target,) = made.targets
        rest = tuple(sorted(made.labels_present.difference(target.labels)))
        is_complete = set(rest).issubset(self.labels)
        if not is_complete or not rest:
            return replace(made, is_complete=is_complete)
        others = Target(labels=rest, crops=made.crops, minus=target.crops, weight=0.0)
        return replace(made, targets=(target, others), is_complete=is_complete)


def with_consistency(loss: Callable[[Batch, Tensor], Tensor], weight: float) -> Callable[[Batch, Tensor], Tensor]:
    """A loss plus the weighted consistency loss."""
    return lambda batch, stems_BT: loss(batch, stems_BT) + weight * consistency_loss(batch, stems_BT)


def consistency_loss(batch: Batch, stems_BT: Tensor) -> Tensor:
    """Loss of the sum of all stems of a mixture against the mixture; mixtures that are not complete contribute 0.

    The mean is over all mixtures, so a mixture weighs as much as its target (mixture consistency of Wisdom et al. 2019,
    here as a loss and not as a projection).
    """
    num_mixtures = int(batch.mixture_G.max()) + 1
    mixture_B = batch.mixture_G[batch.group_B]
    empty_MT = batch.target_GT.new_zeros(num_mixtures, batch.target_GT.shape[-1])
    summed_MT = empty_MT.index_add(0, mixture_B, stems_BT)
    mix_MT = empty_MT.index_copy(0, mixture_B, batch.mix_BT)
    complete_M = torch.zeros_like(mix_MT[:, 0]).index_copy(0, batch.mixture_G, batch.is_complete_G.to(mix_MT.dtype))
    losses_M = clearsep_losses(estimate=summed_MT, reference=mix_MT, mixture=mix_MT)
    return (complete_M * losses_M).sum() / num_mixtures
