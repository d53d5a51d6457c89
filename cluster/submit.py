"""Commands as jobs of a Ray cluster: sent, followed, listed and stopped through Ray's job server.

What is sent is the command line, and this project's own code as the job's working directory, so that a cluster needs
its dependencies alone (the image has them, or :func:`requirements` are installed). Started again, a command goes on
where it was, so a job that was stopped, or lost with its cluster, is submitted once more.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs import _answers

_LOGGER = logging.getLogger(__name__)
COMMANDS = ("demo", "run", "tune", "separate-corpus", "distil")
_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("clearsep.py", "engine", "train", "tune", "cluster")
_SECRET = re.compile(r"key|secret|token|passw|credential", re.IGNORECASE)
_ACTIVE = ("PENDING", "RUNNING")
_LIST_S = 30.0


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """How a command is run as a job."""

    env: tuple[str, ...] = ()
    """Names of environment variables whose values here the job gets too."""
    install: bool = False
    """Install the dependencies on every node that lacks them, in the versions that are here."""
    preflight: bool = True
    """Look at every node first, and do not begin where one is not fit."""
    num_cpus: float = 0.0
    """CPUs held for the command itself, beside those of its work; 0: it runs on the head node."""
    num_gpus: float = 0.0
    """GPUs held for the command itself."""
    memory_gib: float = 0.0
    """Memory held for the command itself."""
    metadata: tuple[tuple[str, str], ...] = ()
    """What the cluster keeps with the job."""

    def __post_init__(self) -> None:
        for name in self.env:
            if name not in os.environ:
                raise ValueError(
                    f"the environment variable {name} is not set here; export it, or leave out --env {name}"
                )
        for name in ("num_cpus", "num_gpus", "memory_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be below 0")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of ours, taken apart."""

    name: str
    """One of :data:`COMMANDS`."""
    arguments: tuple[str, ...]
    """All that follows its name."""
    out: str
    """Where its results go."""
    separator: str | None = None
    """Checkpoint folder that it starts from."""


def is_here(address: str) -> bool:
    """Whether the cluster's head node is this machine, so that paths mean the same (a tunnel's other end is not)."""
    from ray.util.state import list_nodes

    until = time.monotonic() + _LIST_S
    head = [("is_head_node", "=", "True"), ("state", "=", "ALIVE")]
    with _answers(address):
        while not (heads := [node.node_ip for node in list_nodes(address, filters=head)]):
            if time.monotonic() > until:
                raise RuntimeError(f"the cluster at {address} has named no head node for {_LIST_S:.0f} s")
            time.sleep(0.5)  # it has just started
    return any(_is_ours(ip) for ip in heads)


def _is_ours(ip: str) -> bool:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((ip, 0))
        return True
    return False


def requirements() -> list[str]:
    """The project's dependencies, each pinned to the version that is installed here; Ray is the cluster's own."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in importlib.metadata.requires("clearsep-engine") or []]
    return sorted(
        f"{one.name}=={importlib.metadata.version(one.name)}"
        for one in wanted
        if one.name != "ray" and (one.marker is None or one.marker.evaluate({"extra": ""}))
    )


def entrypoint(command: Command, arguments: Sequence[str], config: JobConfig, *, here: bool) -> str:
    """The job's shell command: the preflight, then the command; on this machine in the folder that we are in."""
    python = sys.executable if here and not config.install else "python"
    steps = [shlex.join(["cd", os.getcwd()])] if here else []
    if config.preflight:
        asked = [f"--{name}={value}" for name in ("out", "separator") if (value := getattr(command, name))]
        steps.append(shlex.join([python, "-P", "-m", "clearsep", "preflight", *asked]))
    steps.append("exec " + shlex.join([python, "-P", "-m", "clearsep", command.name, *arguments]))
    return " && ".join(steps)


def check_paths(command: Command, *, here: bool) -> None:
    """Refuse an output that would lie in the job's own folder, which Ray deletes.

    Raises:
        ValueError: the cluster is elsewhere and the output is a relative path.
    """
    if not here and not command.out.startswith(("/", "s3://")):
        raise ValueError(
            f"{command.out} would lie in the job's own folder on the cluster, which Ray deletes; give -o an s3:// "
            "address, or the absolute path of a folder that all nodes share"
        )


def pack(folder: Path, arguments: Sequence[str], *, here: bool) -> list[str]:
    """Put what a job needs into its working directory; returns its arguments.

    That is this project's code, and where the cluster is elsewhere, each YAML file that an argument names.
    """
    for name in _CODE:
        source = _ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if here:
        return list(arguments)
    sent: list[str] = []
    for word in arguments:
        path = Path(word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            name = f"settings-{len(sent)}-{path.name}"
            shutil.copy(path, folder / name)
            sent.append(name)
        else:
            sent.append(word)
    return sent


def submit(
    jobs: Any,  # noqa: ANN401 - Ray's client
    command: Command,
    config: JobConfig,
) -> str:
    """Send a command to the cluster as a job; returns its id. One that is at work there already is that job.

    Raises:
        ValueError: what :func:`check_paths` says.
    """
    address = jobs.get_address()
    here = is_here(address)
    check_paths(command, here=here)
    for name in filter(_SECRET.search, config.env):
        _LOGGER.info(
            f"warning: whoever may see the cluster's dashboard sees the value of {name}; a machine's role is safer"
        )
    with tempfile.TemporaryDirectory(prefix="clearsep-job-") as folder, _answers(address):
        sent = pack(Path(folder), command.arguments, here=here)
        line = entrypoint(command, sent, config, here=here)
        for job in jobs.list_jobs():
            if job.entrypoint == line and job.status in _ACTIVE:
                _LOGGER.info(f"this command is at work there already, as {job.submission_id}")
                return str(job.submission_id)
        environment: dict[str, Any] = {
            "working_dir": folder,
            "env_vars": {name: os.environ[name] for name in config.env},
        }
        if config.install:
            environment["uv"] = {"packages": requirements(), "uv_check": False}
        now = dt.datetime.now(dt.UTC)
        return str(
            jobs.submit_job(
                entrypoint=line,
                submission_id=f"clearsep-{command.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
                runtime_env=environment,
                metadata=dict(config.metadata) | _about(command),
                entrypoint_num_cpus=config.num_cpus or None,
                entrypoint_num_gpus=config.num_gpus or None,
                entrypoint_memory=int(config.memory_gib * 2**30) or None,
            )
        )


def _about(command: Command) -> dict[str, str]:
    version = importlib.metadata.version("clearsep-engine")
    return {"clearsep": version, "command": command.name, "out": command.out}
