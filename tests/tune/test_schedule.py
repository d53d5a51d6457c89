"""Schedules: closed forms of the shapes over the iterations, and errors that name what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from math import sqrt
from typing import Any

import pytest
import yaml

import tune.schedule
from engine.selection.thresholds import Quantile, Thresholds
from engine.settings import build
from tune.config import RunConfig
from tune.schedule import resolve_schedule


def values(shape: Any, iterations: int) -> list[Any]:
    """The value of one threshold with a shape, at each iteration."""
    resolved = resolve_schedule({"iterations": iterations, "min_re_sdr_db": shape})
    assert len(resolved) == iterations
    return [thresholds.min_re_sdr_db for thresholds in resolved]


@pytest.mark.parametrize("shape", [3, 3.0, {"constant": 3}])
def test_a_constant_is_the_same_at_every_iteration(shape: Any) -> None:
    assert values(shape, 3) == [3.0, 3.0, 3.0]
    assert all(isinstance(value, float) for value in values(shape, 3))


def test_linear_changes_evenly_from_the_first_to_the_last() -> None:
    assert values({"linear": [2, 8]}, 4) == pytest.approx([2, 4, 6, 8])
    assert values({"linear": [8, -2]}, 3) == pytest.approx([8, 3, -2])
    assert values({"linear": [2, 8]}, 2) == [2.0, 8.0]


def test_cosine_is_half_a_cosine() -> None:
    assert values({"cosine": [0, 4]}, 5) == pytest.approx([0, 2 - sqrt(2), 2, 2 + sqrt(2), 4])
    assert values({"cosine": [8, 4]}, 3) == pytest.approx([8, 6, 4])
    assert values({"cosine": [10, 15]}, 2) == [10.0, 15.0]


@pytest.mark.parametrize(
    ("iterations", "expected"), [(1, [10]), (2, [10, 15]), (3, [10, 10, 15]), (4, [10, 10, 15, 15])]
)
def test_a_step_changes_in_the_second_half(iterations: int, expected: list[float]) -> None:
    assert values({"step": [10, 15]}, iterations) == expected


@pytest.mark.parametrize(("at", "expected"), [(2, [10, 15, 15, 15]), (4, [10, 10, 10, 15])])
def test_a_step_changes_at_the_given_iteration(at: int, expected: list[float]) -> None:
    assert values({"step": [10, 15], "at": at}, 4) == expected


def test_a_step_may_switch_a_rule_on_or_change_its_kind() -> None:
    assert values({"step": [None, 15]}, 2) == [None, 15.0]
    assert values({"step": [{"quantile": 0.5}, 15]}, 2) == [Quantile(quantile=0.5), 15.0]


@pytest.mark.parametrize("shape", [{"linear": [2, 8]}, {"cosine": [2, 8]}, {"step": [2, 8]}, 2])
def test_a_single_iteration_has_the_first_value(shape: Any) -> None:
    assert values(shape, 1) == [2.0]


def test_a_quantile_may_be_shaped() -> None:
    shaped = {"quantile": {"linear": [0.5, 0.25]}, "by_label": True}
    assert values(shaped, 2) == [Quantile(quantile=0.5, by_label=True), Quantile(quantile=0.25, by_label=True)]
    assert values({"quantile": 0.4}, 2) == [Quantile(quantile=0.4)] * 2


def test_a_list_has_a_mapping_for_each_iteration() -> None:
    listed: list[dict[str, Any]] = [{"min_re_sdr_db": 10}, {"min_re_sdr_db": {"quantile": 0.5}}, {}]
    assert resolve_schedule(listed) == (
        Thresholds(min_re_sdr_db=10.0),
        Thresholds(min_re_sdr_db=Quantile(quantile=0.5)),
        Thresholds(),
    )
    assert resolve_schedule([]) == ()


def test_the_schedule_that_the_docstring_shows() -> None:
    text = str(tune.schedule.__doc__).partition("::")[2]
    first, second, third = resolve_schedule(yaml.safe_load(text)["schedule"])
    assert first == Thresholds(
        min_remix_snr_db=3.0,
        min_estimated_si_sdr_db=2.0,
        label_floor_fraction=0.5,
        min_re_sdr_db=10.0,
        min_stem_level_db=-30.0,
        max_rival_leak_db=Quantile(quantile=0.9, by_label=True),
    )
    assert (second.min_stem_level_db, third.min_stem_level_db) == (-20.0, -25.0)
    assert (second.min_estimated_si_sdr_db, second.label_floor_fraction, second.min_re_sdr_db) == (5.0, 0.35, 15.0)
    assert third.max_rival_leak_db == Quantile(quantile=0.6, by_label=True)


def test_free_has_a_value_for_each_iteration() -> None:
    shape = {"free": [3, None, {"quantile": 0.4}]}
    found = [one.min_re_sdr_db for one in resolve_schedule({"iterations": 3, "min_re_sdr_db": shape})]
    assert found == [3.0, None, Quantile(quantile=0.4)]
    for values in ([1, 2], 3, "abc"):
        with pytest.raises(ValueError, match=r"\.free must be a list of 3 values, .*give one for each iteration"):
            resolve_schedule({"iterations": 3, "min_re_sdr_db": {"free": values}})


def test_other_settings_may_be_shaped_or_named() -> None:
    first, second = resolve_schedule(
        {"iterations": 2, "rank_by": "re_sdr_db", "estimate_confidence": {"linear": [0.5, 0.9]}}
    )
    assert (first.rank_by, second.rank_by) == ("re_sdr_db", "re_sdr_db")
    assert (first.estimate_confidence, second.estimate_confidence) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"min_re_sdr_db": 3}, "schedule.iterations must be a whole number from 1 on, got None; write iterations: 2"),
        ({"iterations": 0}, "schedule.iterations must be a whole number from 1 on, got 0;"),
        ({"iterations": True}, "schedule.iterations must be a whole number from 1 on, got True;"),
        ({"iterations": 2.0}, "schedule.iterations must be a whole number from 1 on, got 2.0;"),
        ({"iterations": 2, "min_re_sdr": 3}, "there is no setting schedule.min_re_sdr; did you mean 'min_re_sdr_db'"),
        ({"iteratoins": 2, "iterations": 2}, "no setting schedule.iteratoins; did you mean 'iterations'"),
        (
            {"iterations": 2, "1": {"min_re_sdr_db": 3}},
            "cannot set schedule.1 (this schedule has shapes over",
        ),
        ([{"min_re_sdr": 3}], "there is no setting min_re_sdr; did you mean 'min_re_sdr_db'"),
    ],
)
def test_a_wrong_schedule_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_schedule(schedule)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"liner": [2, 8]}, "schedule.min_re_sdr_db: there is no shape 'liner'; did you mean 'linear'?"),
        ({"qantile": 0.4}, "there is no shape 'qantile'; did you mean 'quantile'?"),
        ({}, "schedule.min_re_sdr_db must be one shape, got []; give one of constant, linear, cosine, step"),
        ({"linear": [2, 8], "cosine": [2, 8]}, "must be one shape, got ['linear', 'cosine']"),
        ({"linear": [2, 8], "at": 2}, "there is no setting schedule.min_re_sdr_db.at; known: linear"),
        ({"quantile": 0.4, "by_labels": True}, "schedule.min_re_sdr_db.by_labels; did you mean 'by_label'?"),
        ({"linear": 3}, "schedule.min_re_sdr_db.linear must be its first and its last value, got 3; write linear"),
        ({"cosine": [1, 2, 3]}, "cosine must be its first and its last value, got [1, 2, 3]"),
        ({"linear": [None, 3]}, "linear must be two finite numbers, got [None, 3]; use step"),
        ({"linear": [0, float("inf")]}, "linear must be two finite numbers, got [0, inf]"),
        (
            {"step": [1, 2], "at": 1},
            "min_re_sdr_db.at must be an iteration from 2 to 3, got 1; choose one",
        ),
        ({"step": [1, 2], "at": 4}, "min_re_sdr_db.at must be an iteration from 2 to 3, got 4"),
        ({"quantile": {"linear": [0.5, 1.5]}}, "schedule.min_re_sdr_db: quantile must be at most 1, got 1.5"),
        ("high", "schedule, iteration 1: min_re_sdr_db must be a number, got 'high'"),
    ],
)
def test_a_wrong_shape_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        values(shape, 3)
    assert message in str(caught.value)


def test_a_resolved_schedule_is_stored_and_built_again() -> None:
    """``config.yaml`` has the thresholds of every iteration, and the same run is built from it."""
    settings = {
        "corpus": "a.csv",
        "clean": "b.csv",
        "schedule": {"iterations": 3, "min_re_sdr_db": {"quantile": {"cosine": [0.2, 0.6]}}, "label_cap_ratio": 3},
    }
    config = build(RunConfig, settings)
    stored = yaml.safe_load(yaml.safe_dump([asdict(thresholds) for thresholds in config.schedule]))
    assert stored[2]["min_re_sdr_db"] == {"quantile": 0.6, "by_label": False}
    assert build(RunConfig, settings | {"schedule": stored}) == config
