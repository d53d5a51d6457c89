"""What a search found: the verdict's arithmetic, the front, what sharing saved, and the report that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune.findings import (
    Candidate,
    last_rows,
    pareto,
    read_trials,
    sharing,
    tables,
    verdict,
    verdict_in_words,
    write_report,
    write_trials,
)
from tune.loop import RunConfig
from tune.recipes import build


def row(trial: str, iteration: int = 2, **more: Any) -> dict[str, Any]:
    usual = {
        **{"trial": trial, "kind": "searched", "name": trial, "params": "{}", "schedule": "[]", "words": "re_sdr 3"},
        **{"seed": 0, "iteration": iteration, "sdri_db": 5.0, "si_sdri_db": 4.0, "confirmed_sdri_db": None},
        **{"kept_h": 0.5, "num_kept": 10, "num_stems": 40, "estimated_si_sdr_db": None, "cost_s": 100.0},
        **{"made_s": 30.0, "pieces": ["passes/a"], "state": "finished", "error": None},
    }
    return usual | more


def candidate(name: str, choice: list[float], confirmed: list[float], *, is_baseline: bool = False) -> Candidate:
    return Candidate(
        name=name,
        words="re_sdr 3 > 8",
        schedule=[{"min_re_sdr_db": 3.0}, {"min_re_sdr_db": 8.0}],
        choice_sdri_db=choice,
        confirmed_sdri_db=confirmed,
        is_baseline=is_baseline,
    )


BASE = candidate("ClearSep 10 dB", [5.0, 5.2, 5.4], [5.1, 5.1, 5.1], is_baseline=True)


def test_the_winner_is_chosen_on_one_draw_and_judged_on_the_other() -> None:
    found = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])])
    assert (found["winner"], found["is_baseline"], found["num_seeds"]) == ("7", False, 3)
    (ahead,) = found["ahead"]
    assert ahead["of"] == "ClearSep 10 dB"
    assert ahead["by_db"] == pytest.approx(0.4)
    assert ahead["spread_db"] == pytest.approx(0.2)  # of 0.2, 0.4, 0.6
    assert ahead["is_more_than_spread"] is True
    words = verdict_in_words(found)
    assert "Trial 7 (re_sdr 3 > 8) has 5.50 dB SDRi" in words
    assert "0.40 dB ahead of ClearSep 10 dB: more than the spread of 0.20 dB over 3 seeds" in words


def test_what_may_be_chance_and_a_baseline_that_wins_are_said_so() -> None:
    within = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [4.6, 5.2, 5.8])])
    assert within["ahead"][0]["is_more_than_spread"] is False
    assert "not more than the spread" in verdict_in_words(within)
    behind = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [4.6, 4.7, 4.8])])
    assert "0.40 dB behind ClearSep 10 dB: not more than" in verdict_in_words(behind)
    lost = verdict([BASE, candidate("7", [5.0], [9.0])])
    assert (lost["winner"], lost["is_baseline"], lost["ahead"]) == ("ClearSep 10 dB", True, [])
    assert "No schedule that was drawn is better" in verdict_in_words(lost)
    single = verdict([candidate("b", [5.0], [5.0], is_baseline=True), candidate("7", [5.6], [5.3])])
    assert single["ahead"][0]["spread_db"] is None is single["ahead"][0]["is_more_than_spread"]
    assert "one seed" in verdict_in_words(single)
    assert "No schedule was taken" in verdict_in_words(verdict([]))


def test_sharing_counts_every_trial_once_at_its_last_iteration() -> None:
    rows = [row("1", 1, cost_s=60.0, made_s=60.0), row("1", made_s=100.0), row("2", made_s=0.0)]
    assert sharing(rows) == {"num_trials": 2, "alone_s": 200.0, "made_s": 100.0, "fraction": 0.5}
    assert sharing([])["fraction"] is None


def test_the_front_has_whom_nobody_beats() -> None:
    rows = [
        row("best", sdri_db=6.0, cost_s=200.0),
        row("cheap", sdri_db=4.0, cost_s=50.0),
        row("beaten", sdri_db=5.0, cost_s=200.0),
        row("tie", sdri_db=6.0, cost_s=200.0),
        row("early", 1, sdri_db=9.0, cost_s=1.0),
        row("early", 2, sdri_db=3.0, cost_s=300.0),
        row("failed", 0, sdri_db=None, cost_s=None, made_s=None, state="failed", error="why"),
    ]
    assert sorted(pareto(rows)) == ["best", "cheap", "tie"]
    assert [one["name"] for one in last_rows(rows)][-1] == "failed"


def test_trials_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    rows = [row("1"), row("2", 0, sdri_db=None, state="failed", error="kept none of 3 stems")]
    write_trials(rows, tmp_path / "trials.parquet")
    assert read_trials(tmp_path / "trials.parquet") == rows


def settings() -> dict[str, Any]:
    return {"corpus": "natural.csv", "clean": "clips.csv", "schedule": [{"min_re_sdr_db": 1.0}]}


def test_the_report_holds_trials_verdict_and_a_schedule_to_run(tmp_path: Path) -> None:
    params = [{"min_re_sdr_db.shape": "constant", "min_re_sdr_db.value": 3.0}, {"min_re_sdr_db.shape": "off"}]
    rows = [
        row(str(number), sdri_db=5.0 + number, params=json.dumps(params[number % 2]), words="<script>alert(1)</script>")
        for number in range(6)
    ]
    candidates = [BASE, candidate("5", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])]
    values = write_report(tmp_path, rows, candidates, settings=settings(), title="Search")
    assert values["verdict"]["winner"] == "5"
    assert json.loads((tmp_path / "summary.json").read_text()) == values
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script>alert(1)" not in page
    assert page.count("plotly.js v") == 1, "the figures' library is in the page, once"
    assert not [line for line in page.split("<") if line.startswith("script") and " src=" in line[:80]], "no network"
    for name in ("Learning curves", "Parallel coordinates", "Importance", "SDRi and cost"):
        assert f"<h2>{name}</h2>" in page
    assert "too little to show" not in page
    assert "0.40 dB ahead of ClearSep 10 dB" in text and "0.40 dB ahead of ClearSep 10 dB" in page
    best = build(RunConfig, yaml.safe_load((tmp_path / "best.yaml").read_text()))
    assert [one.min_re_sdr_db for one in best.schedule] == [3.0, 8.0]
    assert best.corpus == "natural.csv"


def test_a_search_of_which_nothing_came_has_a_report_too(tmp_path: Path) -> None:
    rows = [row("1", 0, sdri_db=None, si_sdri_db=None, kept_h=None, num_stems=None, cost_s=None, state="failed")]
    write_report(tmp_path, rows, [], settings=settings(), title="Search")
    assert "too little to show" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "best.yaml").exists()
    assert tables(rows, [])[0].rows[0][:3] == ["1", "re_sdr 3", "failed"]
