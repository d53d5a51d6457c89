"""All scores of separated clips: those of score.py, and those that take a separator or a tagger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

from engine.schema import SeparatedClip
from engine.scoring.reseparate import Columns, reseparate
from engine.scoring.scores import Scores, score_clip
from engine.separators.batching import BatchedSeparator, pack
from engine.taggers import Tagger, find_label, margin_db, rivals_of


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What judges stems beside their clip."""

    batched: BatchedSeparator
    tagger: Tagger | None = None
    reseparate: bool = True
    """Whether to separate stems again, two forward passes a stem."""
    seed: int = 0
    """Of the remixes."""

    @property
    def rate_hz(self) -> int:
        """Of the clips and stems."""
        return self.batched.separator.sample_rate_hz

    def extra(self, clips: Sequence[SeparatedClip]) -> list[list[Columns]]:
        """Of every stem of every clip the scores that take a model, only those that are switched on."""
        rows: list[list[Columns]] = [[{} for _ in item.labels] for item in clips]
        parts = [reseparate(clips, self.batched, seed=self.seed)] if self.reseparate else []
        parts += (
            [tagger_margins(clips, self.tagger, sample_rate_hz=self.rate_hz, batch_s=self.batched.batch_s)]
            if self.tagger is not None
            else []
        )
        for part in parts:
            for clip, found in zip(rows, part, strict=True):
                for row, columns in zip(clip, found, strict=True):
                    row.update(columns)
        return rows

    def scores(self, clips: Sequence[SeparatedClip]) -> list[list[Scores]]:
        """All scores of every stem of every clip; raises as `score.score_batch` does."""
        found = [
            score_clip(
                mixture_T=torch.from_numpy(item.clip.samples_T.copy()),
                stems_ST=torch.from_numpy(item.stems_ST),
                sample_rate_hz=self.rate_hz,
            )
            for item in clips
        ]
        return [
            [row | more for row, more in zip(rows, extra, strict=True)]
            for rows, extra in zip(found, self.extra(clips), strict=True)
        ]


def tagger_margins(
    clips: Sequence[SeparatedClip], tagger: Tagger, *, sample_rate_hz: int, batch_s: float
) -> list[list[Columns]]:
    """``tagger_margin_db`` of every stem: its label over the strongest rival of its clip.

    None for unknown labels and for stems that are not finite.
    """
    rows: list[list[Columns]] = [[{"tagger_margin_db": None} for _ in item.labels] for item in clips]
    known = [
        (number, stem)
        for number, item in enumerate(clips)
        for stem, label in enumerate(item.labels)
        if find_label(label, tagger.labels) is not None
        and rivals_of(label, item.clip.row["labels"], tagger.labels)
        and np.isfinite(item.stems_ST[stem]).all()
    ]
    sizes = [clips[number].stems_ST.shape[1] for number, _ in known]
    for positions in pack(sizes, batch_samples=max(1, int(batch_s * sample_rate_hz))):
        batch = [known[i] for i in positions]
        audio = [torch.from_numpy(clips[number].stems_ST[stem].copy()) for number, stem in batch]
        if sample_rate_hz != tagger.sample_rate_hz:
            audio = [torchaudio.functional.resample(one, sample_rate_hz, tagger.sample_rate_hz) for one in audio]
        tags_BL = tagger.tag(
            torch.nn.utils.rnn.pad_sequence(audio, batch_first=True), lengths=[len(one) for one in audio]
        ).cpu()
        pairs = [(clips[number].labels[stem], clips[number].clip.row["labels"]) for number, stem in batch]
        own = [find_label(label, tagger.labels) for label, _ in pairs]
        rivals = [rivals_of(label, labels_present, tagger.labels) for label, labels_present in pairs]
        margins = margin_db(tags_BL, [place for place in own if place is not None], rivals)
        for (number, stem), margin in zip(batch, margins.tolist(), strict=True):
            rows[number][stem]["tagger_margin_db"] = margin
    return rows
