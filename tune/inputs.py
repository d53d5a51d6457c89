"""Inputs of a run: everything that its settings name is found, read and checked here, once, before work begins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.corpus.read import read_corpus
from engine.corpus.sources import SourceClips, read_sources
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.labels.tag import tagging_config
from engine.passes.tasks import require_clips
from engine.schema import ESTIMATES, plain_label
from engine.scoring.estimator import SiSdrEstimator, load_estimator
from engine.selection.thresholds import required_scores
from engine.separators import SeparatorSource, find_separator
from engine.settings import Tree, deciding, named_in
from engine.storage.fingerprints import claim
from engine.storage.paths import Location, Name, location
from engine.taggers import TaggerSource, find_tagger
from engine.taggers.ontology import Ontology, read_ontology
from engine.taggers.presence import Presence, load_presence
from train.evaluation.mixtures import ValidationSet, resolve_validation
from train.task import require_encoder
from tune.config import RunConfig

_NAMES = ("corpus", "class_map", "audio_root", "clean", "clips")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run's settings name, read and checked; each is null if the settings name none.

    Can be pickled; another process reads the corpus again, because a corpus lies in a temporary folder of one machine.
    """

    open_corpus: Callable[[], Corpus]
    """Reads the corpus, by absolute names."""
    clean: SourceClips | None
    """Single-source clips of the folds in use."""
    separator: SeparatorSource | None
    """The seed."""
    estimator: SiSdrEstimator | None
    """The given estimator of SI-SDR."""
    tagger: TaggerSource | None
    """The given tagger."""
    presence: Presence | None
    """The given presence model."""
    ontology: Ontology | None
    """Of the labels that the tagger gives."""
    validation: ValidationSet | None
    """Mixtures on which every iteration is measured."""
    training_validation: ValidationSet | None
    """Mixtures on which students are measured while they learn."""

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The natural clips."""
        return self.open_corpus()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "corpus"}


def resolve(config: RunConfig) -> Inputs:
    """Find, read and check everything that ``config`` names; relative names start from the current folder.

    Raises ``ValueError`` for whatever cannot be read, and for settings that could only fail hours later.
    """
    validated = functools.partial(resolve_validation, allow_outside=config.allow_outside)
    inputs = Inputs(
        open_corpus=functools.partial(
            read_corpus,
            str(location(config.corpus)),
            class_map=_absolute(config.class_map),
            audio_root=_absolute(config.audio_root),
            columns=config.columns,
            allow_outside=config.allow_outside,
            needs_labels=config.labels is None,
        ),
        clean=_clean(config) if config.clean else None,
        separator=find_separator(config.separator) if config.separator else None,
        estimator=load_estimator(config.estimator) if config.estimator else None,
        tagger=find_tagger(config.tagger) if config.tagger else None,
        presence=load_presence(config.labels.presence) if config.labels and config.labels.presence else None,
        ontology=read_ontology(config.labels.ontology) if config.labels and config.labels.ontology else None,
        validation=validated(config.validation) if config.validation else None,
        training_validation=validated(config.training_validation) if config.training_validation else None,
    )
    with named_in("engine", PassConfig):
        require_clips(inputs.corpus, config.engine if config.labels is None else tagging_config(config.engine))
    require_judges(config)
    _require_encoder(config, inputs.separator)
    _require_stem_rate(config, inputs.separator)
    for name in ("validation", "training_validation"):
        require_known_labels(name, getattr(inputs, name), inputs, config)
    return inputs


def _clean(config: RunConfig) -> SourceClips:
    return read_sources(
        location(str(config.clean)),
        folds=config.clean_folds,
        audio_root=config.clean_audio_root,
        columns=config.clean_columns,
        allow_outside=config.allow_outside,
    )


def contents_only(settings: Mapping[str, Any], kind: type = RunConfig) -> Tree:
    """The settings that decide results, without the names of inputs: their contents decide, wherever they are."""
    kept = {name: value for name, value in deciding(settings, kind).items() if name not in _NAMES}
    for name in ("validation", "training_validation", "confirmation"):
        if isinstance(kept.get(name), dict):
            kept[name] = {key: value for key, value in kept[name].items() if key not in _NAMES}
    return kept


def claim_inputs(
    inputs: Inputs,
    out: Location,
    *,
    what: str,
    is_begun: bool,
    settings: Tree | None = None,
    confirmation: ValidationSet | None = None,
) -> None:
    """Keep in ``out`` what the names of a run's settings stand for, or compare; the files of passes keep theirs.

    ``is_begun``: the settings were in ``out`` before this start. Raises ``ValueError`` if clips were replaced, added or
    removed since, or are of other labels.
    """
    has_work = is_begun and any((out / name).is_dir() for name in ("iterations", "base"))
    if has_work and not (out / "inputs.json").is_file():
        raise ValueError(
            f"{out} must have the contents of its inputs to be started again, got {what} of an older version, which "
            "may be of other files; give another folder"
        )
    validations = {"validation": inputs.validation, "training_validation": inputs.training_validation}
    validations["confirmation"] = confirmation
    lists = {"clean": inputs.clean} | {name: one.sources if one else None for name, one in validations.items()}
    for name, clips in lists.items():
        if clips is not None:
            clips.claim(out / "contents" / f"{name}.parquet", what=f"clips of {name} in {out}")
    identity = {name: clips.fingerprint if clips else None for name, clips in lists.items()}
    claim(out / "inputs.json", {"corpus": inputs.corpus.fingerprint, **identity, "settings": settings}, what=what)


def _absolute(name: Name | None) -> str | None:
    return str(location(name)) if name else None


def needs_estimator(config: RunConfig) -> bool:
    """True if a threshold or a training weight uses the estimate of SI-SDR."""
    return _uses(config, *ESTIMATES.names) or config.distil.mix.estimate_weights is not None


def pass_config(config: RunConfig) -> PassConfig:
    """Settings of a run's passes; clips of one label are separated where labels move."""
    return config.engine if config.labels is None else replace(config.engine, min_labels=1)


