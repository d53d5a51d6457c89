"""A batch of training mixtures as tensors.

Shape legend: B queries, G groups of queries that share a target, T samples, L labels, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    rivals: Tensor
    """Rivals that each query names: ones at the positions of their labels ``[B, L]``, or the mean of their embeddings
    ``[B, E]`` for a separator that reads text; zeros for none."""
    pairs: tuple[tuple[Sequence[int], Sequence[int]], ...] = ()
    """Mixtures of two natural clips that are both targets: the numbers of the queries of each clip."""
    query_BE: Tensor | None = None
    """Each query as an embedding, for a separator that reads text."""

    @property
    def query(self) -> Tensor:
        """Each query as the student takes it: an embedding, or else the position of its label."""
        return self.index_B if self.query_BE is None else self.query_BE

    def regroup(self, stems_BT: Tensor, group_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of the stems of each group and mixture of each group, both ``[G, T]``; ``group_B`` replaces the own.

        The mixture of a group is that of its last query: the others have the same one, but for Self-Remixing.
        """
        groups_B = self.group_B if group_B is None else group_B
        summed_GT = torch.zeros_like(self.target_GT).index_add(0, groups_B, stems_BT)
        rows_B = torch.arange(len(self.group_B), device=self.group_B.device)
        last_G = rows_B.new_zeros(len(self.target_GT)).scatter_reduce(0, self.group_B, rows_B, "amax")
        return summed_GT, self.mix_BT[last_G]
