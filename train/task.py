"""TODO train/task.py."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from engine.corpus.sources import read_sources, source_root
from engine.selection.tracks import read_tracks
from engine.separators import NetworkConfig, read_description
from engine.storage.files import read_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location
from train.data.mixer import Mixer
from train.data.training_data import TrainingData, make_mixer
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig

HOW = ("use_gpu", "threads_per_worker", "batch_makers")
"""Settings that decide how a training is run, not what it is."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """All that a worker needs, as plain data."""

    config: DistilConfig
    training_data: TrainingData
    network: NetworkConfig
    start: str | None
    validation: ValidationConfig | None
    progress: str = ""
    """File to which the first worker adds a line of JSON at every validation and when it goes on after a stop."""


def _mixer(task: TrainingTask, *, sample_rate_hz: int, rank: int, num_ranks: int) -> Mixer:
    """What a worker draws its batches from."""
    return make_mixer(
        task.training_data,
        task.config.mix,
        seed=task.config.seed,
        sample_rate_hz=sample_rate_hz,
        rank=rank,
        num_ranks=num_ranks,
        start=task.start,
    )


def _task(
    *,
    training_data: TrainingData,
    config: DistilConfig,
    start: Name | None,
    network: NetworkConfig | None,
    validation: ValidationConfig | None,
) -> TrainingTask:
    def named(path: str | None) -> str | None:  # absolute: workers are not in our folder
        return str(location(path)) if path else None

    return TrainingTask(
        config=config,
        training_data=replace(training_data, clean=named(training_data.clean), tracks=named(training_data.tracks)),
        network=network or NetworkConfig(),
        start=str(location(start)) if start else None,
        validation=validation and replace(validation, clips=str(location(validation.clips))),
    )


def training_identity(
    *,
    training_data: TrainingData,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationConfig | None = None,
) -> str:
    """A fingerprint of what a training is made of; trainings of which it is the same give the same separator."""
    return _identity(
        _task(training_data=training_data, config=config, start=start, network=network, validation=validation)
    )


def _identity(task: TrainingTask) -> str:
    """What a training is: settings, material and start; not where it ran or where its files lie."""
    training_data = task.training_data
    config = {key: value for key, value in asdict(task.config).items() if key not in HOW}
    chosen_by = task.validation if task.config.patience is not None else None
    return fingerprint(
        {
            "config": config,
            "network": None if task.start else asdict(task.network),
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "clean": _sources(training_data.clean, training_data.clean_folds),
            "clean_without": training_data.clean_without,
            "tracks": _selection(task) if training_data.tracks is not None else None,
            "chosen_by": chosen_by and asdict(replace(chosen_by, clips="")),
            "chosen_by_clips": _sources(chosen_by.clips, chosen_by.folds) if chosen_by else None,
        }
    )


def _selection(task: TrainingTask) -> str:
    """The tracks that a training learns from, whatever rules kept them; ``ValueError`` where they are not whole."""
    assert task.training_data.tracks is not None
    read_tracks(task.training_data.tracks)
    mix, manifest = task.config.mix, read_json(location(task.training_data.tracks) / "manifest.json")
    learns_absence = mix.silence_rate * mix.absent_fraction > 0.0  # from stems that one of the rules rejected
    return str(manifest["fingerprint" if learns_absence else "kept_fingerprint"])


def _sources(path: str | None, folds: tuple[int, ...] | None) -> list[tuple[str, str]] | None:
    """The single-source clips of a list by name: a list that has changed is noticed, one that moved is not."""
    if path is None:
        return None
    root = source_root(path)
    rows = read_sources(path, folds=folds).to_pylist()
    return [(os.path.relpath(row["path"], root), row["label"]) for row in rows]


def _check(task: TrainingTask) -> None:
    """Fail on the driver, in words, before workers are started."""
    rate = read_description(task.start)["sample_rate_hz"] if task.start else task.network.sample_rate_hz
    labels = list(_mixer(task, sample_rate_hz=rate, rank=0, num_ranks=1).labels)
    if len(labels) < 2:
        raise ValueError(f"training needs sounds of two labels at least, found {labels}; give more clips or tracks")
    if task.config.patience is not None and task.validation is None:
        raise ValueError("patience chooses by validation; name its clips, or leave patience null to run all steps")
    if task.validation is not None:
        read_sources(task.validation.clips, folds=task.validation.folds)
