"""Settings: frozen config classes whose ranges pydantic checks, and how YAML and ``--set`` fill them.

A config class stands next to the code that it configures::

    @config
    class PassConfig:
        clip_s: Positive = 10.0
        \"\"\"Longer recordings are cut into clips of this length.\"\"\"
        batch_s: Annotated[Positive, RUNTIME] = 80.0
        \"\"\"Audio in one call of the separator, in seconds.\"\"\"

A field marked ``RUNTIME`` changes how fast the work goes, not its result; :func:`deciding` leaves it out. A field
marked ``NEWER`` is younger than folders that users have; :func:`deciding` leaves it out while it has its default.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic import BeforeValidator, Field

from engine.errors import nearest
from engine.storage.documents import MAX_DEPTH, MAX_SETTINGS_BYTES, bounded, parse_yaml

Tree = dict[str, Any]
"""Settings as YAML has them: mappings, lists, text, numbers, true, false and null."""
T = TypeVar("T")


class Runtime:
    """Marks a setting that does not decide a result; see :data:`RUNTIME`."""

    def __repr__(self) -> str:
        return "RUNTIME"


RUNTIME = Runtime()
"""``Annotated[int, RUNTIME]``: the result is the same whatever the value, so a resumed run may change it."""


class Newer:
    """Marks a setting that older folders do not have; see :data:`NEWER`."""

    def __repr__(self) -> str:
        return "NEWER"


NEWER = Newer()
"""``Annotated[int, NEWER]``: the default is what was done before the setting was there, so that old folders fit."""


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}; give a number")
    return value


Number = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]
"""A finite number."""
Positive = Annotated[Number, Field(gt=0)]
"""A finite number above 0."""
NonNegative = Annotated[Number, Field(ge=0)]
"""A finite number from 0 on."""
Fraction = Annotated[Number, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1)]
"""A whole number from 1 on."""
CountOrZero = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)]
"""A whole number from 0 on."""
Seed = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)]
"""A whole number from 0 on that seeds random draws."""

_OPTIONS = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(kind: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only config class, checked as it is made.

    It is a dataclass: ``dataclasses.replace``, ``asdict`` and ``fields`` work, and ``replace`` checks again. A wrong
    type, range or name raises ``ValueError`` in the form "X must be …, got …; remedy".
    """
    checked = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_OPTIONS)(kind)
    init = checked.__init__

    @functools.wraps(init)
    def checked_init(self: object, *args: Any, **values: Any) -> None:  # noqa: ANN401 - any setting's value
        try:
            init(self, *args, **values)
        except pydantic.ValidationError as error:
            raise ValueError(_explain(checked, error)) from None

    checked.__init__ = checked_init  # type: ignore[method-assign]
    found: type[T] = checked  # type: ignore[assignment]
    return found


def build(kind: type[T], settings: T | Mapping[str, Any]) -> T:
    """A config object from plain settings; a wrong type, range or key is a ``ValueError`` that names the setting.

    A config object is returned as it is.
    """
    if isinstance(settings, kind):
        return settings
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must be a mapping of names to values, got {settings!r}; give {{name: value}}")
    return kind(**{str(key): value for key, value in settings.items()})


def plain(settings: Any) -> Any:  # noqa: ANN401 - walks any JSON-like value
    """A config object, or any part of one, as JSON and YAML have it: mappings and lists."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    if isinstance(settings, dict):
        return {key: plain(value) for key, value in settings.items()}
    return [plain(value) for value in settings] if isinstance(settings, (list, tuple)) else settings


def deciding(settings: Any, kind: type | None = None) -> Tree:  # noqa: ANN401 - a config object or plain settings
    """The settings that decide a result, as plain values: all but those that are marked :data:`RUNTIME`.

    Those that are marked :data:`NEWER` are left out while they have their default. Takes a config object, or plain
    settings and their config class ``kind``.
    """
    kind = kind or type(settings)
    found: Tree = {}
    for key, value in plain(settings).items():
        field = fields_of(kind).get(key)
        is_default = field is not None and NEWER in field.metadata and value == default_of(field)
        if field is None or not (RUNTIME in field.metadata or is_default):
            inner = config_class(field.annotation) if field is not None else None
            found[key] = deciding(value, inner) if inner is not None and isinstance(value, dict) else value
    return found


def read_yaml(path: str | Path, example: str) -> Tree:
    """The mapping in a YAML file; ``ValueError`` where it is none, with ``example`` of what it should have."""
    try:
        with open(path, "rb") as file:
            settings = parse_yaml(bounded(file, MAX_SETTINGS_BYTES))
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); give the path of a YAML file") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path} as YAML ({error}); correct it") from None
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ValueError(f"{path} must be a mapping of settings, got {kind}; write it like `{example}`")
    return settings


def merged(base: Tree, over: Tree) -> Tree:
    """Settings ``base`` with those of ``over`` in their place; inner mappings are merged, all else is replaced."""
    both = dict(base)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def override(settings: Tree, overrides: Iterable[str]) -> Tree:
    """A copy of settings with each ``key.sub=value`` applied; the value is read as YAML, a list index is a number."""
    settings = plain(settings)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set must be key=value, got {text!r}; write it like distil.steps=200")
        keys = key.strip().split(".")
        if len(keys) > MAX_DEPTH:
            raise ValueError(f"--set must have a key of at most {MAX_DEPTH} parts, got {len(keys)}; correct it")
        try:
            read = parse_yaml(value)
        except ValueError as error:
            remedy = f"quote it, such as 'key=\"a: b\"' ({error})"
            raise ValueError(f"--set must have a YAML value, got {text!r}; {remedy}") from None
        _put(settings, keys, read, text)
    return settings


def _put(node: Any, keys: list[str], value: object, text: str) -> None:  # noqa: ANN401 - walks any JSON-like value
    for key in keys[:-1]:
        if isinstance(node, dict) and not isinstance(node.get(key), (dict, list)):
            node[key] = {}
        node = node[_position(node, key, text)]
    node[_position(node, keys[-1], text)] = value


def _position(node: object, key: str, text: str) -> Any:  # noqa: ANN401 - a key or an index
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ValueError(f"cannot set .{key} of {text} ({node!r} has no settings inside); leave out .{key}")
    if not key.isdigit() or int(key) >= len(node):
        raise ValueError(f"--set must have a position from 0 to {len(node) - 1}, got {key!r} in {text}; correct it")
    return int(key)


def fields_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - any type
    """Fields of a config class by name, as pydantic describes them; empty for any other type."""
    found: dict[str, Any] = getattr(kind, "__pydantic_fields__", {})
    return found


def config_class(annotation: Any) -> type | None:  # noqa: ANN401 - any type annotation
    """The config class that a field's annotation names, alone or with null; None for any other annotation."""
    inside = [one for one in typing.get_args(annotation) if one is not type(None)]
    kind = inside[0] if len(inside) == 1 and typing.get_origin(annotation) is not tuple else annotation
    return kind if isinstance(kind, type) and fields_of(kind) else None


