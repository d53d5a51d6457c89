"""Training mixtures with their targets, and the batch of tensors that they become.

Shape legend: B queries, G groups of queries that share a target, T samples, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Target:
    """Queries whose stems should add up to one signal."""

    labels: tuple[str, ...]
    """One query each."""
    target_T: np.ndarray
    """The signal, float32."""
    weight: float = 1.0
    """Weight in the loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingMixture:
    """A mixture and its targets."""

    mix_T: np.ndarray
    """The mixture, float32."""
    labels_present: frozenset[str]
    """Every label that may sound in the mixture."""
    targets: tuple[Target, ...]
    """What the student learns from it."""
    is_complete: bool = False
    """True if the targets add up to the mixture."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Queries of mixtures; the stems of a group's queries add up to the group's target.

    Most groups have one query. A natural clip as a target has one query for each of its labels.
    """

    mix_BT: Tensor
    """Mixture of each query."""
    index_B: Tensor
    """Each query, as the position of its label in the separator's labels."""
    group_B: Tensor
    """Group of each query."""
    target_GT: Tensor
    """Target of each group."""
    weight_G: Tensor
    """Weight of each group in the loss; the mean is 1."""
    mixture_G: Tensor
    """Number of the mixture that each group belongs to, counted from 0."""
    is_complete_G: Tensor
    """True if the targets of that mixture add up to it."""
    query_BE: Tensor | None = None
    """Each query as an embedding, for a separator that reads text."""

    @property
    def query(self) -> Tensor:
        """Each query as the student takes it: an embedding, or else the position of its label."""
        return self.index_B if self.query_BE is None else self.query_BE

    def regroup(self, stems_BT: Tensor, group_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of the stems of each group and mixture of each group, both ``[G, T]``; ``group_B`` replaces the own."""
        groups_B = self.group_B if group_B is None else group_B
        summed_GT = torch.zeros_like(self.target_GT).index_add(0, groups_B, stems_BT)
        mix_GT = torch.zeros_like(self.target_GT).index_copy(0, self.group_B, self.mix_BT)
        return summed_GT, mix_GT

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items() if value is not None})


def collate(mixtures: Sequence[TrainingMixture], labels: Sequence[str]) -> Batch:
    """The batch of some mixtures for a separator of these labels."""
    groups = [(number, target) for number, mixture in enumerate(mixtures) for target in mixture.targets]
    mixture_G = torch.tensor([number for number, _ in groups])
    group_B = torch.tensor([group for group, (_, target) in enumerate(groups) for _ in target.labels])
    weight_G = np.array([target.weight for _, target in groups])
    return Batch(
        mix_BT=torch.from_numpy(np.stack([mixture.mix_T for mixture in mixtures]))[mixture_G[group_B]],
        index_B=torch.tensor([labels.index(label) for _, target in groups for label in target.labels]),
        group_B=group_B,
        target_GT=torch.from_numpy(np.stack([target.target_T for _, target in groups])),
        weight_G=torch.from_numpy(weight_G / weight_G.mean()).float(),
        mixture_G=mixture_G,
        is_complete_G=torch.tensor([mixtures[number].is_complete for number, _ in groups]),
    )
