"""The parts of a report of a run: figures at a glance, the flow of the queries, distributions, labels, time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.cli.tables import FLOOR, Table, db_text, limit_text
from engine.schema import plain_label
from engine.selection.thresholds import RULES, score_of
from tune.report.collect import PassFacts, RunFacts
from tune.report.plots import Curve, Plot, histogram, lines
from tune.report.stems import score_names

_NO_LABEL = "no_label"
_UNITS = {"_db": " dB", "_fraction": "", "_ratio": ""}
_ADDRESS = re.compile(r"(\w+://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number at a glance."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FlowRow:
    """An outcome of the queries of a pass, and its place in the bar of all of them, in percent."""

    kind: Literal["all", "failed", "rejected", "kept"]
    name: str
    limit: str
    count: int
    left: float
    width: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class BarPart:
    """A part of a bar, in percent."""

    name: str
    text: str
    width: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """The time of an iteration by what it was spent on."""

    name: str
    wall: Sequence[BarPart]
    """Wall time of the pass, the training and the rest."""
    workers: Sequence[BarPart]
    """Time of all workers of the pass by step."""
    note: str


def score_text(name: str) -> tuple[str, str]:
    """A score's name in words and its unit: ``remix_snr_db`` is "remix SNR" in " dB"."""
    unit = next((ending for ending in _UNITS if name.endswith(ending)), "")
    words = name.removesuffix(unit).split("_")
    text = " ".join(word.upper() if word in ("snr", "sdr", "si", "sdri") else word for word in words)
    text = text.replace("SI SDR", "SI-SDR")
    return f"Re-{text[3:]}" if text.startswith("re S") else text, _UNITS.get(unit, "")


def rule_text(rule: str) -> str:
    """A rule's score in words, without the direction of its limit."""
    return score_text(score_of(rule) if rule in RULES else rule)[0]


def without_secrets(text: str) -> str:
    """Text without what addresses in it may carry: user and password, and a query such as a signature."""
    return _ADDRESS.sub(r"\1\2", text)


def sentence(facts: RunFacts) -> str:
    """The result in plain words."""
    last = facts.passes[-1] if facts.passes else None
    parts = []
    if facts.is_run:
        number = len(facts.records) - 1
        gained = [sdri_db(record) for record in facts.records]
        known = [value for value in gained if value is not None]
        many = f"{number} iteration{'s' if number != 1 else ''}"
        if number and len(known) > 1:
            change = known[-1] - known[0]
            parts.append(
                f"{many} took the separator from {known[0]:.1f} dB to {known[-1]:.1f} dB SDRi, "
                f"{abs(change):.1f} dB {'better' if change >= 0 else 'worse'} than its seed."
            )
        else:
            parts.append(f"{many} {'are' if number != 1 else 'is'} finished." if number else "The seed is ready.")
    if last is not None:
        failed, total = last.summary["num_failed"], last.summary["num_queries"]
        if last.selection is not None:
            kept = last.selection["num_kept"]
            where = f"In {last.name}, " if facts.is_run else ""
            text = f"{where}{kept:,} of {total:,} queries became tracks ({percent(kept, total)})"
        else:
            text = f"{last.summary['num_stems']:,} of {total:,} queries have a stem"
        parts.append(f"{text[0].upper()}{text[1:]}; {'none' if not failed else f'{failed:,}'} failed.")
    return " ".join(parts)


def sdri_db(record: Mapping[str, object]) -> float | None:
    """The validation SDRi of an iteration; null without a validation."""
    validation = record.get("validation")
    return validation["sdri_db"] if isinstance(validation, Mapping) and "sdri_db" in validation else None


def percent(count: float, total: float) -> str:
    """A count as a fraction of a total."""
    fraction = count / total if total else 0.0
    return f"{fraction:.1%}" if 0 < fraction < 0.1 else f"{fraction:.0%}"


def duration_text(seconds: float) -> str:
    """A duration in the unit in which it is read best."""
    for limit, unit_s, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 3600.0:.1f} h"


def _hours(hours: float) -> Mapping[str, str]:
    small = hours < 1.0
    return {"value": f"{hours * 60:.1f}" if small else f"{hours:,.1f}", "unit": "min" if small else "h"}


