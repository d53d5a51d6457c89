"""Results of a search: arithmetic of the verdict, Pareto front, saving by sharing, and the report with all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import yaml

from engine.settings import build
from engine.storage.files import read_json, read_parquet
from engine.storage.s3 import S3Path
from tune.config import RunConfig
from tune.search.figures import figures
from tune.search.report import search_tables, tables, write_report
from tune.search.verdict import (
    TRIALS,
    Candidate,
    last_rows,
    pareto_rows,
    sharing,
    verdict,
    verdict_text,
    write_trials,
)

if TYPE_CHECKING:
    from tests.support.s3_server import S3  # pytest imports it itself, as a plug-in

pytest_plugins = ["tests.support.s3_server"]
LABEL = "<script>alert(1)</script>"
FAILED = {
    **dict.fromkeys(("sdri_db", "si_sdri_db", "kept_h", "num_kept", "num_stems", "cost_s", "built_s")),
    **{"state": "failed", "error": "kept none of 3 stems"},
}


def pareto(rows: list[Any]) -> list[str]:
    return [one["name"] for one in pareto_rows(rows)]


def row(trial: str, iteration: int = 2, **more: Any) -> Any:
    usual = {
        **{
            "trial": trial,
            "kind": "searched",
            "name": trial,
            "params": "{}",
            "schedule": "[]",
            "description": "re_sdr 3",
        },
        **{"seed": 0, "iteration": iteration, "sdri_db": 5.0, "si_sdri_db": 4.0, "confirmed_sdri_db": None},
        **{"kept_h": 0.5, "num_kept": 10, "num_stems": 40, "estimated_si_sdr_db": None, "cost_s": 100.0},
        **{"built_s": 30.0, "artifacts": ["passes/a"], "state": "finished", "error": None},
    }
    return usual | more


def candidate(name: str, choice: list[float], confirmed: list[float], *, is_baseline: bool = False) -> Candidate:
    return Candidate(
        name=name,
        description="re_sdr 3 > 8",
        schedule=[{"min_re_sdr_db": 3.0}, {"min_re_sdr_db": 8.0}],
        choice_sdri_db=choice,
        confirmed_sdri_db=confirmed,
        is_baseline=is_baseline,
    )


BASE = candidate("ClearSep 10 dB", [5.0, 5.2, 5.4], [5.1, 5.1, 5.1], is_baseline=True)


def test_the_winner_is_chosen_on_one_draw_and_judged_on_the_other() -> None:
    found = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])])
    assert (found["winner"], found["is_baseline"], found["num_seeds"]) == ("7", False, 3)
    (ahead,) = found["leads"]
    assert ahead["over"] == "ClearSep 10 dB"
    assert ahead["by_db"] == pytest.approx(0.4)
    assert ahead["spread_db"] == pytest.approx(0.2)  # of 0.2, 0.4, 0.6
    assert ahead["is_more_than_spread"] is True
    text = verdict_text(found)
    assert "Trial 7 (re_sdr 3 > 8) has 5.50 dB SDRi" in text
    assert "0.40 dB ahead of ClearSep 10 dB: more than the spread of 0.20 dB over 3 seeds" in text


def test_the_text_says_if_the_lead_may_be_chance_or_a_baseline_wins() -> None:
    within = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [4.6, 5.2, 5.8])])
    assert within["leads"][0]["is_more_than_spread"] is False
    assert "not more than the spread" in verdict_text(within)
    behind = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [4.6, 4.7, 4.8])])
    assert "0.40 dB behind ClearSep 10 dB: not more than" in verdict_text(behind)
    lost = verdict([BASE, candidate("7", [5.0], [9.0])])
    assert (lost["winner"], lost["is_baseline"], lost["leads"]) == ("ClearSep 10 dB", True, [])
    assert "No drawn schedule is better" in verdict_text(lost)
    single = verdict([candidate("b", [5.0], [5.0], is_baseline=True), candidate("7", [5.6], [5.3])])
    assert single["leads"][0]["spread_db"] is None is single["leads"][0]["is_more_than_spread"]
    assert "one seed" in verdict_text(single)
    assert "No schedule finished" in verdict_text(verdict([]))


def test_means_and_deviations_are_of_both_draws() -> None:
    found = verdict([candidate("7", [1.0, 2.0, 3.0], [4.0, 4.5, 6.5])])
    assert (found["choice_sdri_db"], found["choice_std_db"]) == pytest.approx((2.0, 1.0))
    assert (found["confirmed_sdri_db"], found["confirmed_std_db"]) == pytest.approx((5.0, 1.75**0.5))
    single = verdict([candidate("7", [1.0], [4.0])])
    assert single["choice_std_db"] is None is single["confirmed_std_db"]


def test_differences_are_paired_by_seed_and_unknown_where_the_seeds_differ() -> None:
    found = verdict([BASE, candidate("7", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])])
    assert found["leads"][0]["paired_db"] == pytest.approx([0.2, 0.4, 0.6])
    candidates = [BASE, candidate("7", [5.6, 5.6], [5.3, 5.9])]
    (ahead,) = verdict(candidates)["leads"]
    assert ahead["by_db"] == pytest.approx(0.5), "of the means of all seeds"
    assert ahead["paired_db"] is None is ahead["spread_db"]
    assert "numbers of seeds differ" in verdict_text(verdict(candidates))
    assert tables([], candidates)[1].rows[1][-2:] == ["+0.50", "seeds differ"]


def test_the_same_gain_with_every_seed_is_more_than_no_spread_and_no_gain_is_not() -> None:
    base = candidate("b", [1.0, 1.0], [2.0, 3.0], is_baseline=True)
    ahead = verdict([base, candidate("7", [5.0, 5.0], [2.5, 3.5])])["leads"][0]
    assert (ahead["spread_db"], ahead["is_more_than_spread"]) == (0.0, True)
    even = verdict([base, candidate("7", [5.0, 5.0], [2.0, 3.0])])["leads"][0]
    assert (even["by_db"], even["is_more_than_spread"]) == (0.0, False)


def test_a_drawn_schedule_that_is_as_good_as_a_baseline_does_not_win() -> None:
    base = candidate("b", [5.0], [1.0], is_baseline=True)
    drawn = candidate("7", [5.0], [9.0])
    assert verdict([drawn, base])["winner"] == verdict([base, drawn])["winner"] == "b"
    first, second = candidate("7", [5.0], [1.0]), candidate("8", [5.0], [1.0])
    assert verdict([first, second])["winner"] == "7"


def test_a_baseline_that_wins_is_compared_with_the_other_baselines() -> None:
    other = candidate("ClearSep 15 dB", [4.0, 4.0, 4.0], [4.9, 4.8, 5.0], is_baseline=True)
    found = verdict([other, BASE, candidate("7", [1.0], [1.0])])
    assert [one["over"] for one in found["leads"]] == ["ClearSep 15 dB"]
    assert "0.20 dB ahead of ClearSep 15 dB" in verdict_text(found)


def test_the_confirmation_has_every_candidate_best_first() -> None:
    other = candidate("ClearSep 15 dB", [4.0], [4.0], is_baseline=True)
    table = tables([], [other, BASE, candidate("7", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])])[1]
    schedule = "re_sdr 3 > 8"
    assert [list(line) for line in table.rows] == [
        ["7", schedule, "5.60 ± 0.00", "5.50 ± 0.20", "winner", ""],
        ["ClearSep 10 dB", schedule, "5.20 ± 0.20", "5.10 ± 0.00", "+0.40", "yes"],
        ["ClearSep 15 dB", schedule, "4.00", "4.00", "+1.50", "seeds differ"],
    ]
    single = tables([], [other, candidate("7", [5.0], [3.5])])[1]
    assert list(single.rows[1][-2:]) == ["-0.50", "one seed"]


def test_sharing_counts_every_trial_once_at_its_last_iteration() -> None:
    rows = [row("1", 1, cost_s=60.0, built_s=60.0), row("1", built_s=100.0), row("2", built_s=0.0)]
    assert sharing(rows) == {"num_trials": 2, "cost_alone_s": 200.0, "built_s": 100.0, "ratio": 0.5}
    nothing = {"num_trials": 0, "cost_alone_s": 0, "built_s": 0, "ratio": None}
    assert sharing([]) == sharing([row("3", 0, **FAILED)]) == nothing


def test_sharing_knows_trials_of_one_number_apart_by_their_kind() -> None:
    rows = [
        row("1", kind=kind, cost_s=100.0, built_s=built_s) for kind, built_s in (("baseline", 90.0), ("searched", 0.0))
    ]
    assert (sharing(rows)["cost_alone_s"], sharing(rows)["built_s"]) == (200.0, 90.0)


def test_the_front_has_the_trials_that_no_other_beats() -> None:
    rows = [
        row("best", sdri_db=6.0, cost_s=200.0),
        row("cheap", sdri_db=4.0, cost_s=50.0),
        row("beaten", sdri_db=5.0, cost_s=200.0),
        row("tie", sdri_db=6.0, cost_s=200.0),
        row("early", 1, sdri_db=9.0, cost_s=1.0),
        row("early", 2, sdri_db=3.0, cost_s=300.0),
        row("failed", 0, **FAILED),
        row("broke", 1, sdri_db=9.0, cost_s=1.0, state="failed"),
        row("repeat", sdri_db=9.0, cost_s=1.0, kind="repeat"),
        row("stopped", 1, sdri_db=4.5, cost_s=60.0, state="stopped"),
        row("given", sdri_db=3.5, cost_s=40.0, kind="baseline"),
    ]
    assert pareto(rows) == ["best", "tie", "stopped", "cheap", "given"]
    assert [list(line)[::2] for line in tables(rows, [])[3].rows][3:] == [["cheap", "4.00"], ["given", "3.50"]]
    assert pareto(rows[:1]) == ["best"] and pareto([]) == []
    assert [one["name"] for one in last_rows(rows)][-1] == "failed"


def test_trials_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    rows = [row("1", seed=2**40, estimated_si_sdr_db=3.5), row("2", 0, **FAILED)]
    write_trials(rows, tmp_path / "trials.parquet")
    assert pq.read_table(tmp_path / "trials.parquet").to_pylist() == rows


def test_missing_columns_are_null_and_unknown_columns_are_left_out(tmp_path: Path) -> None:
    write_trials([{"trial": "1", "colour": "red"}], tmp_path / "trials.parquet")
    assert pq.read_table(tmp_path / "trials.parquet").to_pylist() == [dict.fromkeys(TRIALS.names) | {"trial": "1"}]


def test_trials_are_shown_best_first_at_their_last_iteration() -> None:
    rows = [
        row("1", 0, **FAILED, description="re_sdr 30"),
        row("2", 1, sdri_db=9.0),
        row("2", 2, sdri_db=5.125, cost_s=7200.0),
        row("3", 1, sdri_db=6.0, state="stopped", num_kept=0),
        row("4", kind="repeat", sdri_db=8.0),
    ]
    table = tables(rows, [])[0]
    shown = [dict(zip(table.columns, line, strict=True)) for line in table.rows]
    assert [line["trial"] for line in shown] == ["3", "2", "1"]
    assert [line["state"] for line in shown] == ["stopped", "finished", "failed"]
    assert shown[1] == {
        **{"trial": "2", "schedule": "re_sdr 3", "state": "finished", "iterations": "2", "SDRi dB": "5.12"},
        **{"SI-SDRi dB": "4.00", "kept h": "0.500", "kept": "25%", "estimated SI-SDR dB": "", "cost h": "2.000"},
        "error": "",
    }
    assert shown[0]["kept"] == "0%"
    assert (shown[2]["SDRi dB"], shown[2]["kept"], shown[2]["cost h"]) == ("", "", "")
    assert shown[2]["error"] == "kept none of 3 stems"


def drawn(*params: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Finished trials of such parameters, each a dB better than the one before."""
    return [
        row(str(number), **{"sdri_db": 5.0 + number, "params": json.dumps(some)} | more)
        for number, some in enumerate(params)
    ]


