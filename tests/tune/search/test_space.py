"""Spaces of schedules: what their settings mean, what is drawn, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

import tune.search.space
from engine.selection.thresholds import Quantile, Thresholds
from tune.schedule import as_json, resolve_schedule
from tune.search.read_space import read_space
from tune.search.space import FixedChooser, RandomChooser, describe
from tune.search.stages import DistinctSearch
from tune.search.trial import schedule_of

RICH = yaml.safe_load(str(tune.search.space.__doc__).partition("::")[2])["schedule"]


class Recorder(RandomChooser):
    """Draws at random and keeps every parameter that it drew."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.default_rng(seed))
        self.params: dict[str, Any] = {}

    def number(self, name: str, *args: Any) -> float:
        return self.params.setdefault(name, super().number(name, *args))

    def choice(self, name: str, *args: Any) -> Any:
        return self.params.setdefault(name, super().choice(name, *args))

    def integer(self, name: str, *args: Any) -> int:
        return self.params.setdefault(name, super().integer(name, *args))


def drawn(schedule: Mapping[str, Any], iterations: int, **params: Any) -> Sequence[Thresholds]:
    return read_space(schedule, iterations).draw(
        FixedChooser({name.replace("__", "."): value for name, value in params.items()})
    )


@pytest.mark.parametrize(
    ("params", "values"),
    [
        ({"shape": "constant", "value": 4.0}, [4, 4, 4]),
        ({"shape": "linear", "first": 2.0, "last": 8.0}, [2, 5, 8]),
        ({"shape": "cosine", "first": 2.0, "last": 8.0}, [2, 5, 8]),
        ({"shape": "step", "first": 2.0, "last": 8.0, "at": 2}, [2, 8, 8]),
        ({"shape": "step", "first": 2.0, "last": 8.0, "at": 3}, [2, 2, 8]),
        ({"shape": "free", "1": 9.0, "2": 1.0, "3": 5.0}, [9, 1, 5]),
        ({"shape": "off"}, [None, None, None]),
    ],
)
def test_a_shape_takes_its_own_parameters_alone(params: dict[str, Any], values: list[float | None]) -> None:
    space = read_space({"min_re_sdr_db": {"between": [0, 10], "or": None}}, 3)
    given = {f"min_re_sdr_db.{name}": value for name, value in params.items()}
    assert [one.min_re_sdr_db for one in space.draw(FixedChooser(given))] == pytest.approx(values)


def test_one_iteration_has_no_shapes() -> None:
    (only,) = drawn({"min_re_sdr_db": {"between": [0, 10]}}, 1, min_re_sdr_db__value=7.0)
    assert only == Thresholds(min_re_sdr_db=7.0)


def test_what_is_fixed_stays_and_a_choice_holds_for_all_iterations() -> None:
    schedule = {"min_stem_level_db": {"linear": [-30, -20]}, "label_floor_fraction": {"choose": [None, 0.5]}}
    first, second = drawn(schedule, 2, label_floor_fraction__choice=0.5)
    assert (first.min_stem_level_db, second.min_stem_level_db) == (-30.0, -20.0)
    assert first.label_floor_fraction == second.label_floor_fraction == 0.5


def test_of_a_quantile_the_number_is_drawn() -> None:
    schedule = {"min_re_sdr_db": {"quantile": {"between": [0.2, 0.8], "shapes": ["linear"]}, "by_label": True}}
    first, second = drawn(schedule, 2, min_re_sdr_db__first=0.2, min_re_sdr_db__last=0.6)
    assert first.min_re_sdr_db == Quantile(quantile=0.2, by_label=True)
    assert second.min_re_sdr_db == Quantile(quantile=0.6, by_label=True)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_random_draws_are_in_bounds_and_can_be_repeated(iterations: int) -> None:
    space = read_space(RICH, iterations)
    for seed in range(200):
        draw = Recorder(seed)
        schedule = space.draw(draw)
        assert len(schedule) == iterations
        assert space.draw(FixedChooser(draw.params)) == schedule
        assert space.draw(RandomChooser(np.random.default_rng(seed))) == schedule
        for one in schedule:
            assert one.min_re_sdr_db is not None and 0 <= one.min_re_sdr_db <= 20  # type: ignore[operator]
            assert one.label_floor_fraction in (None, 0.3, 0.5)
    shapes = {name for seed in range(200) for name in _params(space, seed)}
    assert ("min_re_sdr_db.at" in shapes) == (iterations > 2)


def _params(space: tune.search.space.Space, seed: int) -> dict[str, Any]:
    draw = Recorder(seed)
    space.draw(draw)
    return draw.params


