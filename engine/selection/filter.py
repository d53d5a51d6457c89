"""Applies thresholds to stored scores: every stem is kept, or rejected with a reason; opens no audio.

The order is: rules with a number for a limit; rules with a quantile, which is taken over the stems that are left; the
floor of each label, which readmits stems that only rules on the rank rejected; the cap. A score that is undefined (such
as the coherence of an only stem) passes its rule; NaN fails it, and so does a Re-SDR that is undefined because the clip
is too short for it. Verdicts do not depend on the order of the rows.

Shape suffix: N stems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import ESTIMATES, SCORES, plain_label
from engine.selection.thresholds import (
    RULES,
    Quantile,
    Thresholds,
    active_rules,
    compares_labels,
    required_scores,
    score_of,
)

VERDICT = pa.schema(
    [
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("rejected_by", pa.string()),  # no_label, the first rule that failed, or label_cap_ratio
        pa.field("rejected_value", pa.float32()),  # the stem's score in that rule; null: NaN or undefined
        pa.field("rejected_limit", pa.float32()),  # the rule's limit; for the cap: the score of the last stem it kept
        pa.field("kept_by_floor", pa.bool_(), nullable=False),  # rejected by a rule on rank_by, kept by the floor
    ]
)
"""Columns of the verdict on a stem."""

_NO_LABEL = "no_label"  # reason of stems whose label their clip does not have
_REASONS = (*RULES, "label_cap_ratio", _NO_LABEL)
_PAIRED = ("coherence_fraction", "contested_db")  # scores that are undefined for the only stem of a clip
_REQUIRED = ("re_sdr_db",)  # scores that fail their rule if they are undefined: the clip is too short to be judged
_REMEDIES = {
    "cycle_si_sdr_db": "make the pass again with re-separation on (`--set reseparate=true`)",
    "rival_leak_db": "make the pass again with re-separation on (`--set reseparate=true`)",
    "tagger_margin_db": "make the pass again with a tagger (`--tagger DIR`)",
    **dict.fromkeys(ESTIMATES.names, "give an estimator (`clearsep filter --estimator DIR`)"),
}


def require_scores(scores: pa.Table, thresholds: Thresholds, remedies: Mapping[str, str] = _REMEDIES) -> None:
    """Raise ``ValueError`` if the thresholds need a score that no stem of the pass has, although some could.

    ``scores`` has all stems of a pass, with the column ``num_stems`` of their clips, ``remedies`` what gives a score.
    """
    for column, setting in required_scores(thresholds).items():
        stems = scores
        if column in _PAIRED and "num_stems" in scores.column_names:
            stems = scores.filter(pc.greater(scores["num_stems"], 1))
        is_known = column in stems.column_names and (column in _REQUIRED or stems[column].null_count < len(stems))
        if len(stems) and not is_known:
            raise ValueError(_undefined(column, setting, remedies))


def _undefined(column: str, setting: str, remedies: Mapping[str, str] = _REMEDIES) -> str:
    remedy = remedies.get(column, f"make the pass again with a separator and settings that give {column}")
    instead = "choose another rank_by" if setting == "rank_by" else f"remove {setting}"
    return f"cannot apply {setting} (no stem has {column}); {remedy}, or {instead}"


def judge(scores: pa.Table, thresholds: Thresholds, *, has_label_N: np.ndarray | None = None) -> pa.Table:
    """A row of ``VERDICT`` for every row of ``scores``, all stems of a pass.

    Stems where ``has_label_N`` is false are rejected before all rules; null: all clips have the labels of their stems.

    ``scores`` must have the columns of ``thresholds.required_columns``; a missing one is a ``ValueError``. Floor and
    cap break ties by ``clip_id``.
    """
    ledger = _Ledger(len(scores))
    barred = np.flatnonzero(~has_label_N) if has_label_N is not None else np.zeros(0, np.int64)
    ledger.reject(barred, _NO_LABEL, np.nan, np.nan)
    broken_N = np.zeros(len(scores), np.bool_)
    broken_N[barred] = True
    other_N = np.zeros(len(scores), np.bool_)
    rules = sorted(active_rules(thresholds), key=lambda rule: isinstance(rule[1], Quantile))  # numbers first
    standing_N = None
    for rule, limit in rules:
        score = _score(scores, rule, thresholds)
        if isinstance(limit, Quantile):
            standing_N = ledger.standing_N if standing_N is None else standing_N  # before the first quantile
            limit_N = _quantiles(score, standing_N, limit, scores)
        else:
            limit_N = np.full(len(scores), limit, np.float32)
        failed_N = ledger.apply(rule, score, limit_N)
        broken_N |= score.broken_N
        other_N |= failed_N if score_of(rule) != thresholds.rank_by else False
    if compares_labels(thresholds):
        ranking = _ranking(scores, thresholds.rank_by)
        if thresholds.label_floor_fraction is not None:
            _floor(ledger, ranking, other_N | broken_N, thresholds.label_floor_fraction)
        if thresholds.label_cap_ratio is not None:
            _cap(ledger, ranking, thresholds.label_cap_ratio)
    return ledger.verdict()


@dataclass(frozen=True, kw_only=True)
class _Score:
    """A score of all stems, as float32: ``defined_N`` is false for null, ``broken_N`` is true for NaN."""

    values_N: np.ndarray
    defined_N: np.ndarray
    broken_N: np.ndarray


def _score(scores: pa.Table, rule: str, thresholds: Thresholds) -> _Score:
    column = score_of(rule)
    if column == "estimated_si_sdr_db" and thresholds.estimate_confidence != 0.5:
        sigmas = NormalDist().inv_cdf(thresholds.estimate_confidence)
        errors = pc.multiply(_column(scores, "estimated_error_db", "estimate_confidence"), pa.scalar(sigmas))
        bounded = pc.subtract(_column(scores, column, rule), errors)
        return _defined(bounded.cast(pa.float32()))
    values = _column(scores, column, rule)
    return _defined(pc.fill_null(values, math.nan) if column in _REQUIRED else values)


def _column(scores: pa.Table, name: str, setting: str) -> pa.ChunkedArray:
    if name not in scores.column_names:
        if name in SCORES.names or name in ESTIMATES.names:
            raise ValueError(_undefined(name, setting))
        raise ValueError(f"cannot apply {setting} (only the stems of a pass have {name}); remove {setting}")
    return scores[name]


def _defined(column: pa.ChunkedArray) -> _Score:
    values_N = column.to_numpy()
    defined_N = column.is_valid().to_numpy()
    return _Score(values_N=values_N, defined_N=defined_N, broken_N=defined_N & np.isnan(values_N))


class _Ledger:
    """Which stems are rejected so far, with reason, value and limit."""

    def __init__(self, num_stems: int) -> None:
        self._reason_N = np.full(num_stems, -1, np.int8)
        self._value_N = np.full(num_stems, np.nan, np.float32)
        self._limit_N = np.full(num_stems, np.nan, np.float32)
        self._saved_N = np.zeros(num_stems, np.bool_)

    @property
    def standing_N(self) -> np.ndarray:
        """True for stems that are not rejected."""
        standing_N: np.ndarray = self._reason_N < 0
        return standing_N

    def apply(self, rule: str, score: _Score, limit_N: np.ndarray) -> np.ndarray:
        """Reject the standing stems that fail a rule; returns true for all stems that fail it."""
        is_min = rule.startswith("min_")
        passes_N = score.values_N >= limit_N if is_min else score.values_N <= limit_N  # false for NaN
        failed_N: np.ndarray = score.defined_N & ~passes_N
        rows = np.flatnonzero(failed_N & self.standing_N)
        self.reject(rows, rule, score.values_N[rows], limit_N[rows])
        return failed_N

    def reject(self, rows: np.ndarray, reason: str, values: np.ndarray | float, limits: np.ndarray | float) -> None:
        """Mark rows as rejected."""
        self._reason_N[rows] = _REASONS.index(reason)
        self._value_N[rows] = values
        self._limit_N[rows] = limits
        self._saved_N[rows] = False

    def readmit(self, rows: np.ndarray) -> None:
        """Mark rows as kept by the floor."""
        self._reason_N[rows] = -1
        self._saved_N[rows] = True

    def verdict(self) -> pa.Table:
        """The table of ``VERDICT``."""
        kept_N = self.standing_N
        names = pa.array(_REASONS).take(pa.array(self._reason_N, mask=kept_N))
        value = pa.array(self._value_N, mask=kept_N | np.isnan(self._value_N))
        limit = pa.array(self._limit_N, mask=kept_N | np.isnan(self._limit_N))
        return pa.table([pa.array(kept_N), names, value, limit, pa.array(self._saved_N)], schema=VERDICT)


def _codes(scores: pa.Table, setting: str) -> np.ndarray:
    """A number for every stem, equal for equal labels in any spelling."""
    coded = _column(scores, "label", setting).combine_chunks()
    if not pa.types.is_dictionary(coded.type):
        coded = pc.dictionary_encode(coded)
    labels = [plain_label(label) for label in coded.dictionary.to_pylist()]
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    table = np.array([numbers[label] for label in labels], np.int32)
    codes_N: np.ndarray = table[coded.indices.to_numpy()] if labels else np.zeros(0, np.int32)
    return codes_N


def _groups(codes: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Split ``rows`` into groups of equal ``codes``, which are sorted."""
    return iter(np.split(rows, np.flatnonzero(np.diff(codes)) + 1)) if len(rows) else iter(())


