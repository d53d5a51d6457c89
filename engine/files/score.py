"""Scores and verdicts for stems in audio files, made by any tool."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch

from engine.audio.decode import MAX_DURATION_S
from engine.audio.decoder import shared_decoder
from engine.passes.separate import unknown_labels
from engine.schema import ESTIMATES, SCORES, ClipRow, DecodedClip, SeparatedClip
from engine.scoring.estimator import SiSdrEstimator, load_estimator
from engine.scoring.model_scores import Scorer, tagger_margins
from engine.scoring.scores import Scores, score_clip
from engine.selection.filter import judge, require_scores
from engine.selection.thresholds import DEFAULT_THRESHOLDS, Quantile, Thresholds, active_rules, score_of
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator
from engine.taggers import Tagger, find_tagger

_LENGTH_TOLERANCE_S = 0.1
_BATCH_S = 80.0
_REMEDIES = {
    "cycle_si_sdr_db": "only a pass has other clips for re-separation",
    "rival_leak_db": "give a separator for re-separation (`--separator NAME`)",
    "tagger_margin_db": "score with a tagger (`--tagger DIR`)",
    **dict.fromkeys(ESTIMATES.names, "give an estimator (`--estimator DIR`)"),
}


class RuleVerdict(TypedDict):
    """The verdict of one rule alone on a stem."""

    passes: bool
    value: float | None
    """The stem's score; None if undefined."""
    limit: float | dict[str, Any]
    """The rule's number, or the fields of its quantile."""


class StemVerdict(TypedDict):
    """Scores of a stem and the verdicts of the thresholds."""

    label: str
    kept: bool
    rejected_by: str | None
    """The first rule that rejects the stem, or ``label_cap_ratio``."""
    rejected_value: float | None
    rejected_limit: float | None
    kept_by_floor: bool
    rules: dict[str, RuleVerdict]
    """Every active rule by name."""
    not_judged: list[str]
    """Default thresholds that could not be applied; empty if rules were given."""
    scores: Scores
    """Every column of ``schema.SCORES``, and with an estimator of ``schema.ESTIMATES``."""


def score_files(
    mixture: str | Path,
    stems: Mapping[str, str | Path],
    thresholds: Thresholds | None = None,
    *,
    separator: Separator | None = None,
    tagger: Tagger | str | os.PathLike[str] | None = None,
    estimator: SiSdrEstimator | str | os.PathLike[str] | None = None,
) -> list[StemVerdict]:
    """Scores of stems in audio files (``{label: path}``), with the verdict of each rule alone and of all together.

    With a ``separator``, scores are computed at its rate, otherwise at the mixture's rate, and the queries of the other
    labels are separated from each stem. There are no other clips for a remix, so ``cycle_si_sdr_db`` is None. Without a
    rule, those of the default thresholds apply whose scores are computed, to each stem by itself. Files may
    differ by 0.1 s in length, because some tools pad them, and are cut to the shortest. ``tagger`` and ``estimator``
    are folders or opened ones. Raises ``ValueError`` for a larger difference, a label that the separator does not know,
    and rules whose score is not computed.

    >>> bell, dog = cs.score_files("mixture.wav", {"bell": "bell.wav", "dog": "dog.wav"})
    >>> bell["label"], bell["kept"], bell["not_judged"]
    ('bell', True, ['min_tagger_margin_db', 'min_estimated_si_sdr_db', 'label_floor_fraction'])
    """
    if isinstance(tagger, (str, os.PathLike)):
        tagger = find_tagger(tagger).with_labels(stems).open()
    if isinstance(estimator, (str, os.PathLike)):
        estimator = load_estimator(estimator)
    rate = separator.sample_rate_hz if separator is not None else shared_decoder().probe(str(mixture)).sample_rate_hz
    item = _read_clip(mixture, stems, rate)
    rows = score_clip(mixture_T=item.mixture_T, stems_ST=item.stems_ST, sample_rate_hz=rate)
    if separator is not None:
        for error in unknown_labels(item.labels, separator).values():
            raise error
        batched = BatchedSeparator(separator=separator, batch_s=_BATCH_S)
        rows = [row | more for row, more in zip(rows, Scorer(batched=batched).model_scores([item])[0], strict=True)]
    if tagger is not None:
        margins = tagger_margins([item], tagger, sample_rate_hz=rate, batch_s=_BATCH_S)[0]
        rows = [row | margin for row, margin in zip(rows, margins, strict=True)]
    scores = pa.Table.from_pylist(rows, schema=SCORES)
    if estimator is not None:
        for name, column in zip(ESTIMATES.names, estimator.estimate(scores).columns, strict=True):
            scores = scores.append_column(ESTIMATES.field(name), column)
    thresholds, not_judged = _with_defaults(thresholds or Thresholds(), scores)
    return _verdicts(item, scores, thresholds, not_judged)