def sentence(rows: list[dict[str, Any]], name: str) -> str:
    """The sentence in place of a figure."""
    (text,) = figures(rows)[name]
    assert isinstance(text, str), "a figure was drawn"
    return text


def test_parameters_that_only_some_trials_have_are_left_out_and_named() -> None:
    params = [
        {"min_estimated_si_sdr_db.shape": "off", "b.value": 1.0},
        {"min_estimated_si_sdr_db.shape": "constant", "min_estimated_si_sdr_db.value": 3, "b.value": 2.0},
        {"min_estimated_si_sdr_db.shape": "constant", "min_estimated_si_sdr_db.value": 4, "b.value": 4.0},
    ]
    shown = figures(drawn(*params))
    coordinates, note = shown["Parallel coordinates"]
    assert [tick.text for tick in coordinates.y_ticks] == ["SDRi dB", "b.value", "min_estimated_si_sdr_db.shape"]
    assert "b.value: 4.0, 2.0, 1.0" in coordinates.description, "best first"
    assert note == "Left out, because not every trial has them: min_estimated_si_sdr_db.value."
    importance, again = shown["Importance"]
    assert again == note
    assert {line[0] for line in importance.rows} == {"b.value", "min_estimated_si_sdr_db.shape"}
    assert sum(float(line[1]) for line in importance.rows) == pytest.approx(1.0, abs=0.011)