def glance(facts: RunFacts) -> list[Figure]:
    """The figures at the top."""
    last, figures = facts.passes[-1] if facts.passes else None, []
    known = [value for record in facts.records if (value := sdri_db(record)) is not None]
    if known:
        text = f"seed {known[0]:.2f} dB" if len(known) > 1 else ""
        figures.append(Figure(name="SDRi", value=f"{known[-1]:.2f}", unit="dB", note=text))
        if len(known) > 1:
            figures.append(Figure(name="Gain over the seed", value=f"{known[-1] - known[0]:+.2f}", unit="dB"))
    if last is not None:
        summary = last.summary
        figures.append(
            Figure(name="Natural audio", **_hours(summary["audio_h"]), note=f"{summary['num_clips']:,} clips")
        )
        if last.selection is not None:
            note = f"{last.selection['num_kept']:,} tracks of {summary['num_queries']:,} queries"
            figures.append(Figure(name="Kept", **_hours(last.selection["kept_h"]), note=note))
        failed = sum(one.summary["num_failed"] for one in facts.passes)
        total = sum(one.summary["num_queries"] for one in facts.passes)
        figures.append(Figure(name="Failures", value=f"{failed:,}", note=f"of {total:,} queries"))
    wall_s = sum(record["wall_s"] for record in facts.records) or (last.summary["wall_s"] if last is not None else 0.0)
    number, unit = duration_text(wall_s).split(" ")
    figures.append(Figure(name="Wall time", value=number, unit=unit))
    return figures


def flow(one: PassFacts) -> list[FlowRow]:
    """The queries of a pass, then all that became of them in the order of the rules; counts add up to the first."""
    total = one.summary["num_queries"]
    outcomes: list[tuple[Literal["failed", "rejected", "kept"], str, str, int, str]] = []
    if one.summary["num_failed"]:
        outcomes.append(("failed", "failed", "", one.summary["num_failed"], ""))
    if one.selection is None:
        outcomes.append(("kept", "stems", "", one.summary["num_stems"], ""))
    else:
        counts, limits = one.selection["num_rejected"], one.selection["thresholds"]
        for rule in sorted(counts, key=lambda name: _turn(name, limits)):
            note = "labels that were only tried, or dropped" if rule == _NO_LABEL else ""
            outcomes.append(("rejected", rule, _limit(rule, limits), counts[rule], note))
        by_floor = one.selection.get("num_kept_by_floor", 0)
        note = f"{by_floor:,} of them by {FLOOR}" if by_floor else ""
        outcomes.append(("kept", "kept", "", one.selection["num_kept"], note))
    rows = [FlowRow(kind="all", name="queries", limit="", count=total, left=0.0, width=100.0)]
    place = 100.0
    for kind, name, limit, count, note in outcomes:
        width = 100.0 * count / total if total else 0.0
        place = max(0.0, place - width)
        left, width = round(place, 3), round(width, 3)
        rows.append(FlowRow(kind=kind, name=name, limit=limit, count=count, left=left, width=width, note=note))
    return rows


def _turn(rule: str, limits: Mapping[str, object]) -> tuple[int, int]:
    """The turn of a rule, as :func:`engine.selection.filter.judge` applies them: quantiles are of what numbers left."""
    if rule == _NO_LABEL:
        return 0, 0
    if rule not in RULES:  # the cap of a label
        return 3, 0
    return 2 if isinstance(limits.get(rule), Mapping) else 1, list(RULES).index(rule)


def _limit(rule: str, limits: Mapping[str, object]) -> str:
    limit = limits.get(rule)
    if limit is None:
        return ""
    sign = {"min_": "≥ ", "max_": "≤ "}.get(rule[:4], "")
    return sign + limit_text(limit) if isinstance(limit, (float, int, Mapping)) else ""


def number_limits(one: PassFacts) -> dict[str, tuple[str, float]]:
    """Rule and limit of every score that a number limits, or a quantile over all labels, by the score's name."""
    found: dict[str, tuple[str, float]] = {}
    if one.selection is None:
        return found
    by_rule: dict[str, float] = {}
    if any(isinstance(limit, Mapping) for limit in one.selection["thresholds"].values()):
        rules, _, limits = one.stems.rejections()
        by_rule = {rule: float(limit) for rule, limit in zip(rules, limits, strict=True)}
    for rule, limit in one.selection["thresholds"].items():
        if rule not in RULES or limit is None:
            continue
        if not isinstance(limit, Mapping):
            found[score_of(rule)] = rule, float(limit)
        elif not limit["by_label"] and rule in by_rule:
            found[score_of(rule)] = rule, by_rule[rule]
    return found


def distributions(one: PassFacts) -> tuple[list[Plot], list[Plot]]:
    """Distributions of the scores with a limit, and of the others."""
    limits = number_limits(one)
    ruled: list[Plot] = []
    others: list[Plot] = []
    for name in score_names():
        rule, limit = limits.get(name, ("", None))
        text, unit = score_text(name)
        title = f"{text}{f' ({unit.strip()})' if unit else ''}"
        plot = histogram(title, *one.stems.values(name), limit=limit, rule=rule)
        if plot is not None:
            (ruled if rule else others).append(plot)
    return ruled, others


