"""TODO tune/search/verdict.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engine.storage.files import read_parquet, write_parquet
from engine.storage.paths import Location, location

Row = dict[str, Any]
TRIALS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("trial", "kind", "name", "params", "schedule", "words")),
        pa.field("seed", pa.int64()),
        pa.field("iteration", pa.int32()),
        *(pa.field(name, pa.float64()) for name in ("sdri_db", "si_sdri_db", "confirmed_sdri_db", "kept_h")),
        *(pa.field(name, pa.int64()) for name in ("num_kept", "num_stems")),
        *(pa.field(name, pa.float64()) for name in ("estimated_si_sdr_db", "cost_s", "made_s")),
        pa.field("pieces", pa.list_(pa.string())),
        *(pa.field(name, pa.string()) for name in ("state", "error")),
    ]
)
"""A trial at an iteration.

``kind`` is baseline, searched or repeat; ``params`` (what its schedule was drawn from) and ``schedule`` are JSON.
``sdri_db`` is on the mixtures that the choice is made on, ``confirmed_sdri_db`` on others. ``estimated_si_sdr_db`` is
the mean of the kept stems, a stand-in for the gate's precision. ``cost_s`` is what all iterations so far cost by
themselves, ``made_s`` what of it this trial had to make. ``state`` is finished, stopped (early, as others were better)
or failed, with its ``error``; of a trial that failed before its first report there is one row, of iteration 0.
"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule that was repeated with several seeds."""

    name: str
    """A baseline's name, or the trial's."""
    words: str
    """Its schedule in words."""
    schedule: list[dict[str, Any]]
    """Its thresholds, an iteration each."""
    choice_sdri_db: list[float]
    """A figure a seed, on the mixtures that the choice is made on."""
    confirmed_sdri_db: list[float]
    """The same separators on mixtures that nothing was chosen by."""
    is_baseline: bool
    """Whether it was given, not found."""


def write_trials(rows: Sequence[Row], path: Location) -> None:
    """Keep the trials as Parquet."""
    write_parquet(path, pa.Table.from_pylist([{name: row.get(name) for name in TRIALS.names} for row in rows], TRIALS))


def read_trials(path: Location) -> list[Row]:
    """What :func:`write_trials` wrote."""
    rows: list[Row] = read_parquet(location(path), schema=TRIALS).to_pylist()
    return rows


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """Of every trial its last iteration, best first; those without figures last."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = last.get((row["kind"], row["trial"]))
        if before is None or row["iteration"] >= before["iteration"]:
            last[row["kind"], row["trial"]] = row
    return sorted(last.values(), key=lambda row: (row["sdri_db"] is None, -(row["sdri_db"] or 0.0)))


def verdict(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Who won on the mixtures of the choice, and how far it is ahead of each baseline on the others.

    A drawn schedule must be better than a baseline to win. ``spread_db`` is the standard deviation of the differences
    seed by seed (``paired_db``, null where the numbers of seeds differ); null where there are less than two.
    """
    if not candidates:
        return {"winner": None, "ahead": []}
    winner = max(candidates, key=lambda one: (statistics.fmean(one.choice_sdri_db), one.is_baseline))
    return {
        "winner": winner.name,
        "words": winner.words,
        "is_baseline": winner.is_baseline,
        "schedule": winner.schedule,
        "num_seeds": len(winner.confirmed_sdri_db),
        "choice_sdri_db": statistics.fmean(winner.choice_sdri_db),
        "choice_std_db": _std(winner.choice_sdri_db),
        "confirmed_sdri_db": statistics.fmean(winner.confirmed_sdri_db),
        "confirmed_std_db": _std(winner.confirmed_sdri_db),
        "ahead": [_ahead(winner, other) for other in candidates if other.is_baseline and other is not winner],
    }


def _ahead(winner: Candidate, other: Candidate) -> dict[str, Any]:
    ours, theirs = winner.confirmed_sdri_db, other.confirmed_sdri_db
    by = statistics.fmean(ours) - statistics.fmean(theirs)
    paired = [our - their for our, their in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else None
    spread = None if paired is None else _std(paired)
    more = None if spread is None else by > spread
    return {"of": other.name, "by_db": by, "paired_db": paired, "spread_db": spread, "is_more_than_spread": more}


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def verdict_in_words(found: Mapping[str, Any]) -> str:
    """One sentence for every baseline."""
    if found["winner"] is None:
        return "No schedule was taken to its last iteration."
    who = f"{found['winner']} ({found['words']})"
    if found["is_baseline"]:
        who = f"No schedule that was drawn is better than the baseline {who}, which"
    else:
        who = f"Trial {who}"
    sentences = [f"{who} has {found['confirmed_sdri_db']:.2f} dB SDRi on mixtures that nothing was chosen by."]
    for one in found["ahead"]:
        side = f"{abs(one['by_db']):.2f} dB {'ahead of' if one['by_db'] >= 0 else 'behind'} {one['of']}"
        if one["paired_db"] is None:
            sentences.append(f"It is {side}; their numbers of seeds differ, so the spread is not known.")
        elif one["spread_db"] is None:
            sentences.append(f"It is {side}; with one seed the spread is not known.")
        else:
            more = "more than" if one["is_more_than_spread"] else "not more than"
            seeds = f"{one['spread_db']:.2f} dB over {found['num_seeds']} seeds"
            sentences.append(f"It is {side}: {more} the spread of {seeds}.")
    return " ".join(sentences)


def sharing(rows: Sequence[Row]) -> dict[str, Any]:
    """What all trials would have cost by themselves, and what they cost together."""
    last = [row for row in last_rows(rows) if row["cost_s"] is not None]
    alone, made = sum(row["cost_s"] for row in last), sum(row["made_s"] or 0.0 for row in last)
    return {"num_trials": len(last), "cost_alone_s": alone, "made_s": made, "ratio": made / alone if alone else None}


def pareto(rows: Sequence[Row]) -> list[str]:
    """Trials of which none other has a better SDRi at no more cost, or less cost at no worse SDRi; best first.

    They are given by name: a baseline and a drawn trial may have the same number.
    """
    return [row["name"] for row in _front_rows(rows)]


def _standing(rows: Sequence[Row]) -> list[Row]:
    """Baselines and drawn trials that did not fail, at their last iteration, best first."""
    return [
        row
        for row in last_rows(rows)
        if row["kind"] != "repeat" and row["state"] != "failed" and None not in (row["sdri_db"], row["cost_s"])
    ]


def _front_rows(rows: Sequence[Row]) -> list[Row]:
    last = _standing(rows)

    def is_beaten(row: Row) -> bool:
        return any(
            other["sdri_db"] >= row["sdri_db"]
            and other["cost_s"] <= row["cost_s"]
            and (other["sdri_db"], other["cost_s"]) != (row["sdri_db"], row["cost_s"])
            for other in last
        )

    return [row for row in last if not is_beaten(row)]
