"""TODO engine/storage/s3_client.py."""

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
"""How often a request is made whose error may pass; with the waits between them that is more than a minute."""
_MAX_WAIT_S = 20.0
_NOT_THERE = frozenset({"404", "NoSuchKey", "NotFound"})
_CHANGED = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict", "409"})
_REFUSED = frozenset(
    "401 403 AccessDenied AllAccessDisabled ExpiredToken InvalidAccessKeyId InvalidToken SignatureDoesNotMatch".split()
)
_WORDS: tuple[tuple[Any, type[OSError | ValueError], str], ...] = (  # the first that fits
    (
        (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
            botocore.exceptions.SSOError,
        ),
        PermissionError,
        "needs credentials ({}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run where a role "
        "gives them",
    ),
    (
        botocore.exceptions.ProfileNotFound,
        ValueError,
        "needs credentials ({}); set AWS_PROFILE to a profile of ~/.aws/config, or unset it",
    ),
    (
        botocore.exceptions.ParamValidationError,
        ValueError,
        "is not an address of the form s3://bucket/key ({}); correct it",
    ),
    (
        botocore.exceptions.SSLError,
        OSError,
        "cannot be reached safely ({}); check AWS_ENDPOINT_URL and AWS_CA_BUNDLE",
    ),
    (
        (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError),
        ConnectionError,
        "cannot be reached ({}); check the network and AWS_ENDPOINT_URL",
    ),
)
_ERRORS = (  # all that boto3 raises; none of them is an OSError or a ValueError
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    boto3.exceptions.Boto3Error,
    urllib3.exceptions.HTTPError,
)
_LOGIN = re.compile(r"(?<=//)[^/@\s]*@")  # user:password@ of an address
_CHOICES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
)
_clients: dict[tuple[object, ...], Any] = {}
_making = threading.Lock()
_Answer = TypeVar("_Answer")


def client() -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
    """This process's client, for the endpoint and region that the environment names."""
    chosen = (os.getpid(), *map(os.environ.get, _CHOICES))
    if chosen not in _clients:
        with _making:  # threads that come together make one
            if chosen not in _clients:
                _clients[chosen] = _client()
    return _clients[chosen]


def _client() -> Any:  # noqa: ANN401
    session = boto3.session.Session(region_name=os.environ.get("AWS_REGION"))  # boto3 knows AWS_DEFAULT_REGION alone
    options: dict[str, Any] = {
        # Few, for the parts of an upload: all threads share one small quota of them, which an outage uses up at once.
        "retries": {"mode": "standard", "max_attempts": 4},
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,  # more threads than connections would make new ones all the time
    }

    def made() -> Any:  # noqa: ANN401
        region = session.region_name or "us-east-1"
        return session.client("s3", region_name=region, config=botocore.config.Config(**options))

    first = made()
    if "amazonaws.com" in first.meta.endpoint_url:
        return first
    options["s3"] = {"addressing_style": "path"}  # no server of one's own has a name for every bucket
    for kind in (
        "request_checksum_calculation",
        "response_checksum_validation",
    ):  # not every server knows these headers
        options[kind] = os.environ.get(f"AWS_{kind.upper()}", "when_required")
    return made()


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def arrow_filesystem() -> pyarrow.fs.S3FileSystem:
    """pyarrow's file system with the same endpoint and region, for libraries that take one (Ray Train)."""
    meta = client().meta
    retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=9)
    if "amazonaws.com" in meta.endpoint_url:
        return pyarrow.fs.S3FileSystem(region=meta.region_name, retry_strategy=retries)
    scheme, _, host = meta.endpoint_url.partition("://")
    return pyarrow.fs.S3FileSystem(
        region=meta.region_name, scheme=scheme, endpoint_override=host, retry_strategy=retries
    )


def _asked(path: S3Path, request: Callable[[], _Answer]) -> _Answer:
    """The answer to a request, made again while the server throttles, fails or is away for a minute.

    What boto3 raises is raised as what a local file system would have raised, in words; it stays the cause.
    """

    def once() -> _Answer:
        try:
            return request()
        except _ERRORS as error:
            raise _in_words(error, path) from error

    return retried(once, attempts=ATTEMPTS, max_wait_s=_MAX_WAIT_S)


def _in_words(error: Exception, path: S3Path) -> OSError | ValueError:
    said = _LOGIN.sub("", str(error))
    if isinstance(error, botocore.exceptions.ClientError):
        return _answer_in_words(error, said, path)
    for kinds, raised, words in _WORDS:
        if isinstance(error, kinds):
            return raised(f"{path} {words.format(said)}")
    return OSError(f"{path}: {said}")


def _answer_in_words(error: botocore.exceptions.ClientError, said: str, path: S3Path) -> OSError:
    code = _code(error)
    if code == "NoSuchBucket":
        return FileNotFoundError(f"{path} does not exist: there is no bucket {path.bucket}; check its name, or make it")
    if code in _NOT_THERE:
        return FileNotFoundError(f"{path} does not exist ({code}); check bucket and key")
    if code in _REFUSED:
        return PermissionError(
            f"{path} may not be used with these credentials ({code}); check the credentials and the bucket's policy "
            "(who may not list a bucket is told so of missing objects too)"
        )
    if code in _CHANGED:
        return OSError(f"{path} was written anew while it was read ({code}); start again")
    return OSError(f"{path}: {said}")
