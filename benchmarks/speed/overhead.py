"""The cost of an engine pass beyond its separator, and its memory by corpus size.

    python -m benchmarks.speed.overhead [--repeats 3] [--only laptop] [--against 7b741c8]

The same checkpoint separates the same clips twice in one run: in a plain loop over decoded clips in this process, with
as many threads as there are cores, and in an engine pass on Ray, which also decodes, scores every stem and writes it.
An earlier version of this project does the same, in turns with this one: a faster separator makes the loop shorter, and
the rest of a pass a larger part of it. Start-up is excluded: the clock of a pass starts when a third of it is done, by
when all processes of Ray have started, and stops with the pass. Memory is the peak of Ray's workers, this process and
the object store together, over N and over 3N clips. Writes ``overhead.md`` and a table of docs/results.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks import pages
from cluster.session import connect
from engine.audio.decode import decode
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.run import run_pass
from engine.passes.separate import separate_clips
from engine.schema import DecodedClip
from engine.separators import NetworkConfig, QuerySeparator, find_separator, load, save
from engine.separators.batching import BatchedSeparator
from engine.storage.files import read_json
from tune.demo import sounds

_PAGE = Path(__file__).with_name("overhead.md")
_RATE_HZ, _CLIP_S, _BATCH_S = 16000, 10.0, 80.0
_LABELS = ("rain", "siren")
_SIZES = {  # network, N, clips of a shard
    "laptop (256 channels, 10 blocks)": (NetworkConfig(), 250, 16),
    "large (768 channels, 20 blocks)": (NetworkConfig(channels=768, num_blocks=20), 24, 4),
}


def write_corpus(folder: Path, num_clips: int) -> Path:
    """Write ten-second clips of two sounds each; returns their manifest."""
    signals = {label: sounds.sound(label, rng=np.random.default_rng(0), duration_s=60.0) for label in _LABELS}
    lines = ["path,labels"]
    rng = np.random.default_rng(1)
    for number in range(num_clips):
        firsts = rng.integers(0, int(50.0 * _RATE_HZ), len(_LABELS))
        parts = [signals[label][first : first + 160000] for label, first in zip(_LABELS, firsts, strict=True)]
        soundfile.write(folder / f"{number}.flac", 0.5 * np.sum(parts, axis=0), _RATE_HZ)
        lines.append(f"{number}.flac,{';'.join(_LABELS)}")
    (folder / f"natural-{num_clips}.csv").write_text("\n".join(lines) + "\n")
    return folder / f"natural-{num_clips}.csv"


def plain_s_per_clip(checkpoint: Path, manifest: Path) -> float:
    """Seconds a clip to separate decoded clips one batch after another in this process."""
    corpus = read_corpus(manifest)
    rows = corpus.clips.to_pylist()
    clips = [
        DecodedClip(row=row, samples_T=decode(Path(corpus.root) / row["path"], sample_rate_hz=_RATE_HZ)) for row in rows
    ]
    torch.set_num_threads(os.cpu_count() or 1)
    batched = BatchedSeparator(separator=load(checkpoint), batch_s=_BATCH_S)
    separate_clips(clips[:4], batched)
    started = time.perf_counter()
    for first in range(0, len(clips), 32):
        separate_clips(clips[first : first + 32], batched)
    return (time.perf_counter() - started) / len(clips)


class Memory:
    """Peak of the memory of Ray's workers, this process and the object store while a ``with`` block runs, in GiB."""

    def __enter__(self) -> Memory:
        self.peak_gib, self._stop = 0.0, threading.Event()
        self._shared_before = _shared_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            used = sum(map(_private_bytes, Path("/proc").glob("[0-9]*"))) + _shared_bytes() - self._shared_before
            self.peak_gib = max(self.peak_gib, used / 2**30)


def _shared_bytes() -> int:
    """Used shared memory, where Ray keeps its objects."""
    shared = os.statvfs("/dev/shm")
    return (shared.f_blocks - shared.f_bfree) * shared.f_frsize


