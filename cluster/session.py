"""Connecting to Ray: a cluster that was named, or one started on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # reporting is the user's to switch on
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the pass shows its own
}
_ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine will not be taken away; a process less to start
    "MALLOC_MMAP_THRESHOLD_": str(2**32),  # glibc keeps what a batch freed for the next: a tenth of a worker's time
    "MALLOC_TRIM_THRESHOLD_": str(2**32),  # would go into page faults
}
_DATA_THREADS = ("iter_threaded", "StreamingExecutor")  # what Ray Data calls those that end with an execution


@contextmanager
def connected(
    address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[None]:
    """Ray for the length of a ``with`` block; a cluster that is already connected is used and left running.

    ``address`` is Ray's (``auto``, ``ray://host:10001``), null: ``RAY_ADDRESS`` where it is set, else one that is
    started on this machine, reachable from it alone (also where another Ray runs here), with all its CPUs and GPUs
    unless told otherwise.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    for name, value in (_QUIET if address else _QUIET | _ALONE).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    local = {} if address else {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
    ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of the caller's
    try:
        yield
    finally:
        _settle()
        ray.shutdown()


def _settle(limit_s: float = 30.0) -> None:
    """Wait for the threads of Ray Data's executions that are over: who calls Ray after its end ends the process."""
    until = time.monotonic() + limit_s
    for thread in threading.enumerate():
        if thread.name.startswith(_DATA_THREADS):
            thread.join(max(0.0, until - time.monotonic()))
