"""TODO cluster/jobs.py."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_TOKEN_REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token"
_AGAIN_S = 2.0


def address_of(named: str | None) -> str:
    """The job server's address: as named, ``RAY_API_SERVER_ADDRESS``, or the one on this machine.

    Raises:
        ValueError: it is not one of HTTP, such as Ray's own ``ray://``.
    """
    address = named or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"jobs are submitted to the cluster's dashboard, http://HOST:8265, not to {address}")
    if parts.username or parts.password:
        raise ValueError("an address holds no password, for it is shown; " + _TOKEN_REMEDY)
    return address


def exposure(address: str) -> str | None:
    """Why an address should not be used like this, in words; None for one of this machine, or with token and TLS."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return None
    if host == "localhost":
        return None
    reasons = []
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        reasons.append(f"no token is used, so that whoever reaches it may run code on the cluster ({_TOKEN_REMEDY})")
    if parts.scheme != "https":
        reasons.append(
            "what is sent is not encrypted, so that whoever is on the way can read and change it, the token too "
            "(use an https:// address, or a tunnel to 127.0.0.1)"
        )
    return f"warning: {address} is not this machine: {'; '.join(reasons)}" if reasons else None


def client(address: str) -> Any:  # noqa: ANN401 - Ray's JobSubmissionClient, which has no types
    """A connection to the job server at an address of :func:`address_of`.

    Raises:
        ValueError: it does not let us in.
        ConnectionError: nobody answers there.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # its words on connections
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray goes by RAY_ADDRESS, whatever it is told
    with _answers(address):
        return JobSubmissionClient(address)


@contextlib.contextmanager
def _answers(address: str) -> Iterator[None]:
    """What Ray raises when it is not reached or does not let in, in words that say what to change."""
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException
    from requests.exceptions import RequestException

    try:
        yield
    except RequestException as error:
        raise ConnectionError(f"the cluster at {address} does not answer ({type(error).__name__})") from None
    except ConnectionError:
        raise ConnectionError(
            f"no Ray cluster answers at {address}; start one (ray start --head), or name another with --address"
        ) from None
    except AuthenticationError:
        raise ValueError(f"the cluster at {address} did not accept the token: {_TOKEN_REMEDY}") from None
    except RayStateApiException as error:
        told = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"the cluster at {address} does not say what nodes it has ({told})") from None


def follow(jobs: Any, job: str, write: Callable[[str], None]) -> int:  # noqa: ANN401 - Ray's client
    """Pass a job's log on as it comes until the job ends; returns its exit code. A lost connection is made again."""
    told = 0
    while True:
        told = asyncio.run(_tail(jobs, job, told, write))
        info = _patiently(lambda: jobs.get_job_info(job), job)
        if info.status.is_terminal():
            write(_patiently(lambda: jobs.get_job_logs(job), job)[told:])
            return exit_code(info)
        time.sleep(_AGAIN_S)


async def _tail(jobs: Any, job: str, told: int, write: Callable[[str], None]) -> int:  # noqa: ANN401 - Ray's client
    """Characters of the log that were passed on when the connection ended; a new one begins at the log's beginning."""
    import aiohttp

    at, chunks = 0, aiter(jobs.tail_job_logs(job))
    while True:
        try:
            chunk = await anext(chunks)
        except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError):  # the connection, not the job
            return told
        if at + len(chunk) > told:
            write(chunk[max(0, told - at) :])
            told = at + len(chunk)
        at += len(chunk)


def _patiently(ask: Callable[[], Any], job: str, limit_s: float = 300.0) -> Any:  # noqa: ANN401 - what Ray's client answers
    """The answer of a job server that may be away for some minutes, while its head node moves."""
    until = time.monotonic() + limit_s
    while True:
        try:
            return ask()
        except (OSError, RuntimeError) as error:
            if _is_unknown(error):
                raise RuntimeError(
                    f"the cluster does not know {job} any more, it was lost with its head node"
                ) from None
            if time.monotonic() > until:
                raise ConnectionError(
                    f"the cluster has not answered for {limit_s:.0f} s ({type(error).__name__}); the job may go on: "
                    "clearsep jobs list"
                ) from None
            time.sleep(_AGAIN_S)


def _is_unknown(error: Exception) -> bool:
    """Whether the job server says that there is no such job."""
    return isinstance(error, RuntimeError) and ("code 404" in str(error) or "does not exist" in str(error))


def exit_code(info: Any) -> int:  # noqa: ANN401 - Ray's JobDetails
    """A job's exit code: its command's own, 143 where it was stopped, 1 where it never got to a command."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return 143
    code = info.driver_exit_code
    return code % 256 if code else 1  # one that a signal ended is below 0


def describe(info: Any) -> dict[str, Any]:  # noqa: ANN401 - Ray's JobDetails
    """What a user wants to know of a job; the values of its environment are not among it."""
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
        "message": (info.message or "").partition(", last available logs")[0],  # they are the log's end again
        "metadata": dict(metadata),
    }


def listed(jobs: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - Ray's client
    """All jobs of ours that the cluster remembers, the newest first."""
    found = [describe(info) for info in jobs.list_jobs() if (info.metadata or {}).get("clearsep")]
    return sorted(found, key=lambda job: job["started"] or "", reverse=True)


def status(jobs: Any, job: str) -> dict[str, Any]:  # noqa: ANN401 - Ray's client
    """One job; a ``ValueError`` where the cluster knows none of that name."""
    return describe(_known(jobs, job))


def stop(jobs: Any, job: str, limit_s: float = 120.0) -> dict[str, Any]:  # noqa: ANN401 - Ray's client
    """End a job in good order, wait until it has ended, and say how it stands."""
    if not _known(jobs, job).status.is_terminal():
        jobs.stop_job(job)
    until = time.monotonic() + limit_s
    while not (info := jobs.get_job_info(job)).status.is_terminal():
        if time.monotonic() > until:
            raise RuntimeError(
                f"{job} has not ended {limit_s:.0f} s after it was told to; see clearsep jobs logs {job}"
            )
        time.sleep(0.5)
    return describe(info)


def _known(jobs: Any, job: str) -> Any:  # noqa: ANN401 - Ray's client and its JobDetails
    with _answers(jobs.get_address()):
        try:
            return jobs.get_job_info(job)
        except RuntimeError as error:
            if not _is_unknown(error):
                raise
    raise ValueError(f"the cluster knows no job {job}; clearsep jobs list shows those it knows")
