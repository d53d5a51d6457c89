"""What the filter is asked for: a limit for every score, and what every label keeps.

A rule is a field ``min_<score>`` or ``max_<score>`` after a column of ``schema.SCORES`` or ``schema.ESTIMATES``; to add
a rule is to add a field. Its limit is a number, a ``Quantile`` of the pass, or ``None``, which switches the rule off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from engine.schema import ESTIMATES, SCORES

_LEVELS = ("min_stem_level_db", "max_stem_level_db")


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A limit that the pass itself sets: in YAML ``{quantile: 0.4, by_label: true}``.

    It is the quantile, interpolated linearly as NumPy does, of the rule's score over the stems that all rules with a
    number for a limit leave standing and whose score is defined. Quantiles see neither one another nor floor and cap.
    """

    quantile: float
    """0 to 1 from the lowest score up: ``min_``: 0.4 rejects the worst 40 %; ``max_``: 0.6 rejects the worst 40 %."""
    by_label: bool = False
    """Take the quantile over the stems of the same label, so that each label loses the same share."""

    def __post_init__(self) -> None:
        if not _is_number(self.quantile) or not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"quantile is {self.quantile!r}; it is a share from 0 to 1, such as 0.4")
        if not isinstance(self.by_label, bool):
            raise ValueError(f"by_label is {self.by_label!r}; it is true or false")


Limit = float | Quantile | None


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a stem must reach to become a track, in the order in which the rules are asked."""

    min_re_sdr_db: Limit = None
    """Reject the stems of a clip whose sum explains the clip with less than this Re-SDR (ClearSep: 10, 15)."""
    min_re_si_sdr_db: Limit = None
    """The same for Re-SISDR."""
    min_remix_snr_db: Limit = None
    """The same for plain SNR, which also sees a wrong gain."""
    min_stem_level_db: float | None = None
    """Reject a stem that is quieter than this beside its mixture: the label is probably absent. A number only."""
    max_stem_level_db: float | None = None
    """Reject a stem that is louder than this beside its mixture. A number only."""
    min_active_fraction: Limit = None
    """Reject a stem that is active for less than this share of its time, 0 to 1."""
    max_coherence_fraction: Limit = None
    """Reject a stem that resembles another stem of its clip more than this, 0 to 1: probably a copy."""
    max_mixture_coherence_fraction: Limit = None
    """Reject a stem that resembles its mixture more than this, 0 to 1: probably nothing was separated."""
    min_mask_snr_db: Limit = None
    """Reject a stem of which its clip's masks expect less than this."""
    min_share_si_sdr_db: Limit = None
    """Reject a stem that differs more than this from its share of the clip."""
    max_contested_db: Limit = None
    """Reject a stem of which the other stems of its clip claim more than this."""
    min_cycle_si_sdr_db: Limit = None
    """Reject a stem that is found again with less than this after a remix with tracks of other clips."""
    max_rival_leak_db: Limit = None
    """Reject a stem out of which the rivals' queries pull more than this."""
    min_tagger_margin_db: Limit = None
    """Reject a stem that the tagger hears as its label by less than this over the strongest rival."""
    min_estimated_si_sdr_db: Limit = None
    """Reject a stem whose estimated SI-SDR, held to ``estimate_confidence``, is below this."""
    estimate_confidence: float = 0.5
    """Keep by ``min_estimated_si_sdr_db`` only what exceeds its limit with at least this probability, between 0 and 1.

    Under a Gaussian about the estimate with its error: the value of the rule is ``estimated_si_sdr_db - z *
    estimated_error_db``, where z is the Gaussian's quantile of the confidence. At 0.5 it is the estimate itself.
    """
    label_floor_fraction: float | None = None
    """Lower the rules on the ``rank_by`` score for each label until at least this share of its stems is kept, 0 to 1.

    The share is of the label's stems that pass all other rules; what fails one of those never comes back.
    """
    label_cap_ratio: float | None = None
    """No label keeps more than this times the median of what labels keep, 1 or more: the worst by ``rank_by`` go.

    Counted over the labels that keep a stem, after the floor, which a cap may undercut.
    """
    rank_by: str = "estimated_si_sdr_db"
    """The score by which floor and cap call a stem better: higher, unless its only rule is a ``max_``."""

    def __post_init__(self) -> None:
        for name, limit in rules(self):
            if not isinstance(limit, Quantile) and not _is_finite(limit):
                raise ValueError(f"{name} is {limit!r}; give a finite number, a quantile, or null to switch it off")
            if isinstance(limit, Quantile) and name in _LEVELS:
                raise ValueError(f"{name} is {limit}; it takes a number only, or every pass would have absent labels")
        if not _is_number(self.estimate_confidence) or not 0.0 < self.estimate_confidence < 1.0:
            raise ValueError(
                f"estimate_confidence is {self.estimate_confidence!r}; give a number between 0 and 1, "
                "such as 0.5 for the estimate itself"
            )
        floor, cap = self.label_floor_fraction, self.label_cap_ratio
        if floor is not None and (not _is_number(floor) or not 0.0 <= floor <= 1.0):
            raise ValueError(f"label_floor_fraction is {floor!r}; it is a share from 0 to 1, or null for none")
        if cap is not None and (not _is_finite(cap) or cap < 1.0):
            raise ValueError(f"label_cap_ratio is {cap!r}; give a number of at least 1, or null for none")
        known = [*SCORES.names, *ESTIMATES.names[:1]]
        if self.rank_by not in known:
            raise ValueError(f"rank_by is {self.rank_by!r}; it is a score: {', '.join(known)}")


RULES = tuple(field.name for field in fields(Thresholds) if field.name.startswith(("min_", "max_")))
"""Every rule, in order."""


def rules(thresholds: Thresholds) -> Iterator[tuple[str, float | Quantile]]:
    """Name and limit of every rule that is on, in order."""
    for name in RULES:
        limit = getattr(thresholds, name)
        if limit is not None:
            yield name, limit


def column_of(rule: str) -> str:
    """The score that a rule looks at."""
    return rule.partition("_")[2]


def scores_asked(thresholds: Thresholds) -> dict[str, str]:
    """Every score column that the thresholds look at, with the setting that asks for it."""
    asked = {column_of(name): name for name, _ in rules(thresholds)}
    if thresholds.min_estimated_si_sdr_db is not None and thresholds.estimate_confidence != 0.5:
        asked["estimated_error_db"] = "estimate_confidence"
    if per_label(thresholds):
        asked.setdefault(thresholds.rank_by, "rank_by")
    return asked


def columns_asked(thresholds: Thresholds) -> list[str]:
    """Every column of a pass that the thresholds look at: scores, ``label`` and ``clip_id``."""
    by_label = any(isinstance(limit, Quantile) and limit.by_label for _, limit in rules(thresholds))
    names = ["label"] if by_label or per_label(thresholds) else []
    return [*scores_asked(thresholds), *names, *(["clip_id"] if per_label(thresholds) else [])]


def per_label(thresholds: Thresholds) -> bool:
    """Whether a floor or a cap is on, which compare the stems of a label."""
    return thresholds.label_floor_fraction is not None or thresholds.label_cap_ratio is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
