"""Submitting commands as jobs to a Ray cluster's job server.

A job consists of the command line and, as its working directory, this project's code and the modules of the user's own
separators. The cluster needs nothing but the dependencies (in its image, or installed from :func:`requirements`). A
restarted command resumes, so a job that was stopped, or lost with its cluster, is simply submitted again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import env_file
from cluster.jobs import JobServer, translated_errors
from cluster.packing import pack

_LOGGER = logging.getLogger(__name__)
COMMANDS = ("demo", "run", "tune", "separate-corpus", "distil")
_ACTIVE = ("PENDING", "RUNNING")
_LIST_S = 30.0
_READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Resources and environment of a job."""

    env: tuple[str, ...] = ()
    """Names of environment variables that the job receives with their local values, which the cluster shows."""
    env_file: str | None = None
    """File on every node with ``NAME=VALUE`` lines, which the job's processes read; its values are not sent."""
    install: bool = False
    """Install the dependencies, in the local versions, on every node that lacks them."""
    preflight: bool = True
    """Check every node first, and do not start the command if a node has a problem."""
    num_cpus: float = 0.0
    """CPUs reserved for the command's own process, in addition to those of its work; 0: it runs on the head node."""
    num_gpus: float = 0.0
    """GPUs reserved for the command's own process."""
    memory_gib: float = 0.0
    """Memory reserved for the command's own process."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Pairs that the cluster stores with the job."""

    def __post_init__(self) -> None:
        for name in self.env:
            if name not in os.environ:
                raise ValueError(f"environment variable {name} must be set, got none; export it or drop --env {name}")
        if self.env_file is not None and not os.path.isabs(self.env_file):
            raise ValueError(
                f"--env-file must be the absolute path of a file on every node, got {self.env_file}; mount a "
                "secret there (a file of this machine is not sent, for the cluster would show its values)"
            )
        for name in ("num_cpus", "num_gpus", "memory_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}; 0 reserves none")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line of this project."""

    name: str
    """One of :data:`COMMANDS`."""
    arguments: tuple[str, ...]
    """Everything after the name."""
    out: str
    """Folder or address of the results."""
    separator: str | None = None
    """Separator that the command starts from: checkpoint folder or ``package.module:factory``."""


def is_here(address: str) -> bool:
    """True if the cluster's head node is this machine, so that paths agree; a tunnel to another machine is not."""
    from ray.util.state import list_nodes

    deadline = time.monotonic() + _LIST_S
    filters = [("is_head_node", "=", "True"), ("state", "=", "ALIVE")]
    with translated_errors(address):
        while not (heads := [node.node_ip for node in list_nodes(address, filters=filters)]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"cannot find the head node of {address} (none for {_LIST_S:.0f} s); try again")
            time.sleep(0.5)  # the cluster has just started
    return any(_is_local_ip(ip) for ip in heads)


def _is_local_ip(ip: str) -> bool:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((ip, 0))
        return True
    return False


def requirements() -> list[str]:
    """The project's dependencies, each pinned to its local version; without Ray, which the cluster has."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in importlib.metadata.requires("clearsep-engine") or []]
    return sorted(
        f"{one.name}=={importlib.metadata.version(one.name)}"
        for one in wanted
        if one.name != "ray" and (one.marker is None or one.marker.evaluate({"extra": ""}))
    )


def entrypoint(command: Command, arguments: Sequence[str], config: JobConfig, *, here: bool) -> str:
    """The job's shell command: the preflight, then the command; on this machine it runs in the current folder."""
    python = sys.executable if here and not config.install else "python"
    steps = [shlex.join(["cd", os.getcwd()])] if here else []
    if config.preflight:
        options = [f"--{name}={value}" for name in ("out", "separator") if (value := getattr(command, name))]
        steps.append(shlex.join([python, "-P", "-m", "clearsep", "preflight", *options]))
    steps.append("exec " + shlex.join([python, "-P", "-m", "clearsep", command.name, *arguments]))
    return " && ".join(steps)


def check_paths(command: Command, *, here: bool) -> None:
    """``ValueError`` for an output inside the job's working directory, which Ray deletes."""
    if not here and not command.out.startswith(("/", "s3://")):
        raise ValueError(
            f"-o must be an s3:// address or an absolute path, got {command.out} (Ray deletes the job's own folder); "
            "give a bucket, or a folder that all nodes share"
        )


def submit(server: JobServer, command: Command, config: JobConfig) -> str:
    """Submit a command and return the job's id; an active job of the same command is returned instead.

    Raises ``ValueError`` as :func:`check_paths` does.
    """
    address = server.get_address()
    here = is_here(address)
    check_paths(command, here=here)
    if config.env:
        _LOGGER.warning(
            f"the values of {', '.join(config.env)} are readable in the job's metadata (dashboard) and in a log on "
            "every node; give secrets by a node's role, or by --env-file as a file on the nodes"
        )
    with tempfile.TemporaryDirectory(prefix="clearsep-job-") as folder, translated_errors(address):
        arguments = pack(Path(folder), command.arguments, here=here)
        line = entrypoint(command, arguments, config, here=here)
        for job in server.list_jobs():
            if job.entrypoint == line and job.status in _ACTIVE:
                _LOGGER.info(f"this command is already running as job {job.submission_id}")
                return str(job.submission_id)
        environment: dict[str, Any] = {
            "working_dir": folder,
            "env_vars": {name: os.environ[name] for name in config.env}
            | ({env_file.VARIABLE: config.env_file} if config.env_file else {}),
        }
        if config.install:
            environment["uv"] = {"packages": requirements(), "uv_check": False}
        now = dt.datetime.now(dt.UTC)
        return _submit_when_ready(
            server,
            entrypoint=line,
            submission_id=f"clearsep-{command.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            runtime_env=environment,
            metadata=dict(config.metadata) | _metadata(command),
            entrypoint_num_cpus=config.num_cpus or None,
            entrypoint_num_gpus=config.num_gpus or None,
            entrypoint_memory=int(config.memory_gib * 2**30) or None,
        )


def _submit_when_ready(server: JobServer, **job: Any) -> str:  # noqa: ANN401 - arguments of Ray's submit_job
    """Submit a job; a cluster that has just started gets ``_READY_S`` to start its agent, which runs jobs."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            return str(server.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"cannot submit a job (the cluster has had no agent that runs jobs for {_READY_S:.0f} s); if "
                    "another Ray on its head node has its port, start it with --dashboard-agent-listen-port=PORT"
                ) from None
        time.sleep(1.0)


def _metadata(command: Command) -> dict[str, str]:
    version = importlib.metadata.version("clearsep-engine")
    return {"clearsep": version, "command": command.name, "out": command.out}
