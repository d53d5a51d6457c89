"""Common parts of the quality benchmarks: ESC-10 split, seed, tagger, estimator, and a corpus whose truth is known."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch

from benchmarks.pages import log
from engine.corpus.sources import SourceClips, read_sources
from engine.passes.shards import read_audio
from engine.schema import ESTIMATES
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.scoring.metrics import si_sdr_db
from engine.scoring.model_scores import Scorer
from engine.selection.thresholds import Thresholds
from engine.separators import NetworkConfig, QueryEmbedder, find_separator, save
from engine.separators.batching import BatchedSeparator
from engine.settings import build
from engine.storage.factories import own_device
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from train.capture import Model, captured
from train.data.config import MixConfig
from train.data.mixer import Mixer
from train.data.training_data import TrainingData, make_mixer
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig, calibrate_on
from train.judges.tagger import TaggerConfig, train_tagger
from train.student import DistilConfig, Student
from tune.config import RunConfig
from tune.demo.corpus import write_natural
from tune.recipes import FIRST_THRESHOLDS, RECIPES, THRESHOLDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Steps, clips and mixtures of a benchmark."""

    seed_steps: int = 800
    half_steps: int = 300
    tagger_steps: int = 1000
    student_steps: int = 300
    num_one: int = 0
    num_two: int = 400
    num_three: int = 80
    num_mixtures: int = 200
    num_adversarial: int = 60
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    schedule: tuple[Thresholds, ...] = tuple(build(Thresholds, limits) for limits in (FIRST_THRESHOLDS, THRESHOLDS))