def test_null_true_and_one_are_three_values_of_a_parameter() -> None:
    plot = figures(drawn({"a": None}, {"a": True}, {"a": 1}))["Parallel coordinates"][0]
    assert "a: 1, true, null" in plot.description
    assert {"1", "true", "null"} <= {mark.text for mark in plot.marks}


@pytest.mark.parametrize("name", ["Parallel coordinates", "Importance"])
def test_a_sentence_says_why_parameters_cannot_be_shown(name: str) -> None:
    assert "fewer than two drawn trials have finished" in sentence(drawn({"a": 1.0}), name)
    assert "fewer than two drawn trials have finished" in sentence(drawn({"a": 1.0}, {"a": 2.0}, state="stopped"), name)
    assert "fewer than two drawn trials have finished" in sentence(drawn({"a": 1.0}, {"a": 2.0}, kind="baseline"), name)
    assert "no parameter in common" in sentence(drawn({"a": 1.0}, {"b": 2.0}), name)
    assert "no parameter in common" in sentence(drawn({}, {}), name)


def test_constant_parameters_have_no_importance() -> None:
    assert "same SDRi" in sentence(drawn({"a": 1.0}, {"a": 2.0}, sdri_db=5.0), "Importance")
    assert "has one value" in sentence(drawn({"a": 1.0, "b": "x"}, {"a": 1.0, "b": "x"}), "Importance")


