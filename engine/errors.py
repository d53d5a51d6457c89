"""TODO engine/errors.py."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AudioError(ValueError):
    """A file or segment that cannot be used: the message says why and what to do."""


class TooManyFailuresError(RuntimeError):
    """More of a pass's queries failed than it lets; the words say what to do."""

    says_how_to_go_on = True


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names, nearest first where one is near."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(options[:30]) + (f" and {len(options) - 30} more" if len(options) > 30 else "")
