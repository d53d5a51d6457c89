"""What a GPU is used for, and what bounds it: separation, training, and the whole loop on ESC-10.

    python -m benchmarks.gpu --esc10 DIR [--quick] [--tables 123]

Table 1: the network's forward pass alone (16 bits, mixtures on the card), the loop around it (clips in memory, results
fetched) and a pass on Ray (decoded, scored, written; start-up left out), with the time that the card is busy meanwhile
and the CPU time of all processes. Table 2: a training step alone, and with its batches made. Table 3: the benchmark
of ``benchmarks/quality/esc10.py`` at the sizes of the README, by stage. About eight minutes on one card. Needs torch,
Ray and libsndfile only: all clips are WAV. Without a GPU it runs on the CPU; ``--quick`` shows in minutes that it works
and writes no page. Writes ``gpu.md``.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from benchmarks import pages
from benchmarks.quality import esc10
from benchmarks.speed.separators import difference_db, give_vectors
from benchmarks.watch import Watch
from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.passes.config import PassConfig
from engine.passes.run import run_pass
from engine.passes.separate import separate_clips, uploaded
from engine.schema import ClipRow, DecodedClip
from engine.separators import NetworkConfig, QuerySeparator, SeparatorSource
from engine.separators.audiosep.network import AudioSepConfig
from engine.separators.audiosep.separator import AudioSep
from engine.separators.base import NetworkSeparator
from engine.separators.batching import BatchedSeparator
from engine.storage.files import read_json
from train.capture import captured
from train.data.config import MixConfig
from train.data.training_data import TrainingData, make_mixer
from train.distil import distil
from train.student import DistilConfig, Student
from tune.demo import sounds

_PAGE = Path(__file__).with_suffix(".md")
_LABELS, _CLIP_S = ("rain", "siren"), 10.0
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LARGE = NetworkConfig(channels=768, num_blocks=20)


def open_laptop(device: str) -> NetworkSeparator:
    """The recipe's network, with random weights."""
    return _opened(QuerySeparator(NetworkConfig(), _LABELS), device)


def open_large(device: str) -> NetworkSeparator:
    """A network of 768 channels and 20 blocks, with random weights."""
    return _opened(QuerySeparator(_LARGE, _LABELS), device)


def open_audiosep(device: str) -> NetworkSeparator:
    """AudioSep's network, with random weights and random embeddings of the labels."""
    separator = AudioSep(AudioSepConfig(), ())
    give_vectors(separator, _LABELS, separator.config.query_features)
    return _opened(separator, device)


