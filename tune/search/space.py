"""The space of schedules that a search walks: for each threshold what is fixed, and what may be drawn.

In a search's settings::

    schedule:
      min_re_sdr_db: {between: [0, 20]}                         # any shape
      min_remix_snr_db: {between: [0, 15], step: 0.5, shapes: [constant, free], or: null}
      label_floor_fraction: {choose: [null, 0.3, 0.5]}          # one for all iterations
      max_rival_leak_db: {quantile: {between: [0.3, 0.9]}, by_label: true}
      min_stem_level_db: -20                                    # fixed; any shape of tune.schedule
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from engine.errors import nearest
from engine.selection.thresholds import Quantile, Thresholds
from tune.schedule import resolve

SHAPES = ("constant", "linear", "cosine", "step", "free")
OFF = "off"
_BETWEEN = ("between", "step", "shapes", "or")
_UNITS = ("_db", "_fraction", "_dbfs")


class Chooser(Protocol):
    """Who decides what is drawn; names are those of a threshold and what of it, such as ``min_re_sdr_db.first``."""

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        """A number of a range, on its grid where it has one."""

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        """One of the options."""

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number of a range with its ends."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, in some shape over the iterations."""

    low: float
    """The least."""
    high: float
    """The greatest."""
    step: float | None = None
    """Distance of the numbers that may be drawn, from ``low`` on; null: all of them."""
    shapes: tuple[str, ...] = SHAPES
    """How it may go over the iterations."""
    may_be_off: bool = False
    """Whether it may also be null."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - what a schedule may hold
        """A shape of ``tune.schedule``, or null."""
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
    """One of some values, the same at every iteration."""

    options: tuple[Any, ...]
    """Null, numbers, or true and false."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - any setting's value
        """The value."""
        return chooser.choice(f"{name}.choice", self.options)


@dataclass(frozen=True, kw_only=True)
class QuantileRange:
    """A quantile whose number is drawn."""

    quantile: Range | Choice
    """From 0 to 1."""
    by_label: bool = False
    """As of ``engine.thresholds.Quantile``."""

    def draw(self, name: str, chooser: Chooser, iterations: int) -> Any:  # noqa: ANN401 - what a schedule may hold
        """The quantile as a schedule has it, or null."""
        drawn = self.quantile.draw(name, chooser, iterations)
        return None if drawn is None else {"quantile": drawn, "by_label": self.by_label}


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which schedules there are; see :func:`read_space`."""

    iterations: int
    """Of every schedule."""
    thresholds: Mapping[str, Any]
    """By name: a :class:`Range`, :class:`Choice`, :class:`QuantileRange`, or what is fixed."""

    def draw(self, chooser: Chooser) -> tuple[Thresholds, ...]:
        """A schedule; ``ValueError`` where the thresholds that were drawn cannot be together."""
        shapes = {
            name: entry.draw(name, chooser, self.iterations) if isinstance(entry, _DRAWN) else entry
            for name, entry in self.thresholds.items()
        }
        return resolve({"iterations": self.iterations, **shapes})

    def free_numbers(self) -> dict[str, tuple[float, float]]:
        """Bounds, by parameter, of the numbers that belong to one iteration alone and are there in every draw."""
        found: dict[str, tuple[float, float]] = {}
        for name, entry in self.thresholds.items():
            inner = entry.quantile if isinstance(entry, QuantileRange) else entry
            if isinstance(inner, Range) and inner.shapes == ("free",) and not inner.may_be_off and self.iterations > 1:
                found |= {f"{name}.{number}": (inner.low, inner.high) for number in range(1, self.iterations + 1)}
        return found


_DRAWN = (Range, Choice, QuantileRange)


class FixedChooser:
    """A chooser that takes what was drawn before."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        """As given, on the grid; ``ValueError`` where it is missing or out of the range."""
        value = float(self._found(name))
        if not low <= value <= high:
            raise ValueError(f"{name} is {value:g}; its range is {low:g} to {high:g}")
        return value if step is None else low + round((value - low) / step) * step

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        """As given; ``ValueError`` where it is missing or none of the options."""
        value = self._found(name)
        if value not in options:
            raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, options))}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """As given; ``ValueError`` where it is missing or out of the range."""
        value = int(self._found(name))
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; its range is {low} to {high}")
        return value

    def _found(self, name: str) -> Any:  # noqa: ANN401 - any setting's value
        if name not in self._params:
            raise ValueError(f"{name} is missing; {nearest(name, self._params)}")
        return self._params[name]


class RandomChooser:
    """A chooser that draws at random, all values alike, and keeps in ``params`` what it drew."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.params: dict[str, Any] = {}

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        """Uniform over the range or its grid."""
        if step is None:
            value = float(self._rng.uniform(low, high))
        else:
            value = low + int(self._rng.integers(_num_steps(low, high, step) + 1)) * step
        self.params[name] = value
        return value

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        """Each as likely as the next."""
        self.params[name] = options[int(self._rng.integers(len(options)))]
        return self.params[name]

    def integer(self, name: str, low: int, high: int) -> int:
        """Uniform, with both ends."""
        self.params[name] = int(self._rng.integers(low, high + 1))
        return int(self.params[name])


def _num_steps(low: float, high: float, step: float) -> int:
    return math.floor((high - low) / step + 1e-9)