def _with_defaults(thresholds: Thresholds, scores: pa.Table) -> tuple[Thresholds, list[str]]:
    """The thresholds; without a rule, those of the default that some stem has a score for, and the other names."""
    if any(active_rules(thresholds)):
        return thresholds, []
    known = [name for name in scores.column_names if scores[name].null_count < len(scores)]
    judged = {rule: limit for rule, limit in DEFAULT_THRESHOLDS.items() if score_of(rule) in known}
    return replace(thresholds, **cast(Any, judged)), [rule for rule in DEFAULT_THRESHOLDS if rule not in judged]


def _read_clip(mixture: str | Path, stems: Mapping[str, str | Path], rate: int) -> SeparatedClip:
    decoder, paths = shared_decoder(), [str(path) for path in (mixture, *stems.values())]
    max_s = max(MAX_DURATION_S, decoder.probe(paths[0]).duration_s + 1.0)
    audio = [decoder.decode(path, sample_rate_hz=rate, max_duration_s=max_s) for path in paths]
    lengths_s = {path: len(signal_T) / rate for path, signal_T in zip(paths, audio, strict=True)}
    if max(lengths_s.values()) - min(lengths_s.values()) > _LENGTH_TOLERANCE_S:
        lengths = ", ".join(f"{path} {length_s:.2f} s" for path, length_s in lengths_s.items())
        raise ValueError(f"stems must be as long as their mixture, got {lengths}; give stems of this mixture")
    num_samples = min(len(samples_T) for samples_T in audio)
    mixture_T, *stems_T = (samples_T[:num_samples] for samples_T in audio)
    row = ClipRow(clip_id=str(mixture), path=str(mixture), labels=list(stems), start_s=None, end_s=None)
    return SeparatedClip(
        clip=DecodedClip(row=row, samples_T=mixture_T),
        labels=list(stems),
        mixture_T=torch.from_numpy(mixture_T),
        stems_ST=torch.from_numpy(np.stack(stems_T)),
    )


def _verdicts(
    item: SeparatedClip, scores: pa.Table, thresholds: Thresholds, not_judged: list[str]
) -> list[StemVerdict]:
    num_stems, values = len(item.labels), scores.to_pylist()
    identity = {"label": item.labels, "clip_id": [item.clip.row["clip_id"]] * num_stems}
    for name, column in (identity | {"num_stems": [num_stems] * num_stems}).items():
        scores = scores.append_column(name, pa.array(column))
    require_scores(scores, thresholds, _REMEDIES)
    limits: dict[str, Any] = dict(active_rules(thresholds))
    none: dict[str, Any] = dict.fromkeys((*limits, "label_floor_fraction", "label_cap_ratio"))
    alone = {
        name: judge(scores, replace(thresholds, **(none | {name: limit})))["kept"].to_pylist()
        for name, limit in limits.items()
    }
    verdicts = judge(scores, thresholds).to_pylist()
    rows = [
        {
            "label": label,
            **verdict,
            "rules": {
                name: {
                    "passes": kept[number],
                    "value": values[number][score_of(name)],
                    "limit": asdict(limits[name]) if isinstance(limits[name], Quantile) else limits[name],
                }
                for name, kept in alone.items()
            },
            "not_judged": not_judged,
            "scores": values[number],
        }
        for number, (label, verdict) in enumerate(zip(item.labels, verdicts, strict=True))
    ]
    return cast(list[StemVerdict], rows)
