"""Re-separation: scores of stems from separating them again, remixed with other clips and by rivals' queries.

RemixIT and Self-Remixing train on remixed stems of different clips (Tzinis et al. 2022, arXiv 2202.08862; Saijo & Ogawa
2023, arXiv 2211.10194); here the same remix scores them. If a stem still contains other sounds of its clip, the
separator removes them from the remix, or a rival's query finds them. This takes two separations per stem.

Shape suffixes: S stems of a clip, T samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.schema import SeparatedClip, plain_label
from engine.scoring.energies import MAX_DB, norm
from engine.scoring.metrics import level_db, si_sdr_db
from engine.scoring.scores import Scores
from engine.separators.batching import BatchedSeparator, SeparationRequest

_GAIN_DB = 5.0


def reseparate(
    clips: Sequence[SeparatedClip],
    batched: BatchedSeparator,
    *,
    seed: int = 0,
    positions: Sequence[int] | None = None,
) -> list[list[Scores]]:
    """``cycle_si_sdr_db`` and ``rival_leak_db`` of every stem of every clip, in order; or of those at ``positions``.

    *Cycle*: a stem is remixed with a stem of another of these clips that has none of its labels, at equal energy and a
    random gain of up to 5 dB up or down, and separated by its own query; the score is the SI-SDR of the result against
    the stem. *Leak*: the query of the loudest other stem of the clip is separated from the stem alone; the score is the
    level of the result relative to the stem. None if there is no such other clip or stem, if the separator fails, or if
    the stem is not finite; -100 for a silent stem. The draws depend only on the seed and the clip's id.
    """
    queries: list[SeparationRequest] = []
    targets: list[tuple[int, int, str]] = []  # clip, stem and column of each query
    positions = range(len(clips)) if positions is None else positions
    rows: dict[int, list[Scores]] = {
        number: [{"cycle_si_sdr_db": None, "rival_leak_db": None} for _ in clips[number].labels] for number in positions
    }
    shard = _Shard(clips, seed)
    for number in positions:
        for stem, (energy, _) in enumerate(shard.sounds[number]):
            if energy == 0.0:
                rows[number][stem] = {"cycle_si_sdr_db": -MAX_DB, "rival_leak_db": -MAX_DB}
            elif math.isfinite(energy):
                for column, query in shard.queries(number, stem):
                    queries.append(query)
                    targets.append((number, stem, column))
    results = zip(targets, batched.separate(queries), strict=True)
    done = [(*target, again_T) for target, again_T in results if not isinstance(again_T, Exception)]
    scores = [_score(column, again_T, clips[number].stems_ST[stem]) for number, stem, column, again_T in done]
    for (number, stem, column, _), score in zip(done, torch.stack(scores).tolist() if scores else [], strict=True):
        rows[number][stem][column] = score
    return list(rows.values())


class _Sound(NamedTuple):
    """A stem in numbers, so that the device is waited for once."""

    energy: float
    """NaN or infinity if a sample is not finite."""
    first: float
    """Position of the first sample that is not 0."""


class _Shard:
    """Clips whose stems are remixed with each other."""

    def __init__(self, clips: Sequence[SeparatedClip], seed: int) -> None:
        self._clips, self._seed = clips, seed
        numbers = [
            torch.stack([norm(item.stems_ST).square(), (item.stems_ST != 0).byte().argmax(-1).double()], -1)
            for item in clips
            if item.stems_ST.numel()
        ]
        values = iter(torch.cat(numbers).tolist() if numbers else [])
        self.sounds = [
            [_Sound(*next(values)) if item.stems_ST.numel() else _Sound(0.0, 0.0) for _ in item.labels]
            for item in clips
        ]

    def queries(self, number: int, stem: int) -> Iterator[tuple[str, SeparationRequest]]:
        """The queries that score a stem, with the column of each."""
        item = self._clips[number]
        label, stem_T = item.labels[stem], item.stems_ST[stem]
        partner_T = self._partner(number, label, len(stem_T))
        if partner_T is not None:
            level = norm(stem_T) / norm(partner_T)
            gain = level * 10.0 ** (_rng(self._seed, item, label, "gain").uniform(-_GAIN_DB, _GAIN_DB) / 20.0)
            remix_T = (stem_T + gain * partner_T.double()).float()
            yield "cycle_si_sdr_db", SeparationRequest(samples_T=remix_T, query=label)
        others = [(sound.energy, -place) for place, sound in enumerate(self.sounds[number]) if place != stem]
        if others:
            rival = item.labels[-max(others)[1]]
            yield "rival_leak_db", SeparationRequest(samples_T=stem_T, query=rival)

    def _partner(self, number: int, label: str, num_samples: int) -> Tensor | None:
        """A stem of another clip that shares no label with this one, cut or repeated to length; None if there is none.

        It has sound in the samples that are taken.
        """
        labels_present = {plain_label(name) for name in self._clips[number].clip.row["labels"]}
        order = _rng(self._seed, self._clips[number], label, "partner").permutation(len(self._clips))
        for other in order:
            item = self._clips[other]
            if labels_present.isdisjoint(plain_label(name) for name in item.clip.row["labels"]):
                loud = [
                    stem_T
                    for stem_T, sound in zip(item.stems_ST, self.sounds[other], strict=True)
                    if 0.0 < sound.energy < math.inf and sound.first < num_samples
                ]
                if loud:
                    chosen_T: Tensor = loud[int(order[0]) % len(loud)]
                    repeated_T = chosen_T.repeat(-(-num_samples // len(chosen_T)))
                    return repeated_T[:num_samples]
        return None


def _score(column: str, again_T: Tensor, stem_T: Tensor) -> Tensor:
    if column == "cycle_si_sdr_db":
        return si_sdr_db(estimate=again_T, reference=stem_T).float()
    return level_db(signal=again_T, reference=stem_T).float()


def _rng(seed: int, item: SeparatedClip, *purpose: str) -> np.random.Generator:
    key = "\0".join([item.clip.row["clip_id"], *purpose])
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")])
