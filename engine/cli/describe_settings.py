"""Settings in words: name, type, range, default and meaning of every field of a config class."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import annotated_types
import yaml

from engine.settings import RUNTIME, config_class, fields_of, plain

_TYPES = {float: "number", int: "whole number", bool: "true or false", str: "text", type(None): "null"}
_BOUNDS: dict[type, str] = {
    annotated_types.Gt: "above",
    annotated_types.Ge: "at least",
    annotated_types.Lt: "below",
    annotated_types.Le: "at most",
    annotated_types.MultipleOf: "a multiple of",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, as ``clearsep settings`` and its page print it."""

    name: str
    """Full name with dots, such as ``distil.mix.batch_size``."""
    type: str
    """Type in words."""
    range: str
    """Allowed values in words; empty if every value of the type is allowed."""
    default: str
    """Default as YAML writes it; ``required`` if there is none."""
    meaning: str
    """What the setting does."""
    is_runtime: bool
    """True if it changes how fast the work goes and nothing else."""


def describe_settings(kind: type, prefix: str = "", defaults: object = None) -> Iterator[Setting]:
    """Every setting of a config class and of the config classes inside it, in order.

    ``defaults`` is the config object whose values are the defaults; without it the class's own are.
    """
    for name, field in fields_of(kind).items():
        value = getattr(defaults, name) if defaults is not None else _default(field)
        inner = config_class(field.annotation)
        if inner is None or value is None:
            yield Setting(
                name=f"{prefix}{name}",
                type=_type_words(field.annotation) if inner is None else "settings or null",
                range=_range_words(field),
                default="required" if value is _REQUIRED else _yaml(value),
                meaning=field.description or "",
                is_runtime=RUNTIME in field.metadata,
            )
        if inner is not None:
            yield from describe_settings(inner, f"{prefix}{name}.", value)


_REQUIRED = object()


def _default(field: Any) -> object:  # noqa: ANN401 - pydantic's FieldInfo
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _type_words(annotation: Any) -> str:  # noqa: ANN401 - any type annotation
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_words(inside[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        return f"list of {_type_words(inside[0])}"
    if origin is dict:
        return "mapping"
    if inside:
        return ", ".join(dict.fromkeys(_type_words(one) for one in inside)).replace(", null", " or null")
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _range_words(field: Any) -> str:  # noqa: ANN401 - pydantic's FieldInfo
    """Bounds of a setting; of a union of types, those of the first type that has them."""
    bounds: dict[str, str] = {}
    for mark in [*field.metadata, *_marks(field.annotation)]:
        for bound in getattr(mark, "metadata", [mark]):
            if type(bound) in _BOUNDS:
                (limit,) = dataclasses.asdict(bound).values()
                bounds.setdefault(_BOUNDS[type(bound)], f"{limit:g}")
    return ", ".join(f"{words} {bounds[words]}" for words in _BOUNDS.values() if words in bounds)


def _marks(annotation: Any) -> list[Any]:  # noqa: ANN401 - any type annotation
    own = list(getattr(annotation, "__metadata__", ()))
    return own + [mark for inside in typing.get_args(annotation) for mark in _marks(inside)]


def _yaml(value: object) -> str:
    text: str = yaml.safe_dump(_changed(value), default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    return text


def _changed(value: Any) -> Any:  # noqa: ANN401 - any setting's value
    """A value as YAML has it; of config objects only the settings that are not the defaults of their class."""
    if isinstance(value, (list, tuple)):
        return [_changed(one) for one in value]
    if not fields_of(type(value)):
        return plain(value)
    fields = fields_of(type(value))
    return {name: _changed(given) for name in fields if (given := getattr(value, name)) != _default(fields[name])}
