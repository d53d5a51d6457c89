"""Every exception that this project defines, in one tree.

A wrong argument or setting raises ``ValueError``, a failing network, disk or server ``OSError``. The classes here are
for what a caller may want to tell apart; each is also one of Python's own.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable

TOKEN_REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token"


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


class DamagedError(ClearsepError, ValueError):
    """The bytes of a file are not those whose checksum was recorded when it was written."""


class WorkerDiedError(ClearsepError, RuntimeError):
    """A clip was alone in hand when worker after worker ended."""

    def __init__(self, message: str, error_class: str = "WorkerDied", attempts: int = 1) -> None:
        super().__init__(message)
        self.error_class = error_class
        """WorkerDied, or WorkerTimeout."""
        self.attempts = attempts
        """Number of workers that ended."""


class InUseError(ClearsepError, ValueError):
    """Another process holds the lock of an output folder."""


class LockLostError(ClearsepError, RuntimeError):
    """Another process took over the lock of an output folder in S3 while this one was writing to it."""


class RayStartError(ClearsepError, RuntimeError):
    """Ray cannot start on this machine."""


class ClusterError(ClearsepError, ConnectionError):
    """No Ray cluster that this process can use answers at an address."""


class TooManyFailuresError(ClearsepError, RuntimeError):
    """More queries of a pass failed than ``max_failed_fraction`` allows."""


INTERRUPT_HANDLED = threading.Event()
"""Set where an interrupt ends; a command raises one that ended elsewhere again."""


def as_exception(error: BaseException) -> Exception:
    """The error without its traceback, which keeps its frames in memory; SystemExit and the like as a RuntimeError.

    KeyboardInterrupt is raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, Exception):
        return error.with_traceback(None)
    return RuntimeError(f"{type(error).__name__}: {error}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the most similar known name, or the known names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(options[:30]) + (f" and {len(options) - 30} more" if len(options) > 30 else "")
