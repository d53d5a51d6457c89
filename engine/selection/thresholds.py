"""Thresholds: a limit for every score, and limits on how many stems of each label are kept.

A rule is a field ``min_<score>`` or ``max_<score>``, named after a column of ``schema.SCORES`` or ``schema.ESTIMATES``;
to add a rule, add a field. Its limit is a number, a ``Quantile`` of the pass, or ``None``, which switches the rule off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated

from pydantic import Field

from engine.errors import nearest
from engine.schema import ESTIMATES, SCORES
from engine.settings import Fraction, Number, config


@config
class Quantile:
    """A limit that is computed from the pass: in YAML ``{quantile: 0.4, by_label: true}``.

    It is the quantile, interpolated linearly as by NumPy, of the rule's score over the stems that pass all rules with
    a number for a limit and whose score is defined. It does not depend on other quantiles, the floor or the cap.
    """

    quantile: Fraction
    """Counted from the lowest score: 0.4 in a ``min_`` rule and 0.6 in a ``max_`` rule reject the worst 40 %."""
    by_label: bool = False
    """Take the quantile over the stems of each label, so that all labels lose the same fraction."""


Limit = Number | Quantile | None
"""The limit of a rule; None switches the rule off."""


@config
class Thresholds:
    """Conditions for a stem to become a track; rules are applied in this order.

    Raises ``ValueError`` for an unknown name or a value out of range.

    >>> cs.Thresholds(min_re_sdr_db=10, max_coherence_fraction=0.9).min_re_sdr_db
    10.0
    """

    min_re_sdr_db: Limit = None
    """Reject all stems of a clip if the Re-SDR of their sum is lower (ClearSep uses 10 and 15)."""
    min_re_si_sdr_db: Limit = None
    """Reject all stems of a clip if the Re-SISDR of their sum is lower."""
    min_remix_snr_db: Limit = None
    """Reject all stems of a clip if the plain SNR of their sum is lower; unlike Re-SDR it depends on the gain."""
    min_stem_level_db: Number | None = None
    """Reject a stem that is quieter relative to its mixture: its label is probably absent. Not a quantile."""
    max_stem_level_db: Number | None = None
    """Reject a stem that is louder relative to its mixture. Not a quantile."""
    min_active_fraction: Limit = None
    """Reject a stem that is active for a smaller fraction of its time, 0 to 1."""
    max_coherence_fraction: Limit = None
    """Reject a stem that is more coherent with another stem of its clip, 0 to 1: probably a copy."""
    max_mixture_coherence_fraction: Limit = None
    """Reject a stem that is more coherent with its mixture, 0 to 1: probably nothing was separated."""
    min_mask_snr_db: Limit = None
    """Reject a stem whose SNR, as expected from the masks of its clip's stems, is lower."""
    min_share_si_sdr_db: Limit = None
    """Reject a stem whose SI-SDR against its share of the mixture is lower."""
    max_contested_db: Limit = None
    """Reject a stem if other stems of its clip claim more of its energy."""
    min_cycle_si_sdr_db: Limit = None
    """Reject a stem whose SI-SDR is lower after it is remixed with stems of other clips and separated again."""
    max_rival_leak_db: Limit = None
    """Reject a stem from which the queries of other labels separate more."""
    min_tagger_margin_db: Limit = None
    """Reject a stem whose label has a smaller margin over the strongest rival in the tagger."""
    min_estimated_si_sdr_db: Limit = None
    """Reject a stem whose estimated SI-SDR, at ``estimate_confidence``, is lower."""
    estimate_confidence: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Probability with which the SI-SDR of a stem must exceed ``min_estimated_si_sdr_db``.

    The error of the estimate is taken as Gaussian: the rule compares ``estimated_si_sdr_db - z * estimated_error_db``,
    where z is the Gaussian's quantile of the confidence. At 0.5 this is the estimate itself.
    """
    label_floor_fraction: Fraction | None = None
    """Relax the rules on the ``rank_by`` score for each label until at least this fraction of its stems is kept.

    The fraction is of the label's stems that pass all other rules; a stem that fails one of those is never kept.
    """
    label_cap_ratio: Annotated[Number, Field(ge=1)] | None = None
    """Most stems per label, as a multiple of the median over labels; the worst by ``rank_by`` are rejected.

    The median is over labels that keep a stem, after the floor; the cap may keep fewer stems than the floor asks for.
    """
    drop_label_below: Fraction | None = None
    """Drop a label from a clip if the probability that it sounds there is lower; null: labels stay.

    It is computed from what the tagger and the separator say of the label's stem (``labels`` of a run).
    """
    add_label_from: Fraction | None = None
    """Add a label to a clip if the probability that it sounds there is at least this; null: none is added."""
    event_from: Fraction | None = None
    """Learn from a clip as from a single-source clip if the probability that one label sounds alone there is at least
    this; null: from none."""
    rank_by: str = "estimated_si_sdr_db"
    """Score that floor and cap rank stems by: a higher one is better, unless the score only has a ``max_`` rule."""

    def __post_init__(self) -> None:
        known = [*SCORES.names, *ESTIMATES.names[:1]]
        if self.rank_by not in known:
            raise ValueError(
                f"rank_by must be the name of a score, got {self.rank_by!r}; {nearest(self.rank_by, known)}"
            )


DEFAULT_THRESHOLDS: Mapping[str, float] = {
    "min_remix_snr_db": 7.0,
    "min_stem_level_db": -20.0,
    "max_mixture_coherence_fraction": 0.9995,
    "min_mask_snr_db": 2.0,
    "min_share_si_sdr_db": 4.0,
    "min_tagger_margin_db": 0.0,
    "min_estimated_si_sdr_db": 3.0,
    "label_floor_fraction": 0.5,
}
"""Default thresholds: rules against stems that are no separation at all, then estimated SI-SDR, with a label floor.