@contextmanager
def named_in(section: str, kind: type) -> Iterator[None]:
    """Errors of a ``with`` block name the settings of a config class as the settings around it do.

    In a run, whose ``section`` "engine" has them, ``min_labels=1`` becomes ``engine.min_labels=1``.
    """
    words = [name if "_" in name else rf"{name}(?=[.=]\w)" for name in fields_of(kind)]  # "engine" may be plain English
    setting = re.compile(rf"(?<![\w./-])({'|'.join(words)})\b")
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.args = tuple(setting.sub(rf"{section}.\1", one) if isinstance(one, str) else one for one in error.args)
        raise


def _explain(kind: type, error: pydantic.ValidationError) -> str:
    """The most specific of pydantic's errors, in the form "X must be …, got …; remedy"."""
    errors = error.errors()
    worst = max(errors, key=lambda one: (one["type"] == "value_error", len(one["loc"]), one["type"] != "missing"))
    names, field = _found_field(kind, worst["loc"], has_unknown=worst["type"] == "unexpected_keyword_argument")
    where = ".".join(names) or kind.__name__
    cause, kind_of_error = worst.get("ctx", {}), worst["type"]
    if kind_of_error == "value_error":
        reason = str(cause.get("error", worst["msg"]))
        if where in reason:
            return reason
        return f"{where} {reason}" if reason.startswith("must ") else f"{where}: {reason}" if names else reason
    if kind_of_error == "unexpected_keyword_argument":
        parent = _found_field(kind, worst["loc"][:-1])[1]
        known = fields_of(kind) if parent is None else _inner_fields(parent.annotation)
        return f"there is no setting {where}; {nearest(names[-1], known)}"
    if kind_of_error in ("missing", "missing_argument"):
        return f"{where} must be set, got nothing; set {where}"
    return f"{where} must be {rule_of(worst)}, got {worst['input']!r}; {_remedy(field)}"


def rule_of(problem: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    """The rule that a value breaks, as the end of "X must be …"."""
    if (rule := _RULES.get(problem["type"])) is not None:
        return rule.format(**problem.get("ctx", {}))
    given = str(problem["msg"]).removeprefix("Input should be ")
    return given[:1].lower() + given[1:]


_RULES = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "finite",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "literal_error": "one of {expected}",
    "dataclass_type": "a mapping of settings",
    "unexpected_positional_argument": "given by name",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "list_type": "a list",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_unicode": "text in UTF-8",
    "string_pattern_mismatch": "text of the form {pattern}",
}


def _found_field(kind: Any, loc: tuple[int | str, ...], *, has_unknown: bool = False) -> tuple[list[str], Any]:  # noqa: ANN401 - any config class
    """The names of a setting on the way to an error, and the field; types of a union that pydantic adds are left out.

    ``has_unknown``: the last name is one that the config class does not have.
    """
    names: list[str] = []
    field, known = None, fields_of(kind)
    for number, part in enumerate(loc):
        if part in known:
            field = known[str(part)]
            known = _inner_fields(field.annotation)
        elif not isinstance(part, int) and not (has_unknown and number == len(loc) - 1):
            continue
        names.append(str(part))
    return names, field


def _inner_fields(annotation: Any) -> dict[str, Any]:  # noqa: ANN401 - any type annotation
    found = dict(fields_of(annotation))
    for inside in typing.get_args(annotation):
        found |= _inner_fields(inside)
    return found


def default_of(field: Any) -> Any:  # noqa: ANN401 - pydantic's FieldInfo, and the default of any setting
    """The default of a setting, as plain values; None if it has none."""
    return None if field.is_required() else plain(field.get_default(call_default_factory=True))


def _remedy(field: Any) -> str:  # noqa: ANN401 - pydantic's FieldInfo
    default = None if field is None else default_of(field)
    return "correct it" if default is None or isinstance(default, (dict, list)) else f"choose one such as {default}"
