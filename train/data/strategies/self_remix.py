"""Self-Remixing: natural clips teach by themselves (Saijo & Ogawa 2023, arXiv 2211.10194; from scratch 2309.00376).

The student's moving average separates two natural clips, their stems change places, and the student separates the two
remixes. Its stems, put back together clip by clip, must add up to the clips as they were recorded. So the target is
real sound, however wrong the stems are.

Shape legend: B queries, P queries of some rows, S stems of a clip, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.scoring.sharing import share_mixture
from engine.separators import QuerySeparator
from engine.settings import Fraction, config
from train.capture import half_precision
from train.data.batch import Batch


@config
class SelfRemix:
    """Settings of Self-Remixing."""

    fraction: Fraction = 0.2
    """Fraction of mixtures that are two natural clips, without a common label, whose stems change places. Two clips
    have at most six labels."""


@torch.no_grad()
def self_remixed(batch: Batch, average: QuerySeparator) -> Batch:
    """The batch with remixes of stems in place of its pairs of clips; the targets stay the clips.

    Each clip is divided among its stems. Every other stem of a clip goes into the other remix. The queries name all
    labels: those of the clip in the first separation, those of the remix in the second. If no query of the batch names
    rivals, none does.
    """
    clips = [rows for pair in batch.pairs for rows in pair]
    if not clips:
        return batch
    rows = [row for some in clips for row in some]
    names_rivals = bool(batch.rivals.any())
    rivals = torch.cat([_rivals(batch, some) for some in clips]) * names_rivals
    with half_precision(batch.mix_BT.device):
        stems_PT = average(batch.target_GT[batch.group_B[rows]], batch.query[rows], rivals).float()
    stem_of = dict(zip(rows, stems_PT, strict=True))
    shares: dict[int, Tensor] = {}
    for some in clips:
        parts_ST = share_mixture(
            mixture_T=batch.target_GT[batch.group_B[some[0]]],
            stems_ST=torch.stack([stem_of[row] for row in some]),
            sample_rate_hz=average.sample_rate_hz,
        )
        shares.update(zip(some, parts_ST, strict=True))
    mix_BT, rivals_B = batch.mix_BT.clone(), batch.rivals.clone()
    for first, second in batch.pairs:
        for some in ([*first[::2], *second[1::2]], [*first[1::2], *second[::2]]):
            mix_BT[some] = torch.stack([shares[row] for row in some]).sum(0)
            rivals_B[some] = _rivals(batch, some) * names_rivals
    return replace(batch, mix_BT=mix_BT, rivals=rivals_B)


def _rivals(batch: Batch, rows: Sequence[int]) -> Tensor:
    """The rivals of queries that are in one mixture, as :attr:`Batch.rivals` has them."""
    if batch.query_BE is not None:
        vectors_PE = batch.query_BE[rows]
        return torch.nn.functional.normalize(vectors_PE.sum(0) - vectors_PE)
    ones_PL = torch.nn.functional.one_hot(batch.index_B[rows], batch.rivals.shape[1]).to(batch.rivals)
    return (ones_PL.sum(0) - ones_PL).clamp(max=1.0)
