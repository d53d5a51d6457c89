"""The scores of stems that need a separator or a tagger, and all scores together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torchaudio
from torch import Tensor

from engine.schema import SeparatedClip
from engine.scoring.energies import norm
from engine.scoring.reseparate import reseparate
from engine.scoring.scores import Scores, score_clip
from engine.separators.batching import BatchedSeparator, pack
from engine.taggers import Tagger, find_label, margin_db, rivals_of


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

    def model_scores(
        self, clips: Sequence[SeparatedClip], positions: Sequence[int] | None = None
    ) -> list[list[Scores]]:
        """For every stem of every clip the scores that need a model; only those that are switched on.

        With ``positions`` only for the clips there; the others are what their stems may be remixed with.
        """
        positions = range(len(clips)) if positions is None else positions
        some = [clips[number] for number in positions]
        rows: list[list[Scores]] = [[{} for _ in item.labels] for item in some]
        parts = [reseparate(clips, self.batched, seed=self.seed, positions=positions)] if self.reseparate else []
        if self.tagger is not None:
            rate, batch_s = self.sample_rate_hz, self.batched.size_s
            parts.append(tagger_margins(some, self.tagger, sample_rate_hz=rate, batch_s=batch_s))
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
    rows: list[list[Scores]] = [[{"tagger_margin_db": None} for _ in item.labels] for item in clips]
    stems: list[tuple[int, int, int, list[int]]] = []  # clip, stem, and positions of its label and its rivals
    is_finite = iter(torch.cat([norm(item.stems_ST) for item in clips]).isfinite().tolist() if clips else [])
    for number, item in enumerate(clips):
        for stem, label in enumerate(item.labels):
            own, rivals = find_label(label, tagger.labels), rivals_of(label, item.clip.row["labels"], tagger.labels)
            if next(is_finite) and own is not None and rivals:
                stems.append((number, stem, own, rivals))
    sizes = [clips[number].stems_ST.shape[1] for number, *_ in stems]
    for positions in pack(sizes, batch_samples=max(1, int(batch_s * sample_rate_hz))):
        batch = [stems[i] for i in positions]
        by_length = groupby((clips[number].stems_ST[stem] for number, stem, *_ in batch), key=len)
        audio: list[Tensor] = []
        for _, signals in by_length:
            audio += torchaudio.functional.resample(torch.stack([*signals]), sample_rate_hz, tagger.sample_rate_hz)
        padded_BT = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
        tags_BL = tagger.tag(padded_BT, lengths=[len(one) for one in audio]).cpu()
        margins = margin_db(tags_BL, [own for _, _, own, _ in batch], [rivals for *_, rivals in batch])
        for (number, stem, *_), margin in zip(batch, margins.tolist(), strict=True):
            rows[number][stem]["tagger_margin_db"] = margin
    return rows
