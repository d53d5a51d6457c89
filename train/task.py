"""One training as its workers get it, the identity of a training, and the checks before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from engine.passes.shards import read_manifest
from engine.selection.tracks import Selection, read_events, read_tracks
from engine.separators import (
    Embeddings,
    NetworkConfig,
    QueryDescription,
    find_encoder,
    identity_of,
    make_embedder,
    query_embedder,
    read_description,
)
from engine.settings import Tree, deciding
from engine.storage.files import read_record
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, location, resolve_name
from train.data.config import MixConfig
from train.data.mixer import Mixer
from train.data.strategies.compose import learns_absence
from train.data.training_data import TrainingData, make_mixer, training_labels
from train.evaluation.mixtures import ValidationSet
from train.student import CurvePoint, DistilConfig, Student


class DataRecord(TypedDict):
    """Training data as the history of a separator names it."""

    clean: str | None
    """Folder or address that the paths of the single-source clips start from."""
    clean_fingerprint: str | None
    num_clean: int
    tracks: str | None
    teacher_terms: list[str]
    """Licences of the released weights that made the tracks, directly or as teachers of their teacher."""


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
    queries: QueryDescription | None = None
    """Encoder of the queries; None: a closed vocabulary."""
    embeddings: Embeddings | None = None
    """Embeddings of all labels, so that no worker opens the encoder; None: a closed vocabulary."""
    states: str = ""
    """Folder of the states from which it resumes."""
    progress: str = ""
    """File to which the first worker appends a line of JSON at every validation and when it resumes."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the student."""
        rate: int = read_description(self.start)["sample_rate_hz"] if self.start else self.network.sample_rate_hz
        return rate

    def mixer(self, *, rank: int = 0, num_ranks: int = 1, device: torch.device | None = None) -> Mixer:
        """The mixer of a worker, with its batches on a device; None: the CPU."""
        return make_mixer(
            self.data,
            self.config.mix,
            seed=self.config.seed,
            sample_rate_hz=self.sample_rate_hz,
            rank=rank,
            num_ranks=num_ranks,
            start=self.start,
            embeddings=self.embeddings,
            device=device,
        )

    def student(self, labels: Sequence[str], *, device: torch.device) -> Student:
        """The student at the beginning of its training."""
        embedder = make_embedder(self.queries, self.embeddings) if self.queries is not None else None
        return Student(self.config, labels, start=self.start, network=self.network, device=device, embedder=embedder)


def make_task(
    *,
    data: TrainingData,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationSet | None = None,
    text_encoder: Name | None = None,
) -> TrainingTask:
    """A task whose paths are absolute, because workers run in other folders.

    Raises ``ValueError`` for an encoder that the student cannot have.
    """
    network, start = network or NetworkConfig(), str(location(start)) if start else None
    if start is None:
        queries = require_encoder(network, text_encoder)
    else:
        queries = _kept_encoder(start, text_encoder)
    tracks = str(location(data.tracks)) if data.tracks else None
    return TrainingTask(
        config=config,
        data=TrainingData(clean=data.clean, tracks=tracks),
        network=network,
        start=start,
        validation=validation,
        queries=queries,
    )


def require_encoder(network: NetworkConfig, name: Name | None) -> QueryDescription | None:
    """The encoder with a name, for a student from scratch; ``ValueError`` if it is none, or if one is missing."""
    if name is None:
        if network.text_features:
            raise ValueError(
                f"text_encoder must be set for network.text_features={network.text_features}, got null; set both or "
                "neither"
            )
        return None
    found = find_encoder(name)
    if found is None:
        raise ValueError(
            f"text_encoder must be a CLAP or a separator that reads text, got {name}, which has a closed vocabulary; "
            "give another folder"
        )
    return found


def _kept_encoder(start: str, name: Name | None) -> QueryDescription | None:
    """The encoder of the separator that a student starts from; its folder may have another name now."""
    kept, named = find_encoder(start), find_encoder(name) if name is not None else None
    if name is None:
        return kept
    if kept is None or named is None or named["encoder_fingerprint"] != kept["encoder_fingerprint"]:
        raise ValueError(
            f"text_encoder must be the encoder that {start} was trained with, got {name}; leave it out, or train a "
            "student from scratch"
        )
    return {**kept, "encoder": named["encoder"]}


