"""What limits a pass on 10, 100 and 1,000 GPUs: costs measured here, the rest simulated; fills cluster/SCALING.md.

    python benchmarks/scaling.py [--out runs/scaling]

*Measured*: what a clip costs each step, in a pass over clips of 10 s with the laptop's separator; and what a task costs
what there is only one of (the command's process, Ray's GCS) and a node (its raylet), in a pass over clips so short
that nothing else counts. *Simulated*: parts of clips on their way through the command's process, CPUs, a bucket's
request limits and GPUs of a stated speed, which are lost now and then and come back. The speed of a GPU and the
bucket's limits are assumptions.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
from nodes import inputs
from scale import HalfSeparator, open_half, write_manifest
from setting import say, stamp

from cluster.session import connected
from engine.cli.tables import fill
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.run import run_pass
from engine.storage.files import read_json, write_json

_PAGE = Path(__file__).resolve().parent.parent / "cluster" / "SCALING.md"
_GETS_A_CLIP, _PUTS_A_PART = 3, 3  # size, header and body; shard, record and what a listing costs
_CLIP_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one clip of 10 s, or one task, costs."""

    decode_s: float
    """CPU time to decode a clip."""
    finish_s: float
    """CPU time to score and write a clip's stems."""
    queries: float
    """Stems of a clip."""
    source_bytes: float
    """A clip as it is read."""
    stem_bytes: float
    """A clip's stems as they are written."""
    driver_s: float
    """CPU time of the command's process for a task."""
    gcs_s: float
    """CPU time of Ray's GCS for a task."""
    raylet_s: float
    """CPU time of a node's raylet for a task."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a pass runs on, and how."""

    gpus: int
    cpus_per_gpu: int = 8
    part_s: float = 320.0
    """Audio of a part."""
    jobs: int = 1
    """Commands, each with a share of the corpus and a prefix of its own."""
    gpu_speed: float = 1000.0
    """Seconds of audio that a GPU separates in a second, one query."""
    gets_per_s: float = 5500.0
    """Requests that a prefix of the bucket answers in a second; of S3 as documented."""
    puts_per_s: float = 3500.0
    lost_per_gpu_h: float = 0.05
    """How often a GPU is taken away; it is back after two minutes."""


def measure_clip(folder: Path) -> dict[str, float]:
    """What a clip costs each step."""
    natural, separator = inputs(folder, 240)
    corpus = read_corpus(natural)
    with connected():
        summary = run_pass(corpus, folder / "pass", separator=separator, config=PassConfig(num_gpus_per_actor=0))
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
    """What a task costs those who hand it out: two tasks a part, a part a clip of a tenth of a second."""
    (folder / "audio" / "0000").mkdir(parents=True)
    noise_T = np.random.default_rng(0).normal(0, 0.1, round(0.1 * HalfSeparator.sample_rate_hz))
    for name in range(number):
        (folder / f"audio/{name // 1000:04d}").mkdir(exist_ok=True)
        soundfile.write(folder / f"audio/{name // 1000:04d}/{name:07d}.wav", noise_T, HalfSeparator.sample_rate_hz)
    write_manifest(folder / "manifest.csv", number)
    config = PassConfig(clip_s=0.1, min_clip_s=0.05, part_s=0.1, rows_per_task=1, num_gpus_per_actor=0)
    with connected():
        before = _cpu_s()
        run_pass(
            read_corpus(folder / "manifest.csv"),
            folder / "out",
            separator="half",
            config=config,
            open_separator=open_half,
            sample_rate_hz=HalfSeparator.sample_rate_hz,
        )
        after = _cpu_s()
    return {f"{name}_s": (after[name] - before[name]) / (2 * number) for name in before}


def _cpu_s() -> dict[str, float]:
    """CPU time so far of this process, and of Ray's own that belong to it."""
    me = psutil.Process()
    found = {"driver": sum(me.cpu_times()[:2]), "gcs": 0.0, "raylet": 0.0}
    for process in me.children(recursive=True):
        name = process.name().removesuffix("_server")
        if name in found:
            found[name] += sum(process.cpu_times()[:2])
    return found


class Station:
    """Equal servers with one queue."""

    def __init__(self, number: int) -> None:
        self.number, self.free, self.busy_s = number, [0.0] * number, 0.0

    def serve(self, at: float, service_s: float) -> float:
        """When what arrives at this time is done; arrivals come in order of time."""
        start = max(at, heapq.heappop(self.free))
        heapq.heappush(self.free, start + service_s)
        self.busy_s += service_s
        return start + service_s


