"""Compares two runs: what they gained, kept and cost, label by label, and their verdicts on the same stems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.cli.tables import Table, db_text
from engine.storage.documents import parse_yaml
from tune.report.collect import RunFacts
from tune.report.parts import duration_text, percent, sdri_db
from tune.report.plots import Curve, Plot, lines


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run relative to another."""

    note: str
    plot: Plot | None
    tables: Sequence[Table]


def compare(facts: RunFacts, other: RunFacts) -> Comparison:
    """Compare a run with another; both must have finished an iteration."""
    curves = [
        Curve(name=name, points=_curve(one), is_muted=one is other)
        for name, one in (("this run", facts), ("the other", other))
    ]
    ours, theirs = _validation(facts), _validation(other)
    same = all(ours[name] == theirs[name] for name in ours if name in theirs)  # a version may add settings
    equal = "the same settings" if same else "different settings, so their SDRi is not comparable"
    tables = [_outcomes(facts, other), _labels(facts, other), *_same_stems(facts, other)]
    return Comparison(
        note=f"The other run is {other.folder}. The two were validated with {equal}.",
        plot=lines("SDRi; strong: this run, faint: the other", curves, x_label="iteration (0: the seed)", y_label="dB"),
        tables=[table for table in tables if table.rows],
    )


def _curve(facts: RunFacts) -> list[tuple[float, float]]:
    values = [(float(record["iteration"]), sdri_db(record)) for record in facts.records]
    return [(at, value) for at, value in values if value is not None]


def _validation(facts: RunFacts) -> dict[str, object]:
    """The settings of the validation mixtures, without the places of their files."""
    settings = parse_yaml(facts.config.encode()) if facts.config else None
    found = settings.get("validation") if isinstance(settings, dict) else None
    return {name: value for name, value in found.items() if name != "clips"} if isinstance(found, dict) else {}


def _outcomes(facts: RunFacts, other: RunFacts) -> Table:
    cells = [_outcome(facts), _outcome(other)]
    rows = [[name, cells[0].get(name, ""), cells[1].get(name, "")] for name in {**cells[0], **cells[1]}]
    return Table(title="After the last iteration", columns=["", "this run", "the other"], rows=rows)


def _outcome(facts: RunFacts) -> dict[str, str]:
    curve, last = _curve(facts), facts.passes[-1] if facts.passes else None
    found = {"SDRi dB, seed": f"{curve[0][1]:.2f}", "SDRi dB, last": f"{curve[-1][1]:.2f}"} if curve else {}
    found["iterations"] = str(len(facts.records) - 1)
    if last is not None and last.selection is not None:
        total = last.summary["num_queries"]
        found |= {"queries": f"{total:,}", "failed": f"{last.summary['num_failed']:,}"}
        found |= {"kept": f"{last.selection['num_kept']:,}", "kept %": percent(last.selection["num_kept"], total)}
        found["kept h"] = f"{last.selection['kept_h']:.2f}"
    found["wall time"] = duration_text(sum(record["wall_s"] for record in facts.records))
    return found


def _labels(facts: RunFacts, other: RunFacts) -> Table:
    """SDRi of every label that both runs measured, after their last iterations."""
    ours, theirs = (_by_label(one) for one in (facts, other))
    rows = [
        [label, db_text(ours[label]), db_text(theirs[label]), f"{ours[label] - theirs[label]:+.2f}"]
        for label in ours
        if label in theirs
    ]
    return Table(title="SDRi dB by label", columns=["label", "this run", "the other", "difference"], rows=rows)


def _by_label(facts: RunFacts) -> dict[str, float]:
    validation = facts.records[-1]["validation"]
    return {label: one["sdri_db"] for label, one in validation["by_label"].items()} if validation else {}


def _same_stems(facts: RunFacts, other: RunFacts) -> list[Table]:
    """Verdicts of the last passes on the stems that both have: the same clip and label."""
    if not (facts.passes and other.passes):
        return []
    (our_kept, ours), (their_kept, theirs) = (one.passes[-1].stems.identities() for one in (facts, other))
    both = (our_kept | ours) & (their_kept | theirs)
    counts = {
        "kept by both": len(our_kept & their_kept),
        "kept by this run only": len((our_kept & both) - their_kept),
        "kept by the other only": len((their_kept & both) - our_kept),
        "rejected by both": len(both - our_kept - their_kept),
    }
    rows = [[name, f"{count:,}", percent(count, len(both))] for name, count in counts.items()]
    title = f"Verdicts on the {len(both):,} stems of the same clip and label in both last passes"
    return [Table(title=title, columns=["verdict", "stems", "%"], rows=rows)] if both else []
