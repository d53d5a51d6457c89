"""The reference of all settings: tables for ``clearsep settings`` and the page ``docs/settings.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from engine.cli.describe_settings import Setting, describe_settings
from engine.cli.tables import Table
from engine.errors import nearest

_COLUMNS = ("setting", "type", "range", "default", "meaning")
_HEAD = """# Settings

Every setting of a run, of the thresholds and of a search: its type, range, default and meaning. `clearsep settings KEY`
prints the same. A setting goes into a YAML file, or into a command as `--set distil.steps=400`; dots separate the
levels. The value is YAML: `--set 'clean_folds=[1, 2]'`. An unknown name or a value out of range is an error before
anything starts.

This page is generated: `clearsep settings --markdown > docs/settings.md`.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one config class and of the config classes inside it."""

    title: str
    intro: str
    """Sentence under the title: where these settings are used."""
    settings: tuple[Setting, ...]


def section(kind: type, *, title: str, intro: str) -> Section:
    """The section of a config class."""
    return Section(title=title, intro=intro, settings=tuple(describe_settings(kind)))


def find_settings(sections: Sequence[Section], key: str | None) -> list[Section]:
    """The settings whose name, or a part of it after a dot, begins with ``key``.

    Raises ``ValueError`` with the nearest name if there are none.
    """
    if key is None:
        return list(sections)
    found = [
        replace(one, settings=tuple(setting for setting in one.settings if f".{key}" in f".{setting.name}"))
        for one in sections
    ]
    if not any(one.settings for one in found):
        names = {setting.name for one in sections for setting in one.settings}
        parts = names if "." in key else {part for name in names for part in name.split(".")}
        raise ValueError(f"there is no setting {key}; {nearest(key, parts)}")
    return [one for one in found if one.settings]


def settings_tables(sections: Sequence[Section]) -> list[Table]:
    """One table for each section."""
    return [
        Table(title=one.title, columns=_COLUMNS, rows=[_row(setting) for setting in one.settings]) for one in sections
    ]


def settings_page(sections: Sequence[Section]) -> str:
    """The page in Markdown, one table for each level of names; levels of one config class are described once."""
    levels = [(one, prefix, group) for one in sections for prefix, group in _levels(one.settings)]
    described: dict[tuple[tuple[str, str], ...], tuple[str, list[Setting]]] = {}
    for _, prefix, group in sorted(levels, key=lambda level: len(level[1])):
        described.setdefault(_key(prefix, group), (prefix, group))
    lines = [_HEAD]
    for one in sections:
        lines.append(f"## {one.title}\n\n{one.intro}\n")
        repeated: set[str] = set()
        for prefix, group in _levels(one.settings):
            original, known = described[_key(prefix, group)]
            differing = [ours for ours, theirs in zip(group, known, strict=True) if ours.default != theirs.default]
            if prefix != original:
                repeated.add(prefix)
                if not differing and f"{prefix[:-1].rpartition('.')[0]}." in repeated:
                    continue  # the level above says so already
            heading = f"### `{prefix}*`\n\n" if prefix else ""
            if prefix == original:
                lines.append(heading + _markdown(group))
            else:
                rest = f"; these differ:\n\n{_markdown(differing)}" if differing else ".\n"
                lines.append(f"{heading}The settings of `{original}*`{rest}")
    return "\n".join(lines)


def _key(prefix: str, group: Iterable[Setting]) -> tuple[tuple[str, str], ...]:
    """Names and meanings, by which the levels of one config class are recognised."""
    return tuple((setting.name.removeprefix(prefix), setting.meaning) for setting in group)


def _levels(settings: Iterable[Setting]) -> list[tuple[str, list[Setting]]]:
    """Settings by the part of their names up to the last dot, in order of first appearance."""
    levels: dict[str, list[Setting]] = {}
    for setting in settings:
        above, dot, _ = setting.name.rpartition(".")
        levels.setdefault(above + dot, []).append(setting)
    return list(levels.items())


def _markdown(settings: Iterable[Setting]) -> str:
    table = Table(title="", columns=_COLUMNS, rows=[_row(setting, code="`") for setting in settings])
    return table.markdown(is_markdown=True) + "\n"


def _row(setting: Setting, *, code: str = "") -> list[str]:
    meaning = " ".join(setting.meaning.split()).replace("``", code)
    if setting.is_runtime:
        meaning += " Does not change results."
    default = setting.default if setting.default == "required" else f"{code}{setting.default}{code}"
    cells = [f"{code}{setting.name}{code}", setting.type, setting.range, default, meaning]
    return [cell.replace("|", "\\|") if code else cell.replace("`", "") for cell in cells]
