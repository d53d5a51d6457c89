"""The limit of a pass: GPUs, CPUs, storage, or none of them; decided from the time that each of them works.

One rule serves the plan of a pass and its summary. A task of decoding or writing takes less than half a CPU of Ray's
account, so two workers a CPU is when they count as all in use, most of them waiting for storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

GPU_STEPS = ("separate", "assess", "score")
"""Steps that run on GPUs if there are any."""
_BUSY, _BUSY_CPUS = 0.85, 0.75  # fractions of the time from which something is the limit; Ray itself needs CPUs too
_FULL = 0.95  # what can be reached
_WORKERS_PER_CPU = 2
_GERUND = {
    "decode": "decoding",
    "separate": "separating",
    "assess": "assessing",
    "score": "scoring",
    "write": "writing",
}
_REMEDY = {
    "reading": "bring the audio nearer, or cut clips from longer files; in S3, spread it over several prefixes",
    "writing": "write to a nearer or faster place, or give longer shards (engine.shard_s)",
}


class PassLimit(TypedDict):
    """The limit of a pass, and what to do about it."""

    limit: Literal["GPUs", "CPUs", "reading", "writing", "start", "command"]
    """``start``: starting took most of the time; ``command``: nothing that works is busy, so handing out the work."""
    gpu_busy_fraction: float | None
    """Null without GPUs."""
    cpu_busy_fraction: float
    advice: str


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """Time that workers spend on a pass, or on the part of it that one start of the command made."""

    step_s: dict[str, float]
    """All workers' time by step, waiting included."""
    gpu_s: float
    """Time in which GPUs are busy."""
    read_wait_s: float
    """Time in which decoding waits for audio."""
    write_wait_s: float
    """Time in which writing waits for storage."""
    num_cpus: float
    num_gpus: float = 0.0
    threads: int = 1
    """CPUs that a separator without a GPU keeps busy."""

    @property
    def cpu_s(self) -> dict[str, float]:
        """Work of CPUs by step."""
        work_s = dict(self.step_s)
        for step in GPU_STEPS:
            work_s[step] *= 0.0 if self.num_gpus else self.threads
        work_s["decode"] -= self.read_wait_s
        work_s["write"] -= self.write_wait_s
        return work_s

    @property
    def needed_s(self) -> dict[str, float]:
        """Wall time that GPUs, CPUs and waiting workers take at least, each if nothing else limits them."""
        work_s, waiting_s = sum(self.cpu_s.values()), self.read_wait_s + self.write_wait_s
        return {
            "GPUs": self.gpu_s / self.num_gpus if self.num_gpus else 0.0,
            "CPUs": work_s / self.num_cpus,
            "storage": (work_s + waiting_s) / (self.num_cpus * _WORKERS_PER_CPU),
        }


def limit_of(times: PassTimes, *, wall_s: float | None = None, start_s: float = 0.0) -> PassLimit:
    """The limit of a pass that took ``wall_s``, of which ``start_s`` were over before any shard was done.

    ``wall_s`` null: the pass takes no longer than what limits it.
    """
    needed_s = times.needed_s
    running_s = max(1e-9, max(needed_s.values()) if wall_s is None else wall_s - start_s)
    gpus, cpus, workers = (min(1.0, needed_s[name] / running_s) for name in ("GPUs", "CPUs", "storage"))
    if wall_s is not None and start_s > wall_s / 2:
        limit, advice = "start", f"starting took {start_s / wall_s:.0%} of the time, as in any short pass"
    elif times.num_gpus and gpus >= _BUSY:
        limit, advice = "GPUs", f"GPUs are busy {gpus:.0%} of the time; more of them make it faster"
    elif cpus >= _BUSY_CPUS:
        limit, advice = "CPUs", _cpu_advice(times, gpus, cpus)
    elif workers >= _BUSY:
        limit = "reading" if times.read_wait_s >= times.write_wait_s else "writing"
        waiting_s = times.read_wait_s + times.write_wait_s
        waits = waiting_s / (waiting_s + sum(times.cpu_s.values()))
        advice = f"workers wait for storage {waits:.0%} of their time, mostly in {limit}; {_REMEDY[limit]}"
    else:
        limit = "command"
        who = f"GPUs ({gpus:.0%} busy) and CPUs" if times.num_gpus else "CPUs"
        advice = (
            f"{who} ({cpus:.0%} busy) wait for work: the shards are few, or the command hands them out too slowly; "
            "give longer shards (engine.shard_s), or several commands (--slice)"
        )
    fraction = gpus if times.num_gpus else None
    return PassLimit(limit=limit, gpu_busy_fraction=fraction, cpu_busy_fraction=cpus, advice=advice)  # type: ignore[typeddict-item]


def _cpu_advice(times: PassTimes, gpus: float, cpus: float) -> str:
    step = _GERUND[max(times.cpu_s, key=lambda name: times.cpu_s[name])]
    if not times.num_gpus:
        return f"CPUs are busy {cpus:.0%} of the time, mostly with {step}; more of them, or a GPU, make it faster"
    more = max(1, math.ceil(times.num_cpus * (_FULL / max(gpus, 0.01) - 1.0) / times.num_gpus))
    return f"GPUs wait for CPUs {1.0 - gpus:.0%} of the time, mostly for {step}; give {more} more CPUs for each GPU"
