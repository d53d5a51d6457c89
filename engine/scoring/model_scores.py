"""The scores of stems that need a separator or a tagger, all scores together, and the tags of clips.

Shape suffixes: B rows of a batch, S stems of a clip, T samples, L labels of a tagger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import TypedDict

import numpy as np
import torch
import torchaudio
from torch import Tensor

from engine.schema import ClipTags, SeparatedClip, labels_present
from engine.scoring.energies import norm
from engine.scoring.metrics import level_db
from engine.scoring.reseparate import reseparate
from engine.scoring.scores import Scores, score_clip
from engine.separators.batching import BatchedSeparator, pack
from engine.taggers import Tagger, find_label, margin_db, rivals_of, tags_of
from engine.taggers.windows import tag_windows

_NOTHING_DB = -60.0


class _Sizes(TypedDict):
    sample_rate_hz: int
    batch_s: float


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Computes scores of stems, with the separator that made them and a tagger."""

    batched: BatchedSeparator
    """The separator; its rate is that of the clips and stems."""
    tagger: Tagger | None = None
    """Scores ``tagger_margin_db``; None leaves that score out."""
    reseparate: bool = True
    """Separate stems again (``cycle_si_sdr_db`` and ``rival_leak_db``), which takes two separations per stem."""
    seed: int = 0
    """Seed of the remixes."""

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the clips and stems."""
        return self.batched.separator.sample_rate_hz

    @property
    def needs_models(self) -> bool:
        """True if :meth:`model_scores` has any."""
        return self.reseparate or self.tagger is not None

    def assess(self, clips: Sequence[SeparatedClip], positions: Sequence[int] | None = None) -> list[SeparatedClip]:
        """The clips with the scores of :meth:`model_scores`, and those whose labels may move with their tags."""
        positions = range(len(clips)) if positions is None else positions
        some = [clips[number] for number in positions]
        stem_tags, found = self._stem_tags(some), dict[int, ClipTags | None]()
        if self.tagger is not None:
            moving = [place for place, item in enumerate(some) if item.clip.row.get("num_tentative") is not None]
            tags = [stem_tags[place] for place in moving]
            kept = clip_tags([some[place] for place in moving], tags, self.tagger, **self._sizes)
            found = dict(zip(moving, kept, strict=True))
        rows = self._model_scores(clips, positions, stem_tags)
        return [
            replace(item, extra=row, tags=found.get(place))
            for place, (item, row) in enumerate(zip(some, rows, strict=True))
        ]

    def model_scores(
        self, clips: Sequence[SeparatedClip], positions: Sequence[int] | None = None
    ) -> list[list[Scores]]:
        """For every stem of every clip the scores that need a model; only those that are switched on.

        With ``positions`` only for the clips there; the others are what their stems may be remixed with.
        """
        positions = range(len(clips)) if positions is None else positions
        return self._model_scores(clips, positions, self._stem_tags([clips[number] for number in positions]))

    @property
    def _sizes(self) -> _Sizes:
        return {"sample_rate_hz": self.sample_rate_hz, "batch_s": self.batched.size_s}

    def _stem_tags(self, clips: Sequence[SeparatedClip]) -> list[np.ndarray]:
        return stem_tags(clips, self.tagger, **self._sizes) if self.tagger is not None else []

    def _model_scores(
        self, clips: Sequence[SeparatedClip], positions: Sequence[int], tags: Sequence[np.ndarray]
    ) -> list[list[Scores]]:
        some = [clips[number] for number in positions]
        rows: list[list[Scores]] = [[{} for _ in item.labels] for item in some]
        parts = [reseparate(clips, self.batched, seed=self.seed, positions=positions)] if self.reseparate else []
        if self.tagger is not None:
            parts.append(_margins(some, tags, self.tagger.labels))
        for part in parts:
            for row, scores in zip(chain(*rows), chain(*part), strict=True):
                row.update(scores)
        return rows

    def scores(self, clips: Sequence[SeparatedClip]) -> list[list[Scores]]:
        """All scores of every stem of every clip; raises ValueError as ``scores.score_batch`` does."""
        rows = [
            score_clip(mixture_T=item.mixture_T, stems_ST=item.stems_ST, sample_rate_hz=self.sample_rate_hz)
            for item in clips
        ]
        for row, scores in zip(chain(*rows), chain(*self.model_scores(clips)), strict=True):
            row.update(scores)
        return rows


def tagger_margins(
    clips: Sequence[SeparatedClip], tagger: Tagger, *, sample_rate_hz: int, batch_s: float
) -> list[list[Scores]]:
    """``tagger_margin_db`` of every stem: the tag of its label over that of the strongest rival in its clip.

    None for labels that the tagger does not know and for stems that are not finite.
    """
    tags = stem_tags(clips, tagger, sample_rate_hz=sample_rate_hz, batch_s=batch_s)
    return _margins(clips, tags, tagger.labels)


def _margins(clips: Sequence[SeparatedClip], tags: Sequence[np.ndarray], labels: Sequence[str]) -> list[list[Scores]]:
    rows: list[list[Scores]] = [[{"tagger_margin_db": None} for _ in item.labels] for item in clips]
    compared: list[tuple[Scores, np.ndarray, int, list[int]]] = []  # with tags, position of the label and its rivals
    for row, item, tags_SL in zip(rows, clips, tags, strict=True):
        for scores, label, tags_L in zip(row, item.labels, tags_SL, strict=True):
            own, rivals = find_label(label, labels), rivals_of(label, labels_present(item.clip.row), labels)
            if own is not None and rivals and np.isfinite(tags_L).all():
                compared.append((scores, tags_L, own, rivals))
    if compared:
        all_scores, all_tags, owns, all_rivals = zip(*compared, strict=True)
        margins = margin_db(torch.from_numpy(np.stack(all_tags)), owns, all_rivals)
        for scores, margin in zip(all_scores, margins.tolist(), strict=True):
            scores["tagger_margin_db"] = margin
    return rows


def stem_tags(
    clips: Sequence[SeparatedClip], tagger: Tagger, *, sample_rate_hz: int, batch_s: float
) -> list[np.ndarray]:
    """Tags ``[S, L]`` (float32, dB) of the stems of every clip; NaN for a stem that is not finite.

    Raises ``ValueError`` for a tagger whose tags are not finite or of another shape.
    """
    tags = [np.full((len(item.labels), len(tagger.labels)), np.nan, np.float32) for item in clips]
    is_finite = torch.cat([norm(item.stems_ST) for item in clips]).isfinite().tolist() if clips else []
    stems = [(number, stem) for number, item in enumerate(clips) for stem in range(len(item.labels))]
    stems = [place for place, finite in zip(stems, is_finite, strict=True) if finite]
    sizes = [clips[number].stems_ST.shape[1] for number, _ in stems]
    for positions in pack(sizes, batch_samples=max(1, int(batch_s * sample_rate_hz))):
        batch = [stems[i] for i in positions]
        by_length = groupby((clips[number].stems_ST[stem] for number, stem in batch), key=len)
        audio: list[Tensor] = []
        for _, signals in by_length:
            audio += torchaudio.functional.resample(torch.stack([*signals]), sample_rate_hz, tagger.sample_rate_hz)
        for (number, stem), tags_L in zip(batch, tags_of(tagger, audio).numpy(), strict=True):
            tags[number][stem] = tags_L
    return tags


def clip_tags(
    clips: Sequence[SeparatedClip], tags: Sequence[np.ndarray], tagger: Tagger, *, sample_rate_hz: int, batch_s: float
) -> list[ClipTags | None]:
    """The tags of every clip whose stems have ``tags``, with those of its windows and of what its stems leave over.

    A residual more than 60 dB below its clip is what rounding leaves of nothing: it has the tags of silence. None for a
    clip with a stem that is not finite.
    """
    numbers = [number for number, tags_SL in enumerate(tags) if np.isfinite(tags_SL).all()]
    mixtures = [clips[number].mixture_T for number in numbers]
    residuals = [_residual(clips[number]) for number in numbers]
    windows = tag_windows(tagger, [*mixtures, *residuals], sample_rate_hz=sample_rate_hz, batch_s=batch_s)
    found: list[ClipTags | None] = [None] * len(clips)
    for number, mixture, residual in zip(numbers, windows, windows[len(mixtures) :], strict=False):
        found[number] = ClipTags(stems_SL=tags[number], clip_L=mixture.strongest(), residual_L=residual.strongest())
    return found


def _residual(item: SeparatedClip) -> Tensor:
    residual_T = item.mixture_T - item.stems_ST.sum(0)
    is_nothing = level_db(signal=residual_T, reference=item.mixture_T) < _NOTHING_DB
    return torch.where(is_nothing, 0.0, residual_T)
