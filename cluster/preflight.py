"""Before a long job: what every node of a cluster has and can do, and whether that is reason not to begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_SAME = ("python", "ray", "torch", "ours")
_LIMIT_S = 180.0
_CLOCK_S = 5.0  # locks in a bucket are renewed by the minute
_RAY_GPU = ("CUDA_VISIBLE_DEVICES", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What every node is asked for."""

    out: str | None = None
    """Folder or s3:// address that every node must be able to write to and read from."""
    separator: str | None = None
    """Checkpoint folder of a separator that every node must be able to run."""
    min_disk_gib: float = 5.0
    """Free space that every node must have where temporary files lie."""


def preflight(config: PreflightConfig) -> list[dict[str, Any]]:
    """A row a node of the cluster that Ray is connected to, with ``problems`` (reasons to stop) and ``notes``.

    Each node is compared with the one that asks. A node that does not answer in time is a row with that problem.
    """
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that a node without our code answers too
    words = [f"--{name}={_absolute(value)}" for name in ("out", "separator") if (value := getattr(config, name))]
    marking = [f"--out={_absolute(config.out)}", f"--marker=.preflight-{uuid.uuid4().hex}"] if config.out else []
    if marking and _mark(marking, "put"):  # else our own look says why not
        words.append(marking[1])
    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {
        node["NodeID"]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(words)
        for node in nodes
    }
    mine = _look(words)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LIMIT_S)
    rows = []
    for node in nodes:
        answer = _answer(asked[node["NodeID"]])
        offset_s = None if "failed" in answer else _clock_offset_s(node["NodeID"])
        rows.append(_judged(node, answer, mine, offset_s, config))
    if marking:
        _mark(marking, "take")
    return rows


def _absolute(path: str) -> str:
    """A path as all nodes understand it: they are not in our folder."""
    return path if "://" in path else os.path.abspath(path)


def _look(words: list[str]) -> dict[str, Any]:
    """The answer of ``engine.probe`` on this node, or ``{"failed": why}``; it sees all GPUs, not this task's alone."""
    try:
        done = _run(words)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {_LIMIT_S * 0.8:.0f} s to look at itself"}
    except (IndexError, json.JSONDecodeError):
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": f"our code does not run there: {told}"}


def _mark(marking: list[str], how: str) -> bool:
    """Put a file into the output that all nodes must see, or take it away; whether that worked."""
    try:
        return _run([*marking, f"--mark={how}"]).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _RAY_GPU}
    command = [sys.executable, "-P", "-m", "engine.probe", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S * 0.8, env=environment, check=False)


def _now() -> float:
    return time.time()


def _answer(task: ray.ObjectRef) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(task, timeout=0.1)
        return answer
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        return {"failed": f"no answer in {_LIMIT_S:.0f} s"}
    except ray.exceptions.RayError as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def _clock_offset_s(node: str) -> float | None:
    """How far a node's clock is ahead of ours, in seconds, at the least: what the way takes is not counted."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_now).options(scheduling_strategy=strategy)
    least = None
    for _ in range(3):
        sent = time.time()
        try:
            told = ray.get(task.remote(), timeout=30.0)
        except ray.exceptions.RayError:
            continue
        ahead = max(0.0, told - time.time()) + min(0.0, told - sent)
        least = ahead if least is None or abs(ahead) < abs(least) else least
    return least


def _judged(
    node: dict[str, Any],
    answer: dict[str, Any],
    mine: dict[str, Any],
    offset_s: float | None,
    config: PreflightConfig,
) -> dict[str, Any]:
    resources = node["Resources"]
    row = {
        "node": node["NodeName"],
        "node_id": node["NodeID"],
        "host": node["NodeManagerHostname"],
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "clock_offset_s": offset_s,
        **answer,
    }
    failed = [answer["failed"]] if "failed" in answer else []
    return row | {
        "problems": failed or _problems(row, answer, mine, config),
        "notes": [] if failed else _notes(row, resources.get("object_store_memory", 0.0) / 2**30),
    }


def _problems(row: dict[str, Any], answer: dict[str, Any], mine: dict[str, Any], config: PreflightConfig) -> list[str]:
    found = []
    here = mine.get("versions", {})
    for name in _SAME:
        there = answer["versions"].get(name)
        if here and there != here.get(name):
            found.append(f"{name} is {there or 'missing'} there and {here.get(name)} here; install the same")
    seen = len(answer.get("gpus_seen", []))
    if row["gpus"] > seen and "gpus_seen" not in answer["errors"]:
        found.append(
            f"Ray counts {row['gpus']:g} GPUs, torch sees {seen}: the driver or torch's CUDA build does not fit"
        )
    if answer.get("disk_gib", config.min_disk_gib) < config.min_disk_gib:
        found.append(
            f"{answer['disk_gib']:.1f} GiB free for temporary files, less than {config.min_disk_gib:g}; make room"
        )
    if row["clock_offset_s"] is not None and abs(row["clock_offset_s"]) > _CLOCK_S:
        found.append(f"its clock is {row['clock_offset_s']:+.0f} s from ours; set it by NTP, for locks and S3 go by it")
    what = {"gpus_seen": "GPUs", "out_ms": config.out, "separator_rtf": config.separator}
    found += [f"{what.get(name, name)}: {error}" for name, error in answer["errors"].items()]
    return found


def _notes(row: dict[str, Any], store_gib: float) -> list[str]:
    room = row.get("shm_total_gib")
    if room is not None and room < store_gib:
        return [
            f"/dev/shm holds {room:.1f} GiB, Ray's object store may take {store_gib:.1f}: it lies on the disk then, "
            "and is slow; give the container a larger one (--shm-size, an emptyDir of medium Memory)"
        ]
    return []