QUICK = Size(
    seed_steps=40,
    half_steps=20,
    tagger_steps=20,
    student_steps=8,
    num_two=24,
    num_three=4,
    num_mixtures=10,
    num_adversarial=8,
    network=NetworkConfig(channels=32, num_blocks=2),
    schedule=(  # a seed of so few steps hardly separates: these keep most of its stems
        Thresholds(min_stem_level_db=-30.0, min_tagger_margin_db=-100.0),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Folders, split and sizes of the quality benchmarks."""

    clips: str
    out: Path
    size: Size
    rate_hz: int = 16000
    corpus_seed: int = 0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options that all quality benchmarks take."""
        parser.add_argument("--esc10", type=Path, required=True, help="folder with clips.csv and audio/")
        parser.add_argument("--out", type=Path, help="working folder (default runs/quality, or runs/quality-quick)")
        parser.add_argument("--quick", action="store_true", help="minutes; shows that it runs, writes no figures")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Setting:
        """The setting that the options describe."""
        out = arguments.out or Path("runs/quality-quick" if arguments.quick else "runs/quality")
        clips = str(arguments.esc10.resolve() / "clips.csv")
        return cls(clips=clips, out=out.resolve(), size=QUICK if arguments.quick else Size())

    def sources(self, *folds: int) -> SourceClips:
        """Single-source clips of some folds."""
        return read_sources(self.clips, folds=folds)

    @property
    def validation(self) -> ValidationConfig:
        """Mixtures of fold 4."""
        return ValidationConfig(clips=self.clips, folds=(4,), num_mixtures=self.size.num_mixtures, seed=0)

    def natural(self) -> Path:
        """Write the natural corpus of folds 2 and 3, once; its truth is kept in another folder."""
        return write_natural(
            self.sources(2, 3),
            self.out / "corpus",
            num_clips=[(1, self.size.num_one), (2, self.size.num_two), (3, self.size.num_three)],
            sample_rate_hz=self.rate_hz,
            seed=self.corpus_seed,
            truth=self.out / "truth",
        )

    def truth_file(self, path: str, label: str) -> Path:
        """File of the true source of a label in a clip."""
        return self.out / "truth" / Path(path).stem / f"{label}.flac"

    def truth(self, path: str, label: str) -> np.ndarray:
        """The true source of a label in a clip, ``[T]``."""
        source_T: np.ndarray = soundfile.read(self.truth_file(path, label), dtype="float32")[0]
        return source_T

    @property
    def seed(self) -> Path:
        """The separator from which all students start, trained on fold 1."""
        return self.out / "seed"

    @property
    def tagger(self) -> Path:
        """The tagger, trained on fold 1."""
        return self.out / "tagger"

    @property
    def run(self) -> Path:
        """The loop with the default thresholds."""
        return self.out / "run"

    def estimator(self) -> SiSdrEstimator:
        """The estimator, calibrated on fold 1."""
        return load_estimator(self.out / "estimator")

    @property
    def thresholds(self) -> Thresholds:
        """The default thresholds of later iterations, without the rules that need a whole pass."""
        return dataclasses.replace(self.size.schedule[-1], label_floor_fraction=None, label_cap_ratio=None)

    def config(self, iterations: int) -> RunConfig:
        """The run of recipe laptop over the natural corpus, with the seed and the judges of :func:`prepare`."""
        schedule = (self.size.schedule + self.size.schedule[-1:] * iterations)[:iterations]
        settings: dict[str, Any] = RECIPES["laptop"]() | {
            "corpus": str(self.natural()),
            "clean": self.clips,
            "clean_folds": (1,),
            "separator": str(self.seed),
            "estimator": str(self.out / "estimator"),
            "tagger": str(self.tagger),
            "validation": self.validation,
            "schedule": schedule,
        }
        config = build(RunConfig, settings)
        distil = dataclasses.replace(config.distil, steps=self.size.student_steps, validate_every_steps=100)
        return dataclasses.replace(config, distil=distil)


def train(
    work: Setting,
    folder: Path,
    data: TrainingData,
    *,
    steps: int,
    mix: MixConfig | None = None,
    seed: int = 0,
    start: Path | None = None,
    embedder: QueryEmbedder | None = None,
) -> Path:
    """Train a separator in this process, once; returns its folder.

    ``embedder`` makes embeddings of its labels, for a network that reads text.
    """
    if (folder / "separator.json").is_file():
        return folder
    config = DistilConfig(steps=steps, mix=mix or MixConfig(), seed=seed, warmup_steps=min(50, steps // 4))
    began = str(start) if start else None
    known = embedder.embed_labels(sorted(set(data.clean.labels))) if embedder and data.clean else None
    device = torch.device(own_device())
    mixer = make_mixer(
        data, config.mix, seed=seed, sample_rate_hz=work.rate_hz, start=began, embeddings=known, device=device
    )
    learn(work, folder, mixer, config, start=began, embedder=embedder)
    return folder


def learn(
    work: Setting,
    folder: Path,
    mixer: Mixer,
    config: DistilConfig,
    *,
    start: str | None = None,
    embedder: QueryEmbedder | None = None,
) -> None:
    """Train a separator on the batches of a mixer, on its device, and save it."""
    device = mixer.render.device
    student = Student(config, mixer.labels, start=start, network=work.size.network, device=device, embedder=embedder)
    model: Model = student.separator
    if device.type == "cuda":
        model = captured(student.separator, mixer.batch(0))
    for step in range(config.steps):
        student.learn(model, mixer.batch(step))
    save(student.result(), folder)


def add_parts(parser: argparse.ArgumentParser, arms: Iterable[str]) -> None:
    """Add the options by which several processes share the trainings of a benchmark."""
    parser.add_argument("--part", default="0/1", help="K/N: this process does every Nth training from the Kth")
    parser.add_argument("--only", nargs="*", choices=list(arms), help="arms to do (default all)")


def own_part(arguments: argparse.Namespace, students: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The trainings of this process, of all pairs of an arm and a seed: the first seeds first."""
    part, num_parts = map(int, arguments.part.split("/"))
    wanted = [student for student in students if not arguments.only or student[0] in arguments.only]
    return sorted(wanted, key=lambda student: student[1])[part::num_parts]


def prepare(work: Setting) -> None:
    """Make seed, tagger and estimator of fold 1, once; the estimator on clips that its separators have not seen."""
    log("seed, tagger and estimator of fold 1")
    clean = work.sources(1)
    train(work, work.seed, TrainingData(clean=clean), steps=work.size.seed_steps)
    tagger = TaggerConfig(steps=work.size.tagger_steps)
    train_tagger(work.tagger, clean=clean, config=tagger, sample_rate_hz=work.rate_hz)
    if (work.out / "estimator" / "estimator.json").is_file():
        return
    held_out = []
    for part in range(2):
        data = TrainingData(clean=clean.without(part, 2))
        separator = train(work, work.out / f"without-{part}", data, steps=work.size.half_steps, seed=part)
        batched = BatchedSeparator(separator=find_separator(separator).open(own_device()), device=own_device())
        held_out.append((Scorer(batched=batched, reseparate=False), clean.part(part, 2)))
    estimator = calibrate_on(held_out, CalibrationConfig(), about={"clean": "fold 1"})
    save_estimator(estimator, work.out / "estimator")


class TrueSiSdr:
    """Stands in for an estimator and knows the truth: the SI-SDR of each stem of a pass against its source."""

    def __init__(self, work: Setting, stems: Location | None = None) -> None:
        self.work = work
        self.stems = stems or work.run / "iterations" / "1" / "stems"
        self.fingerprint = fingerprint("truth")

    def _of_stem(self, shard: str, row: int, path: str, label: str) -> float:
        (stem_T,) = read_audio(self.stems, shard, [row])
        truth_T = torch.from_numpy(self.work.truth(path, label)[: len(stem_T)])
        return float(si_sdr_db(estimate=torch.from_numpy(stem_T[: len(truth_T)]), reference=truth_T))

    def estimate(self, scores: pa.Table) -> pa.Table:
        """Rows of ``schema.ESTIMATES`` for rows of a selection's index."""
        names = ("shard", "row", "path", "label")
        rows = scores.select(names).to_pylist()
        values = [self._of_stem(*(row[name] for name in names)) for row in rows]
        return pa.table([pa.array(values, pa.float32()), pa.array([0.0] * len(rows), pa.float32())], schema=ESTIMATES)
