"""Chaos: a real run on two Ray nodes, interrupted at seeded moments of every step, must end as an undisturbed one.

    python tests/support/chaos.py --points 50 --seed 0 [--report benchmarks/chaos.md]

A *point* is an iteration, a step, a moment in it and a victim: the driver (SIGINT, SIGTERM, kill -9), or with kill -9 a
separator actor, a Ray worker, the worker that trains, or the raylet of one of the two nodes. Whatever the command does
then, the same command is started again until it is done, and the data set is compared with the undisturbed one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from engine.corpus.sources import read_sources
from engine.passes.records import done_names
from engine.passes.shards import read_failures, stem_shards
from engine.storage.files import read_json, sha256_file
from tests.support import ROOT
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural

NUM_ITERATIONS = 2
STEPS = ("separate", "write", "filter", "distil", "evaluate")
DRIVER = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
WORKERS = {"actor": "ray::MapWorker", "task": "ray::Map", "trainer": "ray::RayTrainWorker"}
VICTIMS = {  # of each step, those that live while it goes on
    "separate": (*DRIVER, "actor", "task", "raylet"),
    "write": (*DRIVER, "actor", "raylet"),
    "filter": (*DRIVER,),
    "distil": (*DRIVER, "trainer", "raylet"),
    "evaluate": (*DRIVER,),
}
_LIMIT_S = 300.0  # of one attempt, after which it counts as hanging


@dataclass(frozen=True, kw_only=True, order=True)
class Point:
    """When and whom."""

    iteration: int
    step: str
    wait_s: float
    """After the step's beginning was seen, or of a worker after it was there."""
    victim: str


@dataclass(kw_only=True)
class Episode:
    """What became of one run."""

    hit: list[Point]
    missed: list[Point]
    differences: list[str]
    num_starts: int


def draw_points(number: int, seed: int) -> list[list[Point]]:
    """Points in episodes of about ten, in the order in which a run comes to them; all steps and victims in turn."""
    draw = random.Random(seed)
    every = [(step, victim) for step in STEPS for victim in VICTIMS[step]]
    chosen = [every[i % len(every)] for i in range(number)]
    draw.shuffle(chosen)
    longest_s = {"separate": 4.0, "write": 2.0, "filter": 0.05, "distil": 12.0, "evaluate": 0.2}
    longest_s |= {"actor": 1.0, "task": 0.3, "trainer": 4.0}
    points = [
        Point(
            iteration=draw.randint(1, NUM_ITERATIONS),
            step=step,
            wait_s=draw.random() * longest_s[victim if victim in WORKERS else step],
            victim=victim,
        )
        for step, victim in chosen
    ]
    size = 10
    return [
        sorted(points[i : i + size], key=lambda point: (point.iteration, STEPS.index(point.step), point.wait_s))
        for i in range(0, number, size)
    ]


def write_inputs(folder: Path) -> Path:
    """A corpus with broken files in it, clips to learn from, and the settings of a small run."""
    clips = synth.write_corpus(folder, num_per_label={1: 2, 2: 4, 3: 2}, seed=0, duration_s=2.0)
    sources = read_sources(clips, folds=[2])
    natural = write_natural(sources, folder, num_clips=[(2, 24), (3, 6)], sample_rate_hz=16000, seed=0)
    (folder / "audio" / "broken.flac").write_bytes(b"fLaC and nothing else")
    with natural.open("a") as file:
        file.write("audio/missing.flac,rain;bell\naudio/broken.flac,rain;bell\n,nothing\n")
    training = {
        "steps": 30,
        "mix": {"batch_size": 4, "segment_s": 0.5},
        "validate_every_steps": 10,
        "threads_per_worker": 1,
    }
    settings = {
        "corpus": str(natural),
        "clean": str(clips),
        "clean_folds": [1],
        "network": {
            "channels": 32,
            "num_blocks": 2,
            "num_bands": 24,
            "num_fft": 256,
            "hop_samples": 128,
            "sample_rate_hz": 8000,
        },
        "seed_training": training | {"num_workers": 0},
        "distil": training | {"num_workers": 1, "use_gpu": False},
        "engine": {"rows_per_task": 4, "part_s": 4.0, "num_gpus_per_actor": 0},
        "schedule": [{"min_stem_level_db": -15.0}, {"min_re_sdr_db": -30.0, "min_stem_level_db": -12.0}],
        "validation": {"clips": str(clips), "folds": [3], "num_mixtures": 6},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


class Nodes:
    """A Ray cluster of two nodes on this machine, each with its own raylet; the second can be lost and comes back."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
        self.second: Any = None
        self.renew()

    @property
    def address(self) -> str:
        """What the command is told."""
        return str(self.cluster.address)

    def renew(self) -> None:
        """Start the second node where it is not there."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20, wait=True)

    def raylets(self) -> list[int]:
        """Process ids of the nodes' raylets."""
        nodes = [self.cluster.head_node, *([self.second] if self.second is not None else [])]
        return [node.all_processes["raylet"][0].process.pid for node in nodes]

    def kill_raylet(self) -> None:
        """Kill -9 of the second node's raylet; its workers end with it."""
        if self.second is not None:
            self.second.all_processes["raylet"][0].process.kill()
            with contextlib.suppress(Exception):  # what is left of the node
                self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = None

    def close(self) -> None:
        """End all."""
        self.cluster.shutdown()


def workers(kind: str, raylets: list[int]) -> list[psutil.Process]:
    """Worker processes of some raylets whose title begins so; another Ray may run on this machine."""
    found = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline())
                    if title.startswith(WORKERS[kind]) and not (kind == "task" and title.startswith(WORKERS["actor"])):
                        found.append(process)
    return found