def _private_bytes(process: Path) -> int:
    """Memory that a process shares with no other; 0 unless it is a worker of Ray's or this process."""
    try:
        if not (process / "cmdline").read_bytes().startswith(b"ray::") and process.name != str(os.getpid()):
            return 0
        lines = (process / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0


def pass_s_per_clip(checkpoint: Path, manifest: Path, clips_per_shard: int) -> tuple[float, float, dict[str, float]]:
    """Wall seconds a clip of the last two thirds, peak memory in GiB, and how the time of its steps splits."""
    config = PassConfig(batch_s=_BATCH_S, rows_per_task=clips_per_shard, shard_s=clips_per_shard * _CLIP_S)
    with tempfile.TemporaryDirectory() as out, Memory() as memory:
        summary = run_pass(read_corpus(manifest), out, separator=find_separator(checkpoint), config=config)
        ended = time.time()
        done = sorted((path.stat().st_mtime, path) for path in (Path(out) / "stems").glob("*.done.json"))
        first = len(done) // 3
        started, _ = done[first - 1]
        num_clips = sum(read_json(path)["num_clips"] for _, path in done[first:])
        return (ended - started) / num_clips, memory.peak_gib, summary["step_fraction"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement of a version of this project."""

    plain_s: float
    """Seconds a clip in the plain loop."""
    pass_s: float
    """Seconds a clip in a pass."""
    short_gib: float
    """Memory of a pass over N clips."""
    long_gib: float
    """Memory of a pass over 3N clips."""
    steps: dict[str, float]
    """Fraction of the time of the workers, by step."""


def measure_here(checkpoint: str, small: str, large: str, clips_per_shard: int) -> Measured:
    """Measure this version, in a process of its own."""
    with connect():
        before_s = plain_s_per_clip(Path(checkpoint), Path(small))
        _, short_gib, _ = pass_s_per_clip(Path(checkpoint), Path(small), clips_per_shard)
        pass_s, long_gib, steps = pass_s_per_clip(Path(checkpoint), Path(large), clips_per_shard)
        after_s = plain_s_per_clip(Path(checkpoint), Path(small))  # before and after: the machine drifts
    return Measured(
        plain_s=(before_s + after_s) / 2.0, pass_s=pass_s, short_gib=short_gib, long_gib=long_gib, steps=steps
    )


_MEASURE = """
import importlib.util, json, sys
from pathlib import Path
found = importlib.util.spec_from_file_location("measured_overhead", sys.argv[1])
overhead = importlib.util.module_from_spec(found)
sys.modules["measured_overhead"] = overhead
found.loader.exec_module(overhead)
print(json.dumps(vars(overhead.measure_here(*sys.argv[2:5], int(sys.argv[5])))))
"""


def measure_version(version: Path, *arguments: object) -> Measured:
    """Measure the code in a folder by this file's functions, in a process of its own."""
    command = [sys.executable, "-c", _MEASURE, __file__, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(version)}
    done = subprocess.run(command, cwd=version, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, folder: Path, earlier: Path, repeats: int) -> list[str]:
    """One row of the table."""
    network, num_clips, clips_per_shard = _SIZES[name]
    checkpoint = folder / name.split(maxsplit=1)[0]
    save(QuerySeparator(network, _LABELS), checkpoint)
    small, large = (write_corpus(folder, count) for count in (num_clips, 3 * num_clips))
    pairs = []
    for _ in range(repeats):
        versions = (earlier, pages.ROOT)
        before, now = (measure_version(one, checkpoint, small, large, clips_per_shard) for one in versions)
        pairs.append((before, now))
        pages.log(f"{name}: loop {before.plain_s:.3f}, {now.plain_s:.3f}; pass {before.pass_s:.3f}, {now.pass_s:.3f}")
    ratios = [
        [before.pass_s / before.plain_s for before, _ in pairs],
        [now.pass_s / now.plain_s for _, now in pairs],
        [now.pass_s / before.plain_s for before, now in pairs],
        [before.pass_s / now.pass_s for before, now in pairs],
    ]
    cells = [f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})" for some in ratios]
    last = pairs[-1][1]
    steps = ", ".join(f"{step} {fraction:.0%}" for step, fraction in last.steps.items() if fraction >= 0.005)
    gib = (statistics.median(getattr(now, name) for _, now in pairs) for name in ("short_gib", "long_gib"))
    return [name, *cells, steps, *(f"{value:.2f}" for value in gib)]


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each size")
    parser.add_argument("--only", default="", help="first word of the size to measure (default all)")
    parser.add_argument("--against", default="7b741c8", help="commit of the earlier version (default 7b741c8)")
    arguments = parser.parse_args()
    columns = ["separator", "before: pass / its loop", "now: pass / its loop", "pass now / loop before"]
    columns += ["pass before / pass now", "time of the steps now", "GiB at N", "GiB at 3N"]
    with tempfile.TemporaryDirectory() as folder, pages.version_of(arguments.against) as earlier:
        names = [name for name in _SIZES if name.startswith(arguments.only)]
        rows = [measure(name, Path(folder), earlier, arguments.repeats) for name in names]
    table = pages.markdown(columns, rows)
    about = f"{arguments.repeats} repeats, before: commit {arguments.against}. {pages.stamp()}"
    print(table, about, sep="\n\n")
    pages.write_page(_PAGE, "Engine pass against a plain loop", table, about)
    pages.fill(pages.RESULTS, "overhead", f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