def simulate(costs: Costs, cluster: Cluster, *, seed: int = 0) -> dict[str, Any]:
    """Parts on their way through one of the jobs; its throughput, and how busy each station is."""
    draw = random.Random(seed)
    gpus = max(1, cluster.gpus // cluster.jobs)
    clips = cluster.part_s / _CLIP_S
    stations = {
        "command": Station(1),
        "GCS": Station(1),
        "reads of the bucket": Station(1),
        "writes of the bucket": Station(1),
        "CPUs": Station(gpus * cluster.cpus_per_gpu),
        "GPUs": Station(gpus),
    }
    separate_s = cluster.part_s * costs.queries / cluster.gpu_speed
    task = [("command", costs.driver_s), ("GCS", costs.gcs_s * cluster.jobs)]  # one GCS for all jobs
    way = [
        *task,
        ("reads of the bucket", clips * _GETS_A_CLIP / cluster.gets_per_s),
        ("CPUs", clips * costs.decode_s),
        *task,
        ("GPUs", separate_s),
        *task,
        ("CPUs", clips * costs.finish_s),
        ("writes of the bucket", _PUTS_A_PART / cluster.puts_per_s),
    ]
    number, window = 60 * gpus, 4 * gpus
    order, waiting = itertools.count(), iter(range(number))
    events = [(0.0, next(order), 0) for _ in itertools.islice(waiting, window)]
    ended: list[float] = []
    num_redone = 0
    while events:
        at, _, stage = heapq.heappop(events)
        name, mean_s = way[stage]
        service_s = mean_s * draw.uniform(0.8, 1.2)
        if name == "GPUs" and draw.random() < cluster.lost_per_gpu_h * separate_s / 3600.0:
            num_redone += 1
            stations[name].serve(at, 120.0 + service_s * draw.random())  # the machine is away, the part begins anew
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
    busy = {name: one.busy_s / one.number / wall_s for name, one in stations.items()}
    return {
        "clips_per_s": len(ended) * clips / wall_s * cluster.jobs,
        "busy": busy,
        "limit": max(busy, key=lambda name: busy[name]),
        "redone": num_redone / number,
    }


def recommended(costs: Costs, cluster: Cluster) -> Cluster:
    """What keeps the GPUs busy: CPUs enough for the clips of a GPU, then longer parts, then more jobs."""
    clips_per_s = cluster.gpu_speed / (_CLIP_S * costs.queries)
    cpus = max(2, math.ceil(1.3 * clips_per_s * (costs.decode_s + costs.finish_s)))
    options = [
        replace(cluster, cpus_per_gpu=cpus, part_s=part_s, jobs=jobs)
        for jobs, part_s in itertools.product((1, 2, 4, 8, 16, 32, 64), (320.0, 960.0, 1920.0))
        if jobs <= cluster.gpus
    ]
    fit = (one for one in options if simulate(costs, one)["busy"]["GPUs"] > 0.9)
    return next(fit, options[-1])


def table(costs: Costs) -> str:
    """Both configurations for every size, in Markdown."""
    lines = [
        "| GPUs | each, × real time | CPUs a GPU | `part_s` | jobs | clips/s | GPUs busy | most busy | 1e6 clips |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for speed, gpus in itertools.product((100.0, 1000.0), (10, 100, 1000)):
        plain = Cluster(gpus=gpus, gpu_speed=speed)
        for cluster in dict.fromkeys((plain, recommended(costs, plain))):
            found = simulate(costs, cluster)
            limit = found["limit"]
            cells = [f"{gpus:,}", f"{speed:g}", str(cluster.cpus_per_gpu), f"{cluster.part_s:g}", str(cluster.jobs)]
            cells += [f"{found['clips_per_s']:,.0f}", f"{found['busy']['GPUs']:.0%}"]
            cells += [f"{limit} {found['busy'][limit]:.0%}", f"{1e6 / found['clips_per_s'] / 3600:.2g} h"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(path: Path, measure: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """A measurement, kept on disk."""
    if not path.is_file():
        say(path.stem)
        write_json(path, measure(path.with_suffix("") / f"{time.time():.0f}"))
    found: dict[str, float] = read_json(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="working folder")
    out = parser.parse_args().out.resolve()
    costs = Costs(**kept(out / "clip.json", measure_clip), **kept(out / "tasks.json", measure_tasks))
    units = Counter({"decode_s": 1e3, "finish_s": 1e3, "driver_s": 1e3, "gcs_s": 1e3, "raylet_s": 1e3})
    names = {
        "decode_s": "decoding, CPU ms a clip",
        "finish_s": "scoring and writing, CPU ms a clip",
        "source_bytes": "read, KiB a clip",
        "stem_bytes": "written, KiB a clip",
        "driver_s": "the command's process, CPU ms a task",
        "gcs_s": "Ray's GCS, CPU ms a task",
        "raylet_s": "a raylet, CPU ms a task",
    }
    rows = [f"| {about} | {getattr(costs, name) * (units[name] or 1 / 1024):.3g} |" for name, about in names.items()]
    fill(_PAGE, "costs", "\n".join(["| what | cost |", "| --- | --- |", *rows, "", stamp()]))
    fill(_PAGE, "simulated", table(costs))
    print(_PAGE.read_text())


if __name__ == "__main__":
    main()
