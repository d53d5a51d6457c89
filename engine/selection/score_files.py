"""Scores and verdict of stems that lie in audio files, whoever made them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.audio.decode import MAX_DURATION_S, decode, probe
from engine.schema import SCORES, DecodedClip, SeparatedClip
from engine.scoring.estimator import SiSdrEstimator
from engine.scoring.model_scores import Scorer, tagger_margins
from engine.scoring.scores import score_clip
from engine.selection.filter import judge, require_scores
from engine.selection.thresholds import Quantile, Thresholds, column_of, rules
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator
from engine.taggers import Tagger

_LENGTH_TOLERANCE_S = 0.1
_BATCH_S = 80.0


def score_files(
    mixture: str | Path,
    stems: dict[str, str],
    thresholds: Thresholds,
    *,
    separator: Separator | None = None,
    tagger: Tagger | None = None,
    quality: SiSdrEstimator | None = None,
) -> list[dict[str, Any]]:
    """Scores of stems in audio files (``{label: path}``), what each rule says of them, and the verdict.

    With a ``separator`` the scores are at its rate, else at the mixture's, and its queries are asked what they find in
    each stem; there are no other clips to remix with, so ``cycle_si_sdr_db`` stays None. Files may differ by 0.1 s in
    length, as tools that pad do, and are cut to the shortest. Beyond, for labels that the separator does not know, and
    for rules that ask for a score without what makes it: ``ValueError``.
    """
    rate = separator.sample_rate_hz if separator is not None else probe(mixture).sample_rate_hz
    item = _clip(mixture, stems, rate)
    rows = score_clip(
        mixture_T=torch.from_numpy(item.clip.samples_T), stems_ST=torch.from_numpy(item.stems_ST), sample_rate_hz=rate
    )
    if separator is not None:
        separator.separate(torch.zeros(len(stems), 0), item.labels)  # says which label it does not know
        batched = BatchedSeparator(separator=separator, batch_s=_BATCH_S)
        rows = [row | more for row, more in zip(rows, Scorer(batched=batched).extra([item])[0], strict=True)]
    if tagger is not None:
        margins = tagger_margins([item], tagger, sample_rate_hz=rate, batch_s=_BATCH_S)[0]
        rows = [row | margin for row, margin in zip(rows, margins, strict=True)]
    return _verdicts(item, pa.Table.from_pylist(rows, schema=SCORES), thresholds, quality)


def _clip(mixture: str | Path, stems: dict[str, str], rate: int) -> SeparatedClip:
    longest_s = max(MAX_DURATION_S, probe(mixture).duration_s + 1.0)
    paths = (mixture, *stems.values())
    audio = [decode(path, sample_rate_hz=rate, max_duration_s=longest_s) for path in paths]
    lengths_s = {str(path): len(signal_T) / rate for path, signal_T in zip(paths, audio, strict=True)}
    if max(lengths_s.values()) - min(lengths_s.values()) > _LENGTH_TOLERANCE_S:
        told = ", ".join(f"{path} {length_s:.2f} s" for path, length_s in lengths_s.items())
        raise ValueError(f"stems are as long as their mixture, these are not: {told}; give stems of this mixture")
    num_samples = min(len(samples_T) for samples_T in audio)
    mixture_T, *stems_T = (samples_T[:num_samples] for samples_T in audio)
    row = {"clip_id": str(mixture), "path": str(mixture), "labels": list(stems), "start_s": None, "end_s": None}
    return SeparatedClip(clip=DecodedClip(row=row, samples_T=mixture_T), labels=list(stems), stems_ST=np.stack(stems_T))


def _verdicts(
    item: SeparatedClip, scores: pa.Table, thresholds: Thresholds, quality: SiSdrEstimator | None
) -> list[dict[str, Any]]:
    if quality is not None:
        estimates = quality.estimate(scores)
        scores = pa.table({name: table[name] for table in (scores, estimates) for name in table.column_names})
    shown = scores.to_pylist()
    for name, values in (
        ("label", item.labels),
        ("clip_id", [item.clip.row["clip_id"]] * len(shown)),
        ("num_stems", [len(shown)] * len(shown)),
    ):
        scores = scores.append_column(name, pa.array(values))
    require_scores(scores, thresholds)
    on: dict[str, Any] = dict(rules(thresholds))
    off: dict[str, Any] = dict.fromkeys((*on, "label_floor_fraction", "label_cap_ratio"))
    said = {name: judge(scores, replace(thresholds, **(off | {name: limit}))).to_pylist() for name, limit in on.items()}
    verdicts = judge(scores, thresholds).to_pylist()
    return [
        {
            "label": label,
            **verdict,
            "rules": {
                name: {
                    "passes": rows[number]["kept"],
                    "value": shown[number][column_of(name)],
                    "limit": _limit(on[name]),
                }
                for name, rows in said.items()
            },
            "scores": shown[number],
        }
        for number, (label, verdict) in enumerate(zip(item.labels, verdicts, strict=True))
    ]


def _limit(limit: float | Quantile) -> float | dict[str, Any]:
    return asdict(limit) if isinstance(limit, Quantile) else limit
