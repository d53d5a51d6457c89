"""Results of a search: the table of its trials, the verdict on the winner, the saving by sharing, the Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from typing_extensions import TypedDict

from engine.storage.files import write_parquet
from engine.storage.paths import Location


class TrialReport(TypedDict):
    """Report of a trial after an iteration; null for what is unknown."""

    iteration: int
    sdri_db: float | None
    """On the mixtures by which schedules are chosen."""
    si_sdri_db: float | None
    confirmed_sdri_db: float | None
    """On mixtures by which nothing is chosen; only for repeats."""
    kept_h: float | None
    num_kept: int | None
    num_stems: int | None
    estimated_si_sdr_db: float | None
    """Mean over the kept stems, a substitute for the precision of the thresholds."""
    cost_s: float | None
    """Time that all iterations so far would take without shared artifacts."""
    built_s: float | None
    """Time that this trial spent on building artifacts so far."""
    artifacts: list[str]
    """Shared artifacts of all iterations so far, as ``kind/fingerprint``."""


class TrialRow(TrialReport):
    """A trial at one of its iterations; at iteration 0 if it failed before its first report."""

    trial: str
    """Number of the trial, unique for its ``kind``."""
    kind: Literal["baseline", "searched", "repeat"]
    name: str
    """Name of a baseline, or else the number of the trial that drew the schedule."""
    params: str
    """Parameters that the schedule was drawn from, as JSON."""
    schedule: str
    """Thresholds of all iterations, as JSON."""
    description: str
    """The schedule in short."""
    seed: int
    """Seed of the training, for a repeat."""
    state: Literal["finished", "stopped", "failed"]
    """``stopped``: early, because other trials were better, or because the time was up."""
    error: str | None


_TYPES = {
    pa.string(): ("trial", "kind", "name", "params", "schedule", "description", "state", "error"),
    pa.int64(): ("seed", "iteration", "num_kept", "num_stems"),
    pa.float64(): ("sdri_db", "si_sdri_db", "confirmed_sdri_db", "kept_h", "estimated_si_sdr_db", "cost_s", "built_s"),
    pa.list_(pa.string()): ("artifacts",),
}
TRIALS = pa.schema([(name, kind) for kind, names in _TYPES.items() for name in names])
"""Columns of :class:`TrialRow`."""


class Candidate(TypedDict):
    """A schedule that was repeated with several seeds."""

    name: str
    """Name of the baseline or number of the trial."""
    description: str
    """The schedule in short."""
    schedule: list[dict[str, Any]]
    """Thresholds of every iteration, as settings."""
    choice_sdri_db: list[float]
    """Figure of every seed on the mixtures by which schedules are chosen."""
    confirmed_sdri_db: list[float]
    """Figures of the same separators on mixtures by which nothing is chosen."""
    is_baseline: bool
    """The schedule was given, not drawn."""


class Lead(TypedDict):
    """Lead of the winner over a baseline, on the mixtures by which nothing is chosen."""

    over: str
    """Name of the baseline."""
    by_db: float
    paired_db: list[float] | None
    """Difference for every seed; null if the numbers of seeds differ."""
    spread_db: float | None
    """Standard deviation of these differences; null for fewer than two."""
    is_more_than_spread: bool | None


class Verdict(TypedDict):
    """The winner, chosen on one set of mixtures and measured on another."""

    winner: str
    description: str
    is_baseline: bool
    schedule: list[dict[str, Any]]
    num_seeds: int
    choice_sdri_db: float
    choice_std_db: float | None
    confirmed_sdri_db: float
    confirmed_std_db: float | None
    leads: list[Lead]


class Sharing(TypedDict):
    """Cost of all trials, each by itself and with shared artifacts."""

    num_trials: int
    cost_alone_s: float
    built_s: float
    ratio: float | None


def write_trials(rows: Sequence[TrialRow], path: Location) -> None:
    """Write the rows as Parquet."""
    write_parquet(path, pa.Table.from_pylist(list(rows), TRIALS))


def last_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The last iteration of every trial, best first, those without figures last."""
    last: dict[tuple[str, str], TrialRow] = {}
    for row in rows:
        before = last.get((row["kind"], row["trial"]))
        if before is None or row["iteration"] >= before["iteration"]:
            last[row["kind"], row["trial"]] = row
    return sorted(last.values(), key=lambda row: (row["sdri_db"] is None, -(row["sdri_db"] or 0.0)))


