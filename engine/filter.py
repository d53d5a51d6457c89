"""Thresholds over stored scores: kept, or rejected with its reason; opens no audio.

A threshold is a field named ``min_<score>`` or ``max_<score>`` after a column of ``schema.SCORES``; to add a rule is to
add a field. ``None`` switches a rule off. A score that is undefined (the coherence of an only stem) passes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import SCORES


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a stem must reach to become a track, in the order in which the rules are asked."""

    min_re_sdr_db: float | None = None
    """Reject the stems of a clip whose sum explains the clip with less than this Re-SDR (ClearSep: 10, 15)."""
    min_re_si_sdr_db: float | None = None
    """The same for Re-SISDR."""
    min_remix_snr_db: float | None = None
    """The same for plain SNR, which also sees a wrong gain."""
    min_stem_level_db: float | None = None
    """Reject a stem that is quieter than this beside its mixture: the label is probably absent."""
    max_stem_level_db: float | None = None
    """Reject a stem that is louder than this beside its mixture."""
    max_coherence_fraction: float | None = None
    """Reject a stem that resembles another stem of its clip more than this, 0 to 1: probably a copy."""

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if name.partition("_")[2] not in SCORES.names:
                raise AssertionError(f"{name} is not min_ or max_ of a score column")
            if limit is not None and not math.isfinite(limit):
                raise ValueError(f"{name} is {limit}; give a finite number, or null to switch the rule off")


VERDICT = pa.schema(
    [
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("rejected_by", pa.string()),  # the first rule that failed
        pa.field("rejected_value", pa.float32()),  # the stem's score there
        pa.field("rejected_limit", pa.float32()),  # the rule's limit
    ]
)


def judge(scores: pa.Table, thresholds: Thresholds) -> pa.Table:
    """A row of ``VERDICT`` for every row of ``scores``, which has the columns of ``schema.SCORES``."""
    num_rows = len(scores)
    undecided = pa.array([True] * num_rows, pa.bool_())
    rejected_by = pa.nulls(num_rows, pa.string())
    value = pa.nulls(num_rows, pa.float32())
    limits = pa.nulls(num_rows, pa.float32())
    for rule, limit in asdict(thresholds).items():
        if limit is None:
            continue
        direction, _, column = rule.partition("_")
        score, bound = scores[column].combine_chunks(), pa.scalar(limit, pa.float32())
        passes = pc.greater_equal(score, bound) if direction == "min" else pc.less_equal(score, bound)  # NaN: neither
        hit = pc.and_(undecided, pc.invert(pc.fill_null(passes, True)))
        rejected_by = pc.if_else(hit, rule, rejected_by)
        value = pc.if_else(hit, score, value)
        limits = pc.if_else(hit, bound, limits)
        undecided = pc.and_(undecided, pc.invert(hit))
    return pa.table([undecided, rejected_by, value, limits], schema=VERDICT)
