"""Plots: paths at known places."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tune.report.plots import Curve, coordinates, histogram, lines, scatter


def heights(path: str) -> float:
    """The sum of the heights of a histogram's bars."""
    return sum(-float(height) for height in re.findall(r"v(-[\d.]+)h", path))


def test_bars_are_as_high_as_they_have_stems() -> None:
    kept_N, rejected_N = np.repeat(np.arange(10.0), 6), np.repeat(np.arange(10.0), 2)
    plot = histogram("level", kept_N, rejected_N)
    assert plot is not None
    assert heights(plot.shapes[0].path) == pytest.approx(10 * 75.0, abs=0.2)
    assert heights(plot.shapes[1].path) == pytest.approx(10 * 25.0, abs=0.2)
    assert "60 kept and 20 rejected stems, median 4.50" in plot.description


def test_values_that_are_not_defined_are_left_out() -> None:
    nothing_N = np.array([np.nan, np.inf], np.float32)
    assert histogram("level", nothing_N, np.zeros(0, np.float32)) is None
    plot = histogram("level", np.array([1.0, np.nan]), np.zeros(0))
    assert plot is not None and "1 stems, median 1.00" in plot.description


def test_a_limit_beyond_all_values_is_within_the_picture() -> None:
    plot = histogram("level", np.array([1.0, 2.0]), np.zeros(0), limit=30.0, rule="max_level_db")
    assert plot is not None
    assert 0.0 < plot.marks[0].x < 100.0 and plot.marks[0].text == "≤ 30"


def test_one_far_value_does_not_flatten_the_others() -> None:
    plot = histogram("level", np.concatenate([np.linspace(0, 1, 1000), [1e9]]), np.zeros(0))
    assert plot is not None
    assert max(float(tick.text) for tick in plot.x_ticks) <= 2.0


def test_a_curve_goes_through_its_points() -> None:
    curve = Curve(name="mean", points=[(0.0, 4.0), (1.0, 6.0)], bounds={0.0: (3.0, 5.0)})
    plot = lines("SDRi", [curve], x_label="iteration", y_label="dB")
    assert plot is not None
    (line,) = [shape for shape in plot.shapes if shape.kind == "line"]
    ends = [tuple(map(float, point.split())) for point in line.path[1:].split("L")]
    ticks = {tick.text: tick.y for tick in plot.y_ticks}
    assert [ends[0][1], ends[1][1]] == pytest.approx([ticks["4"], ticks["6"]], abs=0.02)
    assert [tick.text for tick in plot.x_ticks] == ["0", "1"], "no half iterations"
    assert lines("SDRi", [Curve(name="none", points=[])], x_label="", y_label="") is None


def test_equal_values_have_an_axis_too() -> None:
    plot = lines("SDRi", [Curve(name="a", points=[(1.0, 5.0)])], x_label="", y_label="")
    assert plot is not None and plot.y_ticks


def test_the_front_joins_its_points_by_cost() -> None:
    plot = scatter("cost", [("a", (2.0, 6.0), True), ("b", (1.0, 4.0), True), ("c", (3.0, 5.0), False)],
                   x_label="h", y_label="dB")  # fmt: skip
    assert plot is not None
    (line,) = [shape for shape in plot.shapes if shape.kind == "line"]
    xs = [float(point.split()[0]) for point in line.path[1:].split("L")]
    assert xs == sorted(xs) and len(xs) == 2
    assert scatter("cost", [], x_label="", y_label="") is None


def test_each_trial_is_a_line_through_its_values() -> None:
    plot = coordinates("trials", {"SDRi": [6.0, 5.0], "shape": ["off", "constant"]}, ["1", "2"])
    strong = next(shape for shape in plot.shapes if shape.kind == "line")
    assert strong.title == "1" and strong.path == "M93.1 25.0L75.0 75.0"
    assert {(mark.text, mark.x, mark.y) for mark in plot.marks} >= {("off", 75.0, 75.0), ("constant", 25.0, 75.0)}
