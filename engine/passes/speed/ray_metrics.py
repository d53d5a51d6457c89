"""Metrics of passes and runs for Ray's dashboard, for Prometheus and for the Grafana board.

The process of the command records them from the reports of its workers, so the steps themselves do not depend on Ray.
Without a connection to Ray nothing is recorded. Also a count that Ray keeps of its workers.
"""

from __future__ import annotations

import functools
from typing import Any

import ray
import ray._private.state
import ray.util.metrics
from ray.core.generated import common_pb2, gcs_pb2

from engine.cli.display import shown
from engine.passes.records import STEPS
from engine.passes.transport import ShardReport

COUNTERS = {
    "clearsep_audio_seconds": ("Audio of clips whose stems are on disk, in seconds.", ()),
    "clearsep_step_seconds": ("Time of workers in a step, in seconds.", ("step",)),
    "clearsep_queries": ("Queries by outcome: stem or failed.", ("outcome",)),
    "clearsep_failures": ("Failed queries by step and class of error.", ("step", "error_class")),
}
GAUGES = {
    "clearsep_clips_waiting": ("Clips of the pass that are not on disk yet.", ()),
    "clearsep_real_time_factor": ("Seconds of separation per second of audio, in the last shard.", ("worker",)),
    "clearsep_batch_fill_fraction": ("Fraction of a separator's batches that is audio, not padding.", ("worker",)),
    "clearsep_vram_bytes": ("Largest GPU memory in use for the last shard.", ("worker",)),
    "clearsep_kept_fraction": ("Fraction of an iteration's stems that its thresholds kept.", ("iteration",)),
    "clearsep_sdri_db": ("SDR improvement of an iteration's separator on the validation mixtures.", ("iteration",)),
}


@functools.cache
def _counter(name: str) -> Any:  # noqa: ANN401 - Ray has no types
    description, tags = COUNTERS[name]
    return ray.util.metrics.Counter(name, description=description, tag_keys=tags)


@functools.cache
def _gauge(name: str) -> Any:  # noqa: ANN401 - Ray has no types
    description, tags = GAUGES[name]
    return ray.util.metrics.Gauge(name, description=description, tag_keys=tags)


def _count(name: str, value: float, **tags: str) -> None:
    if value > 0:
        _counter(name).inc(value, tags=tags)


def record_shard(report: ShardReport, *, clips_waiting: int) -> None:
    """Record the report of a shard."""
    if not ray.is_initialized():
        return
    record = report.record
    _count("clearsep_audio_seconds", record["audio_s"])
    for step in STEPS:
        _count("clearsep_step_seconds", record[f"{step}_s"], step=step)  # type: ignore[literal-required]
    _count("clearsep_queries", record["num_stems"], outcome="stem")
    _count("clearsep_queries", record["num_failed"], outcome="failed")
    for (step, error_class), num_queries in report.failed.items():
        _count("clearsep_failures", num_queries, step=step, error_class=shown(error_class))
    _gauge("clearsep_clips_waiting").set(clips_waiting)
    worker = {"worker": report.use.worker}
    if record["audio_s"]:
        _gauge("clearsep_real_time_factor").set(record["separate_s"] / record["audio_s"], tags=worker)
        _gauge("clearsep_batch_fill_fraction").set(report.use.batch_fill_fraction, tags=worker)
    if report.use.vram_bytes:
        _gauge("clearsep_vram_bytes").set(report.use.vram_bytes, tags=worker)


def record_kept(iteration: int, *, num_kept: int, num_stems: int) -> None:
    """Record the fraction of its stems that an iteration kept."""
    if ray.is_initialized() and num_stems:
        _gauge("clearsep_kept_fraction").set(num_kept / num_stems, tags={"iteration": str(iteration)})


def record_validation(iteration: int, sdri_db: float) -> None:
    """Record the validation result of an iteration's separator."""
    if ray.is_initialized():
        _gauge("clearsep_sdri_db").set(sdri_db, tags={"iteration": str(iteration)})


def num_ended_for_memory() -> int:
    """Workers that Ray's memory monitor has ended so far; the public API for that needs Ray's dashboard."""
    table = ray._private.state.state._connect_and_get_accessor().get_worker_table()
    kind = common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY
    return sum(gcs_pb2.WorkerTableData.FromString(worker).exit_type == kind for worker in table)
