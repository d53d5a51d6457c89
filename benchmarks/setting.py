"""What the quality benchmarks share: the ESC-10 split, the seed, a corpus with its truth, the estimator."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch

from engine.corpus.sources import part_of, read_sources
from engine.passes.shards import read_audio
from engine.schema import ESTIMATES
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.scoring.metrics import si_sdr_db
from engine.scoring.model_scores import Scorer
from engine.selection.thresholds import Thresholds
from engine.separators import NetworkConfig, load, save
from engine.separators.batching import BatchedSeparator
from engine.settings import build
from train.data.config import MixConfig
from train.data.training_data import TrainingData, make_mixer
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig, calibrate_on
from train.judges.tagger import TaggerConfig, train_tagger
from train.student import DistilConfig, Student
from tune.config import RunConfig
from tune.demo.corpus import write_natural
from tune.recipes import FIRST_GATE, GATE, RECIPES

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    seed_steps: int = 800
    half_steps: int = 300
    tagger_steps: int = 1000
    round_steps: int = 300
    num_two: int = 400
    num_three: int = 80
    num_mixtures: int = 200
    num_fooling: int = 60
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    gates: tuple[Thresholds, ...] = tuple(build(Thresholds, gate) for gate in (FIRST_GATE, GATE))


QUICK = Size(
    seed_steps=40,
    half_steps=20,
    tagger_steps=20,
    round_steps=8,
    num_two=24,
    num_three=4,
    num_mixtures=10,
    num_fooling=8,
    network=NetworkConfig(channels=32, num_blocks=2),
    gates=(
        Thresholds(min_stem_level_db=-30.0, min_tagger_margin_db=-100.0),
    ),  # a seed of so few steps hardly separates
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Folders, split and sizes."""

    clips: str
    out: Path
    size: Size
    rate_hz: int = 16000

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """The options that all of them take."""
        parser.add_argument("--esc10", type=Path, required=True, help="folder with clips.csv and audio/")
        parser.add_argument("--out", type=Path, help="working folder (default runs/quality, or runs/quality-quick)")
        parser.add_argument("--quick", action="store_true", help="minutes; shows that it runs, no figures")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Setting:
        out = arguments.out or Path("runs/quality-quick" if arguments.quick else "runs/quality")
        clips = str(arguments.esc10.resolve() / "clips.csv")
        return cls(clips=clips, out=out.resolve(), size=QUICK if arguments.quick else Size())

    @property
    def validation(self) -> ValidationConfig:
        """Mixtures of fold 4."""
        return ValidationConfig(clips=self.clips, folds=(4,), num_mixtures=self.size.num_mixtures, seed=0)

    def natural(self) -> Path:
        """The natural corpus of folds 2 and 3; its truth lies apart."""
        return write_natural(
            read_sources(self.clips, folds=[2, 3]),
            self.out / "corpus",
            num_clips=[(2, self.size.num_two), (3, self.size.num_three)],
            sample_rate_hz=self.rate_hz,
            seed=0,
            truth=self.out / "truth",
        )

    def truth_file(self, path: str, label: str) -> Path:
        """Where the true source of a label in a clip lies."""
        return self.out / "truth" / Path(path).stem / f"{label}.flac"

    def truth(self, path: str, label: str) -> np.ndarray:
        """The true source of a label in a clip, ``[T]``."""
        source_T: np.ndarray = soundfile.read(self.truth_file(path, label), dtype="float32")[0]
        return source_T

    @property
    def seed(self) -> Path:
        """The separator that all start from, trained on fold 1."""
        return self.out / "seed"

    @property
    def tagger(self) -> Path:
        """Trained on fold 1."""
        return self.out / "tagger"

    @property
    def run(self) -> Path:
        """The loop with the default gate."""
        return self.out / "run"

    def quality(self) -> SiSdrEstimator:
        """The estimator, calibrated on fold 1."""
        return load_estimator(self.out / "quality")

    @property
    def gate(self) -> Thresholds:
        """The default gate, without what a pass as a whole adds."""
        return dataclasses.replace(self.size.gates[-1], label_floor_fraction=None, label_cap_ratio=None)

    def config(self, iterations: int) -> RunConfig:
        """The run of recipe laptop over the natural corpus, from the seed and with the judges of :func:`prepare`."""
        settings = RECIPES["laptop"]()
        config = build(RunConfig, settings | {"corpus": str(self.natural()), "separator": str(self.seed)})
        return dataclasses.replace(
            config,
            clean=self.clips,
            clean_folds=(1,),
            quality=str(self.out / "quality"),
            tagger=str(self.tagger),
            schedule=(self.size.gates + self.size.gates[-1:] * iterations)[:iterations],
            distil=dataclasses.replace(config.distil, steps=self.size.round_steps, validate_every_steps=100),
            validation=self.validation,
        )


