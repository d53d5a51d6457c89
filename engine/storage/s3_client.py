"""Requests to S3 with this project's retries, whose errors are Python's own and say what to do."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import pyarrow.fs
import urllib3.exceptions

from engine.storage.retry import retried

if TYPE_CHECKING:
    from engine.storage.s3 import S3Path

ATTEMPTS = 9
"""Number of attempts of a request; with the waits between them they last more than a minute."""
MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})
"""Error codes of an object that does not exist."""
CONFLICT_CODES = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict", "409"})
"""Error codes of a request whose condition does not hold."""
_MAX_WAIT_S = 20.0
_REFUSED_CODES = frozenset(
    "401 403 AccessDenied AllAccessDisabled ExpiredToken InvalidAccessKeyId InvalidToken SignatureDoesNotMatch".split()
)
_TRANSLATIONS: tuple[tuple[Any, type[OSError | ValueError], str], ...] = (  # the first that matches is used
    (
        (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
            botocore.exceptions.SSOError,
        ),
        PermissionError,
        "cannot use {path} without credentials ({cause}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
        "AWS_PROFILE, or run on a machine whose role gives them",
    ),
    (
        botocore.exceptions.ProfileNotFound,
        ValueError,
        "cannot use {path} without credentials ({cause}); set AWS_PROFILE to a profile of ~/.aws/config, or unset it",
    ),
    (
        botocore.exceptions.ParamValidationError,
        ValueError,
        "an S3 address must be s3://bucket/key, got {path} ({cause}); correct it",
    ),
    (
        botocore.exceptions.SSLError,
        OSError,
        "cannot reach {path} over TLS ({cause}); check AWS_ENDPOINT_URL and AWS_CA_BUNDLE",
    ),
    (
        (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError),
        ConnectionError,
        "cannot reach {path} ({cause}); check the network and AWS_ENDPOINT_URL",
    ),
)
_ALL_ERRORS = (  # none of boto3's is an OSError or a ValueError
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    boto3.exceptions.Boto3Error,
    urllib3.exceptions.HTTPError,
)
_LOGIN = re.compile(r"(?<=//)[^/@\s]*@")  # user:password@ in an address
_CLIENT_VARIABLES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
)
_clients: dict[tuple[object, ...], Any] = {}
_clients_lock = threading.Lock()
_Answer = TypeVar("_Answer")


def client() -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
    """This process's client for the endpoint, region and profile in the environment."""
    key = (os.getpid(), *map(os.environ.get, _CLIENT_VARIABLES))
    if key not in _clients:
        with _clients_lock:  # threads that start together share one client
            if key not in _clients:
                _clients[key] = _new_client()
    return _clients[key]


def _new_client() -> Any:  # noqa: ANN401
    session = boto3.session.Session(region_name=os.environ.get("AWS_REGION"))  # boto3 reads AWS_DEFAULT_REGION only
    options: dict[str, Any] = {
        # Few attempts: all threads share boto3's small retry quota, which an outage uses up at once.
        "retries": {"mode": "standard", "max_attempts": 4},
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,  # with more threads than connections, boto3 would open new ones all the time
    }

    def connect() -> Any:  # noqa: ANN401
        region = session.region_name or "us-east-1"
        return session.client("s3", region_name=region, config=botocore.config.Config(**options))

    first = connect()
    if _is_amazon(first.meta):
        return first
    options["s3"] = {"addressing_style": "path"}  # other servers have no host name for each bucket
    for kind in ("request_checksum_calculation", "response_checksum_validation"):  # not every server knows the headers
        options[kind] = os.environ.get(f"AWS_{kind.upper()}", "when_required")
    return connect()


def _is_amazon(meta: Any) -> bool:  # noqa: ANN401 - of a boto3 client
    return "amazonaws.com" in meta.endpoint_url


def error_code(error: botocore.exceptions.ClientError) -> str:
    """The server's code of an error, such as ``NoSuchKey``; empty if it gave none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def arrow_filesystem() -> pyarrow.fs.S3FileSystem:
    """A pyarrow file system with the same endpoint and region, for Ray Train."""
    meta = client().meta
    scheme, _, host = meta.endpoint_url.partition("://")
    endpoint = {} if _is_amazon(meta) else {"scheme": scheme, "endpoint_override": host}
    retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return pyarrow.fs.S3FileSystem(region=meta.region_name, retry_strategy=retries, **endpoint)


def call_s3(path: S3Path, request: Callable[[], _Answer]) -> _Answer:
    """Return the answer to a request about ``path``; retry it for a minute while the server throttles or is away.

    Raises what a local file system would raise, such as ``FileNotFoundError``, with boto3's error as its cause.
    """

    def attempt() -> _Answer:
        try:
            return request()
        except _ALL_ERRORS as error:
            raise _translate(error, path) from error

    return retried(attempt, attempts=ATTEMPTS, max_wait_s=_MAX_WAIT_S)


def _translate(error: Exception, path: S3Path) -> OSError | ValueError:
    cause = _LOGIN.sub("", str(error))
    if isinstance(error, botocore.exceptions.ClientError):
        return _translate_answer(error_code(error), cause, path)
    for kinds, raised, message in _TRANSLATIONS:
        if isinstance(error, kinds):
            return raised(message.format(path=path, cause=cause))
    return OSError(f"cannot use {path} ({cause}); try again")


def _translate_answer(code: str, cause: str, path: S3Path) -> OSError:
    if code == "NoSuchBucket":
        return FileNotFoundError(f"there is no bucket {path.bucket} for {path}; check its name, or create it")
    if code in MISSING_CODES:
        return missing_object(path)
    if code in _REFUSED_CODES:
        return PermissionError(
            f"cannot use {path} with these credentials ({code}); check the credentials and the bucket's policy "
            "(without the right to list a bucket, S3 also answers so for missing objects)"
        )
    if code in CONFLICT_CODES:
        return OSError(f"cannot read on in {path} (it was replaced while it was read: {code}); start again")
    return OSError(f"cannot use {path} ({cause}); try again")


def missing_object(path: S3Path) -> FileNotFoundError:
    """The error for an object that does not exist."""
    return FileNotFoundError(f"there is no object {path}; check bucket and key")