def has_begun(out: Path, point: Point) -> bool:
    """Whether the run has come to the point's step."""
    folder = out / "iterations" / str(point.iteration)
    signs = {
        "separate": folder / "stems" / "pass.json",
        "write": folder / "stems",
        "filter": folder / "stems" / "manifest.json",
        "distil": folder / "tracks" / "manifest.json",
        "evaluate": folder / "separator" / "separator.json",
    }
    if not signs[point.step].exists():
        return False
    return point.step != "write" or bool(done_names(folder))


def is_over(out: Path, point: Point) -> bool:
    """Whether the run has left the point's step behind."""
    folder = out / "iterations" / str(point.iteration)
    ends = {
        "separate": folder / "stems" / "manifest.json",
        "write": folder / "stems" / "manifest.json",
        "filter": folder / "tracks" / "manifest.json",
        "distil": folder / "separator" / "separator.json",
        "evaluate": folder / "iteration.json",
    }
    return ends[point.step].exists()


@dataclass(kw_only=True)
class Command:
    """The command under test, started again whenever it ended before its work was done."""

    config: Path
    out: Path
    address: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    started: float = 0.0

    def start(self) -> None:
        """Start it."""
        # A shell has what it starts in the background ignore SIGINT, and what that starts too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        words = [sys.executable, "-m", "clearsep", "run", str(self.config), "-o", str(self.out)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "--address", self.address],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            )
        self.num_starts += 1
        self.started = time.monotonic()

    def is_running(self) -> bool:
        """False where it has ended; one that hangs is an error."""
        assert self.process is not None
        if self.process.poll() is None and time.monotonic() - self.started > _LIMIT_S:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"the command hung for {_LIMIT_S:.0f} s; its log ends: {self.log.read_text()[-2000:]}")
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to it alone, and wait until it is gone."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGABRT)  # where it hangs goes into the log (PYTHONFAULTHANDLER)
            self.process.wait()
            told = self.log.read_text().partition("Extension modules")[0][-6000:]
            raise AssertionError(
                f"the command did not end within a minute of signal {number}; its log: {told}"
            ) from None


def strike(point: Point, command: Command, nodes: Nodes) -> bool:
    """Do a point's harm; false where its victim was not there, or not any more."""
    if point.victim in DRIVER:
        if not command.is_running():
            return False
        command.signal(DRIVER[point.victim])
        return True
    if point.victim == "raylet":
        nodes.kill_raylet()
        return True
    _find_workers(point, command, nodes)
    time.sleep(point.wait_s)
    for victim in _find_workers(point, command, nodes):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            return True
    return False


def _find_workers(point: Point, command: Command, nodes: Nodes) -> list[psutil.Process]:
    """The victims as soon as there are any: they come later than their step, and go. None where the step ends first."""
    found: list[psutil.Process] = []
    while not found and command.is_running() and not is_over(command.out, point):
        time.sleep(0.005)
        found = workers(point.victim, nodes.raylets())
    return found


def run_episode(points: list[Point], config: Path, out: Path, nodes: Nodes, log: Path) -> Episode:
    """One run through all its points to its end."""
    command = Command(config=config, out=out, address=nodes.address, log=log)
    episode = Episode(hit=[], missed=[], differences=[], num_starts=0)
    command.start()
    waiting = collections.deque(points)
    while True:
        if not command.is_running():
            assert command.process is not None
            if command.process.returncode == 0:
                break
            if command.process.returncode == 2:
                raise AssertionError(f"the command says that it is wrong: {log.read_text()[-2000:]}")
            nodes.renew()
            command.start()
        while waiting and is_over(out, waiting[0]):
            episode.missed.append(waiting.popleft())
        if waiting and has_begun(out, waiting[0]):
            point = waiting.popleft()
            with log.open("a") as file:
                file.write(f"[chaos: {point}]\n")
            if point.victim not in WORKERS:
                time.sleep(point.wait_s)
            (episode.hit if strike(point, command, nodes) else episode.missed).append(point)
            if point.victim == "raylet":
                time.sleep(2.0)
                nodes.renew()
        time.sleep(0.005)
    episode.missed += waiting
    episode.num_starts = command.num_starts
    return episode


