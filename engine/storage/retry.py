"""Retries of what fails for a reason that may pass by itself, such as a network error."""

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
"""Number of attempts, the first included."""
_FIRST_WAIT_S = 0.5

_TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN EBUSY ECONNABORTED ECONNREFUSED ECONNRESET EHOSTUNREACH EINTR EIO EMFILE ENETDOWN ENETRESET "
        "ENETUNREACH ENFILE ENOBUFS ENOMEM EPIPE EREMOTEIO ESTALE ETIMEDOUT"
    ).split()
    if hasattr(errno, name)  # EREMOTEIO is Linux only
)
_TRANSIENT_S3_CODES = frozenset(
    "InternalError RequestTimeout RequestTimeTooSkewed ServiceUnavailable SlowDown Throttling ThrottlingException "
    "TooManyRequests 429 500 502 503 504".split()
)
_TRANSIENT_CLASSES: tuple[type[BaseException], ...] = (
    MemoryError,
    TimeoutError,
    ConnectionError,
    http.client.HTTPException,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.CredentialRetrievalError,
    urllib3.exceptions.ProtocolError,
    urllib3.exceptions.TimeoutError,
)

_Value = TypeVar("_Value")


def is_transient(error: BaseException) -> bool:
    """Return true if an error or its cause is of the network, throttling or memory, and so may pass by itself."""
    if getattr(error, "transient", False):  # the decoder process has checked it
        return True
    if isinstance(error, botocore.exceptions.SSLError):  # a wrong certificate stays wrong
        return False
    if isinstance(error, _TRANSIENT_CLASSES) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    if isinstance(error, botocore.exceptions.ClientError):
        return error.response.get("Error", {}).get("Code") in _TRANSIENT_S3_CODES
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def retried(call: Callable[[], _Value], *, attempts: int = ATTEMPTS, max_wait_s: float = 60.0) -> _Value:
    """Return what ``call`` returns; after a transient error, wait and call it again.

    The wait doubles each time, with a random factor of 0.5 to 1.5. The last error is raised, with the number of
    attempts in its attribute ``attempts``.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if attempt == attempts or not is_transient(error):
                error.attempts = attempt  # type: ignore[attr-defined]
                raise
        time.sleep(min(_FIRST_WAIT_S * 2 ** (attempt - 1), max_wait_s) * random.uniform(0.5, 1.5))
    raise AssertionError("not reached")
