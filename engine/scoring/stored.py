"""Scores of separated clips as they will be stored, computed where the stems are: on a GPU, of many clips at once.

Shape suffixes: B clips of one length, S a clip's mixture and stems, T samples, N scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.audio.flac import flac24_steps
from engine.schema import ClipRow, ClipTags, SeparatedClip, labels_present
from engine.scoring.energies import is_on_cpu
from engine.scoring.metrics import level_db
from engine.scoring.scores import SAMPLES_AT_ONCE_ON_GPU, Scores, score_rows, score_values


@dataclass(frozen=True, kw_only=True)
class ScoredClip:
    """A clip with the signals and scores that are stored of it; labels that failed are absent."""

    row: ClipRow
    labels: list[str]
    signals_ST: np.ndarray
    """The mixture and the stems: integers of :class:`engine.audio.flac.Steps`, or samples without ``exponents``."""
    exponents: list[int] | None
    """Of each signal; None if the signals are written at another rate than that of the separator."""
    scores: list[Scores]
    """Of each stem."""
    residual_level_db: float
    """Level of the clip minus its stems, relative to the clip."""
    tags: ClipTags | None = None
    """None if they are not stored."""


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Clips with the tensors that leave their device; a GPU may still be at work on them."""

    items: Sequence[SeparatedClip]
    signals_BST: Tensor
    exponents_BS: Tensor | None
    values_BSN: Tensor
    residual_db_B: Tensor

    def clips(self) -> Iterator[ScoredClip | Exception]:
        """Each clip as it is stored, or its error."""
        exponents = [None] * len(self.items) if self.exponents_BS is None else self.exponents_BS.tolist()
        values, residuals_db = self.values_BSN.tolist(), self.residual_db_B.tolist()
        columns = (self.items, self.signals_BST.numpy(), exponents, values, residuals_db)
        for item, signals_ST, exponents_S, values_SN, residual_db in zip(*columns, strict=True):
            if not (rows := score_rows(values_SN)):
                yield ValueError("every sample of a stem must be finite, got NaN or infinity; correct the separator")
                continue
            scores = [{**row, **more} for row, more in zip(rows, item.extra or [{}] * len(rows), strict=True)]
            yield ScoredClip(
                row=item.clip.row,
                labels=item.labels,
                signals_ST=signals_ST,
                exponents=exponents_S,
                scores=scores,
                residual_level_db=residual_db,
                tags=item.tags,
            )


def batches_of(items: Sequence[SeparatedClip]) -> Iterator[list[SeparatedClip]]:
    """The clips in batches to score at once: on a CPU each alone, on a GPU those with as many stems of one length."""
    alike: dict[object, list[SeparatedClip]] = {}
    for number, item in enumerate(items):
        alike.setdefault(number if is_on_cpu(item.stems_ST) else item.stems_ST.shape, []).append(item)
    for group in alike.values():
        size = max(1, SAMPLES_AT_ONCE_ON_GPU // max(1, group[0].stems_ST.numel()))
        yield from (group[first : first + size] for first in range(0, len(group), size))


@torch.no_grad()
def score_together(items: Sequence[SeparatedClip], *, sample_rate_hz: int, as_integers: bool) -> ScoredBatch:
    """Round the stems of clips to what is stored and score them.

    The stems of a clip's labels are scored together; that of a label that is only tried as if it joined them, so that
    it does not change the scores of the others.

    The signals that leave the device are the integers that will be stored, or the samples if ``as_integers`` is false.
    """
    mixtures_BT = torch.stack([item.mixture_T for item in items])
    signals_BST = torch.cat([mixtures_BT[:, None], torch.stack([item.stems_ST for item in items])], 1)
    steps = flac24_steps(signals_BST)
    stored_BST = steps.rounded[:, 1:]
    values_BSN = _values(items, mixtures_BT, stored_BST, sample_rate_hz)
    return ScoredBatch(
        items=items,
        signals_BST=_fetched(steps.integers if as_integers else signals_BST),
        exponents_BS=_fetched(steps.exponents) if as_integers else None,
        values_BSN=_fetched(values_BSN),
        residual_db_B=_fetched(level_db(signal=mixtures_BT - stored_BST.sum(1), reference=mixtures_BT).float()),
    )


def _values(items: Sequence[SeparatedClip], mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> Tensor:
    """The scores ``[B, S, N]`` of every stem, in the company of those of its clip's labels."""
    if not any(item.clip.row.get("num_tentative") for item in items):
        return score_values(mixtures_BT=mixtures_BT, stems_BST=stems_BST, sample_rate_hz=sample_rate_hz)
    values: dict[tuple[int, int], Tensor] = {}
    groups: dict[int, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}  # by size: clip, stems, those it scores
    for clip, item in enumerate(items):
        present = labels_present(item.clip.row)
        company = tuple(stem for stem, label in enumerate(item.labels) if label in present)
        if company:
            groups.setdefault(len(company), []).append((clip, company, company))
        for stem in (stem for stem, label in enumerate(item.labels) if label not in present):
            groups.setdefault(len(company) + 1, []).append((clip, (*company, stem), (stem,)))
    for group in groups.values():
        mixtures = mixtures_BT[[clip for clip, _, _ in group]]
        stems = torch.stack([stems_BST[clip, list(together)] for clip, together, _ in group])
        scored = score_values(mixtures_BT=mixtures, stems_BST=stems, sample_rate_hz=sample_rate_hz)
        for (clip, together, wanted), values_SN in zip(group, scored, strict=True):
            values |= {(clip, stem): values_SN[together.index(stem)] for stem in wanted}
    rows = range(stems_BST.shape[1])
    return torch.stack([torch.stack([values[clip, stem] for stem in rows]) for clip in range(len(items))])


def _fetched(tensor: Tensor) -> Tensor:
    """The tensor in CPU memory; its values are there when the device has been waited for."""
    if is_on_cpu(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