def train(
    work: Setting,
    folder: Path,
    training_data: TrainingData,
    *,
    steps: int,
    mix: MixConfig | None = None,
    seed: int = 0,
    start: Path | None = None,
) -> Path:
    """A separator trained in this process on one thread; one that is there is kept."""
    if (folder / "separator.json").is_file():
        return folder
    config = DistilConfig(steps=steps, mix=mix or MixConfig(), seed=seed, warmup_steps=min(50, steps // 4))
    began = str(start) if start else None
    mixer = make_mixer(training_data, config.mix, seed=seed, sample_rate_hz=work.rate_hz, start=began)
    student = Student(config, mixer.labels, start=began, network=work.size.network, device=torch.device("cpu"))
    for step in range(steps):
        student.learn(student.separator, mixer.batch(step), torch.device("cpu"))
    save(student.result(), folder)
    return folder


def prepare(work: Setting) -> None:
    """Seed, tagger and estimator, all of fold 1: the estimator on stems of clips that their separator did not learn."""
    say("seed, tagger and estimator of fold 1")
    train(work, work.seed, TrainingData(clean=work.clips, clean_folds=(1,)), steps=work.size.seed_steps)
    tagger = TaggerConfig(steps=work.size.tagger_steps)
    train_tagger(work.tagger, clean=work.clips, clean_folds=(1,), config=tagger)
    if (work.out / "quality" / "quality.json").is_file():
        return
    sources = read_sources(work.clips, folds=(1,))
    held_out = []
    for part in range(2):
        training_data = TrainingData(clean=work.clips, clean_folds=(1,), clean_without=(part, 2))
        separator = train(work, work.out / f"without-{part}", training_data, steps=work.size.half_steps, seed=part)
        batched = BatchedSeparator(separator=load(separator), batch_s=80.0)
        held_out.append((Scorer(batched=batched, reseparate=False), part_of(sources, part, 2)))
    save_estimator(calibrate_on(held_out, CalibrationConfig(), about={"clean": "fold 1"}), work.out / "quality")


def true_si_sdr(work: Setting, stems: Path | None = None) -> Callable[[pa.Table], pa.Table]:
    """An estimator that knows the truth: SI-SDR of each stem of a pass against its source."""
    stems = stems or work.run / "iterations" / "1" / "stems"

    @functools.cache
    def one(shard: str, row: int, path: str, label: str) -> float:
        (stem_T,) = read_audio(stems, shard, [row])
        truth_T = torch.from_numpy(work.truth(path, label)[: len(stem_T)])
        return float(si_sdr_db(estimate=torch.from_numpy(stem_T[: len(truth_T)]), reference=truth_T))

    def estimate(index: pa.Table) -> pa.Table:
        names = ("shard", "row", "path", "label")
        rows = index.select(names).to_pylist()
        values = [one(*(row[name] for name in names)) for row in rows]
        return pa.table([pa.array(values, pa.float32()), pa.array([0.0] * len(rows), pa.float32())], schema=ESTIMATES)

    return estimate


def say(text: str) -> None:
    """A line with the time."""
    print(f"[{dt.datetime.now():%H:%M:%S}] {text}", flush=True)


def commit() -> str:
    """What is checked out."""
    git = shutil.which("git")
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = git and subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=False).stdout.strip()
    return found or "unknown"


def hardware() -> str:
    """Date and machine of a table."""
    return f"{dt.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), no GPU."


def stamp() -> str:
    """Commit, date and hardware of a table."""
    return f"Commit {commit()}, {hardware()}"
