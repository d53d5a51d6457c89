"""Re-separation: scores of stems from separating them again, remixed with other clips and by rivals' queries.

RemixIT and Self-Remixing train on remixed stems of different clips (Tzinis et al. 2022, arXiv 2202.08862; Saijo & Ogawa
2023, arXiv 2211.10194); here the same remix scores them. If a stem still contains other sounds of its clip, the
separator removes them from the remix, or a rival's query finds them. This takes two separations per stem.

Shape suffixes: S stems of a clip, T samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from engine.schema import SeparatedClip, plain_label
from engine.scoring.energies import MAX_DB
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
    stems = [item.stems_ST.cpu().numpy() for item in clips]
    for number in positions:
        for stem, stem_T in enumerate(stems[number]):
            if not np.any(stem_T):
                rows[number][stem] = {"cycle_si_sdr_db": -MAX_DB, "rival_leak_db": -MAX_DB}
                continue
            if not np.isfinite(stem_T).all():
                continue
            for column, query in _queries(clips, stems, number, stem, seed):
                queries.append(query)
                targets.append((number, stem, column))
    for (number, stem, column), again_T in zip(targets, batched.separate(queries), strict=True):
        if not isinstance(again_T, Exception):
            rows[number][stem][column] = _score(column, again_T, clips[number].stems_ST[stem])
    return list(rows.values())


def _queries(
    clips: Sequence[SeparatedClip], stems: Sequence[np.ndarray], number: int, stem: int, seed: int
) -> list[tuple[str, SeparationRequest]]:
    """The queries that score a stem, with the column of each."""
    queries = []
    label, stem_T = clips[number].labels[stem], stems[number][stem]
    partner_T = _partner(clips, stems, number, label, len(stem_T), seed)
    if partner_T is not None:
        level = np.sqrt(np.mean(np.square(stem_T, dtype=np.float64)) / np.mean(np.square(partner_T, dtype=np.float64)))
        gain = level * 10.0 ** (_rng(seed, clips[number], label, "gain").uniform(-_GAIN_DB, _GAIN_DB) / 20.0)
        remix_T = (stem_T + gain * partner_T).astype(np.float32)
        queries.append(("cycle_si_sdr_db", SeparationRequest(samples_T=torch.from_numpy(remix_T), query=label)))
    rival = _rival(clips[number].labels, stems[number], label)
    if rival is not None:
        queries.append(("rival_leak_db", SeparationRequest(samples_T=clips[number].stems_ST[stem], query=rival)))
    return queries


def _partner(
    clips: Sequence[SeparatedClip], stems: Sequence[np.ndarray], number: int, label: str, num_samples: int, seed: int
) -> np.ndarray | None:
    """A stem of another clip that shares no label with this one, cut or repeated to length; None if there is none."""
    labels_present = {plain_label(name) for name in clips[number].clip.row["labels"]}
    order = _rng(seed, clips[number], label, "partner").permutation(len(clips))
    for other in order:
        item = clips[other]
        if labels_present.isdisjoint(plain_label(name) for name in item.clip.row["labels"]):
            loud = [stem_T for stem_T in stems[other] if np.any(stem_T[:num_samples]) and np.isfinite(stem_T).all()]
            if loud:
                return np.resize(loud[int(order[0]) % len(loud)], num_samples)
    return None


def _rival(labels: Sequence[str], stems_ST: np.ndarray, label: str) -> str | None:
    """The other label of a clip whose stem is loudest; None if there is no other stem."""
    energy = {name: float(np.sum(np.square(stem_T))) for name, stem_T in zip(labels, stems_ST, strict=True)}
    others = [name for name in energy if name != label]
    return max(others, key=lambda name: energy[name]) if others else None


def _score(column: str, again_T: torch.Tensor, stem_T: torch.Tensor) -> float:
    if column == "cycle_si_sdr_db":
        return float(si_sdr_db(estimate=again_T, reference=stem_T).float())
    return float(level_db(signal=again_T, reference=stem_T).float())


def _rng(seed: int, item: SeparatedClip, *purpose: str) -> np.random.Generator:
    key = "\0".join([item.clip.row["clip_id"], *purpose])
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")])
