"""Every exception that this project defines, in one tree.

A wrong argument or setting raises ``ValueError``, a failing network, disk or server ``OSError``. The classes here are
for what a caller may want to tell apart; each is also one of Python's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClearsepError(Exception):
    """Base class of the project's exceptions."""

    has_remedy = True
    """The message says what to do next, so that the command adds no advice of its own."""


class AudioError(ClearsepError, ValueError):
    """A file or segment cannot be used."""


class SilentError(AudioError):
    """A clip has no sound."""


class TooShortError(AudioError):
    """A clip is shorter than ``min_clip_s``."""


class DecodeError(AudioError):
    """The decoder process could not decode a file."""

    def __init__(self, message: str, error_class: str = "DecodeError", transient: bool = False) -> None:
        super().__init__(message)
        self.error_class = error_class
        """Class of the exception in the decoder process, or Decoder with Crash, Killed, Timeout or Start."""
        self.transient = transient
        """The cause may pass by itself, so another attempt is worth its time."""


class InUseError(ClearsepError, ValueError):
    """Another process holds the lock of an output folder."""


class LockLostError(ClearsepError, RuntimeError):
    """Another process took over the lock of an output folder in S3 while this one was writing to it."""


class TooManyFailuresError(ClearsepError, RuntimeError):
    """More queries of a pass failed than ``max_failed_fraction`` allows."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the most similar known name, or the known names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(options[:30]) + (f" and {len(options) - 30} more" if len(options) > 30 else "")