The limits were chosen on mixtures of ESC-10's fold 1 and on adversarial stems made of them (``benchmarks/fooling.py``
measures them on other folds). Scores that added nothing to these rules, such as those of re-separation, have no rule.
"""

RULES = tuple(field.name for field in fields(Thresholds) if field.name.startswith(("min_", "max_")))
"""Names of all rules, in order."""


def active_rules(thresholds: Thresholds) -> Iterator[tuple[str, float | Quantile]]:
    """Name and limit of every rule that is switched on, in order."""
    for name in RULES:
        limit = getattr(thresholds, name)
        if limit is not None:
            yield name, limit


def score_of(rule: str) -> str:
    """Name of the score that a rule limits."""
    return rule.partition("_")[2]


def required_scores(thresholds: Thresholds) -> dict[str, str]:
    """Every score that the thresholds need, with the name of the setting that needs it."""
    required = {score_of(name): name for name, _ in active_rules(thresholds)}
    if thresholds.min_estimated_si_sdr_db is not None and thresholds.estimate_confidence != 0.5:
        required["estimated_error_db"] = "estimate_confidence"
    if compares_labels(thresholds):
        required.setdefault(thresholds.rank_by, "rank_by")
    return required


def required_columns(thresholds: Thresholds) -> list[str]:
    """Every column of a pass that the thresholds need: scores, ``label`` and ``clip_id``."""
    by_label = any(isinstance(limit, Quantile) and limit.by_label for _, limit in active_rules(thresholds))
    names = ["label"] if by_label or compares_labels(thresholds) else []
    return [*required_scores(thresholds), *names, *(["clip_id"] if compares_labels(thresholds) else [])]


def moves_labels(thresholds: Thresholds) -> bool:
    """True if labels are dropped or added, or single events are mined by the same evidence."""
    limits = (thresholds.drop_label_below, thresholds.add_label_from, thresholds.event_from)
    return any(limit is not None for limit in limits)


def compares_labels(thresholds: Thresholds) -> bool:
    """True if a floor or a cap is set; they rank the stems of each label."""
    return thresholds.label_floor_fraction is not None or thresholds.label_cap_ratio is not None
