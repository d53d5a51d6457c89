"""Spaces of schedules: for each threshold a fixed value, or what may be drawn for it.

In a search's settings (:mod:`tune.search.read_space` reads them)::

    schedule:
      min_re_sdr_db: {between: [0, 20]}                         # any shape
      min_remix_snr_db: {between: [0, 15], step: 0.5, shapes: [constant, free], or: null}
      label_floor_fraction: {choose: [null, 0.3, 0.5]}          # one for all iterations
      max_rival_leak_db: {quantile: {between: [0.3, 0.9]}, by_label: true}
      min_stem_level_db: -20                                    # fixed; any shape of tune.schedule
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from engine.selection.thresholds import Quantile, Thresholds
from tune.schedule import is_number, resolve_schedule

SHAPES = ("constant", "linear", "cosine", "step", "free")
"""Shapes over the iterations that may be drawn."""
OFF = "off"
"""Drawn instead of a shape to switch a threshold off."""
_UNITS = ("_db", "_fraction", "_dbfs")


class Chooser(Protocol):
    """Chooses the parameters of a schedule; each is named after its threshold, such as ``min_re_sdr_db.first``."""

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        """A number of a range, on its grid if ``step`` is set."""

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        """One of the options."""

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, in one of several shapes over the iterations."""

    low: float
    """Lowest number."""
    high: float
    """Highest number."""
    step: float | None = None
    """Distance between the numbers that may be drawn, from ``low`` on; null: any number."""
    shapes: tuple[str, ...] = SHAPES
    """Shapes that may be drawn."""
    may_be_off: bool = False
    """Null may be drawn too."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - a part of a schedule
        """A shape of :mod:`tune.schedule`, or null."""
        shapes = list(self.shapes) if iterations > 1 else ["constant"]
        shapes += [OFF] if self.may_be_off else []
        shape = chooser.choice(f"{name}.shape", shapes) if len(shapes) > 1 else shapes[0]
        if shape == OFF:
            return None
        if shape == "constant":
            return self._number(f"{name}.value", chooser)
        if shape == "free":
            return {"free": [self._number(f"{name}.{number}", chooser) for number in range(1, iterations + 1)]}
        drawn: dict[str, Any] = {shape: [self._number(f"{name}.{end}", chooser) for end in ("first", "last")]}
        if shape == "step" and iterations > 2:
            drawn["at"] = chooser.integer(f"{name}.at", 2, iterations)
        return drawn

    def _number(self, name: str, chooser: Chooser) -> float:
        return chooser.number(name, self.low, self.high, self.step)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values, the same in every iteration."""

    options: tuple[Any, ...]
    """Null, numbers, or true and false."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - any setting's value
        """The chosen value."""
        return chooser.choice(f"{name}.choice", self.options)


@dataclass(frozen=True, kw_only=True)
class QuantileRange:
    """A quantile whose number is drawn."""

    quantile: Range | Choice
    """Numbers from 0 to 1."""
    by_label: bool = False
    """See :class:`engine.selection.thresholds.Quantile`."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - a part of a schedule
        """The quantile as a schedule has it, or null."""
        drawn = self.quantile.draw(name, chooser, iterations)
        return None if drawn is None else {"quantile": drawn, "by_label": self.by_label}


@dataclass(frozen=True, kw_only=True)
class Space:
    """All schedules that may be drawn."""

    iterations: int
    """Length of every schedule."""
    thresholds: Mapping[str, Any]
    """By name: a :class:`Range`, :class:`Choice`, :class:`QuantileRange`, or a fixed value or shape."""

    def draw(self, chooser: Chooser) -> tuple[Thresholds, ...]:
        """A schedule; ``ValueError`` if the drawn thresholds cannot stand together."""
        shapes = {
            name: entry.draw(name, chooser, self.iterations) if is_drawn(entry) else entry
            for name, entry in self.thresholds.items()
        }
        return resolve_schedule({"iterations": self.iterations, **shapes})


def is_drawn(entry: object) -> bool:
    """True if an entry of a space is drawn, false if it is fixed."""
    return isinstance(entry, Range | Choice | QuantileRange)


class FixedChooser:
    """A chooser that repeats parameters which were drawn before."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return float(self._params[name])

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        return self._params[name]

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._params[name])


class RandomChooser:
    """A chooser that draws uniformly."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        if step is None:
            return float(self._rng.uniform(low, high))
        return low + int(self._rng.integers(num_steps(low, high, step) + 1)) * step

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        return options[int(self._rng.integers(len(options)))]

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


def num_steps(low: float, high: float, step: float) -> int:
    """Steps of a grid that fit between two ends."""
    return math.floor((high - low) / step + 1e-9)


def describe(schedule: Sequence[Thresholds]) -> str:
    """A schedule in short, such as ``re_sdr 10 > 15, label_floor 0.5``, without thresholds at their default."""
    parts = []
    for one in fields(Thresholds):
        values = [getattr(thresholds, one.name) for thresholds in schedule]
        if all(value == one.default for value in values):
            continue
        texts = [_value_text(value) for value in values]
        parts.append(f"{_short_name(one.name)} {texts[0] if len(set(texts)) == 1 else ' > '.join(texts)}")
    return ", ".join(parts)


def _short_name(name: str) -> str:
    name = name.removeprefix("min_")
    return next((name.removesuffix(unit) for unit in _UNITS if name.endswith(unit)), name)


def _value_text(value: Any) -> str:  # noqa: ANN401 - any setting's value
    if value is None:
        return OFF
    if isinstance(value, Quantile):
        return f"q{value.quantile:.3g}" + (" by label" if value.by_label else "")
    return f"{value:.4g}" if is_number(value) else str(value).lower()
