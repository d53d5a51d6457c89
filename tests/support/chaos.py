"""Chaos test: a real run on two Ray nodes, interrupted at seeded moments, must end with the data of an undisturbed run.

    python -m tests.support.chaos --points 50 --seed 0 [--report benchmarks/chaos.md]

A *point* is an iteration, a step of it, a delay and a victim: the command itself (SIGINT, SIGTERM or SIGKILL), or by
SIGKILL a separator actor, a Ray task, the training worker, the process of a decoder or the raylet of the second node;
or the next listing of the pass's records loses two entries. Whenever the command ends early it is started again; when
it is done, its stems, failures, tracks and weights are compared byte for byte.
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

import psutil
import pyarrow.parquet as pq
import yaml

from engine.corpus.sources import read_sources
from engine.passes.records import done_names
from engine.passes.shards import stem_shards
from engine.storage.files import read_json, sha256_file
from tests.support import ROOT
from tests.support.chaos_victims import LISTINGS, WORKERS, find_workers
from tests.support.ray_nodes import TwoNodes
from tests.support.signals import read_failures
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural

NUM_ITERATIONS = 2
STEPS = ("separate", "write", "filter", "distil", "evaluate")
DRIVER = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
VICTIMS = {  # processes that exist during each step
    "separate": (*DRIVER, "actor", "task", "decoder", "raylet"),
    "write": (*DRIVER, "actor", "listing", "raylet"),
    "filter": (*DRIVER,),
    "distil": (*DRIVER, "trainer", "decoder", "raylet"),
    "evaluate": (*DRIVER,),
}
_LIMIT_S = 300.0  # time for one start of the command; after that it hangs


@dataclass(frozen=True, kw_only=True, order=True)
class Point:
    """One interruption."""

    iteration: int
    step: str
    wait_s: float
    """Delay after the step has begun, or for a worker after it has appeared."""
    victim: str


@dataclass(kw_only=True)
class Episode:
    """One run with its interruptions."""

    hit: list[Point]
    missed: list[Point]
    """Points whose victim did not exist, or not any more."""
    differences: list[str]
    """Differences from the undisturbed run."""
    num_starts: int


def draw_points(number: int, seed: int) -> list[list[Point]]:
    """Points for runs of about ten each, in the order of a run; steps and victims take turns."""
    draw = random.Random(seed)
    every = [(step, victim) for step in STEPS for victim in VICTIMS[step]]
    stride = max(1, len(every) // number)  # a few points are of all steps too
    chosen = [every[i * stride % len(every)] for i in range(number)]
    draw.shuffle(chosen)
    longest_s = {"separate": 4.0, "write": 2.0, "filter": 0.05, "distil": 12.0, "evaluate": 0.2}
    longest_s |= {"actor": 1.0, "task": 0.3, "trainer": 4.0, "decoder": 0.1}
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
    """Write a corpus with broken files, clips to train on, and the settings of a small run; returns the settings."""
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
        "distil": training | {"steps": 300, "validate_every_steps": 50, "num_workers": 1, "use_gpu": False},  # seconds
        "engine": {"rows_per_task": 4, "shard_s": 4.0, "num_gpus_per_actor": 0},
        "schedule": [{"min_stem_level_db": -15.0}, {"min_re_sdr_db": -30.0, "min_stem_level_db": -12.0}],
        "validation": {"clips": str(clips), "folds": [3], "num_mixtures": 6},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def has_begun(out: Path, point: Point) -> bool:
    """The run has reached the point's step."""
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
    """The run has finished the point's step."""
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
    """The command under test."""

    config: Path
    out: Path
    address: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    num_starts: int = 0
    started: float = 0.0

    @property
    def listings(self) -> Path:
        """A file that lets the next listing lose entries."""
        return self.log.with_suffix(".listing")

    def start(self) -> None:
        """Start the command, for the first time or again."""
        # A process that a shell starts in the background ignores SIGINT, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        words = [sys.executable, "-m", "tests.support.chaos_victims", "run", str(self.config), "-o", str(self.out)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "--address", self.address],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PYTHONFAULTHANDLER": "1", LISTINGS: str(self.listings)},
            )
        self.num_starts += 1
        self.started = time.monotonic()

    def is_running(self) -> bool:
        """The command has not ended yet; raises AssertionError if it hangs."""
        assert self.process is not None
        if self.process.poll() is None and time.monotonic() - self.started > _LIMIT_S:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"the command hung for {_LIMIT_S:.0f} s; its log ends: {self.log.read_text()[-2000:]}")
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the command, not to its children, and wait until it has ended."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGABRT)  # PYTHONFAULTHANDLER logs where it hangs
            self.process.wait()
            log = self.log.read_text().partition("Extension modules")[0][-6000:]
            raise AssertionError(
                f"the command did not end within a minute of signal {number}; its log: {log}"
            ) from None


