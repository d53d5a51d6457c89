"""TODO tune/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from engine.passes.config import PassConfig
from engine.selection.thresholds import Thresholds
from engine.separators import NetworkConfig
from engine.storage.paths import location
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from train.student import DistilConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    corpus: str
    """Natural clips with their labels: a manifest, AudioSet's segment CSV, or a folder of folders by label."""
    class_map: str | None = None
    """AudioSet's ``class_labels_indices.csv``, for its segment CSV."""
    audio_root: str | None = None
    """Where AudioSet's audio files are; null: beside its CSV."""
    clean: str | None = None
    """Single-source clips, CSV ``path,label[,fold]``: they train the seed and are mixed into every distillation."""
    clean_folds: tuple[int, ...] | None = None
    """Folds of ``clean``; null: all."""
    separator: str | None = None
    """Checkpoint folder of the seed; null: a seed is trained from the clean clips."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Shape of a seed that is trained here."""
    seed_training: DistilConfig = field(default_factory=lambda: DistilConfig(steps=1600))
    """How that seed is trained."""
    engine: PassConfig = field(default_factory=PassConfig)
    """How every iteration separates the corpus."""
    schedule: tuple[Thresholds, ...] = (Thresholds(min_re_sdr_db=10.0), Thresholds(min_re_sdr_db=15.0))
    """Thresholds of every iteration, whose number is the number of iterations.

    In settings also a mapping of ``iterations`` and a shape for every threshold: see ``tune.schedule``.
    """
    quality: str | None = None
    """Folder of a calibrated estimator; null: one is calibrated on the clean clips where the schedule asks for it."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How that estimator is calibrated."""
    tagger: str | None = None
    """Folder of a tagger, built-in or of Hugging Face; null: trained on the clean clips where the schedule asks."""
    tagger_training: TaggerConfig = field(default_factory=TaggerConfig)
    """How that tagger is trained."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """How every student is trained from its teacher."""
    validation: ValidationConfig | None = None
    """Mixtures on which every separator is measured; null: none."""
    training_validation: ValidationConfig | None = None
    """Mixtures that students are followed on as they learn, and chosen by under ``patience``; null: none.

    Other clips than those of ``validation``, or its figures are of what was chosen by them.
    """

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("corpus is missing; name the manifest or folder of natural clips: --set corpus=PATH")
        if self.separator is None and self.clean is None:
            raise ValueError("a run starts from a separator, or from clean clips to train one; set separator or clean")
        patient = any(training.patience is not None for training in (self.distil, self.seed_training))
        if patient and self.training_validation is None:
            raise ValueError("patience chooses by training_validation; set its clips, or leave patience null")


def absolute(config: RunConfig) -> RunConfig:
    """The run with its inputs named as processes in other folders understand them."""
    names = ("corpus", "class_map", "audio_root", "clean", "separator", "quality", "tagger")
    found: dict[str, Any] = {name: str(location(value)) for name in names if (value := getattr(config, name))}
    for name in ("validation", "training_validation"):
        validation: ValidationConfig | None = getattr(config, name)
        found[name] = validation and replace(validation, clips=str(location(validation.clips)))
    return replace(config, **found)
