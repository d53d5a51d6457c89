"""What limits a pass on 10, 100 and 1,000 GPUs: costs measured here, the rest simulated.

    python -m benchmarks.scale.scaling [--out runs/scaling]

*Measured*: the cost of a clip in each step, in a pass over clips of 10 s with the laptop's separator; and the cost of a
task of Ray for those of which there is only one (the command's process, Ray's GCS) and for a node (its raylet), in two
passes over clips so short that nothing else counts: with a task of Ray for every task of the pass, and with several in
one. *Simulated*: shards on their way through the command's process, CPUs, the request limits of a bucket and GPUs of a
given speed, which are lost now and then and come back. The speed of a GPU and the limits of the bucket are assumptions.
Fills the tables of docs/guides/scaling.md.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import soundfile

from benchmarks import pages
from benchmarks.scale.nodes import write_inputs
from benchmarks.scale.scale import HalfSeparator, open_half, write_manifest
from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes import run
from engine.passes.config import PassConfig
from engine.separators import SeparatorSource, find_separator

_PAGE = pages.ROOT / "docs" / "guides" / "scaling.md"
_GETS_PER_CLIP, _PUTS_PER_SHARD = 3, 3  # size, header and body; shard, record and the cost of a listing
_CLIP_S, _ROWS_PER_TASK = 10.0, 64
_BLOCK_BYTES = 128 * 2**20  # of Ray Data


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of one clip of 10 s and of one task."""

    decode_s: float
    """CPU time to decode a clip."""
    finish_s: float
    """CPU time to score and write a clip's stems."""
    queries: float
    """Stems of a clip."""
    source_bytes: float
    """Size of a clip's audio."""
    stem_bytes: float
    """Size of a clip's stems."""
    driver_s: float
    """CPU time of the command's process for a task of Ray."""
    report_s: float
    """CPU time of the command's process for a shard, however many are in a task."""
    gcs_s: float
    """CPU time of Ray's GCS for a task of Ray."""
    raylet_s: float
    """CPU time of a node's raylet for a task of Ray."""


