"""The one place that shows text to people: names, labels and messages of others as plain text on one line.

Text from files, other machines and libraries is foreign: it may hold control codes that a terminal obeys, line breaks
that look like lines of ours, marks that reverse the order of letters, and the markup of rich or Markdown. Tables, log
lines, progress and reports therefore go through this module. JSON is exact instead and escapes by itself.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence

import rich.table
from rich.console import Console
from rich.text import Text

MAX_MESSAGE = 2000
"""Characters of a message that are shown."""
_MAX_SHOWN = 300
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # controls, invisible marks, halves of characters, line breaks
_JOINERS = "\u200c\u200d"  # invisible too, but part of emoji and of words in Persian and Hindi
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", **{sign: f"\\{sign}" for sign in "|`*[]~"}})


def shown(text: object, *, most: int | None = _MAX_SHOWN, keep: str = "") -> str:
    r"""Foreign text as people may see it: on one line, ``\x1b`` for what is invisible, long text without its middle.

    ``keep`` has characters that stay, such as line breaks. Shortened text says how many characters are left out.

    >>> shown("a\nb\x1b[1m[bold]"), shown("x" * 4000 + "end", most=9)
    ('a\\nb\\x1b[1m[bold]', 'xxxxxx… 3994 more …end')
    """
    plain = str(text)
    if not plain.isprintable():
        keep += _JOINERS
        plain = "".join(
            one.encode("unicode_escape").decode() if unicodedata.category(one) in _HIDDEN and one not in keep else one
            for one in plain
        )
    if most is None or len(plain) <= most:
        return plain
    end = most // 3
    return f"{plain[: most - end]}… {len(plain) - most} more …{plain[-end:]}"


def markdown(text: object, *, most: int = _MAX_SHOWN) -> str:
    """Foreign text for Markdown: neither markup, nor HTML, nor the end of a table's cell."""
    return shown(" ".join(str(text).split()), most=most).translate(_MARKDOWN)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that takes text as it is: ``[bold]`` and ``:smile:`` are no markup, and numbers have no colours.

    It is a terminal only where a line can change in place. A log file gets no control codes, even if the environment
    forces colours, and a notebook gets the lines of a log: rich's own displays there need further packages.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    forced = None if is_terminal else False
    plain = functools.partial(Console, markup=False, emoji=False, highlight=False, force_jupyter=False)
    return plain(stderr=stderr, width=width, force_terminal=forced)


def rich_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> rich.table.Table:
    """A table for a console, whose cells are foreign text."""
    table = rich.table.Table(title=Text(shown(title)), title_justify="left")
    for column in columns:
        table.add_column(Text(shown(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table