def with_embeddings(task: TrainingTask, labels: Sequence[str], store: Location) -> TrainingTask:
    """The task with the embeddings of all labels that its student learns or is validated on, kept in ``store``.

    They are computed here, by the encoder, unless they are there already. A task of a closed vocabulary is returned as
    it is.
    """
    if task.queries is None:
        return task
    embedder = (query_embedder(task.start) if task.start else None) or make_embedder(task.queries)
    validated = task.validation.sources.labels if task.validation else ()
    embeddings = embedder.embed_once([*labels, *validated], store)
    width = embeddings.vectors_LE.shape[1]
    if task.start is None and task.network.text_features not in (0, width):
        raise ValueError(
            f"network.text_features must be {width}, the width of the encoder, got {task.network.text_features}; "
            "leave it out"
        )
    return replace(task, embeddings=embeddings, network=replace(task.network, text_features=width))


def training_identity(
    *,
    data: TrainingData,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationSet | None = None,
    text_encoder: Name | None = None,
) -> str:
    """Fingerprint of a training; trainings with the same identity give the same separator."""
    task = make_task(
        data=data, config=config, start=start, network=network, validation=validation, text_encoder=text_encoder
    )
    return task_identity(task)


def task_identity(task: TrainingTask) -> str:
    """Fingerprint of settings, training data and start; not of where it runs or where its files are."""
    data = task.data
    chosen_by = task.validation if task.config.patience is not None else None
    reads = {"queries": identity_of(task.queries)} if task.queries and not task.start else {}
    return fingerprint(
        {
            **reads,
            "config": deciding(task.config),
            "network": None if task.start else deciding(task.network),
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "clean": data.clean.fingerprint if data.clean else None,
            "tracks": _tracks_fingerprint(data.tracks, task.config.mix) if data.tracks else None,
            "chosen_by": dict(chosen_by.identity) if chosen_by else None,
        }
    )


def _tracks_fingerprint(tracks: Name, mix: MixConfig) -> str:
    """Fingerprint of the tracks and events, whatever rules chose them; ``ValueError`` for an incomplete selection."""
    read_tracks(tracks)
    manifest = read_record(location(tracks) / "manifest.json", Selection, needs=["fingerprint", "kept_fingerprint"])
    kept = str(manifest["fingerprint" if learns_absence(mix) else "kept_fingerprint"])
    if mix.max_events_ratio == 0.0 or not manifest.get("num_events"):
        return kept
    read_events(tracks)
    return fingerprint([kept, manifest["events_fingerprint"]])


def data_record(data: TrainingData) -> DataRecord:
    """Training data as the history names it."""
    return {
        "clean": data.clean.root if data.clean else None,
        "clean_fingerprint": data.clean.fingerprint if data.clean else None,
        "num_clean": len(data.clean) if data.clean else 0,
        "tracks": str(data.tracks) if data.tracks else None,
        "teacher_terms": _teacher_terms(data.tracks) if data.tracks else [],
    }


def _teacher_terms(tracks: Name) -> list[str]:
    selection = read_record(location(tracks) / "manifest.json", Selection, needs=["stems"])
    return read_manifest(resolve_name(selection["stems"], folder=location(tracks))).get("separator_terms", [])


def about(task: TrainingTask) -> dict[str, object]:
    """The optional fields of the student's description."""
    return {"queries": dict(task.queries)} if task.queries is not None else {}


def check_task(task: TrainingTask) -> list[str]:
    """The labels of a training; raises ``ValueError``, before workers start, for data and settings that cannot work."""
    labels = training_labels(task.data, task.config.mix, sample_rate_hz=task.sample_rate_hz, start=task.start)
    if len(labels) < 2:
        raise ValueError(f"training must have sounds of two labels or more, got {labels}; give more clips or tracks")
    if task.config.patience is not None and task.validation is None:
        raise ValueError(
            "patience must have a validation to choose by, got none; set validation, or patience null to run all steps"
        )
    return labels