def test_every_trial_has_its_learning_curve_but_for_repeats() -> None:
    rows = [
        row("1", 1, kind="baseline", name="ClearSep 10 dB", sdri_db=3.0),
        row("1", 2, kind="baseline", name="ClearSep 10 dB", sdri_db=4.0),
        row("1", 1, sdri_db=3.5, state="stopped"),
        row("2", 1, sdri_db=2.5, state="failed"),
        row("3", 0, **FAILED),
        row("4", kind="repeat"),
    ]
    (plot,) = figures(rows)["Learning curves"]
    curves = ("ClearSep 10 dB: re_sdr 3: 3.00 at 1, 4.00 at 2", "1: re_sdr 3: 3.50 at 1", "2: re_sdr 3: 2.50 at 1")
    assert plot.description.endswith(f". {'; '.join(curves)}.")
    assert [shape.title for shape in plot.shapes if shape.kind == "line"] == ["ClearSep 10 dB: re_sdr 3"]
    assert "no trial has a figure" in sentence(rows[4:], "Learning curves")


def test_the_figure_of_the_front_has_the_front() -> None:
    rows = [
        row("a", sdri_db=6.0, cost_s=7200.0),
        row("b", sdri_db=5.0, cost_s=10800.0),
        row("c", sdri_db=4.0, cost_s=3600.0),
    ]
    (plot,) = figures(rows)["SDRi and cost"]
    kinds = {shape.title: shape.kind for shape in plot.shapes}
    assert kinds == {
        **{"Pareto front": "line", "a: re_sdr 3": "dot", "c: re_sdr 3": "dot", "b: re_sdr 3": "muted-dot"},
    }
    assert "b: re_sdr 3: 3, 5.00" in plot.description
    assert "no trial has" in sentence([row("d", 0, **FAILED)], "SDRi and cost")


def settings() -> dict[str, Any]:
    return {"corpus": "natural.csv", "clean": "clips.csv", "schedule": [{"min_re_sdr_db": 1.0}]}


def test_the_report_holds_trials_verdict_and_a_schedule_to_run(tmp_path: Path) -> None:
    params = [{"min_re_sdr_db.shape": "constant", "min_re_sdr_db.value": 3.0}, {"min_re_sdr_db.shape": "off"}]
    rows = [
        row(
            str(number),
            sdri_db=5.0 + number,
            params=json.dumps(params[number % 2]),
            description="<script>alert(1)</script>",
        )
        for number in range(6)
    ]
    candidates = [BASE, candidate("5", [5.6, 5.6, 5.6], [5.3, 5.5, 5.7])]
    values = write_report(tmp_path, rows, candidates, settings=settings(), title="Search")
    assert values["verdict"]["winner"] == "5"
    assert json.loads((tmp_path / "summary.json").read_text()) == values
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script>alert(1)" not in page
    assert len(page) < 100_000
    assert "http" not in page.replace("http-equiv", ""), "no network"
    for name in ("Learning curves", "Parallel coordinates", "Importance", "SDRi and cost"):
        assert f">{name}</h2>" in page
    assert "Not drawn" not in page
    assert "0.40 dB ahead of ClearSep 10 dB" in text and "0.40 dB ahead of ClearSep 10 dB" in page
    best = build(RunConfig, yaml.safe_load((tmp_path / "best.yaml").read_text()))
    assert [one.min_re_sdr_db for one in best.schedule] == [3.0, 8.0]
    assert best.corpus == "natural.csv"