def _opened(separator: NetworkSeparator, device: str) -> NetworkSeparator:
    return separator.to(device).eval()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A separator of table 1."""

    name: str
    open: Callable[[str], NetworkSeparator]
    batches_s: tuple[float, ...]
    """Audio of the batches of the forward pass and the loop, in seconds; each clip has two queries."""
    num_clips: int
    """Clips of the pass."""
    config: PassConfig = field(default_factory=PassConfig)
    """Settings of the pass."""


CASES = (
    Case(name="laptop (256 channels, 10 blocks)", open=open_laptop, batches_s=(80.0, 320.0, 640.0), num_clips=4000),
    Case(name="large (768 channels, 20 blocks)", open=open_large, batches_s=(80.0, 320.0, 640.0), num_clips=4000),
    Case(name="AudioSep", open=open_audiosep, batches_s=(80.0, 320.0), num_clips=800),
)
_QUICK = (replace(CASES[0], batches_s=(20.0,), num_clips=24, config=PassConfig(rows_per_task=4)),)


def seconds(call: Callable[[], object], *, repeats: int, warm: int = 3) -> float:
    """Median wall time of a call with everything that it started on the card."""
    times = []
    for _ in range(warm + repeats):
        started = time.perf_counter()
        call()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def write_corpus(folder: Path, num_clips: int, rate_hz: int) -> Path:
    """Write recordings of two sounds each, of which a dozen clips of ten seconds overlap; returns the manifest."""
    starts_s = np.arange(12) / 12
    signals = [
        np.resize(sounds.sound(label, rng=np.random.default_rng(0), duration_s=30.0), 60 * rate_hz) for label in _LABELS
    ]
    rng = np.random.default_rng(1)
    lines = ["path,labels,start_s,end_s"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-num_clips // len(starts_s))):
        firsts = rng.integers(0, 48 * rate_hz, len(_LABELS))
        parts = [signal[first : first + 11 * rate_hz] for signal, first in zip(signals, firsts, strict=True)]
        soundfile.write(folder / f"{number}.wav", 0.4 * np.sum(parts, axis=0), rate_hz, subtype="PCM_16")
        lines += [f"{number}.wav,{';'.join(_LABELS)},{at:.6f},{at + _CLIP_S:.6f}" for at in starts_s]
    manifest = folder / "natural.csv"
    manifest.write_text("\n".join(lines[: 1 + num_clips]) + "\n")
    return manifest


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """What a pass took between a third of its shards and its end, by when all processes have started."""

    audio_s_per_s: float
    cpu_ms: float
    """CPU time of all processes for a clip."""
    steps_ms: str
    """Time of the workers for a clip, by step."""
    gpu_busy: str


def time_pass(case: Case, folder: Path) -> PassTimes:
    """Run a pass of a case and time it."""
    rate_hz = case.open("cpu").sample_rate_hz
    corpus = read_corpus(write_corpus(folder / "corpus", case.num_clips, rate_hz))
    source = SeparatorSource.from_factory(case.open)
    with Watch() as watch:
        summary = run_pass(corpus, folder / "pass", separator=source, config=case.config)
    done = sorted((path.stat().st_mtime, path) for path in (folder / "pass" / "stems").glob("*.done.json"))
    first = max(1, len(done) // 3)
    records = [read_json(path) for _, path in done[first:]]
    (start, _), (end, _) = done[first - 1], done[-1]
    num_clips = sum(record["num_clips"] for record in records)
    steps = {step: 1e3 * used_s / summary["num_clips"] for step, used_s in summary["step_s"].items() if used_s}
    return PassTimes(
        audio_s_per_s=sum(record["audio_s"] for record in records) / (end - start),
        cpu_ms=1e3 * watch.cpu_s(start, end) / num_clips,
        steps_ms=", ".join(f"{step} {used_ms:.1f}" for step, used_ms in steps.items()),
        gpu_busy=watch.busy(start, end),
    )


def separation_rows(case: Case, *, repeats: int) -> list[list[str]]:
    """Rows of table 1 of a separator: one for each batch, and one for the pass."""
    torch.manual_seed(0)
    separator = case.open(_DEVICE)
    clip_samples = round(_CLIP_S * separator.sample_rate_hz)
    rows, differences = [], ""
    if _DEVICE == "cuda":
        mix_MT, queries = 0.1 * torch.randn(1, clip_samples), [_LABELS[0]]
        found_db = [difference_db(separator, mix_MT, queries, autocast=autocast) for autocast in (False, True)]
        differences = " / ".join(f"{value_db:.0f}" for value_db in found_db)
    for batch_s in case.batches_s:
        num_clips = max(1, round(batch_s / _CLIP_S / len(_LABELS)))
        clips = [_clip(number, clip_samples) for number in range(num_clips)]
        batched = BatchedSeparator(separator=separator, device=_DEVICE, autocast=_DEVICE == "cuda", batch_s=batch_s)
        audio_s = num_clips * len(_LABELS) * _CLIP_S
        forward_s = seconds(_forward(separator, num_clips, clip_samples), repeats=repeats)
        loop_s = seconds(functools.partial(_loop, clips, batched, times=repeats), repeats=3, warm=1) / repeats
        speeds = [f"{audio_s / used_s:,.0f}" for used_s in (forward_s, loop_s)]
        row = [case.name, f"{batch_s:g}", f"{1e3 * forward_s:.1f}", *speeds, f"{forward_s / loop_s:.0%}"]
        rows.append([*row, differences])
        pages.log(" | ".join(rows[-1]))
    return rows


def _clip(number: int, num_samples: int) -> DecodedClip:
    row: ClipRow = {"clip_id": str(number), "path": "", "labels": list(_LABELS), "start_s": None, "end_s": None}
    noise_T = np.random.default_rng(number).normal(0.0, 0.1, num_samples).astype(np.float32)
    return DecodedClip(row=row, samples_T=noise_T)


def _forward(separator: NetworkSeparator, num_clips: int, num_samples: int) -> Callable[[], object]:
    mix_MT = 0.1 * torch.randn(num_clips, num_samples, device=_DEVICE)
    rows = [number for number in range(num_clips) for _ in _LABELS]
    query_BQ = separator.encode(_LABELS * num_clips)

    @torch.inference_mode()
    def call() -> object:
        with torch.autocast(_DEVICE, enabled=_DEVICE == "cuda"):
            return separator.separate_chunk(mix_MT, query_BQ, [num_samples] * num_clips, rows)

    return call


def _loop(clips: Sequence[DecodedClip], batched: BatchedSeparator, *, times: int) -> None:
    """Separate clips in memory several times and fetch their stems, with three batches in flight as in a pass."""
    turns = threading.Lock()

    def call(_number: int) -> None:
        mixtures = uploaded(clips, batched.device)
        with turns:
            separated, _ = separate_clips(clips, batched, mixtures)
        for stems_ST in [fetched(item.stems_ST) for item in separated]:
            assert len(stems_ST) == len(_LABELS), "every query has a stem"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(times)))


def fetched(stems_ST: torch.Tensor) -> torch.Tensor:
    """Stems in the memory of the CPU; from a card they are on their way."""
    if not stems_ST.is_cuda:
        return stems_ST
    return torch.empty(stems_ST.shape, pin_memory=True).copy_(stems_ST, non_blocking=True)


def pass_row(case: Case, folder: Path) -> list[str]:
    """The row of table 1 of a pass."""
    times = time_pass(case, folder)
    row = [case.name, f"{times.audio_s_per_s:,.0f}", times.gpu_busy, f"{times.cpu_ms:.1f}", times.steps_ms]
    pages.log(" | ".join(row))
    return row


def training_row(name: str, network: NetworkConfig, size: int, clips: Path, *, steps: int) -> list[str]:
    """A row of table 2."""
    data, device = TrainingData(clean=read_sources(clips / "clips.csv", folds=(1,))), torch.device(_DEVICE)
    config = DistilConfig(steps=10 * steps, mix=MixConfig(batch_size=size))
    mixer = make_mixer(data, config.mix, seed=0, sample_rate_hz=network.sample_rate_hz, device=device)
    student = Student(config, mixer.labels, start=None, network=network, device=device)
    batch, numbers = mixer.batch(0), itertools.count(1)
    model = captured(student.separator, batch) if device.type == "cuda" else student.separator
    alone_s = seconds(lambda: student.learn(model, batch), repeats=steps)
    made_s = seconds(lambda: mixer.batch(next(numbers)), repeats=steps)
    with Watch() as watch:
        begun = time.perf_counter()
        losses = [student.learn(model, mixer.batch(next(numbers))) for _ in range(4 * steps)]
        float(torch.stack(losses).mean())  # waits for the last step
        step_s = (time.perf_counter() - begun) / len(losses)
    times_ms = [f"{1e3 * used_s:.1f}" for used_s in (made_s, alone_s, step_s)]
    row = [name, str(size), *times_ms, f"{alone_s / step_s:.0%}", watch.busy()]
    pages.log(" | ".join(row))
    return row


def one_step_s(clips: Path, out: Path) -> float:
    """Wall time of a training of one step."""
    started = time.perf_counter()
    data = TrainingData(clean=read_sources(clips / "clips.csv", folds=(1,)))
    distil(out, data=data, config=DistilConfig(steps=1), network=NetworkConfig())
    return time.perf_counter() - started


def loop_on_esc10(clips: Path, folder: Path, *, quick: bool) -> list[list[str]]:
    """Rows of table 3: wall time by stage of the benchmark on ESC-10."""
    size = esc10.QUICK if quick else esc10.Size()
    work = esc10.Bench(clips, folder / "work", size, seed=0, threads=None)
    started = time.perf_counter()
    with Watch() as watch:
        result = esc10.bench(work, "all")
    wall_s = time.perf_counter() - started
    assert result is not None, "all parts are done"
    iterations = result["summary"]["iterations"]
    stages = {name: _training_s(work.out / name, "separator.json") for name in ("seed", "control", "bound")}
    stages["tagger"] = _training_s(work.out / "tagger", "tagger.json")
    for number, entry in enumerate(iterations[1:], 1):
        summary = read_json(work.out / "run" / "iterations" / str(number) / "summary.json")
        stages[f"iteration {number}: pass"] = summary["wall_s"]
        stages[f"iteration {number}: training"] = entry["cost_s"] - summary["wall_s"]
    rest_s = wall_s - sum(stages.values())
    rows = [[name, f"{used_s:.0f}"] for name, used_s in stages.items()]
    gains = ", ".join(f"{row['sdri_db']:.2f}" for row in result["rows"].values())
    return [
        *rows,
        ["estimator, validation, starting", f"{rest_s:.0f}"],
        ["all", f"{wall_s:.0f}"],
        ["GPU busy", watch.busy()],
        ["SDRi dB of seed, iterations, control, bound, oracle", gains],
    ]


def _training_s(folder: Path, description: str) -> float:
    return float(read_json(folder / description)["history"][-1]["wall_s"])


def write_wav(esc10_folder: Path, out: Path, *, folds: set[int], rate_hz: int = 16000) -> Path:
    """Write the clips of some folds as WAV of one rate; returns their folder, which has a list ``clips.csv``."""
    with (esc10_folder / "clips.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["fold"]) in folds]
    (out / "audio").mkdir(parents=True, exist_ok=True)

    def convert(row: dict[str, str]) -> str:
        samples_T, found_hz = soundfile.read(esc10_folder / row["path"], dtype="float32")
        name = f"audio/{Path(row['path']).stem}.wav"
        soundfile.write(out / name, soxr.resample(samples_T, found_hz, rate_hz), rate_hz, subtype="PCM_16")
        return f"{name},{row['label']},{row['fold']}"

    with ThreadPoolExecutor() as pool:
        lines = ["path,label,fold", *pool.map(convert, rows)]
    (out / "clips.csv").write_text("\n".join(lines) + "\n")
    return out


_FORWARD = (
    *("separator", "batch, s of audio", "forward ms", "forward, audio s/s", "loop, audio s/s", "loop / forward"),
    "GPU to CPU, dB, 32 / 16 bits",
)
_PASS = ("separator", "pass, audio s/s", "GPU busy", "CPU ms a clip", "workers' ms a clip")
_TRAINING = ("network", "batch", "batch ms", "step alone ms", "step with its batch ms", "alone / with", "GPU busy")


def tables(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The tables, each when it is measured."""
    quick = arguments.quick
    clips = write_wav(arguments.esc10, folder / "clips", folds={1, 2, 3, 4})
    cases = _QUICK if quick else CASES
    if "1" in arguments.tables:
        rows = [row for case in cases for row in separation_rows(case, repeats=3 if quick else 10)]
        yield pages.markdown(_FORWARD, rows)
        yield pages.markdown(_PASS, [pass_row(case, folder / f"case-{number}") for number, case in enumerate(cases)])
    if "2" in arguments.tables:
        shapes = [("laptop", NetworkConfig()), ("large", _LARGE)]
        sizes = [(name, network, size) for name, network in shapes for size in (16, 64)]
        steps = 2 if quick else 50
        rows = [training_row(*some, clips, steps=steps) for some in (sizes[:1] if quick else sizes)]
        start = f"A training of one step takes {one_step_s(clips, folder / 'one'):.1f} s from call to return."
        yield f"{pages.markdown(_TRAINING, rows)}\n\n{start}"
    if "3" in arguments.tables:
        yield pages.markdown(("stage", "s"), loop_on_esc10(clips, folder, quick=quick))


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, required=True, help="folder with clips.csv and audio/")
    parser.add_argument("--quick", action="store_true", help="minutes; shows that it runs, writes no page")
    parser.add_argument("--tables", default="123", help="numbers of the tables to measure (default 123)")
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if _DEVICE == "cuda" else "no GPU"
    about = f"torch {torch.__version__}; commit {pages.commit()}, {pages.hardware(gpu)}"
    parts: list[str] = []
    with tempfile.TemporaryDirectory() as folder, connect():
        for table in tables(arguments, Path(folder)):
            print(table, flush=True)
            parts.append(table)
            if not arguments.quick:
                pages.write_page(_PAGE, "On a GPU", *parts, about)


if __name__ == "__main__":
    main()
