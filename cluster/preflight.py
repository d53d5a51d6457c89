"""Checking every node of a cluster before a long job: versions, GPUs, disk, clock, output and separator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any, TypedDict

import ray
import ray.cloudpickle
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.packing import is_factory

_SAME = ("python", "ray", "torch", "clearsep")
_LIMIT_S = 180.0
_CLOCK_S = 5.0  # locks in a bucket are renewed every minute
_RAY_GPU = ("CUDA_VISIBLE_DEVICES", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Requirements that every node must meet."""

    out: str | None = None
    """Folder or s3:// address that every node must be able to write to and read from."""
    separator: str | None = None
    """Checkpoint folder or ``package.module:factory`` of a separator that every node must be able to run."""
    min_disk_gib: float = 5.0
    """Free space that every node must have for temporary files."""


class Gpu(TypedDict):
    """A GPU that torch can use."""

    name: str
    memory_gib: float


class Probe(TypedDict, total=False):
    """Findings of ``engine.cli.selfcheck`` on one node; a check that failed is missing and has an error instead."""

    versions: dict[str, str | None]
    """Version by package; ``clearsep`` is a fingerprint of this project's code."""
    gpus_seen: list[Gpu]
    """GPUs that torch can use."""
    disk_gib: float
    """Free space for temporary files."""
    shm_gib: float
    """Free space in /dev/shm."""
    shm_total_gib: float
    """Size of /dev/shm."""
    out_ms: float
    """Time of a write and a read in the output folder."""
    separator_rtf: float
    """Seconds of computing per second of audio."""
    errors: dict[str, str]
    """Error by name of the check that failed."""
    failed: str
    """Reason for which the node could not be checked at all; everything else is missing then."""


class NodeReport(Probe):
    """One row of the preflight."""

    node: str
    node_id: str
    host: str
    cpus: float
    gpus: float
    clock_offset_s: float | None
    """Seconds by which the node's clock is ahead; None if unknown."""
    problems: list[str]
    """Reasons not to start."""
    notes: list[str]
    """Advice."""


def preflight(config: PreflightConfig) -> list[NodeReport]:
    """Check every node of the connected cluster; one row per node.

    Nodes are compared with the machine of the caller. A node that does not answer in time is a row with that problem.
    """
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node without our code must answer too
    options = [f"--{name}={_absolute(value)}" for name in ("out", "separator") if (value := getattr(config, name))]
    marker = [f"--out={_absolute(config.out)}", f"--marker=.preflight-{uuid.uuid4().hex}"] if config.out else []
    if marker and _mark(marker, "put"):  # otherwise the check of this machine reports the reason
        options.append(marker[1])
    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0, max_retries=0)(_selfcheck)
    tasks = {
        node["NodeID"]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(options, os.getcwd())
        for node in nodes
    }
    mine = _selfcheck(options, os.getcwd())
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=_LIMIT_S)
    rows = []
    for node in nodes:
        probe = _result(tasks[node["NodeID"]])
        offset_s = None if "failed" in probe else _clock_offset_s(node["NodeID"])
        rows.append(report(node, probe, mine, offset_s, config))
    if marker:
        _mark(marker, "take")
    return rows


def _absolute(name: str) -> str:
    """A folder as nodes with another current folder find it; addresses and ``package.module:factory`` stay."""
    return name if "://" in name or is_factory(name) else os.path.abspath(name)


def _selfcheck(options: list[str], folder: str) -> Probe:
    """Result of ``engine.cli.selfcheck`` on this node; it sees all GPUs of the node, not those of this task.

    ``folder`` is the caller's current folder, where a separator's module may be.
    """
    try:
        done = _run(options, folder)
        probe: Probe = json.loads(done.stdout.splitlines()[-1])
        return probe
    except subprocess.TimeoutExpired:
        return {"failed": f"the check took longer than {_LIMIT_S * 0.8:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": f"cannot run the project's code ({cause}); install it on the node"}