def test_text_of_users_never_becomes_markup(tmp_path: Path) -> None:
    params = [{f"{LABEL}.p": f"{LABEL}{number}", "a": number} for number in range(2)]
    texts = {"description": LABEL, "error": f"{LABEL} a | b\nc"}
    rows = [*drawn(*params, **texts), row("9", kind="baseline", name=LABEL, **texts)]
    base = Candidate(
        name=LABEL, description=LABEL, schedule=[{"rank_by": LABEL}], choice_sdri_db=[1.0], confirmed_sdri_db=[1.0],
        is_baseline=True,
    )  # fmt: skip
    write_report(tmp_path, rows, [base, candidate("1", [0.5], [0.5])], settings=settings(), title=LABEL)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    text, _, code = text.partition("```yaml")
    assert LABEL in code, "code is shown as it is"
    assert "<script>alert" not in page + text
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert "<h1>&lt;script&gt;" in page and "<title>&lt;script&gt;" in page
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| 1 | &lt;")} == {
        5,
        12,
    }
    assert "alert(1)&lt;/script> a \\| b c |" in text


def test_best_is_the_run_with_the_winners_schedule_without_thresholds_that_are_off(tmp_path: Path) -> None:
    quantile = {"quantile": 0.4, "by_label": True}
    schedule = [
        {"min_re_sdr_db": None, "min_remix_snr_db": quantile, "label_floor_fraction": 0.5},
        {"min_re_sdr_db": 8.0, "max_contested_db": None},
    ]
    best = Candidate(
        name="7", description="", schedule=schedule, choice_sdri_db=[1.0], confirmed_sdri_db=[1.0], is_baseline=False
    )  # fmt: skip
    own = settings() | {"clean_folds": (1, 2), "audio_root": None}
    write_report(tmp_path, [row("7")], [best], settings=own, title="Search")
    read = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert read["schedule"] == [
        {"min_remix_snr_db": quantile, "label_floor_fraction": 0.5},
        {"min_re_sdr_db": 8.0},
    ]
    assert build(RunConfig, read) == build(RunConfig, own | {"schedule": schedule})
    assert own["schedule"] == [{"min_re_sdr_db": 1.0}], "the given settings stay as they were"
    assert "```yaml\nschedule:\n- min_remix_snr_db:" in (tmp_path / "report.md").read_text()


def test_figures_that_are_not_finite_are_null_in_the_report(tmp_path: Path) -> None:
    rows = [row("1", sdri_db=float("nan"), si_sdri_db=float("-inf")), row("2", sdri_db=-3.0)]
    values = write_report(tmp_path, rows, [], settings=settings(), title="Search")
    assert (values["rows"][0]["sdri_db"], values["rows"][0]["si_sdri_db"]) == (None, None)
    assert values["pareto"] == ["2"]
    assert [line[0] for line in tables(values["rows"], [])[0].rows] == ["2", "1"]


def test_a_summary_has_the_tables_of_the_report(tmp_path: Path) -> None:
    rows, candidates = [row("1"), row("2", 0, **FAILED)], [BASE, candidate("1", [5.6], [5.3])]
    write_report(tmp_path, rows, candidates, settings=settings(), title="Search")
    assert search_tables(read_json(tmp_path / "summary.json")) == tables(rows, candidates)


def test_a_report_may_be_in_s3(s3: S3) -> None:
    out = S3Path(s3.root) / "search"
    write_report(out, [row("1")], [candidate("1", [5.6], [5.3])], settings=settings(), title="Search")
    assert read_parquet(out / "trials.parquet").to_pylist() == [row("1")]
    assert (out / "report.html").read_bytes().startswith(b"<!doctype html>")
    assert b"# Search" in (out / "report.md").read_bytes()
    assert yaml.safe_load((out / "best.yaml").read_bytes())["schedule"][1] == {"min_re_sdr_db": 8.0}


def test_a_search_without_results_has_a_report_too(tmp_path: Path) -> None:
    rows = [row("1", 0, sdri_db=None, si_sdri_db=None, kept_h=None, num_stems=None, cost_s=None, state="failed")]
    write_report(tmp_path, rows, [], settings=settings(), title="Search")
    assert "Not drawn" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "best.yaml").exists()
    assert tables(rows, [])[0].rows[0][:3] == ["1", "re_sdr 3", "failed"]