_SHOWN = {
    "decode_s": ("decoding, CPU ms a clip", 1e3),
    "finish_s": ("scoring and writing, CPU ms a clip", 1e3),
    "source_bytes": ("read, KiB a clip", 1 / 1024),
    "stem_bytes": ("written, KiB a clip", 1 / 1024),
    "driver_s": ("the command's process, CPU ms a task of Ray", 1e3),
    "report_s": ("the command's process, CPU ms a shard", 1e3),
    "gcs_s": ("Ray's GCS, CPU ms a task of Ray", 1e3),
    "raylet_s": ("a raylet, CPU ms a task of Ray", 1e3),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of a pass, and how it uses them."""

    gpus: int
    cpus_per_gpu: int = 8
    shard_s: float = 320.0
    """Audio of a shard."""
    slices: int = 1
    """Commands that work on the pass, each on a slice."""
    prefixes: int = 1
    """Prefixes of the bucket over which the corpus' audio is spread."""
    gpu_speed: float = 1000.0
    """Seconds of audio that a GPU separates in a second, for one query."""
    gets_per_s: float = 5500.0
    """Requests that a prefix of the bucket answers in a second, as S3 documents them."""
    puts_per_s: float = 3500.0
    """The same for writes."""
    lost_per_gpu_h: float = 0.05
    """How often a GPU is taken away; it returns after two minutes."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Result of a simulation."""

    clips_per_s: float
    busy: dict[str, float]
    """Fraction of the time that each station is busy."""

    @property
    def limit(self) -> str:
        """The busiest station."""
        return max(self.busy, key=lambda name: self.busy[name])


def measure_clip(folder: Path) -> dict[str, float]:
    """Costs of a clip."""
    natural, checkpoint = write_inputs(folder, 240)
    config = PassConfig(num_gpus_per_actor=0)
    with connect():
        summary = run.run_pass(
            read_corpus(natural), folder / "pass", separator=find_separator(checkpoint), config=config
        )
    number = summary["num_clips"]
    step_s = {name: value / number for name, value in summary["step_s"].items()}
    audio = sum(path.stat().st_size for path in (natural.parent / "audio").glob("clip-*"))
    stems = sum(path.stat().st_size for path in (folder / "pass" / "stems").glob("*.parquet"))
    return {
        "decode_s": step_s["decode"],
        "finish_s": step_s["score"] + step_s["write"] + step_s["assess"],
        "queries": summary["num_stems"] / number,
        "source_bytes": audio / number,
        "stem_bytes": stems / number,
    }


def measure_tasks(folder: Path, *, number: int = 1500) -> dict[str, float]:
    """Costs of a task of Ray for those who hand it out, and of a shard for the command's process."""
    several = run._MOST_IN_BLOCK
    one = _measure_shards(folder / "one", number, in_block=1)
    many = _measure_shards(folder / "several", number, in_block=several)
    task = {name: (one[name] - many[name]) / (2 - 2 / several) for name in one}  # a shard takes two tasks of Ray
    return {f"{name}_s": seconds for name, seconds in task.items()} | {"report_s": one["driver"] - 2 * task["driver"]}


def _measure_shards(folder: Path, number: int, *, in_block: int) -> dict[str, float]:
    """CPU time for a shard of one clip of a tenth of a second, with so many in a task of Ray."""
    (folder / "audio" / "0000").mkdir(parents=True)
    noise_T = np.random.default_rng(0).normal(0, 0.1, round(0.1 * HalfSeparator.sample_rate_hz))
    for name in range(number):
        (folder / f"audio/{name // 1000:04d}").mkdir(exist_ok=True)
        soundfile.write(folder / f"audio/{name // 1000:04d}/{name:07d}.wav", noise_T, HalfSeparator.sample_rate_hz)
    write_manifest(folder / "manifest.csv", number)
    config = PassConfig(clip_s=0.1, min_clip_s=0.05, shard_s=0.1, rows_per_task=1, num_gpus_per_actor=0)
    separator = SeparatorSource.from_factory(open_half)
    with connect(), mock.patch.object(run, "_MOST_IN_BLOCK", in_block):
        before = _cpu_s()
        run.run_pass(read_corpus(folder / "manifest.csv"), folder / "out", separator=separator, config=config)
        after = _cpu_s()
    return {name: (after[name] - before[name]) / number for name in before}


def _cpu_s() -> dict[str, float]:
    """CPU time so far of this process, and of Ray's own processes that belong to it."""
    me = psutil.Process()
    seconds = {"driver": sum(me.cpu_times()[:2]), "gcs": 0.0, "raylet": 0.0}
    for process in me.children(recursive=True):
        name = process.name().removesuffix("_server")
        if name in seconds:
            seconds[name] += sum(process.cpu_times()[:2])
    return seconds


class Station:
    """Equal servers with one queue."""

    def __init__(self, number: int) -> None:
        self.number, self.free, self.busy_s = number, [0.0] * number, 0.0

    def serve(self, at: float, service_s: float) -> float:
        """Time at which the work that arrives at ``at`` is done; arrivals come in order of time."""
        start = max(at, heapq.heappop(self.free))
        heapq.heappush(self.free, start + service_s)
        self.busy_s += service_s
        return start + service_s


def _stations(cluster: Cluster, gpus: int) -> dict[str, Station]:
    return {
        "command": Station(1),
        "GCS": Station(1),
        "reads of the bucket": Station(1),
        "writes of the bucket": Station(1),
        "CPUs": Station(gpus * cluster.cpus_per_gpu),
        "GPUs": Station(gpus),
    }


def _way(costs: Costs, cluster: Cluster) -> list[tuple[str, float]]:
    """Stations that a shard passes in order, each with its mean time there; slices share Ray's GCS and the bucket."""
    clips, shared = cluster.shard_s / _CLIP_S, cluster.slices

    def task(num_shards: float) -> list[tuple[str, float]]:
        return [("command", costs.driver_s / num_shards), ("GCS", costs.gcs_s * shared / num_shards)]

    decoded, separated = (_shards_in_block(cluster, signals) for signals in (1.0, 2.0 + costs.queries))
    return [
        *task(max(1.0, _ROWS_PER_TASK / clips) * _tasks_in_block(cluster)),
        ("reads of the bucket", clips * _GETS_PER_CLIP * shared / cluster.gets_per_s / cluster.prefixes),
        ("CPUs", clips * costs.decode_s),
        *task(decoded),
        ("GPUs", cluster.shard_s * costs.queries / cluster.gpu_speed),
        *task(min(decoded, separated)),
        ("CPUs", clips * costs.finish_s),
        ("writes of the bucket", _PUTS_PER_SHARD * shared / cluster.puts_per_s),
        ("command", costs.report_s),
    ]


def _tasks_in_block(cluster: Cluster) -> int:
    """Tasks of the pass in a task of Ray, in a pass over a million clips."""
    num_tasks, num_actors = (number // cluster.slices for number in (10**6 // _ROWS_PER_TASK, cluster.gpus))
    return math.ceil(num_tasks / run._num_blocks(num_tasks, max(1, num_actors)))


def _shards_in_block(cluster: Cluster, signals: float) -> float:
    """Shards of so many signals that Ray Data puts into one block, at 16 kHz."""
    in_task = max(1.0, _ROWS_PER_TASK * _CLIP_S / cluster.shard_s) * _tasks_in_block(cluster)
    return min(in_task, max(1.0, _BLOCK_BYTES / (cluster.shard_s * 16_000 * 4 * signals)))


def simulate(costs: Costs, cluster: Cluster, *, seed: int = 0) -> Simulated:
    """Shards on their way through one of the slices; its throughput, and how busy each station is."""
    draw = random.Random(seed)
    gpus = max(1, cluster.gpus // cluster.slices)
    stations, way = _stations(cluster, gpus), _way(costs, cluster)
    number, window = 60 * gpus, 4 * gpus
    order, waiting = itertools.count(), iter(range(number))
    events = [(0.0, next(order), 0) for _ in itertools.islice(waiting, window)]
    ended: list[float] = []
    while events:
        at, _, stage = heapq.heappop(events)
        name, mean_s = way[stage]
        service_s = mean_s * draw.uniform(0.8, 1.2)
        if name == "GPUs" and draw.random() < cluster.lost_per_gpu_h * mean_s / 3600.0:
            stations[name].serve(at, 120.0 + service_s * draw.random())  # the machine is away, the shard starts again
            heapq.heappush(events, (at, next(order), stage))
            continue
        done = stations[name].serve(at, service_s)
        if stage + 1 < len(way):
            heapq.heappush(events, (done, next(order), stage + 1))
            continue
        ended.append(done)
        if next(waiting, None) is not None:
            heapq.heappush(events, (done, next(order), 0))
    wall_s = max(ended)
    return Simulated(
        clips_per_s=len(ended) * cluster.shard_s / _CLIP_S / wall_s * cluster.slices,
        busy={name: one.busy_s / one.number / wall_s for name, one in stations.items()},
    )


def recommended(costs: Costs, cluster: Cluster) -> Cluster:
    """A configuration that keeps the GPUs busy: enough CPUs and prefixes, then longer shards, then more slices."""
    clips_per_s = cluster.gpu_speed / (_CLIP_S * costs.queries)
    cpus = max(2, math.ceil(1.3 * clips_per_s * (costs.decode_s + costs.finish_s)))
    prefixes = math.ceil(1.1 * clips_per_s * cluster.gpus * _GETS_PER_CLIP / cluster.gets_per_s)
    options = [
        replace(cluster, cpus_per_gpu=cpus, prefixes=prefixes, shard_s=shard_s, slices=slices)
        for slices, shard_s in itertools.product((1, 2, 4, 8, 16, 32, 64), (320.0, 960.0, 1920.0))
        if slices <= cluster.gpus
    ]
    sufficient = (one for one in options if simulate(costs, one).busy["GPUs"] > 0.9)
    return next(sufficient, options[-1])


def simulated_table(costs: Costs) -> str:
    """Both configurations for every size, in Markdown."""
    rows = []
    for speed, gpus in itertools.product((100.0, 1000.0), (10, 100, 1000)):
        plain = Cluster(gpus=gpus, gpu_speed=speed)
        for cluster in dict.fromkeys((plain, recommended(costs, plain))):
            result = simulate(costs, cluster)
            cells = [f"{gpus:,}", f"{speed:g}", str(cluster.cpus_per_gpu), f"{cluster.shard_s:g}"]
            cells += [str(cluster.prefixes), str(cluster.slices)]
            cells += [f"{result.clips_per_s:,.0f}", f"{result.busy['GPUs']:.0%}"]
            cells += [f"{result.limit} {result.busy[result.limit]:.0%}", f"{1e6 / result.clips_per_s / 3600:.2g} h"]
            rows.append(cells)
    columns = ["GPUs", "each, × real time", "CPUs a GPU", "`shard_s`", "prefixes", "slices"]
    return pages.markdown([*columns, "clips/s", "GPUs busy", "most busy", "1e6 clips"], rows)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="working folder")
    out = parser.parse_args().out.resolve()

    def measured(name: str, measure: Callable[[Path], dict[str, float]]) -> dict[str, float]:
        costs: dict[str, float] = pages.measured_once(
            out / f"{name}.json", lambda: measure(out / name / f"{time.time():.0f}")
        )
        return costs

    costs = Costs(**measured("clip", measure_clip), **measured("tasks", measure_tasks))
    rows = [[about, f"{getattr(costs, name) * scale:.3g}"] for name, (about, scale) in _SHOWN.items()]
    parts = [pages.markdown(["what", "cost"], rows) + f"\n\n{pages.stamp()}", simulated_table(costs)]
    print(*parts, sep="\n\n")
    for marker, text in zip(("costs", "simulated"), parts, strict=True):
        pages.fill(_PAGE, marker, text)


if __name__ == "__main__":
    main()