def read_space(schedule: Mapping[str, Any], iterations: int) -> Space:
    """The space of a search's ``schedule``; ``ValueError`` where it is none, also if some of its schedules are not."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; give a whole number from 1 on")
    if not isinstance(schedule, Mapping):
        raise ValueError("schedule must be a mapping, such as `schedule: {min_re_sdr_db: {between: [0, 20]}}`")
    known = [one.name for one in fields(Thresholds)]
    for name in schedule:
        if name not in known:
            raise ValueError(f"there is no setting schedule.{name}; {nearest(str(name), known)}")
    space = Space(iterations=iterations, thresholds={name: _entry(name, told) for name, told in schedule.items()})
    for name in space.thresholds:
        for chooser in _corners(space, name):
            space.draw(chooser)
    if not any(isinstance(entry, _DRAWN) for entry in space.thresholds.values()):
        raise ValueError(
            "schedule has nothing to search: all of it is fixed; give a threshold a range, such as "
            "min_re_sdr_db: {between: [0, 20]}"
        )
    return space


class _Corner:
    """A chooser that takes the ends of all ranges, and of one threshold the nth of what it may be."""

    def __init__(self, name: str, turn: int, *, high: bool) -> None:
        self._name, self._turn, self._high = name, turn, high
        self.most = 1

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return high if self._high else low

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        if name.partition(".")[0] != self._name:
            return options[0]
        self.most = len(options)
        return options[self._turn]

    def integer(self, name: str, low: int, high: int) -> int:
        return high if self._high else low


def _corners(space: Space, name: str) -> Iterator[_Corner]:
    for high in (False, True):
        first = _Corner(name, 0, high=high)
        yield first
        yield from (_Corner(name, turn, high=high) for turn in range(1, first.most))


def _entry(name: str, told: Any) -> Any:  # noqa: ANN401 - any setting's value
    where = f"schedule.{name}"
    if not isinstance(told, Mapping):
        return told
    if "between" in told:
        return _range(told, where)
    if "choose" in told:
        _only(told, ("choose",), where)
        return _choice(told["choose"], where)
    inner = told.get("quantile")
    if isinstance(inner, Mapping) and ("between" in inner or "choose" in inner):
        _only(told, ("quantile", "by_label"), where)
        drawn = _entry(f"{name}.quantile", inner)
        return QuantileRange(quantile=drawn, by_label=told.get("by_label", False))
    return told


def _range(told: Mapping[str, Any], where: str) -> Range:
    _only(told, _BETWEEN, where)
    ends = told["between"]
    if not isinstance(ends, Sequence) or len(ends) != 2 or not all(map(_is_number, ends)) or not ends[0] < ends[1]:
        raise ValueError(f"{where}: between is {ends!r}; give the least and the greatest number, such as [0, 20]")
    low, high = map(float, ends)
    step = told.get("step")
    if step is not None and not (_is_number(step) and 0 < step <= high - low):
        raise ValueError(
            f"{where}: step is {step!r}; give a number above 0 and not above {high - low:g}, or leave it out"
        )
    shapes = told.get("shapes", SHAPES)
    if not isinstance(shapes, Sequence) or isinstance(shapes, str) or not shapes:
        raise ValueError(f"{where}: shapes is {shapes!r}; give a list of {', '.join(SHAPES)}, or leave it out for all")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"{where}: there is no shape {shape!r}; {nearest(str(shape), SHAPES)}")
    if told.get("or") is not None:
        raise ValueError(f"{where}: or is {told['or']!r}; give null, or one of several values with choose: [...]")
    if step is not None:
        high = low + _num_steps(low, high, step) * step
    return Range(low=low, high=high, step=step, shapes=tuple(dict.fromkeys(shapes)), may_be_off="or" in told)


def _choice(options: Any, where: str) -> Choice:  # noqa: ANN401 - what the user wrote
    if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        raise ValueError(f"{where}: choose is {options!r}; give a list of values, such as [null, 0.3, 0.5]")
    for option in options:
        if not (option is None or isinstance(option, bool) or _is_number(option)):
            raise ValueError(f"{where}: choose has {option!r}; give null, numbers, or true and false")
    return Choice(options=tuple(options))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _only(told: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in told:
        if key not in known:
            raise ValueError(f"there is no setting {where}.{key}; {nearest(str(key), known)}")


def describe(schedule: Sequence[Thresholds], *, without: Sequence[Thresholds] = ()) -> str:
    """A schedule in a few words, such as ``re_sdr 10 > 15, label_floor 0.5``; what is as in ``without`` is left out."""
    words = []
    for one in fields(Thresholds):
        values = [getattr(thresholds, one.name) for thresholds in schedule]
        if all(value == one.default for value in values) or values == [getattr(other, one.name) for other in without]:
            continue
        told = [_value(value) for value in values]
        words.append(f"{_short(one.name)} {told[0] if len(set(told)) == 1 else ' > '.join(told)}")
    return ", ".join(words)


def _short(name: str) -> str:
    name = name.removeprefix("min_")
    return next((name.removesuffix(unit) for unit in _UNITS if name.endswith(unit)), name)


def _value(value: Any) -> str:  # noqa: ANN401 - any setting's value
    if value is None:
        return OFF
    if isinstance(value, Quantile):
        return f"q{value.quantile:.3g}" + (" by label" if value.by_label else "")
    return f"{value:.3g}" if _is_number(value) else str(value).lower()
