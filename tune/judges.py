"""What a run judges its stems with: the estimator of their quality and, where it is asked for, a tagger."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from engine.corpus.sources import part_of, read_sources
from engine.schema import ESTIMATES
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.scoring.model_scores import Scorer
from engine.selection.thresholds import scores_asked
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.storage.paths import Location, Name, location
from engine.taggers import Tagger, open_tagger
from train.data.training_data import TrainingData
from train.distil import distil
from train.judges.calibrate import calibrate_on
from train.judges.tagger import train_tagger

_LOGGER = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tune.config import RunConfig

_NUM_PARTS = 2


@dataclass(frozen=True, kw_only=True)
class Judges:
    """An estimator and the folder of a tagger, each null where nothing asks for it."""

    quality: SiSdrEstimator | None = None
    tagger: str | None = None


def check_judges(config: RunConfig) -> None:
    """``ValueError`` where the schedule asks for a judge that the run has no means to make."""
    if config.quality is not None:
        load_estimator(config.quality)
    if config.tagger is not None:
        open_tagger(config.tagger)
    if _asks_for_quality(config) and config.quality is None and config.clean is None:
        raise ValueError(
            "the schedule, or distil.mix.quality_weight, asks for estimated quality, which is calibrated on "
            "single-source clips; set clean, or quality to an estimator's folder, or do without it"
        )
    if _asks(config, "cycle_si_sdr_db", "rival_leak_db") and not config.engine.reseparate:
        raise ValueError("the schedule asks for scores of re-separation; set engine.reseparate, or do without them")
    if _asks(config, "tagger_margin_db") and config.tagger is None and config.clean is None:
        raise ValueError("the schedule asks for tagger_margin_db; set tagger, or clean to train one")


def prepare_judges(config: RunConfig, out: Location) -> Judges:
    """Make, or find in ``out``, what the schedule asks for. It is made once, of the seed, and serves all iterations."""
    tagger = config.tagger
    if tagger is None and _asks(config, "tagger_margin_db"):
        assert config.clean is not None, "check_judges"
        tagger = str(out / "tagger")
        if not (location(tagger) / "tagger.json").is_file():
            _LOGGER.info("training a tagger on the single-source clips")
        train_tagger(
            tagger,
            clean=config.clean,
            clean_folds=config.clean_folds,
            config=config.tagger_training,
            sample_rate_hz=load(out / "iterations" / "0" / "separator").sample_rate_hz,
        )
    quality = None
    if _asks_for_quality(config):
        quality = load_estimator(config.quality) if config.quality is not None else _quality(config, out, tagger)
    return Judges(quality=quality, tagger=tagger)


def _asks_for_quality(config: RunConfig) -> bool:
    return _asks(config, *ESTIMATES.names) or config.distil.mix.quality_weight != "none"


def _asks(config: RunConfig, *names: str) -> bool:
    return any(name in scores_asked(thresholds) for thresholds in config.schedule for name in names)


def _quality(config: RunConfig, out: Location, tagger: str | None) -> SiSdrEstimator:
    """The run's estimator, calibrated on single-source clips that a separator has not learned from.

    A seed that was given is taken not to have learned from them. One that was trained here has, so separators of its
    kind are trained on one half of them and judged on the other. The estimator serves other separators as well. A
    tagger that was trained on the same clips knows them too well to be calibrated with: it is left to its own rule.
    """
    folder = out / "quality"
    if (folder / "quality.json").is_file():
        return load_estimator(folder)
    assert config.clean is not None, "check_judges"
    sources = read_sources(config.clean, folds=config.clean_folds)
    ears = open_tagger(tagger) if tagger is not None and config.tagger is not None else None
    held_out: list[tuple[Scorer, pa.Table]] = []
    if config.separator is not None:
        held_out.append((_assessor(config, config.separator, ears), sources))
    for part in range(_NUM_PARTS if config.separator is None else 0):
        _LOGGER.info(f"calibration: training separator {part + 1} of {_NUM_PARTS} for {config.calibration.steps} steps")
        separator = folder / f"without-{part}"
        distil(
            separator,
            training_data=TrainingData(
                clean=config.clean, clean_folds=config.clean_folds, clean_without=(part, _NUM_PARTS)
            ),
            config=replace(config.seed_training, steps=config.calibration.steps, patience=None),
            network=config.network,
        )
        held_out.append((_assessor(config, separator, ears), part_of(sources, part, _NUM_PARTS)))
    about = {"held_out": "by halves" if config.separator is None else "all clips", "clean": config.clean}
    quality = calibrate_on(held_out, config.calibration, about=about)
    save_estimator(quality, folder)
    _LOGGER.info(
        f"calibration: the estimate of SI-SDR is right within {quality.about['rmse_db']:.1f} dB (root mean square)"
    )
    return quality


def _assessor(config: RunConfig, separator: Name, tagger: Tagger | None) -> Scorer:
    batched = BatchedSeparator(separator=load(separator), batch_s=config.engine.batch_s)
    return Scorer(batched=batched, tagger=tagger, reseparate=config.engine.reseparate)
