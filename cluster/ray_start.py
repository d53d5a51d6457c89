"""Starting a Ray that only this user can reach, and asking a cluster for an answer before Ray waits for one.

It uses Ray's private API, until the public one has these:

- ``ray.init`` turns 127.0.0.1 into the machine's address and listens on all interfaces (ray-project/ray issues 26293
  and 7418); the switch by which Windows and macOS listen on loopback (issue 18730) works on Linux too.
- ``ray.init`` waits a quarter of an hour for an address at which no cluster is, and does not notice Ctrl-C meanwhile.
- The mode of authentication and the token are read once in a process and must be read again after a change.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import ray
import ray._private.ray_constants
import ray._private.services
import ray._raylet
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.scratch import scratch_folder
from engine.errors import TOKEN_REMEDY, ClusterError, RayStartError

_LOGGER = logging.getLogger(__name__)
_OURS = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on 127.0.0.1 alone; for the processes that Ray starts
    "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # a small /dev/shm makes Ray slow rather than impossible
}
_OF_OTHERS = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_GCS_SERVER_PORT", "RAY_REDIS_ADDRESS")
_ANSWER_S, _TRIES_S = 10.0, 10.0
_SHM = "/dev/shm"


def join_cluster(address: str, setup: Callable[[], None]) -> None:
    """Connect to a cluster, whose workers call ``setup``; ``ClusterError`` if none of this version answers in time."""
    _find_cluster(address)
    try:
        with warnings.catch_warnings(action="ignore"):  # the error below says it
            _init(address, setup)
    except (ConnectionError, RuntimeError) as error:
        if address.startswith("ray://"):
            raise _no_answer(address, str(error).strip().splitlines()[0]) from None
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ClusterError(
            f"cannot use the Ray cluster at {address} ({cause}); run the command on one of its nodes, or send it there "
            "with clearsep submit"
        ) from None


def _find_cluster(address: str) -> None:
    if address.startswith("ray://"):
        _connect(address, *_host_and_port(address.removeprefix("ray://"), address))
        return
    target = address
    if address == "auto":
        try:
            target = ray._private.services.canonicalize_bootstrap_address("auto")
        except ConnectionError:
            raise ClusterError("cannot find a Ray cluster on this machine; start one (ray start --head)") from None
    _host_and_port(target, address)
    version = _version(target)
    if version and version != ray.__version__:
        raise ClusterError(
            f"the cluster at {target} must have Ray {ray.__version__} as here, got {version}; install the same version"
        )


def _host_and_port(target: str, address: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "/" in target:
        raise ValueError(
            f"a Ray address must be HOST:PORT, ray://HOST:PORT, auto or local, got {address}; correct --address or "
            "RAY_ADDRESS (clearsep submit takes the http:// address of a cluster's dashboard)"
        )
    return host.strip("[]"), int(port)


def _connect(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise _no_answer(address, error.strerror or str(error)) from None


def _no_answer(address: str, cause: str) -> ClusterError:
    return ClusterError(
        f"cannot reach a Ray cluster at {address} ({cause}); start one there (ray start --head), or correct --address "
        "or RAY_ADDRESS"
    )


def _version(target: str) -> str:
    """The version of Ray that a cluster's state service reports."""
    deadline = time.monotonic() + _TRIES_S
    with init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        while True:
            try:
                return str(service.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_ANSWER_S).ray_version)
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.UNAUTHENTICATED:
                    raise ClusterError(
                        f"cannot use the cluster at {target} (it refused the token); {TOKEN_REMEDY}"
                    ) from None
                if code != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise _no_answer(target, error.details().rpartition(": ")[2].rstrip("]") or code.name) from None
            time.sleep(1.0)  # its head may just be starting again


@contextlib.contextmanager
def own_ray(setup: Callable[[], None], *, num_cpus: int | None, num_gpus: int | None) -> Iterator[None]:
    """A Ray on 127.0.0.1 with a token for the length of a ``with`` block, its files in a folder of mode 0700.

    Workers call ``setup`` first. A start that fails is tried once more. Raises :exc:`RayStartError`.
    """
    with scratch_folder() as folder, _settings(folder):
        options: dict[str, int | str | None] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if not os.access(_SHM, os.W_OK):
            _LOGGER.warning(f"{_SHM} must be writable, got a read-only one or none; Ray keeps objects on disk, slowly")
            options["_plasma_directory"] = str(folder)
        try:
            _start(folder, setup, **options)
        except Exception as error:  # noqa: BLE001 - Ray raises bare Exceptions
            _LOGGER.warning(f"Ray did not start ({_cause(error, folder)}); trying once more")
            try:
                _start(folder, setup, **options)
            except Exception as last:  # noqa: BLE001
                cause = _cause(last, folder)
                remedy = f"mount a writable {_SHM}" if _SHM in cause else "free memory, processes and disk space"
                raise RayStartError(
                    f"cannot start Ray on this machine ({cause}); {remedy} and start again, or set RAY_TMPDIR to a "
                    "short folder, where Ray's logs then stay"
                ) from None
        yield


def _init(address: str, setup: Callable[[], None], **options: bool | int | str | None) -> None:
    environment = {"worker_process_setup_hook": setup}  # a new one each time, for Ray changes it
    ray.init(address, runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False, **options)


def _start(folder: Path, setup: Callable[[], None], **options: int | str | None) -> None:
    """Start Ray; if that fails or is interrupted, leave none of its processes behind."""
    try:  # in a folder within ours, for Ray makes its own writable for everybody
        _init("local", setup, _temp_dir=str(folder / "r"), include_dashboard=False, **options)
    except BaseException:
        ray.shutdown()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(str(folder) in word for word in child.cmdline()):
                    child.kill()
                    child.wait(5.0)
        raise


def _cause(error: Exception, folder: Path) -> str:
    """The first serious line of the logs of Ray's processes, else that of the exception."""
    for path in sorted((folder / "r" / "session_latest" / "logs").glob("[gr][ca][sy]*")):  # gcs_server, raylet
        found = re.search(r"^\[.*? [CF] .*?\] (?:.*?:\d+: *)?(.*)$", path.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1][:200]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _settings(folder: Path) -> Iterator[None]:
    """The environment of our own Ray, with a new token in ``folder``; as before after the ``with`` block."""
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    before, constants = dict(os.environ), ray._private.ray_constants
    cluster_before = constants.ENABLE_RAY_CLUSTER
    try:
        for name in _OF_OTHERS:
            os.environ.pop(name, None)
        os.environ.update(_OURS, RAY_AUTH_TOKEN_PATH=str(token))
        constants.ENABLE_RAY_CLUSTER = False  # the variable above, for this process
        _read_settings_again()
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = cluster_before
        for name in (*_OURS, *_OF_OTHERS, "RAY_AUTH_TOKEN_PATH"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
        _read_settings_again()


def _read_settings_again() -> None:
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
