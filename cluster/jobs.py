"""Jobs on a Ray cluster: connect to its job server, follow, list and stop jobs.

Following is our own code: Ray's client neither survives a lost connection nor returns the job's exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypedDict
from urllib.parse import urlsplit

from engine.errors import TOKEN_REMEDY, ClusterError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
JobServer: TypeAlias = Any
"""Ray's ``JobSubmissionClient``, which has no types."""
_RETRY_S = 2.0
_ANSWER_S = 20.0


class JobState(TypedDict):
    """The state of a job as commands print it; holds no values of environment variables."""

    job: str
    """Id of the job."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    """Name of the submitted command."""
    out: str
    """Folder or address of its results."""
    started: str | None
    """Start in ISO format, UTC; None before it."""
    wall_s: float | None
    """Seconds from the start to the end or to now."""
    exit_code: int | None
    """Exit code; None while the job is active."""
    message: str
    """Ray's message about the status."""
    metadata: dict[str, str]
    """Metadata that was given at submission."""


def server_address(given: str | None) -> str:
    """The job server's address: ``given``, else ``RAY_API_SERVER_ADDRESS``, else the one on this machine.

    Raises ``ValueError`` for an address that is not HTTP (such as ``ray://``) or holds a password.
    """
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"the address of a job server must be http(s)://HOST:PORT, got {address}; "
            "give that of the cluster's dashboard, such as http://HOST:8265"
        )
    if parts.username or parts.password:
        raise ValueError(f"an address must hold no password, got one (addresses are displayed); {TOKEN_REMEDY}")
    return address


def exposure_warning(address: str) -> str | None:
    """Warning about an unprotected connection to another machine; None for this machine, or with token and TLS."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return None
    if host == "localhost":
        return None
    reasons = []
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        reasons.append(f"without a token, anybody who reaches it can run code on the cluster ({TOKEN_REMEDY})")
    if parts.scheme != "https":
        reasons.append(
            "the connection is not encrypted, so anybody in between can read and change it, including the token "
            "(use an https:// address, or a tunnel to 127.0.0.1)"
        )
    return f"{address} is not this machine: {'; '.join(reasons)}" if reasons else None


def connect_to_server(address: str) -> JobServer:
    """A client of the job server at an address of :func:`server_address`.

    Raises ``ValueError`` if the server refuses the token, ``ConnectionError`` if no server answers.
    """
    import requests
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # no messages about connections
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise Ray prefers RAY_ADDRESS to the given address
    with translated_errors(address):
        requests.get(f"{address}/api/version", timeout=_ANSWER_S)  # Ray's client would wait for ever
        return JobSubmissionClient(address)


@contextlib.contextmanager
def translated_errors(address: str) -> Iterator[None]:
    """Turn Ray's errors of connection and authentication into errors that say what to change."""
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException
    from requests.exceptions import RequestException

    remedy = "start one (ray start --head), or give another address with --address"
    try:
        yield
    except RequestException:
        raise ClusterError(f"cannot reach a Ray cluster at {address} (no answer); {remedy}") from None
    except ConnectionError:
        raise ClusterError(f"cannot reach a Ray cluster at {address} (no answer); {remedy}") from None
    except AuthenticationError:
        raise ValueError(f"cannot use the cluster at {address} (it refused the token); {TOKEN_REMEDY}") from None
    except RayStateApiException as error:
        cause = (str(error).splitlines() or [""])[0]
        raise ClusterError(f"cannot list the nodes of the cluster at {address} ({cause}); try again") from None


def follow(server: JobServer, job: str, write: Callable[[str], None]) -> int:
    """Write a job's log as it grows until the job ends; returns its exit code. Reconnects after a lost connection."""
    num_written = 0
    while True:
        num_written = asyncio.run(_tail(server, job, num_written, write))
        info = _retried(lambda: server.get_job_info(job), job)
        if info.status.is_terminal():
            write(_retried(lambda: server.get_job_logs(job), job)[num_written:])
            return exit_code(info)
        time.sleep(_RETRY_S)


