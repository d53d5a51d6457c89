"""Plots as paths in a square of 100 by 100; the page stretches the square and takes colours from its style.

A path has no text: ticks and labels are HTML at a percentage, so that they keep their size at every width. No library
draws this: those of Python write fixed colours and fixed widths, and plotly's script alone is three times the page.

Shape suffixes: N stems, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from engine.cli.display import shown

_BINS = 48
_OUTLIERS = 0.5  # percent on each side that a histogram puts into its outermost bins
_MARGIN = 0.06  # of the range, on each side
Kind = Literal["kept", "rejected", "limit", "line", "dot", "muted", "muted-dot", "error", "axis"]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A path in the style of its kind, with a text that shows under the pointer."""

    kind: Kind
    path: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A text at a place: percent from the left and from the top; a tick of an axis has one of them."""

    text: str
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Shapes with the ticks of their axes."""

    title: str
    description: str
    """All that the picture says, for those who do not see it."""
    shapes: Sequence[Shape]
    x_ticks: Sequence[Mark] = ()
    y_ticks: Sequence[Mark] = ()
    x_label: str = ""
    y_label: str = ""
    marks: Sequence[Mark] = ()
    note: str = ""
    names_rows: bool = False
    """The ticks on the left are names, which need room."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A named line of points; ``bounds`` has the interval of each point."""

    name: str
    points: Sequence[Point]
    is_muted: bool = False
    bounds: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """A range of values on 0 to 100."""

    low: float
    high: float
    is_up: bool = False
    """The highest value is at 0, as on an axis that points up."""

    def at(self, value: float) -> float:
        """The place of a value."""
        place = 100.0 * (value - self.low) / (self.high - self.low)
        return round(100.0 - place if self.is_up else place, 2)

    def ticks(self, most: int = 5) -> list[Mark]:
        """Round values within the range."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        places = [
            (f"{value:g}" if step >= 1 else f"{value:.{-math.floor(math.log10(step))}f}", value) for value in values
        ]
        return [Mark(text=text, **{"y" if self.is_up else "x": self.at(value)}) for text, value in places]


def _scale(values: Iterable[float], *, is_up: bool = False, margin: float = _MARGIN) -> _Scale:
    """The range of some values with a margin; of equal values, one unit around them."""
    some = list(values)
    low, high = min(some), max(some)
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    room = margin * (high - low)
    return _Scale(low=low - room, high=high + room, is_up=is_up)


def histogram(
    title: str, kept_N: np.ndarray, rejected_N: np.ndarray, *, limit: float | None = None, rule: str = ""
) -> Plot | None:
    """Values of kept and rejected stems, with the limit drawn in; null if no value is defined."""
    both = [values[np.isfinite(values)] for values in (kept_N, rejected_N)]
    values_N = np.concatenate(both)
    if not values_N.size:
        return None
    ends = [float(end) for end in np.percentile(values_N, (_OUTLIERS, 100.0 - _OUTLIERS))]
    scale = _scale([*ends, *([limit] if limit is not None else [])])
    edges_B = np.linspace(scale.low, scale.high, _BINS + 1)
    kept_B, rejected_B = (np.histogram(np.clip(one, scale.low, scale.high), edges_B)[0] for one in both)
    top = int((kept_B + rejected_B).max())
    shapes = [
        Shape(kind="kept", path=_bars(np.zeros(_BINS), kept_B, top)),
        Shape(kind="rejected", path=_bars(kept_B, rejected_B, top)),
    ]
    counts = f"{len(both[0])} kept and {len(both[1])} rejected stems" if both[1].size else f"{len(both[0])} stems"
    text = f"Distribution of {title}: {counts}, median {np.median(values_N):.2f}"
    note = ""
    if limit is not None:
        shapes.append(Shape(kind="limit", path=f"M{scale.at(limit)} 0V100"))
        note = f"{'≥' if rule.startswith('min_') else '≤'} {limit:g}"
        text += f"; the limit is {note}"
    marks = [Mark(text=note, x=scale.at(limit))] if limit is not None else []
    return Plot(title=title, description=f"{text}.", shapes=shapes, x_ticks=scale.ticks(4), marks=marks, note=note)


def _bars(base_B: np.ndarray, count_B: np.ndarray, top: int) -> str:
    """Bars that stand on others, one for each bin."""
    step = 100.0 / len(count_B)
    width = 0.86 * step
    return "".join(
        f"M{number * step:.2f} {100 - 100 * base / top:.2f}h{width:.2f}v{-100 * count / top:.2f}h{-width:.2f}z"
        for number, (base, count) in enumerate(zip(base_B, count_B, strict=True))
        if count
    )


def lines(title: str, curves: Sequence[Curve], *, x_label: str, y_label: str) -> Plot | None:
    """Curves over one axis; null without a point."""
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return None
    x = _scale(x for curve in drawn for x, _ in curve.points)
    bounds = [bound for curve in drawn for pair in curve.bounds.values() for bound in pair]
    y = _scale([*(y for curve in drawn for _, y in curve.points), *bounds], is_up=True)
    shapes = [shape for curve in sorted(drawn, key=lambda one: not one.is_muted) for shape in _curve(curve, x, y)]
    text = "; ".join(
        f"{_short(curve.name)}: {', '.join(f'{y:.2f} at {x:g}' for x, y in curve.points)}" for curve in drawn
    )
    is_counted = all(float(value).is_integer() for curve in drawn for value, _ in curve.points)
    x_ticks = [replace(tick, text=f"{float(tick.text):g}") for tick in x.ticks()]
    x_ticks = [tick for tick in x_ticks if not is_counted or float(tick.text).is_integer()]
    return Plot(
        title=title, description=f"{title}. {text}.", shapes=shapes, x_ticks=x_ticks, y_ticks=y.ticks(),
        x_label=x_label, y_label=y_label,
    )  # fmt: skip


def _curve(curve: Curve, x: _Scale, y: _Scale) -> list[Shape]:
    places = [(x.at(one), y.at(other)) for one, other in curve.points]
    prefix: Literal["", "muted-"] = "muted-" if curve.is_muted else ""
    path = "M" + "L".join(f"{one} {other}" for one, other in places)
    shapes = [Shape(kind="muted" if curve.is_muted else "line", path=path, title=curve.name)]
    shapes += [
        Shape(kind="error", path=f"M{x.at(one)} {y.at(low)}V{y.at(high)}", title=f"95 %: {low:.2f} to {high:.2f}")
        for one, (low, high) in curve.bounds.items()
    ]
    for (one, other), place in zip(curve.points, places, strict=True):
        kind: Kind = "muted-dot" if prefix else "dot"
        shapes.append(Shape(kind=kind, path=_dot(place), title=f"{curve.name}: {other:.2f} at {one:g}"))
    return shapes


def _dot(place: Point) -> str:
    """A line of no length, whose round caps are a circle at any stretch."""
    return f"M{place[0]} {place[1]}h0"


def _short(name: str) -> str:
    return shown(name, most=80)


def scatter(title: str, points: Sequence[tuple[str, Point, bool]], *, x_label: str, y_label: str) -> Plot | None:
    """Named points, some of them on the front, which a line joins; null without a point."""
    if not points:
        return None
    x = _scale(point[0] for _, point, _ in points)
    y = _scale((point[1] for _, point, _ in points), is_up=True)
    shapes = [
        Shape(kind="dot" if is_front else "muted-dot", path=_dot((x.at(point[0]), y.at(point[1]))), title=name)
        for name, point, is_front in points
    ]
    front = sorted(point for _, point, is_front in points if is_front)
    path = "M" + "L".join(f"{x.at(one)} {y.at(other)}" for one, other in front)
    shapes.insert(0, Shape(kind="line", path=path, title="Pareto front"))
    text = "; ".join(f"{_short(name)}: {one:.3g}, {other:.2f}" for name, (one, other), _ in points)
    return Plot(
        title=title, description=f"{title}: {x_label} and {y_label}. {text}.", shapes=shapes, x_ticks=x.ticks(),
        y_ticks=y.ticks(), x_label=x_label, y_label=y_label,
    )  # fmt: skip


def coordinates(title: str, columns: Mapping[str, Sequence[float | str]], names: Sequence[str]) -> Plot:
    """Parallel coordinates: a row for every column, a line for every name, the first of which is drawn strongly."""
    height = 100.0 / len(columns)
    places: list[list[float]] = []
    marks: list[Mark] = []
    for number, values in enumerate(columns.values()):
        middle = round((number + 0.5) * height, 2)
        row, texts = _row(values)
        places.append(row)
        marks += [Mark(text=text, x=at, y=middle) for text, at in texts]
    rows = [round((number + 0.5) * height, 2) for number in range(len(columns))]
    shapes = [Shape(kind="axis", path="".join(f"M0 {row}H100" for row in rows))]
    for number in reversed(range(len(names))):
        some = [(place[number], row) for place, row in zip(places, rows, strict=True)]
        path = "M" + "L".join(f"{one} {other}" for one, other in some)
        shapes.append(Shape(kind="line" if number == 0 else "muted", path=path, title=names[number]))
        shapes += [
            Shape(kind="dot" if number == 0 else "muted-dot", path=_dot(one), title=names[number]) for one in some
        ]
    ticks = [Mark(text=name, y=row) for name, row in zip(columns, rows, strict=True)]
    text = "; ".join(f"{name}: {', '.join(_short(str(value)) for value in values)}" for name, values in columns.items())
    return Plot(
        title=title, description=f"{title}. Trials {', '.join(names)}. {text}.", shapes=shapes, y_ticks=ticks,
        marks=marks, names_rows=True,
    )  # fmt: skip


def _row(values: Sequence[float | str]) -> tuple[list[float], list[tuple[str, float]]]:
    """Places of the values of a column, and the texts at some of them: both ends of numbers, every other value."""
    if all(isinstance(value, float) for value in values):
        numbers = [float(value) for value in values]
        scale = _scale(numbers, margin=0.08)
        return [scale.at(value) for value in numbers], [
            (f"{one:.4g}", scale.at(one)) for one in {min(numbers), max(numbers)}
        ]
    texts = sorted({str(value) for value in values})
    places = {text: round(100.0 * (number + 0.5) / len(texts), 2) for number, text in enumerate(texts)}
    return [places[str(value)] for value in values], list(places.items())
