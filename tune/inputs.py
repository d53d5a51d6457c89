"""Inputs of a run: everything that its settings name is found, read and checked here, once, before work begins."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from engine.corpus.read import read_corpus
from engine.corpus.sources import SourceClips, read_sources
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.tasks import require_clips
from engine.schema import ESTIMATES, plain_label
from engine.scoring.estimator import SiSdrEstimator, load_estimator
from engine.selection.thresholds import required_scores
from engine.separators import SeparatorSource, find_separator
from engine.settings import named_in
from engine.storage.paths import Name, location
from engine.taggers import TaggerSource, find_tagger
from train.evaluation.mixtures import ValidationSet, resolve_validation
from tune.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run's settings name, read and checked; each is null if the settings name none.

    Can be pickled; another process reads the corpus again, because a corpus lies in a temporary folder of one machine.
    """

    corpus_names: tuple[str, str | None, str | None]
    """Absolute names of the corpus, of AudioSet's class map and of the folder of the audio."""
    clean: SourceClips | None
    """Single-source clips of the folds in use."""
    separator: SeparatorSource | None
    """The seed."""
    estimator: SiSdrEstimator | None
    """The given estimator of SI-SDR."""
    tagger: TaggerSource | None
    """The given tagger."""
    validation: ValidationSet | None
    """Mixtures on which every iteration is measured."""
    training_validation: ValidationSet | None
    """Mixtures on which students are measured while they learn."""

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The natural clips."""
        source, class_map, audio_root = self.corpus_names
        return read_corpus(source, class_map=class_map, audio_root=audio_root)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "corpus"}


def resolve(config: RunConfig) -> Inputs:
    """Find, read and check everything that ``config`` names; relative names start from the current folder.

    Raises ``ValueError`` for whatever cannot be read, and for settings that could only fail hours later.
    """
    inputs = Inputs(
        corpus_names=(str(location(config.corpus)), _absolute(config.class_map), _absolute(config.audio_root)),
        clean=read_sources(location(config.clean), folds=config.clean_folds) if config.clean else None,
        separator=find_separator(config.separator) if config.separator else None,
        estimator=load_estimator(config.estimator) if config.estimator else None,
        tagger=find_tagger(config.tagger) if config.tagger else None,
        validation=resolve_validation(config.validation) if config.validation else None,
        training_validation=resolve_validation(config.training_validation) if config.training_validation else None,
    )
    with named_in("engine", PassConfig):
        require_clips(inputs.corpus, config.engine)
    require_judges(config)
    _require_one_rate(config, inputs.separator)
    for name in ("validation", "training_validation"):
        require_known_labels(name, getattr(inputs, name), inputs)
    return inputs


def _absolute(name: Name | None) -> str | None:
    return str(location(name)) if name else None


def needs_estimator(config: RunConfig) -> bool:
    """True if a threshold or a training weight uses the estimate of SI-SDR."""
    return _uses(config, *ESTIMATES.names) or config.distil.mix.estimate_weights is not None


def needs_tagger(config: RunConfig) -> bool:
    """True if a threshold uses the tagger's score."""
    return _uses(config, "tagger_margin_db")


def _uses(config: RunConfig, *scores: str) -> bool:
    return any(score in required_scores(thresholds) for thresholds in config.schedule for score in scores)


def require_judges(config: RunConfig) -> None:
    """Raise ``ValueError`` if the schedule uses scores that this run will not have."""
    if needs_estimator(config) and config.estimator is None and config.clean is None:
        raise ValueError(
            "estimator or clean must be set if the schedule or distil.mix.estimate_weights uses the estimated SI-SDR, "
            "got neither; set clean to calibrate an estimator on it, or estimator to the folder of one"
        )
    if _uses(config, "cycle_si_sdr_db", "rival_leak_db") and not config.engine.reseparate:
        raise ValueError(
            "engine.reseparate must be true for a schedule that uses scores of re-separation, got false; "
            "set engine.reseparate=true, or remove those thresholds"
        )
    if needs_tagger(config) and config.tagger is None and config.clean is None:
        raise ValueError(
            "tagger or clean must be set for a schedule that uses tagger_margin_db, got neither; "
            "set tagger to the folder of one, or clean to train one"
        )


def _require_one_rate(config: RunConfig, separator: SeparatorSource | None) -> None:
    """The first student of a separator that cannot be trained on has the architecture ``network``."""
    if separator is None or separator.is_checkpoint or separator.sample_rate_hz == config.network.sample_rate_hz:
        return
    raise ValueError(
        f"network.sample_rate_hz must be {separator.sample_rate_hz}, the rate of {separator.name}, got "
        f"{config.network.sample_rate_hz}; set network.sample_rate_hz={separator.sample_rate_hz}"
    )


def require_known_labels(name: str, validation: ValidationSet | None, inputs: Inputs) -> None:
    """Raise ``ValueError`` if a validation has a label that a separator of the run will not know."""
    if validation is None:
        return
    known = _known_labels(inputs)
    if unknown := sorted({label for label in validation.sources.labels if plain_label(label) not in known}):
        raise ValueError(
            f"{name}.clips must have labels that the run's separators know, got {unknown}; remove those clips"
        )


def _known_labels(inputs: Inputs) -> set[str]:
    """Labels, in plain spelling, that the separators of all iterations know."""
    clean = {plain_label(label) for label in inputs.clean.labels} if inputs.clean else set[str]()
    if inputs.separator is None:
        return clean
    known = {plain_label(label) for label in inputs.separator.labels}
    if inputs.separator.is_checkpoint:
        return known
    # The first student is trained from scratch, on the corpus' labels and the clean clips.
    clean |= {plain_label(label) for row in inputs.corpus.sorted_clips() for label in row["labels"]}
    return known & clean if known else clean
