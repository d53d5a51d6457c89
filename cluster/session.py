"""Connecting to Ray: to a given cluster, or to one that is started on this machine while it is needed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # users decide whether to report usage
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # a pass logs its own progress
}
_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts this machine; saves a process
    "MALLOC_MMAP_THRESHOLD_": str(2**32),  # glibc reuses a batch's freed memory for the next one; without this,
    "MALLOC_TRIM_THRESHOLD_": str(2**32),  # page faults take a tenth of a worker's time
}
_DATA_THREADS = ("iter_threaded", "StreamingExecutor")  # Ray Data's names of threads that end with an execution


@contextmanager
def connect(address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the length of a ``with`` block; an existing connection is used and stays open.

    ``address`` is Ray's (``auto``, ``HOST:PORT``, ``ray://HOST:10001``). Without it, ``RAY_ADDRESS`` decides if it is
    set. Otherwise (and for ``local``) Ray starts on this machine with ``num_cpus`` and ``num_gpus`` (default: all),
    reachable for this user alone even if another Ray runs here, and stops at the end of the block. Raises
    ``ClusterError`` (a ``ConnectionError``) if no cluster of this Ray's version answers at ``address``,
    ``RayStartError`` if Ray cannot start here.

    >>> with cs.connect():  # run_pass, distil, run and search need it
    ...     pass
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    for name, value in (_QUIET | _LOCAL if address == "local" else _QUIET).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    from cluster.ray_start import join_cluster, own_ray

    setup = _find_own_packages(str(Path(__file__).resolve().parents[1]))
    with ExitStack() as stack:
        with _signal_kept():
            if address == "local":
                stack.enter_context(own_ray(setup, num_cpus=num_cpus, num_gpus=num_gpus))
            else:
                join_cluster(address, setup)
        try:
            yield
        finally:
            _wait_for_data_threads()
            ray.shutdown()


def require_connection() -> None:
    """Raise ``RuntimeError`` unless Ray is connected: Ray itself would start one that others can reach."""
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray must be connected for this, got no connection; call it in a `with cs.connect():` block")


def _find_own_packages(root: str) -> Callable[[], None]:
    """Make the function with which a worker imports this project's packages, whatever else has their names."""

    def setup() -> None:  # sent by value, for it must not be looked for in one of these packages
        import contextlib
        import importlib
        import sys

        sys.path.insert(0, root)
        with contextlib.suppress(ImportError):  # a node where the project is elsewhere
            importlib.import_module("clearsep")
            module = importlib.import_module("cluster.env_file")
            with contextlib.suppress(OSError, ValueError):  # preflight reports it; Ray would start the worker again
                module.load_env_file()
        sys.path.remove(root)

    return setup


@contextmanager
def _signal_kept() -> Iterator[None]:
    """Put the caller's handler of SIGTERM back, which Ray replaces as it starts."""
    handler_before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler_before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler_before)


def _wait_for_data_threads(limit_s: float = 30.0) -> None:
    """Wait for Ray Data's threads of finished executions: a call to Ray after its shutdown would end the process."""
    deadline = time.monotonic() + limit_s
    for thread in threading.enumerate():
        if thread.name.startswith(_DATA_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))