def needs_tagger(config: RunConfig) -> bool:
    """True if a threshold uses the tagger's score, or the tagger gives labels."""
    return config.labels is not None or _uses(config, "tagger_margin_db")


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
            "tagger or clean must be set for labels and for a schedule that uses tagger_margin_db, got neither; "
            "set tagger to the folder of one, or clean to train one"
        )
    if config.labels is not None and config.labels.presence is None and config.clean is None:
        raise ValueError(
            "labels.presence or clean must be set for labels, got neither; set clean to calibrate a presence model on "
            "it, or labels.presence to the folder of one"
        )


def _require_encoder(config: RunConfig, separator: SeparatorSource | None) -> None:
    """Raise ``ValueError`` if the students cannot have the text encoder."""
    if config.text_encoder is not None and separator is not None and separator.is_trainable:
        raise ValueError(
            f"text_encoder must be null for a separator that is trained further, got {config.text_encoder}; remove it: "
            f"students keep the queries of {separator.name}"
        )
    require_encoder(config.network, config.text_encoder)


def student_rate_hz(config: RunConfig, separator: SeparatorSource | None) -> int:
    """Rate of the students: that of a separator that is trained further, else that of ``network``."""
    if separator is not None and separator.is_trainable:
        return separator.sample_rate_hz
    return config.network.sample_rate_hz


def _require_stem_rate(config: RunConfig, separator: SeparatorSource | None) -> None:
    rate_hz, given = student_rate_hz(config, separator), config.engine.stem_rate_hz
    if given not in (None, rate_hz):
        raise ValueError(
            f"engine.stem_rate_hz must be {rate_hz}, the rate of the students, got {given}; remove it: a run sets it"
        )


def require_known_labels(name: str, validation: ValidationSet | None, inputs: Inputs, config: RunConfig) -> None:
    """Raise ``ValueError`` if a validation has a label that a separator of the run will not know."""
    if validation is None:
        return
    known = _known_labels(inputs, reads_text=config.text_encoder is not None)
    if known is None:
        return
    if unknown := sorted({label for label in validation.sources.labels if plain_label(label) not in known}):
        raise ValueError(
            f"{name}.clips must have labels that the run's separators know, got {unknown}; remove those clips"
        )


def _known_labels(inputs: Inputs, *, reads_text: bool) -> set[str] | None:
    """Labels, in plain spelling, that the separators of all iterations know; None: they read any text.

    ``reads_text``: separators that are trained from scratch read text.
    """
    seed = inputs.separator
    if seed is not None and seed.is_trainable:
        return None if seed.reads_text else _plain(seed.labels)
    students = _plain(inputs.clean.labels) if inputs.clean else set[str]()
    if seed is None:
        return None if reads_text else students
    # The first student is trained from scratch, on the corpus' labels and the clean clips.
    students |= {plain_label(label) for row in inputs.corpus.sorted_clips() for label in row["labels"]}
    known = None if seed.reads_text or not seed.labels else _plain(seed.labels)
    if reads_text:
        return known
    return students if known is None else known & students


def _plain(labels: Iterable[str]) -> set[str]:
    return {plain_label(label) for label in labels}