async def _tail(server: JobServer, job: str, num_written: int, write: Callable[[str], None]) -> int:
    """Follow one connection, which starts at the log's start, to its end; returns the characters written so far."""
    import aiohttp

    position, chunks = 0, aiter(server.tail_job_logs(job))
    while True:
        try:
            chunk = await anext(chunks)
        except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError):  # the connection, not the job
            return num_written
        if position + len(chunk) > num_written:
            write(chunk[max(0, num_written - position) :])
            num_written = position + len(chunk)
        position += len(chunk)


def _retried(request: Callable[[], Any], job: str, limit_s: float = 300.0) -> Any:  # noqa: ANN401 - Ray's answers
    """The answer of a job server that may be away for some minutes while its head node moves."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return request()
        except (OSError, RuntimeError) as error:
            if _is_unknown(error):
                raise RuntimeError(
                    f"cannot find job {job} (it was lost with the head node); submit the same command again"
                ) from None
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"cannot reach the cluster (no answer for {limit_s:.0f} s, {type(error).__name__}); the job may "
                    "still run: see clearsep jobs list"
                ) from None
            time.sleep(_RETRY_S)


def _is_unknown(error: Exception) -> bool:
    """True if the job server reports that it has no such job."""
    return isinstance(error, RuntimeError) and ("code 404" in str(error) or "does not exist" in str(error))


def exit_code(info: Any) -> int:  # noqa: ANN401 - Ray's JobDetails
    """A job's exit code: that of its command, 143 if it was stopped, 1 if its command never started."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return 143
    code = info.driver_exit_code
    return code % 256 if code else 1  # negative if a signal ended it


def _state(info: Any) -> JobState:  # noqa: ANN401 - Ray's JobDetails
    started, ended = (value / 1000 if value else None for value in (info.start_time, info.end_time))
    metadata: Mapping[str, str] = info.metadata or {}
    return {
        "job": info.submission_id,
        "status": str(info.status),
        "command": metadata.get("command", ""),
        "out": metadata.get("out", ""),
        "started": dt.datetime.fromtimestamp(started, dt.UTC).isoformat(timespec="seconds") if started else None,
        "wall_s": round((ended or time.time()) - started, 1) if started else None,
        "exit_code": exit_code(info) if info.status.is_terminal() else None,
        "message": (info.message or "").partition(", last available logs")[0],  # Ray repeats the end of the log
        "metadata": dict(metadata),
    }


def list_jobs(server: JobServer) -> list[JobState]:
    """All jobs of this project that the cluster remembers, newest first."""
    states = [_state(info) for info in server.list_jobs() if (info.metadata or {}).get("clearsep")]
    return sorted(states, key=lambda job: job["started"] or "", reverse=True)


def job_state(server: JobServer, job: str) -> JobState:
    """The state of one job; ``ValueError`` if the cluster has no job of that id."""
    return _state(_known(server, job))


def stop(server: JobServer, job: str, limit_s: float = 120.0) -> JobState:
    """Stop a job, wait until it has ended and return its state; ``RuntimeError`` if it has not after ``limit_s``."""
    if not _known(server, job).status.is_terminal():
        server.stop_job(job)
    deadline = time.monotonic() + limit_s
    while not (info := server.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"cannot stop job {job} (still active after {limit_s:.0f} s); see clearsep jobs logs {job}"
            )
        time.sleep(0.5)
    return _state(info)


def _known(server: JobServer, job: str) -> Any:  # noqa: ANN401 - Ray's JobDetails
    with translated_errors(server.get_address()):
        try:
            return server.get_job_info(job)
        except RuntimeError as error:
            if not _is_unknown(error):
                raise
    raise ValueError(f"there is no job {job} on the cluster; clearsep jobs list shows its jobs")
