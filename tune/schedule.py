"""A schedule as a function of the iteration: each threshold constant, linear, cosine, a step, or free at each.

In a run's settings, beside the plain list of one mapping an iteration::

    schedule:
      iterations: 3
      min_remix_snr_db: 3
      min_estimated_si_sdr_db: {linear: [2, 8]}
      label_floor_fraction: {cosine: [0.5, 0.2]}
      min_re_sdr_db: {step: [10, 15], at: 2}
      min_stem_level_db: {free: [-30, -20, -25]}
      max_rival_leak_db: {quantile: {linear: [0.9, 0.6]}, by_label: true}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from engine.errors import nearest
from engine.selection.thresholds import Quantile, Thresholds

_SHAPES = ("constant", "linear", "cosine", "step", "free")
_SETTINGS = tuple(field.name for field in fields(Thresholds))
_QUANTILE = tuple(field.name for field in fields(Quantile))


def resolve(schedule: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Thresholds, ...]:
    """The thresholds of every iteration, from a mapping of shapes or from a list with a mapping an iteration.

    Of n iterations, the first has the first of a shape's two values and the last has the second. ``linear`` goes
    evenly, ``cosine`` by half a cosine, flat at both ends. ``step`` changes at iteration ``at`` (2 to n; default: in
    the second half, of which the middle of an odd n is no part) and may step to and from null or a quantile. Where n is
    1, the first value holds. ``free`` has a value, null or quantile for each iteration. Raises ``ValueError`` for what
    is no threshold, no shape or no value of it.
    """
    if not isinstance(schedule, Mapping):
        return tuple(_thresholds(dict(entry), number, len(schedule)) for number, entry in enumerate(schedule, 1))
    shapes = dict(schedule)
    num_iterations = shapes.pop("iterations", None)
    if not isinstance(num_iterations, int) or isinstance(num_iterations, bool) or num_iterations < 1:
        raise ValueError(f"schedule.iterations is {num_iterations!r}; say how many, such as iterations: 2")
    return tuple(_thresholds(shapes, number, num_iterations) for number in range(1, num_iterations + 1))


def _thresholds(shapes: Mapping[str, Any], number: int, num_iterations: int) -> Thresholds:
    values: dict[str, Any] = {}
    for name, shape in shapes.items():
        where = f"schedule.{name}"
        if str(name).isdigit():
            raise ValueError(f"{where}: this schedule is a function of the iteration; set a threshold of it by name")
        if name not in _SETTINGS:
            raise ValueError(f"there is no setting {where}; {nearest(str(name), ('iterations', *_SETTINGS))}")
        values[name] = _value(shape, number, num_iterations, where)
    try:
        return Thresholds(**values)
    except ValueError as error:
        raise ValueError(f"schedule, iteration {number}: {error}") from None


def _value(shape: Any, number: int, num_iterations: int, where: str) -> Any:  # noqa: ANN401 - any setting's value
    """What a shape is at an iteration; anything but a mapping is constant."""
    if not isinstance(shape, Mapping):
        return float(shape) if isinstance(shape, int) and not isinstance(shape, bool) else shape
    if "quantile" in shape:
        _only(shape, _QUANTILE, where)
        values = {key: _value(item, number, num_iterations, f"{where}.{key}") for key, item in shape.items()}
        try:
            return Quantile(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    names = [name for name in shape if name != "at"]
    if len(names) != 1 or names[0] not in _SHAPES:
        unknown = next((str(name) for name in names if name not in _SHAPES), "")
        told = nearest(unknown, (*_SHAPES, "quantile")) if unknown else f"give one of {', '.join(_SHAPES)}, or quantile"
        raise ValueError(f"{where}: there is no shape {unknown!r}; {told}")
    _only(shape, ("step", "at") if "step" in shape else names, where)
    if "constant" in shape:
        return _value(shape["constant"], number, num_iterations, where)
    if "free" in shape:
        return _value(_free(shape["free"], num_iterations, where)[number - 1], number, num_iterations, where)
    return _between(shape, number, num_iterations, where)


def _free(values: Any, num_iterations: int, where: str) -> Sequence[Any]:  # noqa: ANN401 - what the user wrote
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num_iterations:
        raise ValueError(f"{where}: free is {values!r}; give a list of {num_iterations}, a value for each iteration")
    return values


def _between(shape: Mapping[str, Any], number: int, num_iterations: int, where: str) -> Any:  # noqa: ANN401 - as above
    name = next(name for name in _SHAPES if name in shape)
    ends = shape[name]
    if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
        raise ValueError(f"{where}: {name} is {ends!r}; give its first and its last value, such as {name}: [2, 8]")
    if name == "step":
        at = _step_at(shape, num_iterations, where)
        return _value(ends[number >= at], number, num_iterations, where)
    if not all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in ends):
        raise ValueError(f"{where}: {name} is {ends!r}; it goes between two finite numbers, step between anything")
    first, last = ends
    share = (number - 1) / (num_iterations - 1) if num_iterations > 1 else 0.0
    if name == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return first * (1.0 - share) + last * share


def _step_at(shape: Mapping[str, Any], num_iterations: int, where: str) -> int:
    at = shape.get("at")
    if at is None:
        return (num_iterations + 1) // 2 + 1
    if not isinstance(at, int) or isinstance(at, bool) or not 2 <= at <= num_iterations:
        raise ValueError(f"{where}: at is {at!r}; give an iteration from 2 to {num_iterations}, or leave it out")
    return at


def _only(shape: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in shape:
        if key not in known:
            raise ValueError(f"there is no setting {where}.{key}; {nearest(str(key), known)}")