def _quantiles(score: _Score, standing_N: np.ndarray, limit: Quantile, scores: pa.Table) -> np.ndarray:
    """The limit of every stem; NaN for a label without a defined score."""
    counted_N = standing_N & score.defined_N & ~score.broken_N
    codes_N = _codes(scores, "by_label") if limit.by_label else np.zeros(len(scores), np.int32)
    limit_N = np.full(len(scores), np.nan, np.float32)
    rows = np.argsort(codes_N, kind="stable")
    for group in _groups(codes_N[rows], rows):
        if (counted := group[counted_N[group]]).size:
            limit_N[group] = np.quantile(score.values_N[counted].astype(np.float64), limit.quantile)
    return limit_N


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """The rows of every label, best first, undefined ranks last, ties by clip; and the ranks of all rows."""

    groups: list[np.ndarray]
    ranks_N: np.ndarray


def _ranking(scores: pa.Table, rank_by: str) -> _Ranking:
    ranks_N = _column(scores, rank_by, "rank_by").to_numpy()  # NaN if undefined
    codes_N = _codes(scores, "label_floor_fraction or label_cap_ratio")
    clips = _column(scores, "clip_id", "label_floor_fraction or label_cap_ratio")
    is_lower_better = f"min_{rank_by}" not in RULES
    worse = pa.array(ranks_N if is_lower_better else -ranks_N, pa.float32(), from_pandas=True)
    keys = pa.table({"label": codes_N, "worse": worse, "clip": clips})
    rows = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]).to_numpy()
    return _Ranking(groups=list(_groups(codes_N[rows], rows)), ranks_N=ranks_N)


def _floor(ledger: _Ledger, ranking: _Ranking, barred_N: np.ndarray, fraction: float) -> None:
    """Readmit the best stems of every label that keeps less than ``fraction`` of its stems that are not barred."""
    kept_N = ledger.standing_N
    for group in ranking.groups:
        eligible = group[~barred_N[group]]
        missing = math.ceil(fraction * len(eligible) - 1e-6) - int(kept_N[eligible].sum())
        rejected = eligible[~kept_N[eligible] & ~np.isnan(ranking.ranks_N[eligible])]
        ledger.readmit(rejected[: max(0, missing)])


def _cap(ledger: _Ledger, ranking: _Ranking, ratio: float) -> None:
    """Reject the worst stems of every label that keeps more than ``ratio`` times the median."""
    kept_N = ledger.standing_N
    kept = [rows for group in ranking.groups if (rows := group[kept_N[group]]).size]
    if not kept:
        return
    most = math.floor(ratio * float(np.median([len(rows) for rows in kept])) + 1e-6)
    for rows in kept:
        if len(rows) > most:
            ranks = ranking.ranks_N[rows]
            ledger.reject(rows[most:], "label_cap_ratio", ranks[most:], float(ranks[most - 1]))