def contents(out: Path) -> dict[str, Any]:
    """All of a run that its user builds on, without times."""
    found: dict[str, Any] = {}
    for number in range(NUM_ITERATIONS + 1):
        folder = out / "iterations" / str(number)
        found[f"{number} weights"] = sha256_file(folder / "separator" / "weights.safetensors")
        entry = read_json(folder / "iteration.json")
        found[f"{number} figures"] = {key: value for key, value in entry.items() if key not in ("wall_s", "cost_s")}
        if not number:
            continue
        for shard in stem_shards(folder / "stems"):
            found[f"{number} {shard.name}"] = sha256_file(shard)
        ids = [(row["clip_id"], row["label"]) for shard in stem_shards(folder / "stems") for row in _ids(shard)]
        assert len(set(ids)) == len(ids), f"iteration {number} has a stem twice"
        found[f"{number} failures"] = read_failures(folder).to_pylist()
        for name in ("kept", "rejected"):
            found[f"{number} {name}"] = sha256_file(folder / "tracks" / f"{name}.parquet")
    return found


def _ids(shard: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(shard, columns=["clip_id", "label"]).to_pylist()
    return rows


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run that nothing happened to."""

    config: Path
    contents: dict[str, Any]


def run_undisturbed(work: Path) -> Undisturbed:
    """Do it, on a Ray of its own."""
    config = write_inputs(work / "inputs")
    words = [sys.executable, "-m", "clearsep", "run", str(config), "-o", str(work / "undisturbed")]
    subprocess.run(words, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    return Undisturbed(config=config, contents=contents(work / "undisturbed"))


def run_chaos(points: int, seed: int, work: Path, undisturbed: Undisturbed) -> Iterator[Episode]:
    """Episodes, each compared with the undisturbed run."""
    nodes = Nodes()
    config, expected = undisturbed.config, undisturbed.contents
    try:
        for number, some in enumerate(draw_points(points, seed)):
            nodes.renew()
            out = work / f"episode-{number}"
            episode = run_episode(some, config, out, nodes, work / f"episode-{number}.log")
            found = contents(out)
            names = sorted(expected.keys() | found.keys())
            episode.differences = [
                f"{name}: {found.get(name)} instead of {expected.get(name)}"
                for name in names
                if expected.get(name) != found.get(name)
            ]
            shutil.rmtree(out)
            yield episode
    finally:
        nodes.close()


def table(episodes: list[Episode]) -> str:
    """Points by step and victim, in Markdown."""
    hit = collections.Counter((point.step, point.victim) for episode in episodes for point in episode.hit)
    victims = list(dict.fromkeys(victim for step in STEPS for victim in VICTIMS[step]))
    lines = ["| step | " + " | ".join(victims) + " |", "| --- |" + " --- |" * len(victims)]
    for step in STEPS:
        cells = [str(hit[step, victim] or "") if victim in VICTIMS[step] else "" for victim in victims]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="interruptions that must happen (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    episodes: list[Episode] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clearsep-chaos-") as folder:
        drawn = arguments.points * 3 // 2  # some come too late to find their victim
        undisturbed = run_undisturbed(Path(folder))
        for episode in run_chaos(drawn, arguments.seed, Path(folder), undisturbed):
            episodes.append(episode)
            struck = sum(len(entry.hit) for entry in episodes)
            print(
                f"[{dt.datetime.now():%H:%M:%S}] {struck} interruptions, {episode.num_starts} starts in this run, "
                f"{'the same data' if not episode.differences else f'DIFFERENT: {episode.differences}'}",
                flush=True,
            )
            if struck >= arguments.points:
                break
    different = [name for episode in episodes for name in episode.differences]
    text = (
        f"{sum(len(entry.hit) for entry in episodes)} interruptions of {len(episodes)} runs, seed {arguments.seed}: "
        f"{len(episodes) - sum(bool(entry.differences) for entry in episodes)} ended with the data of the undisturbed "
        f"run, byte for byte; {(time.monotonic() - started) / 60:.0f} minutes on {os.cpu_count()} cores.\n\n"
        f"{table(episodes)}"
    )
    print(text)
    if arguments.report:
        arguments.report.write_text(f"# Chaos\n\n{text}\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
