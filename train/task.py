"""One training as its workers get it, the identity of a training, and the checks before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from engine.selection.tracks import Selection, read_tracks
from engine.separators import NetworkConfig, read_description
from engine.settings import Tree, deciding, plain
from engine.storage.files import read_record
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location
from train.data.config import MixConfig
from train.data.mixer import Mixer
from train.data.strategies.compose import learns_absence
from train.data.training_data import TrainingData, make_mixer
from train.evaluation.mixtures import ValidationSet
from train.student import CurvePoint, DistilConfig


class DataRecord(TypedDict):
    """Training data as the history of a separator names it."""

    clean: str | None
    """Folder or address that the paths of the single-source clips start from."""
    clean_fingerprint: str | None
    num_clean: int
    tracks: str | None


class TrainingRecord(TypedDict):
    """Entry of a separator's history: one training."""

    identity: str
    """Fingerprint of settings, training data and start (:func:`training_identity`)."""
    start: str | None
    """Fingerprint of the separator that it started from; None: from scratch."""
    steps: int
    """Updates that were made."""
    config: Tree
    """Settings, all of them."""
    data: DataRecord
    """Clips and tracks that it learned from."""
    curve: list[CurvePoint]
    wall_s: float
    """Wall time of the last start, in seconds."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """All that a worker needs; it can be sent to other machines."""

    config: DistilConfig
    """Settings of the training."""
    data: TrainingData
    """Clips and tracks that it learns from."""
    network: NetworkConfig
    """Shape of a network that is trained from scratch."""
    start: str | None
    """Checkpoint folder to start from; None: from scratch."""
    validation: ValidationSet | None
    """Mixtures on which it is validated."""
    states: str = ""
    """Folder of the states from which it resumes."""
    progress: str = ""
    """File to which the first worker appends a line of JSON at every validation and when it resumes."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the student."""
        rate: int = read_description(self.start)["sample_rate_hz"] if self.start else self.network.sample_rate_hz
        return rate

    def mixer(self, *, rank: int = 0, num_ranks: int = 1) -> Mixer:
        """The mixer of a worker."""
        return make_mixer(
            self.data,
            self.config.mix,
            seed=self.config.seed,
            sample_rate_hz=self.sample_rate_hz,
            rank=rank,
            num_ranks=num_ranks,
            start=self.start,
        )


def make_task(
    *,
    data: TrainingData,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationSet | None = None,
) -> TrainingTask:
    """A task whose paths are absolute, because workers run in other folders."""
    tracks = str(location(data.tracks)) if data.tracks else None
    return TrainingTask(
        config=config,
        data=TrainingData(clean=data.clean, tracks=tracks),
        network=network or NetworkConfig(),
        start=str(location(start)) if start else None,
        validation=validation,
    )


def training_identity(
    *,
    data: TrainingData,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationSet | None = None,
) -> str:
    """Fingerprint of a training; trainings with the same identity give the same separator."""
    return task_identity(make_task(data=data, config=config, start=start, network=network, validation=validation))


def task_identity(task: TrainingTask) -> str:
    """Fingerprint of settings, training data and start; not of where it runs or where its files are."""
    data = task.data
    chosen_by = task.validation if task.config.patience is not None else None
    return fingerprint(
        {
            "config": deciding(task.config),
            "network": None if task.start else plain(task.network),
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "clean": data.clean.fingerprint if data.clean else None,
            "tracks": _tracks_fingerprint(data.tracks, task.config.mix) if data.tracks else None,
            "chosen_by": dict(chosen_by.identity) if chosen_by else None,
        }
    )


def _tracks_fingerprint(tracks: Name, mix: MixConfig) -> str:
    """Fingerprint of the tracks, whatever rules kept them; raises ``ValueError`` if the selection is not complete."""
    read_tracks(tracks)
    manifest = read_record(location(tracks) / "manifest.json", Selection, needs=["fingerprint", "kept_fingerprint"])
    return str(manifest["fingerprint" if learns_absence(mix) else "kept_fingerprint"])


def data_record(data: TrainingData) -> DataRecord:
    """Training data as the history names it."""
    return {
        "clean": data.clean.root if data.clean else None,
        "clean_fingerprint": data.clean.fingerprint if data.clean else None,
        "num_clean": len(data.clean) if data.clean else 0,
        "tracks": str(data.tracks) if data.tracks else None,
    }


def check_task(task: TrainingTask) -> None:
    """Raise ``ValueError`` on the driver, before workers start, for training data and settings that cannot work."""
    labels = list(task.mixer().labels)
    if len(labels) < 2:
        raise ValueError(f"training must have sounds of two labels or more, got {labels}; give more clips or tracks")
    if task.config.patience is not None and task.validation is None:
        raise ValueError(
            "patience must have a validation to choose by, got none; set validation, or patience null to run all steps"
        )
