"""Errors that pass by themselves, such as a network's, and how often to try again."""

from __future__ import annotations

import errno
import http.client
import random
import time
from collections.abc import Callable
from typing import TypeVar

import botocore.exceptions
import urllib3.exceptions

ATTEMPTS = 4
"""How often something is tried that fails for a reason that may pass."""

_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_CODES = frozenset(
    "InternalError RequestTimeout RequestTimeTooSkewed ServiceUnavailable SlowDown Throttling ThrottlingException "
    "TooManyRequests 429 500 502 503 504".split()
)
_KINDS: tuple[type[BaseException], ...] = (
    MemoryError,
    TimeoutError,
    ConnectionError,
    http.client.HTTPException,
    botocore.exceptions.ConnectionError,  # that cannot be made
    botocore.exceptions.HTTPClientError,  # that end or time out
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.CredentialRetrievalError,
    urllib3.exceptions.ProtocolError,
    urllib3.exceptions.TimeoutError,
)

_Value = TypeVar("_Value")


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what caused it, is of the network, of throttling or of memory: it may pass by itself."""
    if getattr(error, "transient", False):  # what another process found out
        return True
    if isinstance(error, botocore.exceptions.SSLError):  # a certificate that is wrong stays so
        return False
    if isinstance(error, _KINDS) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if isinstance(error, botocore.exceptions.ClientError):
        return error.response.get("Error", {}).get("Code") in _CODES
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def retried(
    call: Callable[[], _Value], *, attempts: int = ATTEMPTS, first_wait_s: float = 0.5, max_wait_s: float = 60.0
) -> _Value:
    """What ``call`` returns, tried again after a growing, partly random wait where its error is transient.

    The last error is raised with its number of tries as ``attempts``.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if attempt == attempts or not is_transient(error):
                error.attempts = attempt  # type: ignore[attr-defined]
                raise
        time.sleep(min(first_wait_s * 2 ** (attempt - 1), max_wait_s) * random.uniform(0.5, 1.5))
    raise AssertionError("not reached")
