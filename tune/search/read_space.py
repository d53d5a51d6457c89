"""Reading a space of schedules from a search's settings; all that could not work is refused here, before any trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from engine.errors import nearest
from engine.selection.thresholds import Thresholds
from tune.schedule import is_number, require_known
from tune.search.space import SHAPES, Choice, QuantileRange, Range, Space, is_drawn, num_steps


def read_space(schedule: Mapping[str, Any], iterations: int) -> Space:
    """The space of a search's ``schedule``; ``ValueError`` if it is none, or if some of its schedules cannot work."""
    require_known(schedule, [one.name for one in fields(Thresholds)], "schedule")
    space = Space(iterations=iterations, thresholds={name: _entry(name, entry) for name, entry in schedule.items()})
    for name in space.thresholds:
        for chooser in _corners(space, name):
            space.draw(chooser)
    if not any(is_drawn(entry) for entry in space.thresholds.values()):
        raise ValueError(
            "schedule must have something to search, got fixed values alone; give a threshold a range, such as "
            "min_re_sdr_db: {between: [0, 20]}"
        )
    return space


class _Corner:
    """A chooser that takes one end of every range, and the option with number ``position`` of one threshold."""

    def __init__(self, name: str, position: int, *, high: bool) -> None:
        self._name, self._position, self._high = name, position, high
        self.num_options = 1

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return high if self._high else low

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        if name.partition(".")[0] != self._name:
            return options[0]
        self.num_options = len(options)
        return options[self._position]

    def integer(self, name: str, low: int, high: int) -> int:
        return high if self._high else low


def _corners(space: Space, name: str) -> Iterator[_Corner]:
    for high in (False, True):
        first = _Corner(name, 0, high=high)
        yield first
        yield from (_Corner(name, position, high=high) for position in range(1, first.num_options))


def _entry(name: str, entry: Any) -> Any:  # noqa: ANN401 - any setting's value
    where = f"schedule.{name}"
    if not isinstance(entry, Mapping):
        return entry
    if "between" in entry:
        return _range(entry, where)
    if "choose" in entry:
        require_known(entry, ("choose",), where)
        return _choice(entry["choose"], where)
    inner = entry.get("quantile")
    if isinstance(inner, Mapping) and ("between" in inner or "choose" in inner):
        require_known(entry, ("quantile", "by_label"), where)
        drawn = _entry(f"{name}.quantile", inner)
        return QuantileRange(quantile=drawn, by_label=entry.get("by_label", False))
    return entry


def _range(entry: Mapping[str, Any], where: str) -> Range:
    require_known(entry, ("between", "step", "shapes", "or"), where)
    ends = entry["between"]
    if not isinstance(ends, Sequence) or len(ends) != 2 or not all(map(is_number, ends)) or not ends[0] < ends[1]:
        raise ValueError(f"{where}.between must be the lowest and the highest number, got {ends!r}; write [0, 20]")
    low, high = map(float, ends)
    step = entry.get("step")
    if step is not None and not (is_number(step) and 0 < step <= high - low):
        raise ValueError(
            f"{where}.step must be above 0 and at most {high - low:g}, got {step!r}; choose another, or leave it out"
        )
    if entry.get("or") is not None:
        raise ValueError(f"{where}.or must be null, got {entry['or']!r}; list several values with choose: [...]")
    if step is not None:
        high = low + num_steps(low, high, step) * step
    return Range(low=low, high=high, step=step, shapes=_shapes(entry, where), may_be_off="or" in entry)


def _shapes(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    shapes = entry.get("shapes", SHAPES)
    if not isinstance(shapes, Sequence) or isinstance(shapes, str) or not shapes:
        raise ValueError(f"{where}.shapes must be a list of shapes, got {shapes!r}; choose among {', '.join(SHAPES)}")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"{where}: there is no shape {shape!r}; {nearest(str(shape), SHAPES)}")
    return tuple(dict.fromkeys(shapes))


def _choice(options: Any, where: str) -> Choice:  # noqa: ANN401 - what the user wrote
    if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        raise ValueError(f"{where}.choose must be a list of values, got {options!r}; write it like [null, 0.3, 0.5]")
    for option in options:
        if not (option is None or isinstance(option, bool) or is_number(option)):
            raise ValueError(f"{where}.choose must have null, numbers, true or false, got {option!r}; correct it")
    return Choice(options=tuple(options))
