"""Training and evaluation as the Python API offers them: names of files and plain settings are resolved here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from cluster.gpu import call_on_gpu
from engine.corpus.sources import SourceClips, read_sources
from engine.separators import NetworkConfig, Separator, SeparatorSource, find_separator
from engine.settings import build, config
from engine.storage.factories import own_device
from engine.storage.paths import Name
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem
from train.evaluation.evaluate import evaluate as evaluate_system
from train.evaluation.figures import Evaluation
from train.evaluation.mixtures import READING, ValidationConfig, ValidationSet, draw_mixtures, resolve_validation
from train.student import DistilConfig

if TYPE_CHECKING:
    from train.task import TrainingRecord


@config
class TrainingConfig:
    """Settings of a single training, named as in a run."""

    distil: DistilConfig = field(default_factory=DistilConfig)
    """Training of the student."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture of a separator that is trained from scratch."""
    validation: ValidationConfig | None = None
    """Mixtures on which the student is measured while it learns."""


def distil(
    out: Name,
    *,
    clean: SourceClips | Name | None = None,
    tracks: Name | None = None,
    start: Name | None = None,
    config: DistilConfig | Mapping[str, Any] | None = None,
    network: NetworkConfig | Mapping[str, Any] | None = None,
    validation: ValidationConfig | Mapping[str, Any] | None = None,
    text_encoder: Name | None = None,
) -> TrainingRecord:
    """Train a separator into the checkpoint folder ``out``; returns the record of the training.

    It learns from ``clean`` (single-source clips: CSV ``path,label[,fold]`` or a folder with a subfolder per label),
    from ``tracks`` (a folder that :func:`select_tracks` wrote), or from both. It continues from the checkpoint
    ``start``, or starts from scratch with the architecture ``network``. With ``text_encoder`` (the folder of a CLAP, or
    of a separator that has one) a student from scratch reads text: it answers words that it was not trained on.
    ``config``, ``network`` and ``validation`` are settings by name, as ``clearsep settings distil`` lists them. Needs
    :func:`connect`; the same call resumes an interrupted training. Raises ``ValueError`` for inputs or settings that
    cannot work, ``RuntimeError`` if the training fails.

    >>> with cs.connect():
    ...     record = cs.distil("student", clean="clips.csv", config={"steps": 2, "mix": {"batch_size": 2}})
    >>> record["steps"]
    2
    """
    from train.distil import distil as train

    checked = build(ValidationConfig, validation) if validation is not None else None
    return train(
        out,
        data=TrainingData(clean=_clips(clean) if clean is not None else None, tracks=tracks),
        config=build(DistilConfig, config or {}),
        start=start,
        network=build(NetworkConfig, network or {}),
        validation=resolve_validation(checked) if checked else None,
        text_encoder=text_encoder,
    )


def evaluate(
    separator: Separator | Name,
    clips: SourceClips | Name,
    *,
    num_mixtures: int = 300,
    num_sources: int = 2,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure a separator on seeded mixtures of single-source clips that it was not trained on.

    ``separator`` is an open one, measured where it is, or a name for :func:`load_separator`, which is opened on a GPU
    of this machine or of the connected cluster if there is one. ``clips`` is a CSV ``path,label[,fold]`` or a folder
    with a subfolder per label. Every source of every mixture is a query once. The result has the means in dB
    (``sdri_db``, ``si_sdri_db``, ``bss_sdri_db``, ...), their 95 % confidence intervals and the same by label.
    ``config`` has more settings of the mixtures by name, as ``clearsep settings validation`` lists them: with
    ``{"same_label_fraction": 0.3}`` some have two sources of one label, and the result has the class-aware
    ``capi_sdri_db``. Raises ``ValueError`` for clips or settings that cannot be used and labels that the separator does
    not know.

    >>> report = cs.evaluate("separator", "clips.csv", num_mixtures=4)
    >>> report["num_stems"], sorted(report["by_label"])
    (8, ['bell', 'dog'])
    """
    named = {"num_mixtures": num_mixtures, "num_sources": num_sources, "seed": seed, **(config or {})}
    if not named.keys().isdisjoint(READING):
        raise ValueError(
            f"settings of an evaluation must say how its clips are mixed, got {sorted(named.keys() & set(READING))}; "
            "use the options of the command, or read_sources"
        )
    settings = build(ValidationConfig, {"clips": "", **named})
    validation = ValidationSet(config=settings, sources=_clips(clips))
    if isinstance(separator, Separator):
        return _measure(separator, validation)
    return call_on_gpu(_open_and_measure, find_separator(separator), validation)


def _open_and_measure(separator: SeparatorSource, validation: ValidationSet) -> Evaluation:
    return _measure(separator.open(own_device()), validation)


def _measure(separator: Separator, validation: ValidationSet) -> Evaluation:
    mixtures = draw_mixtures(validation, sample_rate_hz=separator.sample_rate_hz)
    return evaluate_system(SeparatorSystem(separator), mixtures, seed=validation.config.seed)


def _clips(clips: SourceClips | Name) -> SourceClips:
    return clips if isinstance(clips, SourceClips) else read_sources(clips)