def test_a_step_is_a_grid_from_the_least_number_on() -> None:
    space = read_space({"min_re_sdr_db": {"between": [1, 10], "step": 4, "shapes": ["constant"]}}, 2)
    found = {space.draw(RandomChooser(np.random.default_rng(seed)))[0].min_re_sdr_db for seed in range(50)}
    assert found == {1.0, 5.0, 9.0}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"min_re_sdr": {"between": [0, 1]}}, "did you mean 'min_re_sdr_db'"),
        ({"min_re_sdr_db": {"between": [3, 0]}}, "must be the lowest and the highest number"),
        ({"min_re_sdr_db": {"between": [0]}}, "must be the lowest and the highest number"),
        ({"min_re_sdr_db": {"between": [0, float("inf")]}}, "must be the lowest and the highest number"),
        ({"min_re_sdr_db": {"between": [0, 1], "step": 0}}, "step must be above 0 and at most 1, got 0"),
        ({"min_re_sdr_db": {"between": [0, 1], "step": 2}}, "step must be above 0 and at most 1, got 2"),
        (
            {"min_re_sdr_db": {"between": [0, 1], "shapes": []}},
            "must be a list of shapes, got []; choose among constant",
        ),
        ({"min_re_sdr_db": {"between": [0, 1], "shapes": ["liner"]}}, "did you mean 'linear'"),
        ({"min_re_sdr_db": {"between": [0, 1], "or": 3}}, "choose"),
        ({"min_re_sdr_db": {"between": [0, 1], "shape": "free"}}, "did you mean 'shapes'"),
        ({"min_re_sdr_db": {"betwen": [0, 1]}}, "betwen"),
        ({"min_re_sdr_db": {"choose": []}}, "choose must be a list of values, got []"),
        ({"min_re_sdr_db": {"choose": [{"linear": [1, 2]}]}}, "must have null, numbers, true or false"),
        ({"label_floor_fraction": {"between": [0, 3]}}, "label_floor_fraction must be at most 1, got 3"),
        ({"label_floor_fraction": {"choose": [0.1, 3]}}, "label_floor_fraction must be at most 1, got 3"),
        ({"min_re_sdr_db": {"quantile": {"between": [0.5, 2]}}}, "quantile must be at most 1, got 2"),
        ({"min_re_sdr_db": 3.0}, "must have something to search"),
        ({}, "must have something to search"),
    ],
)
def test_a_wrong_space_is_refused_when_it_is_read(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_space(schedule, 2)
    assert message in str(error.value)


def test_a_schedule_in_short() -> None:
    schedule = [
        {"min_re_sdr_db": 10, "label_floor_fraction": 0.5, "max_rival_leak_db": {"quantile": 0.4}},
        {"min_re_sdr_db": 15, "label_floor_fraction": 0.5},
    ]
    assert describe(resolve_schedule(schedule)) == "re_sdr 10 > 15, max_rival_leak q0.4 > off, label_floor 0.5"
    assert describe([Thresholds()]) == ""


RISING = {"between": [0, 6], "step": 6, "shapes": ["constant", "linear"]}


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_is_drawn_twice_until_the_space_has_no_other(
    sampler: type[optuna.samplers.RandomSampler | optuna.samplers.TPESampler], seed: int
) -> None:
    """Eight schedules, of which four can be drawn by other parameters too: a line may be level."""
    settings: Mapping[str, Any] = {"min_stem_level_db": {"choose": [-40.0, -30.0]}, "min_re_sdr_db": RISING}
    space = read_space(settings, 2)
    values = [(level, *both) for level in (-40.0, -30.0) for both in ((0.0, 0.0), (0.0, 6.0), (6.0, 0.0), (6.0, 6.0))]
    schedules = {
        as_json([Thresholds(min_stem_level_db=level, min_re_sdr_db=value) for value in both]) for level, *both in values
    }
    known = set(sorted(schedules)[:3])
    searcher = DistinctSearch(space, known, metric="sdri_db", mode="max", sampler=sampler(seed=seed))
    drawn = []
    for number in range(6):
        parameters: Any = searcher.suggest(f"trial {number}")
        drawn.append(as_json(schedule_of(parameters, space)))
        searcher.on_trial_result(f"trial {number}", {"sdri_db": 1.0, "training_iteration": 1})
        searcher.on_trial_complete(f"trial {number}", {"sdri_db": 1.0})
    assert set(drawn[:5]) == schedules - known and len(set(drawn[:5])) == 5
    assert drawn[5] in schedules, "there is no other"
