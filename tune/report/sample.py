"""The clips of a report to listen to: the best and the worst, and those at every limit, so that an ear can judge it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cli.tables import FLOOR
from engine.selection.thresholds import RULES
from tune.report.collect import PassFacts
from tune.report.parts import number_limits, score_text
from tune.report.stems import Numbered, StemRow

_RANKS = ("estimated_si_sdr_db", "share_si_sdr_db", "remix_snr_db", "re_sdr_db", "stem_level_db")
_FAILED = "failed"
_MOST_FAILED = 4  # clips with a label that failed
_ENDS, _AT_LIMIT = 4, 2  # stems of a stratum: at an end of the ranking, at the limit of a rule


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Stems that are in the sample for one reason, the most telling first."""

    reason: str
    places: Sequence[Numbered]


@dataclass(frozen=True, kw_only=True)
class SampledClip:
    """A clip of the sample, with the stems that it is there for and the reason for each."""

    clip_id: str
    path: str
    reasons: Mapping[str, str]
    """Reason by label."""


def strata(one: PassFacts) -> list[Stratum]:
    """The strata of a pass: by the score that ranks its stems, by the rules of its selection, and failed labels."""
    name = _rank(one)
    found = []
    if name:
        kept_N, _ = one.stems.values(name)
        order = np.argsort(kept_N, kind="stable")[: np.isfinite(kept_N).sum()]  # NaN is last
        middle = order[len(order) // 2 :]
        text, _ = score_text(name)
        noun = "kept" if one.stems.is_judged else "of all"
        ends = {f"best {noun} by {text}": order[::-1], f"worst {noun} by {text}": order}
        ends |= {} if one.stems.is_judged else {f"median by {text}": middle}
        found = [
            Stratum(reason=reason, places=[Numbered(True, int(number)) for number in some[:_ENDS]])
            for reason, some in ends.items()
        ]
    failed = [row["clip_id"] for row in one.failed if row["label"] is not None][:_MOST_FAILED]
    places = one.stems.places(failed)
    return [
        *found,
        *(_at_limits(one) if one.stems.is_judged else ()),
        *([Stratum(reason=_FAILED, places=places)] if places else []),
    ]


def _rank(one: PassFacts) -> str:
    """The score that ranks the stems: that of the thresholds if it is defined, else the first that is."""
    own = one.selection["thresholds"].get("rank_by") if one.selection is not None else None
    names = [*([own] if isinstance(own, str) else []), *_RANKS]
    return next((name for name in names if np.isfinite(one.stems.values(name)[0]).any()), "")


def _at_limits(one: PassFacts) -> Iterator[Stratum]:
    """For every rule, the stems that it just rejected and those that it just kept."""
    rules, value_N, limit_N = one.stems.rejections()
    limits = {rule: (name, limit) for name, (rule, limit) in number_limits(one).items()}
    for rule in (*RULES, "label_cap_ratio"):
        numbers = np.flatnonzero(rules == rule)
        near = numbers[np.argsort(np.abs(value_N - limit_N)[numbers], kind="stable")]
        if near.size:
            places = [Numbered(False, int(number)) for number in near[:_AT_LIMIT]]
            yield Stratum(reason=f"just rejected by {rule}", places=places)
    used = set(rules)
    for rule, (name, limit) in limits.items():
        distance_N = np.abs(one.stems.values(name)[0] - limit)
        near = np.argsort(distance_N, kind="stable")[: min(_AT_LIMIT, int(np.isfinite(distance_N).sum()))]
        if near.size and rule in used:
            yield Stratum(reason=f"just kept by {rule}", places=[Numbered(True, int(number)) for number in near])


def draw(one: PassFacts, *, most: int) -> list[SampledClip]:
    """At most ``most`` clips: the first stem of every stratum, then the second, and so on."""
    layers = strata(one)
    order = [
        (stratum.reason, stratum.places[turn])
        for turn in range(max((len(stratum.places) for stratum in layers), default=0))
        for stratum in layers
        if turn < len(stratum.places)
    ]
    rows = one.stems.rows([place for _, place in order])
    found: dict[str, tuple[StemRow, dict[str, str]]] = {}
    for (reason, _), row in zip(order, rows, strict=True):
        if row["clip_id"] in found or len(found) < most:
            _, reasons = found.setdefault(row["clip_id"], (row, {}))
            if reason != _FAILED:  # which is about a label without a stem
                reasons[row["label"]] = f"{reasons[row['label']]}; {reason}" if row["label"] in reasons else reason
    return [
        SampledClip(clip_id=clip_id, path=row["path"], reasons=reasons) for clip_id, (row, reasons) in found.items()
    ]


def verdict_text(row: StemRow, *, is_judged: bool) -> str:
    """The outcome of a stem in words."""
    if not is_judged:
        return ""
    rule = row["rejected_by"]
    if rule is None:
        return f"kept by {FLOOR}" if row["kept_by_floor"] else "kept"
    value, limit = row["rejected_value"], row["rejected_limit"]
    if value is None or limit is None:
        return f"rejected by {rule}"
    return f"rejected by {rule}: {value:.4g}, limit {limit:.4g}"