def _mark(marker: list[str], action: str) -> bool:
    """Put a file that all nodes must see into the output folder, or take it away; True if that worked."""
    try:
        return _run([*marker, f"--mark={action}"], os.getcwd()).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _run(options: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _RAY_GPU}
    here = [
        os.path.dirname(path) for path in getattr(sys.modules.get("engine"), "__path__", [])
    ]  # before the user's own
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*here, os.environ.get("PYTHONPATH"), folder]))
    command = [sys.executable, "-P", "-m", "engine.cli.selfcheck", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S * 0.8, env=environment, check=False)


def _now() -> float:
    return time.time()


def _result(task: ray.ObjectRef) -> Probe:
    try:
        probe: Probe = ray.get(task, timeout=0.1)
        return probe
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        return {"failed": f"no answer in {_LIMIT_S:.0f} s"}
    except ray.exceptions.RayError as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def _clock_offset_s(node: str) -> float | None:
    """Seconds by which a node's clock is certainly ahead of this one; delays of the network do not count."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_now).options(scheduling_strategy=strategy)
    least = None
    for _ in range(3):
        sent = time.time()
        try:
            there = ray.get(task.remote(), timeout=30.0)
        except ray.exceptions.RayError:
            continue
        ahead = max(0.0, there - time.time()) + min(0.0, there - sent)
        least = ahead if least is None or abs(ahead) < abs(least) else least
    return least


def report(
    node: dict[str, Any], probe: Probe, mine: Probe, offset_s: float | None, config: PreflightConfig
) -> NodeReport:
    """The row of a node of ``ray.nodes()``, judged by its probe and by this machine's."""
    resources = node["Resources"]
    row: NodeReport = {
        "node": node["NodeName"],
        "node_id": node["NodeID"],
        "host": node["NodeManagerHostname"],
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "clock_offset_s": offset_s,
        **probe,  # type: ignore[typeddict-item]
    }
    failed = [probe["failed"]] if "failed" in probe else []
    row["problems"] = failed or _problems(row, mine, config)
    row["notes"] = [] if failed else _notes(row, resources.get("object_store_memory", 0.0) / 2**30)
    return row


def _problems(row: NodeReport, mine: Probe, config: PreflightConfig) -> list[str]:
    problems = []
    here = mine.get("versions", {})
    for name in _SAME:
        there = row["versions"].get(name)
        if here and there != here.get(name):
            problems.append(f"{name} must be {here.get(name)} as here, got {there or 'none'}; install the same version")
    num_seen = len(row.get("gpus_seen", []))
    if row["gpus"] > num_seen and "gpus_seen" not in row["errors"]:
        problems.append(
            f"torch must see the {row['gpus']:g} GPUs that Ray counts, got {num_seen}; "
            "install a driver and a CUDA build of torch that fit"
        )
    if row.get("disk_gib", config.min_disk_gib) < config.min_disk_gib:
        problems.append(
            f"free space for temporary files must be at least {config.min_disk_gib:g} GiB, got {row['disk_gib']:.1f}; "
            "make room"
        )
    if row["clock_offset_s"] is not None and abs(row["clock_offset_s"]) > _CLOCK_S:
        problems.append(
            f"the clock must agree within {_CLOCK_S:g} s, got {row['clock_offset_s']:+.0f} s; "
            "set it by NTP (locks and S3 depend on it)"
        )
    subjects = {"gpus_seen": "GPUs", "out_ms": config.out, "separator_rtf": config.separator}
    problems += [f"{subjects.get(name, name)}: {error}" for name, error in row["errors"].items()]
    return problems


def _notes(row: NodeReport, store_gib: float) -> list[str]:
    size_gib = row.get("shm_total_gib")
    if size_gib is not None and size_gib < store_gib:
        return [
            f"/dev/shm has {size_gib:.1f} GiB, Ray's object store may need {store_gib:.1f} GiB and is slow on disk; "
            "give the container more (--shm-size, an emptyDir of medium Memory)"
        ]
    return []
