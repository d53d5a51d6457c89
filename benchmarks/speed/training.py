"""Speed of a training at the laptop's size: steps a minute with their batches, relative to the steps alone.

    python -m benchmarks.speed.training [--esc10 DIR] [--steps 20] [--large] [--batch-size 16]

In this process, as ``distil.num_workers: 0`` trains: sounds are loaded, every batch is drawn, rendered and learned
from, on a GPU if there is one. Steps alone learn from one batch again and again. Both take turns, and the best of each
counts, so that other work on the machine does not. Without ESC-10 the sounds are synthesised. Writes ``training.md``.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import joblib
import torch

from benchmarks import pages
from engine.corpus.sources import SourceClips, read_sources
from engine.separators import NetworkConfig
from train.capture import Model, captured
from train.data.config import MixConfig
from train.data.training_data import TrainingData, make_mixer
from train.student import DistilConfig, Student
from tune.demo import sounds as synth

_PAGE = Path(__file__).with_name("training.md")
_STEPS_OF_A_ROUND = 5
_COLUMNS = (
    *("network", "mixtures", "first step after s", "draw ms", "draw and render ms", "step alone ms"),
    *("step with its batch ms", "steps a minute", "memory GB"),
)


def measure(clean: SourceClips, network: NetworkConfig, *, num_steps: int, batch_size: int) -> list[str]:
    """Cells of the row of a network."""
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(joblib.cpu_count())
    config = DistilConfig(mix=MixConfig(batch_size=batch_size))
    data = TrainingData(clean=clean)
    mixer = make_mixer(data, config.mix, seed=0, sample_rate_hz=network.sample_rate_hz, device=device)
    student = Student(config, mixer.labels, start=None, network=network, device=device)
    batch = mixer.batch(0)
    model: Model = student.separator
    if device.type == "cuda":
        model = captured(student.separator, batch.mix_BT, batch.query)
    first_s = time.perf_counter() - began + _seconds(lambda _: student.learn(model, batch), [0], device)
    jobs: dict[str, Callable[[int], object]] = {
        "draw": mixer.draw,
        "batch": mixer.batch,
        "step": lambda _: student.learn(model, batch),
        "both": lambda step: student.learn(model, mixer.batch(step)),
    }
    rounds = [range(first, first + _STEPS_OF_A_ROUND) for first in range(0, num_steps, _STEPS_OF_A_ROUND)]
    times = [{name: _seconds(job, steps, device) for name, job in jobs.items()} for steps in rounds]
    best_s = {name: min(each[name] for each in times) / _STEPS_OF_A_ROUND for name in jobs}
    size = f"{network.channels} channels, {network.num_blocks} blocks"
    cells = [f"{1000 * best_s[name]:.1f}" for name in jobs]
    return [size, str(batch_size), f"{first_s:.1f}", *cells, f"{60 / best_s['both']:.0f}", f"{_peak_gb(device):.2f}"]


def _seconds(job: Callable[[int], object], steps: Iterable[int], device: torch.device) -> float:
    """Time of a job for some steps, until the device has done them."""
    began = time.perf_counter()
    for step in steps:
        job(step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak_gb(device: torch.device) -> float:
    """Largest memory so far: of the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure and write the page."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, help="folder with clips.csv and audio/")
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind (default 20)")
    parser.add_argument("--batch-size", type=int, default=16, help="mixtures in a step (default 16)")
    parser.add_argument("--large", action="store_true", help="a network of 768 channels and 20 blocks")
    parser.add_argument("--out", type=Path, default=_PAGE, help="the page (default training.md)")
    arguments = parser.parse_args()
    network = NetworkConfig(channels=768, num_blocks=20) if arguments.large else NetworkConfig()
    with tempfile.TemporaryDirectory() as folder:
        clips = arguments.esc10 / "clips.csv" if arguments.esc10 else None
        clean = read_sources(clips or synth.write_corpus(Path(folder), num_per_label={1: 8}, seed=0, duration_s=5.0))
        row = measure(clean, network, num_steps=arguments.steps, batch_size=arguments.batch_size)
    made_by = "Written by `python -m benchmarks.speed.training`: times of one step, the best of several rounds."
    pages.write_page(arguments.out, "Speed of a training", made_by, pages.markdown(_COLUMNS, [row]), pages.stamp())
    pages.log(", ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, row, strict=True)))


if __name__ == "__main__":
    main()