def strike(point: Point, command: Command, nodes: TwoNodes) -> bool:
    """Interrupt the run; false if the victim does not exist, or not any more."""
    if point.victim in DRIVER:
        if not command.is_running():
            return False
        command.signal(DRIVER[point.victim])
        return True
    if point.victim == "raylet":
        nodes.kill_raylet()
        return True
    if point.victim == "listing":
        command.listings.touch()
        return command.is_running() and not is_over(command.out, point)
    _wait_for_victims(point, command, nodes)
    time.sleep(point.wait_s)
    for victim in _wait_for_victims(point, command, nodes):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            return True
    return False


def _wait_for_victims(point: Point, command: Command, nodes: TwoNodes) -> list[psutil.Process]:
    """Wait for processes of the point's kind, which appear after the step has begun; none if the step ends first."""
    victims: list[psutil.Process] = []
    while not victims and command.is_running() and not is_over(command.out, point):
        time.sleep(0.005)
        victims = find_workers(point.victim, nodes.raylets())
    return victims


def run_episode(points: list[Point], config: Path, out: Path, nodes: TwoNodes, log: Path) -> Episode:
    """Take one run through all its points to its end."""
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
                raise AssertionError(f"the command refused its input: {log.read_text()[-2000:]}")
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


def contents(out: Path) -> dict[str, object]:
    """Checksums and figures of a run's results, without times."""
    results: dict[str, object] = {}
    for number in range(NUM_ITERATIONS + 1):
        folder = out / "iterations" / str(number)
        results[f"{number} weights"] = sha256_file(folder / "separator" / "weights.safetensors")
        entry = read_json(folder / "iteration.json")
        results[f"{number} figures"] = {key: value for key, value in entry.items() if key not in ("wall_s", "cost_s")}
        if not number:
            continue
        for shard in stem_shards(folder / "stems"):
            results[f"{number} {shard.name}"] = sha256_file(shard)
        tables = [pq.read_table(shard, columns=["clip_id", "label"]) for shard in stem_shards(folder / "stems")]
        ids = [tuple(row.values()) for table in tables for row in table.to_pylist()]
        assert len(set(ids)) == len(ids), f"iteration {number} has a stem twice"
        results[f"{number} failures"] = read_failures(folder).drop_columns("attempts").to_pylist()
        for name in ("kept", "rejected"):
            results[f"{number} {name}"] = sha256_file(folder / "tracks" / f"{name}.parquet")
    return results


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run without interruptions."""

    config: Path
    contents: dict[str, object]


def run_undisturbed(work: Path) -> Undisturbed:
    """Run the command once, on a Ray of its own."""
    config = write_inputs(work / "inputs")
    words = [sys.executable, "-m", "clearsep", "run", str(config), "-o", str(work / "undisturbed")]
    subprocess.run(words, cwd=ROOT, check=True, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    return Undisturbed(config=config, contents=contents(work / "undisturbed"))


def run_chaos(points: int, seed: int, work: Path, undisturbed: Undisturbed) -> Iterator[Episode]:
    """Interrupted runs, each compared with the undisturbed one."""
    nodes = TwoNodes()
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


def points_table(episodes: list[Episode]) -> str:
    """Number of interruptions by step and victim, as a Markdown table."""
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
        drawn = arguments.points * 3 // 2  # some find no victim
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
        f"{points_table(episodes)}"
    )
    print(text)
    if arguments.report:
        arguments.report.write_text(f"# Chaos\n\n{text}\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
