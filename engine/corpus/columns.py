"""Columns of a list under other names: ``path=fname,labels=tags``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from engine.corpus.clips import ManifestRow

_NAMES = ("path", "labels", "label", "start_s", "end_s", "fold")
_Parts = list[tuple[str, str | None, str]]
"""Texts, each with the column that follows it and that column's format."""


class Columns:
    """Which columns of a list hold what this project reads: ``path``, ``labels`` (or ``label``), times and ``fold``.

    Given as text (``path=fname,labels=tags``) or as a mapping. A column is named, or numbered from 1 in a CSV without
    header. A value with braces is put together from columns: ``path=audio/fold{fold}/{name}.wav``; a format follows a
    colon as in Python, so ``{2:0>6}`` fills column 2 up with zeros.
    """

    def __init__(self, given: Mapping[str, str] | str | None = None) -> None:
        words = given.split(",") if isinstance(given, str) else [f"{name}={value}" for name, value in _items(given)]
        self._given: dict[str, _Parts] = {}
        for name, equals, value in (word.partition("=") for word in words if word.strip()):
            if name.strip() not in _NAMES or not equals or not value.strip():
                raise ValueError(
                    f"columns must be like path=fname,labels=tags, got {name}{equals}{value!r}; names are "
                    f"{', '.join(_NAMES)}"
                )
            self._given[name.strip()] = _parts(value.strip())
        hidden = {"labels", "label"} if {"labels", "label"} & set(self._given) else set[str]()
        self._others = [name for name in _NAMES if name not in self._given and name not in hidden]

    def required(self, *groups: tuple[str, ...]) -> Sequence[tuple[str, ...]]:
        """The columns that a list must have: for each group those that are given for it, else one of its names."""
        found = [group for group in groups if not set(group) & set(self._given)]
        fields = [field for parts in self._given.values() for _, field, _ in parts if field is not None]
        return [*((field,) for field in fields), *found]

    def taken(self, row: ManifestRow) -> ManifestRow:
        """The cells of a row under this project's names, and its error if it has one."""
        cells = {name: row[name] for name in self._others if name in row}
        for name, parts in self._given.items():
            if len(parts) == 1 and parts[0][0] == "" and not parts[0][2]:
                cells[name] = row.get(str(parts[0][1]))
            else:
                cells[name] = "".join(_filled(part, row) for part in parts)
        return cells | ({"error": row["error"]} if isinstance(row.get("error"), Exception) else {})


def _items(given: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in (given or {}).items()]


def _parts(value: str) -> _Parts:
    if "{" not in value:
        return [("", value, "")]
    try:
        parts = [(text, field, spec or "") for text, field, spec, _ in string.Formatter().parse(value)]
        for *_, spec in parts:
            format("", spec)
    except ValueError as error:
        raise ValueError(f"columns must have braces like {{fname}}.wav, got {value!r} ({error}); correct it") from error
    if any(field == "" for _, field, _ in parts):
        raise ValueError(f"columns must have a name or number in braces, got {value!r}; correct it")
    return parts


def _filled(part: tuple[str, str | None, str], row: ManifestRow) -> str:
    text, field, spec = part
    value = row.get(field) if field is not None else None
    return text + ("" if field is None else format("" if value is None else str(value), spec))
