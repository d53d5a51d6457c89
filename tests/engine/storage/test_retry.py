"""Transient errors are retried after waits that double; other errors are raised at once."""

import errno
import itertools

import botocore.exceptions
import pytest
import torch
import urllib3.exceptions

from engine.storage import retry
from engine.storage.retry import is_transient, retried


def answered(code):
    return botocore.exceptions.ClientError({"Error": {"Code": code}}, "GetObject")


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.EIO, "input/output error"),
        OSError(errno.ESTALE, "stale file handle"),
        answered("SlowDown"),
        answered("503"),
        answered("429"),
        answered("InternalError"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        botocore.exceptions.ResponseStreamingError(error="cut"),
        urllib3.exceptions.ProtocolError("cut"),
        caused(RuntimeError("the clip cannot be read"), answered("SlowDown")),
        caused(ValueError("a"), caused(OSError("b"), TimeoutError())),
    ],
    ids=repr,
)
def test_transient_errors(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a rule"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "disk full"),
        OSError("without a number"),
        answered("NoSuchKey"),
        answered("AccessDenied"),
        answered("PreconditionFailed"),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.ParamValidationError(report="bad bucket"),
        botocore.exceptions.SSLError(endpoint_url="https://x", error="certificate verify failed"),
        caused(OSError("x"), answered("NoSuchKey")),
    ],
    ids=repr,
)
def test_errors_that_stay(error):
    assert not is_transient(error)


@pytest.fixture
def waits(monkeypatch):
    """Record the waits in seconds instead of waiting, with the mean of their random factor."""
    waits_s = []
    monkeypatch.setattr(retry.time, "sleep", waits_s.append)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: (low + high) / 2)
    return waits_s


def failing(*errors, value="done"):
    """A call that raises these one after another and then returns."""
    left = iter(errors)

    def call():
        error = next(left, None)
        if error is not None:
            raise error
        return value

    return call


def test_a_transient_error_is_retried_after_waits_that_double(waits):
    assert retried(failing(TimeoutError(), ConnectionError(), answered("SlowDown"))) == "done"
    assert waits == [0.5, 1.0, 2.0]


def test_the_last_error_is_raised_with_the_number_of_attempts(waits):
    with pytest.raises(ConnectionError, match="fourth") as raised:
        retried(failing(*(ConnectionError(number) for number in ("first", "second", "third", "fourth"))))
    assert raised.value.attempts == retry.ATTEMPTS == 4
    assert waits == [0.5, 1.0, 2.0], "no wait after the last"


def test_an_error_that_stays_is_raised_at_once(waits):
    with pytest.raises(ValueError, match="rule") as raised:
        retried(failing(ValueError("rule")))
    assert (raised.value.attempts, waits) == (1, [])


def test_an_error_that_stays_after_a_transient_one_has_the_number_of_attempts(waits):
    with pytest.raises(ValueError, match="rule") as raised:
        retried(failing(TimeoutError(), ValueError("rule")))
    assert (raised.value.attempts, waits) == (2, [0.5])


def test_the_number_of_attempts_can_be_given(waits):
    with pytest.raises(TimeoutError) as raised:
        retried(failing(*(TimeoutError() for _ in range(9))), attempts=2)
    assert (raised.value.attempts, waits) == (2, [0.5])


def test_no_wait_is_longer_than_the_limit(waits):
    with pytest.raises(TimeoutError):
        retried(failing(*(TimeoutError() for _ in range(9))), attempts=6, max_wait_s=3.0)
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_waits_are_random_so_that_many_clients_do_not_retry_at_once(monkeypatch):
    waits_s = []
    monkeypatch.setattr(retry.time, "sleep", waits_s.append)
    for _ in range(20):
        retried(failing(TimeoutError(), TimeoutError()))
    first, second = waits_s[::2], waits_s[1::2]
    assert len({*first}) == 20 and all(0.25 <= wait_s <= 0.75 for wait_s in first)
    assert all(0.5 <= wait_s <= 1.5 for wait_s in second)
    assert any(a != b for a, b in itertools.pairwise(second))


def test_an_interrupt_is_never_retried(waits):
    with pytest.raises(KeyboardInterrupt):
        retried(failing(KeyboardInterrupt()))
    assert waits == []
