"""What a pass and a run tell Ray's metrics, to be seen in its dashboard, in Prometheus and in our own Grafana board.

All is told by the process of the command, from what its tasks report of their parts: the steps themselves know no Ray.
Where Ray is not connected, nothing is told.
"""

from __future__ import annotations

import functools
from typing import Any

import ray
import ray.util.metrics

from engine.passes.records import STEPS

COUNTERS = {
    "clearsep_audio_seconds": ("Audio of clips whose stems are on disk, in seconds.", ()),
    "clearsep_step_seconds": ("Time that workers spent in a step, in seconds.", ("step",)),
    "clearsep_queries": ("Queries by outcome: stem or failed.", ("outcome",)),
    "clearsep_failures": ("Failed queries by step and class of error.", ("step", "error_class")),
}
GAUGES = {
    "clearsep_clips_waiting": ("Clips of the pass that are not on disk yet.", ()),
    "clearsep_real_time_factor": ("Seconds of separating for a second of audio, of the last part.", ("worker",)),
    "clearsep_batch_fill_fraction": ("Share of a separator's batches that is audio and not padding.", ("worker",)),
    "clearsep_vram_bytes": ("Most GPU memory that the last part took.", ("worker",)),
    "clearsep_kept_fraction": ("Share of an iteration's stems that its gate kept.", ("iteration",)),
    "clearsep_sdri_db": ("SDR improvement of an iteration's separator on the run's validation.", ("iteration",)),
}


@functools.cache
def _counter(name: str) -> Any:  # noqa: ANN401 - Ray has no types
    about, tags = COUNTERS[name]
    return ray.util.metrics.Counter(name, description=about, tag_keys=tags)


@functools.cache
def _gauge(name: str) -> Any:  # noqa: ANN401 - Ray has no types
    about, tags = GAUGES[name]
    return ray.util.metrics.Gauge(name, description=about, tag_keys=tags)


def _count(name: str, value: float, **tags: str) -> None:
    if value > 0:
        _counter(name).inc(value, tags=tags)


def record_shard(row: dict[str, Any], *, clips_waiting: float) -> None:
    """Tell of a part, as :class:`engine.stages.ScoreAndWrite` reports it."""
    if not ray.is_initialized():
        return
    _count("clearsep_audio_seconds", row["audio_s"])
    for step in STEPS:
        _count("clearsep_step_seconds", row[f"{step}_s"], step=step)
    num_failed = row["num_failed"] + row["num_failed_before"]
    _count("clearsep_queries", row["num_queries"] + row["num_failed_before"] - num_failed, outcome="stem")
    _count("clearsep_queries", num_failed, outcome="failed")
    for failed in row["failed"]:
        names = {"step": failed["step"], "error_class": failed["error_class"]}
        _count("clearsep_failures", failed["num_queries"], **names)
    _gauge("clearsep_clips_waiting").set(max(0.0, clips_waiting))
    worker = {"worker": row["worker"]}
    if row["audio_s"]:
        _gauge("clearsep_real_time_factor").set(row["separate_s"] / row["audio_s"], tags=worker)
        _gauge("clearsep_batch_fill_fraction").set(row["batch_fill_fraction"], tags=worker)
    if row["vram_bytes"]:
        _gauge("clearsep_vram_bytes").set(row["vram_bytes"], tags=worker)


def record_kept(iteration: int, *, num_kept: int, num_stems: int) -> None:
    """Tell what an iteration's gate kept."""
    if ray.is_initialized() and num_stems:
        _gauge("clearsep_kept_fraction").set(num_kept / num_stems, tags={"iteration": str(iteration)})


def record_validation(iteration: int, sdri_db: float) -> None:
    """Tell what an iteration's separator is worth."""
    if ray.is_initialized():
        _gauge("clearsep_sdri_db").set(sdri_db, tags={"iteration": str(iteration)})