def verdict(candidates: Sequence[Candidate]) -> Verdict | None:
    """The winner and its lead over every baseline; ``None`` without candidates.

    A drawn schedule must be better than every baseline to win.
    """
    if not candidates:
        return None
    winner = max(candidates, key=lambda one: (statistics.fmean(one["choice_sdri_db"]), one["is_baseline"]))
    return {
        "winner": winner["name"],
        "description": winner["description"],
        "is_baseline": winner["is_baseline"],
        "schedule": winner["schedule"],
        "num_seeds": len(winner["confirmed_sdri_db"]),
        "choice_sdri_db": statistics.fmean(winner["choice_sdri_db"]),
        "choice_std_db": deviation(winner["choice_sdri_db"]),
        "confirmed_sdri_db": statistics.fmean(winner["confirmed_sdri_db"]),
        "confirmed_std_db": deviation(winner["confirmed_sdri_db"]),
        "leads": [_lead(winner, other) for other in candidates if other["is_baseline"] and other is not winner],
    }


def _lead(winner: Candidate, other: Candidate) -> Lead:
    ours, theirs = winner["confirmed_sdri_db"], other["confirmed_sdri_db"]
    by = statistics.fmean(ours) - statistics.fmean(theirs)
    paired = [our - their for our, their in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else None
    spread = None if paired is None else deviation(paired)
    more = None if spread is None else by > spread
    return {"over": other["name"], "by_db": by, "paired_db": paired, "spread_db": spread, "is_more_than_spread": more}


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; ``None`` for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def verdict_text(found: Verdict | None) -> str:
    """The verdict as sentences, one for every baseline."""
    if found is None:
        return "No schedule finished its last iteration."
    winner = f"{found['winner']} ({found['description']})"
    if found["is_baseline"]:
        winner = f"No drawn schedule is better than the baseline {winner}, which"
    else:
        winner = f"Trial {winner}"
    sentences = [f"{winner} has {found['confirmed_sdri_db']:.2f} dB SDRi on mixtures by which nothing was chosen."]
    for lead in found["leads"]:
        side = f"{abs(lead['by_db']):.2f} dB {'ahead of' if lead['by_db'] >= 0 else 'behind'} {lead['over']}"
        if lead["paired_db"] is None:
            sentences.append(f"It is {side}; their numbers of seeds differ, so the spread is not known.")
        elif lead["spread_db"] is None:
            sentences.append(f"It is {side}; with one seed the spread is not known.")
        else:
            more = "more than" if lead["is_more_than_spread"] else "not more than"
            seeds = f"{lead['spread_db']:.2f} dB over {found['num_seeds']} seeds"
            sentences.append(f"It is {side}: {more} the spread of {seeds}.")
    return " ".join(sentences)


def sharing(rows: Sequence[TrialRow]) -> Sharing:
    """Cost of all trials without and with shared artifacts."""
    last = [row for row in last_rows(rows) if row["cost_s"] is not None]
    alone, built = sum(row["cost_s"] or 0.0 for row in last), sum(row["built_s"] or 0.0 for row in last)
    return {"num_trials": len(last), "cost_alone_s": alone, "built_s": built, "ratio": built / alone if alone else None}


def comparable_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Baselines and drawn trials that did not fail, at their last iteration, best first."""
    return [
        row
        for row in last_rows(rows)
        if row["kind"] != "repeat" and row["state"] != "failed" and None not in (row["sdri_db"], row["cost_s"])
    ]


def pareto_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Trials that no other beats, with a better SDRi at no more cost or less cost at no worse SDRi; best first."""
    last = [(row["sdri_db"] or 0.0, row["cost_s"] or 0.0, row) for row in comparable_rows(rows)]
    return [
        row
        for sdri_db, cost_s, row in last
        if not any(
            other_db >= sdri_db and other_s <= cost_s and (other_db, other_s) != (sdri_db, cost_s)
            for other_db, other_s, _ in last
        )
    ]
