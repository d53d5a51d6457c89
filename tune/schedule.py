"""Schedules: the thresholds of every iteration, given one by one or as shapes over the iterations.

In a run's settings, instead of a plain list with one mapping for each iteration::

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

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from engine.errors import nearest
from engine.selection.thresholds import Quantile, Thresholds
from engine.settings import build

_SHAPES = ("constant", "linear", "cosine", "step", "free")
_THRESHOLDS = tuple(field.name for field in fields(Thresholds))
_QUANTILE = tuple(field.name for field in fields(Quantile))


def resolve_schedule(schedule: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Thresholds, ...]:
    """The thresholds of every iteration, from a list with a mapping for each or from a mapping of shapes.

    The first iteration gets the first of a shape's two values, the last iteration the second; a single iteration gets
    the first. ``linear`` changes evenly, ``cosine`` along half a cosine, flat at both ends. ``step`` changes at
    iteration ``at`` (default: the first iteration after the middle), also to and from null or a quantile. ``free``
    lists a value, null or quantile for each iteration. Raises ``ValueError`` for anything else.
    """
    if not isinstance(schedule, Mapping):
        return tuple(build(Thresholds, entry) for entry in schedule)
    shapes = dict(schedule)
    num_iterations = shapes.pop("iterations", None)
    if not isinstance(num_iterations, int) or isinstance(num_iterations, bool) or num_iterations < 1:
        raise ValueError(
            f"schedule.iterations must be a whole number from 1 on, got {num_iterations!r}; write iterations: 2"
        )
    return tuple(_thresholds(shapes, number, num_iterations) for number in range(1, num_iterations + 1))


def resolve_shapes(schedule: Any) -> Any:  # noqa: ANN401 - what the user wrote
    """A mapping of shapes as the thresholds of every iteration; anything else as it is, for pydantic to check."""
    return resolve_schedule(schedule) if isinstance(schedule, Mapping) else schedule


def as_json(schedule: Iterable[Thresholds]) -> str:
    """A schedule as settings in JSON, without the thresholds that have their default."""
    default = asdict(Thresholds())
    return json.dumps(
        [{name: value for name, value in asdict(one).items() if value != default[name]} for one in schedule]
    )


def require_known(settings: Iterable[object], known: Sequence[str], where: str) -> None:
    """Raise ``ValueError`` for the first setting inside ``where`` that is not a known one."""
    for name in settings:
        if name not in known:
            raise ValueError(f"there is no setting {where}.{name}; {nearest(str(name), known)}")


def _thresholds(shapes: Mapping[str, Any], number: int, num_iterations: int) -> Thresholds:
    values: dict[str, Any] = {}
    for name, shape in shapes.items():
        if str(name).isdigit():
            raise ValueError(
                f"cannot set schedule.{name} (this schedule has shapes over the iterations); set a threshold by name"
            )
        if name not in _THRESHOLDS:
            known = ("iterations", *_THRESHOLDS)
            raise ValueError(f"there is no setting schedule.{name}; {nearest(str(name), known)}")
        values[name] = _value(shape, number, num_iterations, f"schedule.{name}")
    try:
        return Thresholds(**values)
    except ValueError as error:
        where = f"schedule, iteration {number}"
        raise ValueError(f"{where}: {error}") from None


def _value(shape: Any, number: int, num_iterations: int, where: str) -> Any:  # noqa: ANN401 - any setting's value
    """The value of a shape at an iteration; anything but a mapping is constant."""
    if not isinstance(shape, Mapping):
        return float(shape) if isinstance(shape, int) and not isinstance(shape, bool) else shape
    if "quantile" in shape:
        require_known(shape, _QUANTILE, where)
        values = {key: _value(item, number, num_iterations, f"{where}.{key}") for key, item in shape.items()}
        try:
            return Quantile(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    name = _shape_name(shape, where)
    require_known(shape, ("step", "at") if name == "step" else (name,), where)
    if name == "constant":
        return _value(shape["constant"], number, num_iterations, where)
    if name == "free":
        return _value(_free(shape["free"], num_iterations, where)[number - 1], number, num_iterations, where)
    ends = shape[name]
    if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
        raise ValueError(f"{where}.{name} must be its first and its last value, got {ends!r}; write {name}: [2, 8]")
    if name == "step":
        at = _step_at(shape, num_iterations, where)
        return _value(ends[number >= at], number, num_iterations, where)
    return _between(name, ends, number, num_iterations, where)


def _shape_name(shape: Mapping[str, Any], where: str) -> str:
    names = [name for name in shape if name != "at"]
    if len(names) == 1 and names[0] in _SHAPES:
        return str(names[0])
    if unknown := [str(name) for name in names if name not in _SHAPES]:
        raise ValueError(f"{where}: there is no shape {unknown[0]!r}; {nearest(unknown[0], (*_SHAPES, 'quantile'))}")
    raise ValueError(f"{where} must be one shape, got {names}; give one of {', '.join(_SHAPES)}, or quantile")


def _free(values: Any, num_iterations: int, where: str) -> Sequence[Any]:  # noqa: ANN401 - what the user wrote
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num_iterations:
        raise ValueError(
            f"{where}.free must be a list of {num_iterations} values, got {values!r}; give one for each iteration"
        )
    return values


def _between(name: str, ends: Sequence[Any], number: int, num_iterations: int, where: str) -> float:
    if not all(is_number(end) for end in ends):
        raise ValueError(f"{where}.{name} must be two finite numbers, got {ends!r}; use step for other values")
    first, last = float(ends[0]), float(ends[1])
    fraction = (number - 1) / (num_iterations - 1) if num_iterations > 1 else 0.0
    if name == "cosine":
        fraction = (1.0 - math.cos(math.pi * fraction)) / 2.0
    return first * (1.0 - fraction) + last * fraction


def is_number(value: object) -> bool:
    """True for a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _step_at(shape: Mapping[str, Any], num_iterations: int, where: str) -> int:
    at = shape.get("at")
    if at is None:
        return (num_iterations + 1) // 2 + 1
    if not isinstance(at, int) or isinstance(at, bool) or not 2 <= at <= num_iterations:
        raise ValueError(
            f"{where}.at must be an iteration from 2 to {num_iterations}, got {at!r}; choose one, or leave at out"
        )
    return at
