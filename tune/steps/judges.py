"""Judges of a run's stems: the estimator of their SI-SDR and the tagger, given or made, each only if it is needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.gpu import call_on_gpu
from engine.corpus.sources import SourceClips
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.scoring.model_scores import Scorer
from engine.separators import SeparatorSource, find_separator
from engine.separators.batching import BatchedSeparator
from engine.storage.factories import own_device
from engine.storage.paths import Location
from engine.taggers import TaggerSource, find_tagger
from engine.taggers.presence import Presence, load_presence, save_presence
from train.data.training_data import TrainingData
from train.distil import distil
from train.judges.calibrate import calibrate_on
from train.judges.presence import PresenceJudge, calibrate_presence
from train.judges.tagger import train_tagger
from tune.config import RunConfig
from tune.inputs import Inputs, needs_estimator, needs_tagger

_LOGGER = logging.getLogger(__name__)
_NUM_PARTS = 2


@dataclass(frozen=True, kw_only=True)
class Judges:
    """An estimator, a tagger and a presence model, each null if the run does not use it."""

    estimator: SiSdrEstimator | None = None
    tagger: TaggerSource | None = None
    presence: Presence | None = None


def prepare_judges(config: RunConfig, inputs: Inputs, seed: SeparatorSource, out: Location) -> Judges:
    """The judges that the schedule needs, given or made; made ones lie in ``out`` and serve all iterations."""
    tagger = inputs.tagger
    if tagger is None and needs_tagger(config):
        tagger = _train_tagger(config, inputs, seed, out / "tagger")
    estimator = None
    if needs_estimator(config):
        estimator = inputs.estimator or _calibrated(config, inputs, out / "estimator")
    presence = None
    if config.labels is not None:
        assert tagger is not None, "needs_tagger"
        presence = inputs.presence or _presence(config, inputs, seed, tagger, out)
        if presence.tagger != tagger.fingerprint:
            raise ValueError(
                f"labels.presence must be calibrated for the run's tagger {tagger.name}, got one for another; give its "
                "folder, or leave it out to calibrate one on clean"
            )
    return Judges(estimator=estimator, tagger=tagger, presence=presence)


def _train_tagger(config: RunConfig, inputs: Inputs, seed: SeparatorSource, folder: Location) -> TaggerSource:
    assert inputs.clean is not None, "require_judges"
    if not (folder / "tagger.json").is_file():
        _LOGGER.info("training a tagger on the single-source clips")
    settings, rate_hz = config.tagger_training, seed.sample_rate_hz
    call_on_gpu(train_tagger, folder, clean=inputs.clean, config=settings, sample_rate_hz=rate_hz)
    return find_tagger(folder)


def _calibrated(config: RunConfig, inputs: Inputs, folder: Location) -> SiSdrEstimator:
    """The run's estimator, calibrated on single-source clips that a separator has not learned from.

    A given seed is assumed not to have learned from them. A seed that was trained here has, so two separators of its
    kind are trained, each on one half of them, and judged on the other half. The estimator serves other separators as
    well. A tagger that was trained on the same clips would be too sure of them, so only a given tagger takes part.
    """
    if (folder / "estimator.json").is_file():
        return load_estimator(folder)
    clean = inputs.clean
    assert clean is not None, "require_judges"
    held_out = _held_out(config, inputs, clean, folder)
    tagger = inputs.tagger.with_labels(clean.labels) if inputs.tagger is not None else None
    estimator = call_on_gpu(_calibrate, held_out, tagger, config)
    save_estimator(estimator, folder)
    _LOGGER.info(f"calibration: the root mean square error of the SI-SDR is {estimator.about['rmse_db']:.1f} dB")
    return estimator


def _held_out(
    config: RunConfig, inputs: Inputs, clean: SourceClips, folder: Location
) -> list[tuple[SeparatorSource, SourceClips]]:
    """Separators, each with single-source clips that it has not learned from."""
    if inputs.separator is not None:
        return [(inputs.separator, clean)]
    held_out = []
    for part in range(_NUM_PARTS):
        separator = folder / f"without-{part}"
        if not (separator / "separator.json").is_file():
            steps = config.calibration.steps
            _LOGGER.info(f"calibration: training separator {part + 1} of {_NUM_PARTS} for {steps} steps")
        distil(
            separator,
            data=TrainingData(clean=clean.without(part, _NUM_PARTS)),
            config=replace(config.seed_training, steps=config.calibration.steps, patience=None),
            network=config.network,
            text_encoder=config.text_encoder,
        )
        held_out.append((find_separator(separator), clean.part(part, _NUM_PARTS)))
    return held_out


def _presence(
    config: RunConfig, inputs: Inputs, seed: SeparatorSource, tagger: TaggerSource, out: Location
) -> Presence:
    """The run's presence model, calibrated on single-source clips that no separator or tagger has learned from.

    A given tagger is assumed not to have learned from them; in place of one that was trained here, two of its kind are
    trained, each on one half of them.
    """
    folder = out / "presence"
    if (folder / "presence.json").is_file():
        return load_presence(folder)
    clean = inputs.clean
    assert clean is not None, "require_judges"
    separators = [separator for separator, _ in _held_out(config, inputs, clean, out / "estimator")]
    given = inputs.tagger.with_labels(clean.labels) if inputs.tagger is not None else None
    judges: list[tuple[TaggerSource, SeparatorSource, SourceClips]] = []
    for part in range(_NUM_PARTS):
        one = given or _half_tagger(config, clean, part, folder / f"without-{part}", seed.sample_rate_hz)
        judges.append((one, separators[part % len(separators)], clean.part(part, _NUM_PARTS)))
    presence = call_on_gpu(_calibrate_presence, judges, tagger.fingerprint, config)
    save_presence(presence, folder)
    return presence


def _half_tagger(
    config: RunConfig, clean: SourceClips, part: int, folder: Location, sample_rate_hz: int
) -> TaggerSource:
    """A tagger that has not learned from one part of the clips."""
    others = clean.without(part, _NUM_PARTS)
    call_on_gpu(train_tagger, folder, clean=others, config=config.tagger_training, sample_rate_hz=sample_rate_hz)
    return find_tagger(folder)


def _calibrate_presence(
    judges: Sequence[tuple[TaggerSource, SeparatorSource, SourceClips]], tagger: str, config: RunConfig
) -> Presence:
    """The presence model, in the process that computes it, on its GPU if there is one."""
    device = own_device()
    opened = [
        PresenceJudge(
            tagger=one.open(device),
            separator=BatchedSeparator(separator=separator.open(device), device=device, batch_s=config.engine.batch_s),
            clean=clips,
        )
        for one, separator, clips in judges
    ]
    return calibrate_presence(opened, config.calibration, tagger=tagger, about={"clean": config.clean})


def _calibrate(
    held_out: Sequence[tuple[SeparatorSource, SourceClips]], tagger: TaggerSource | None, config: RunConfig
) -> SiSdrEstimator:
    """The estimator, in the process that computes it, on its GPU if there is one."""
    device = own_device()
    opened = tagger.open(device) if tagger is not None else None
    scorers = [
        Scorer(
            batched=BatchedSeparator(separator=separator.open(device), device=device, batch_s=config.engine.batch_s),
            tagger=opened,
            reseparate=config.engine.reseparate,
        )
        for separator, _ in held_out
    ]
    about = {"held_out": "by halves" if len(held_out) == _NUM_PARTS else "all clips", "clean": config.clean}
    return calibrate_on(
        [(scorer, clean) for scorer, (_, clean) in zip(scorers, held_out, strict=True)], config.calibration, about=about
    )