def labels_table(facts: RunFacts) -> Table | None:
    """Every label: its stems and tracks in the last pass, and its SDRi after every iteration; null without any."""
    last = facts.passes[-1] if facts.passes else None
    counts = last.stems.by_label() if last is not None else {}
    measured = [
        (record["iteration"], record["validation"]["by_label"]) for record in facts.records if record["validation"]
    ]
    spelled = {plain_label(label): label for label in counts}
    labels = sorted({*counts, *(spelled.get(plain_label(name), name) for _, figures in measured for name in figures)})
    if not labels:
        return None
    by_plain = [{plain_label(name): one["sdri_db"] for name, one in figures.items()} for _, figures in measured]
    judged = last is not None and last.stems.is_judged
    rows = []
    for label in labels:
        kept, rejected = counts.get(label, (0, 0))
        values = [figures.get(plain_label(label)) for figures in by_plain]
        cells = [f"{kept + rejected}", *([f"{kept}", percent(kept, kept + rejected)] if judged else [])]
        known = [value for value in values if value is not None]
        gain = [f"{known[-1] - known[0]:+.2f}" if len(known) > 1 else ""] if len(measured) > 1 else []
        rows.append([label, *cells, *map(db_text, values), *gain])
    names = ["SDRi, seed" if number == 0 else f"SDRi, {number}" for number, _ in measured]
    columns = ["label", "stems", *(["kept", "kept %"] if judged else []), *names]
    columns += ["gain"] if len(measured) > 1 else []
    return Table(title="By label", columns=columns, rows=rows)


def learning(facts: RunFacts) -> list[Plot]:
    """SDRi after every iteration, the mean with its confidence and each label, and the losses of the trainings."""
    measured = [(float(record["iteration"]), record["validation"]) for record in facts.records if record["validation"]]
    labels = sorted({label for _, figures in measured for label in figures["by_label"]})[:40]
    bounds = {at: figures.get("confidence_95", {}).get("sdri_db") for at, figures in measured}
    curves = [
        Curve(
            name="mean",
            points=[(at, figures["sdri_db"]) for at, figures in measured],
            bounds={at: (pair[0], pair[1]) for at, pair in bounds.items() if pair},
        )
    ]
    for label in labels:
        some = [(at, figures["by_label"][label]["sdri_db"]) for at, figures in measured if label in figures["by_label"]]
        curves.append(Curve(name=label, points=some, is_muted=True))
    trainings = [("seed", facts.seed_training), *((one.name, one.training) for one in facts.passes)]
    drawn = [(name, training) for name, training in trainings if training is not None and training["curve"]]
    losses = [
        Curve(
            name=name,
            points=[(point["step"], point["loss_db"]) for point in training["curve"] if "loss_db" in point],
            is_muted=number < len(drawn) - 1,
        )
        for number, (name, training) in enumerate(drawn)
    ]
    plots = [
        lines("SDRi on the validation mixtures", curves, x_label="iteration (0: the seed)", y_label="dB"),
        lines("Training loss", losses, x_label="update", y_label="dB, lower is better"),
    ]
    return [plot for plot in plots if plot is not None]


def times(facts: RunFacts) -> Iterator[Times]:
    """The wall time of every iteration, and the time of its pass's workers."""
    for one in facts.passes:
        pass_s = one.summary["wall_s"]
        spent = {"pass": pass_s}
        if one.record is not None:
            training_s = one.training["wall_s"] if one.training is not None else 0.0
            rest_s = max(0.0, one.record["wall_s"] - pass_s - training_s)
            spent |= {"training": training_s, "selection and evaluation": rest_s}
        limit = one.summary.get("limit")
        speed = f"{one.summary['audio_s_per_s']:.0f} s of audio per second."
        advice = f" The limit was {limit['limit']}: {limit['advice']}." if limit else ""
        yield Times(
            name=one.name,
            wall=_segments(spent),
            workers=_segments(one.summary["step_s"]),
            note=speed + advice.replace("..", "."),
        )


def _segments(spent_s: Mapping[str, float]) -> list[BarPart]:
    total_s = sum(spent_s.values()) or 1.0
    return [
        BarPart(
            name=name,
            text=f"{duration_text(some_s)}, {percent(some_s, total_s)}",
            width=round(100 * some_s / total_s, 2),
        )
        for name, some_s in spent_s.items()
        if some_s > 0
    ]
