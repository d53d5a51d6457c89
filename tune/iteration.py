"""TODO tune/iteration.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.corpus.table import Corpus
from engine.passes.ray_metrics import record_kept, record_validation
from engine.passes.run import pass_identity, run_pass
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import write_tracks
from engine.separators import load, read_description
from engine.storage.files import read_json, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from train.data.training_data import TrainingData
from train.distil import distil
from train.evaluation.evaluate import estimator, evaluate
from train.evaluation.mixtures import EvaluationMixture, draw_mixtures
from train.task import training_identity
from tune.artifacts import Artifacts
from tune.config import RunConfig
from tune.judges import Judges

_LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Work:
    """A run as it goes."""

    config: RunConfig
    """What it does."""
    corpus: Corpus
    """What ``config`` names."""
    pieces: Artifacts
    """Where its pieces lie."""
    judges: Judges
    """What its stems are judged with."""
    distil: Callable[..., dict[str, Any]] = distil
    """What trains its students: :func:`train.distil.distil`, here or elsewhere."""
    mixtures: list[EvaluationMixture] = field(default_factory=list)
    """Those of its validation, once they are drawn."""


def iterate(
    work: Work, number: int, thresholds: Thresholds, teacher: Location, *, retry_failed: bool = False
) -> tuple[dict[str, Any], Location]:
    """Separate, score, filter, distil, evaluate; returns what is recorded of the iteration, and its separator.

    ``cost_s`` of the record is the wall time of all its pieces, whoever made them.
    """
    started = time.perf_counter()
    stems, engine = _pass(work, number, teacher, retry_failed=retry_failed)
    selection, tracks = _select(work, number, thresholds, stems)
    if not tracks["num_kept"]:
        raise ValueError(
            f"iteration {number} kept none of {tracks['num_stems']} stems (rejected: {tracks['num_rejected']}, failed: "
            f"{engine['num_failed']}); loosen its thresholds in a new run, or look with `clearsep inspect {stems}`"
        )
    record_kept(number, num_kept=tracks["num_kept"], num_stems=tracks["num_stems"])
    _LOGGER.info(f"iteration {number}: kept {tracks['num_kept']} of {tracks['num_stems']} stems; distilling")
    separator, training = _distil(work, number, teacher, selection)
    names = ("num_clips", "num_set_aside", "num_queries", "num_stems", "num_failed", "audio_h")
    entry = {"iteration": number, **{name: engine[name] for name in names}}
    names = ("num_kept", "num_kept_by_floor", "num_rejected", "kept_h", "kept_by_label", "thresholds")
    entry["estimated_si_sdr_db"] = tracks["kept_estimated_si_sdr_db"]  # null where nothing asked for an estimate
    entry |= {name: tracks[name] for name in names} | {"validation": validate(work, number, separator)}
    entry |= {"cost_s": engine["wall_s"] + training["wall_s"], "wall_s": time.perf_counter() - started}
    return entry, separator


def _pass(work: Work, number: int, teacher: Location, *, retry_failed: bool) -> tuple[Location, dict[str, Any]]:
    """Separate and score the corpus; returns the pass's folder and its summary."""
    config, tagger = work.config, work.judges.tagger
    inputs = pass_identity(
        work.corpus, separator=read_description(teacher)["fingerprint"], tagger=tagger, config=config.engine
    )
    folder = work.pieces.place("passes", number, inputs)
    if retry_failed and (folder / "separator" / "separator.json").is_file():
        raise ValueError(
            f"the student of iteration {number} of {work.pieces.out} has learned already, from tracks that other clips "
            "would change; start the command without --retry-failed to go on, or delete the iteration's separator"
        )
    with work.pieces.making(folder, alone="passes"):  # a pass wants the whole cluster, two would starve each other
        _LOGGER.info(f"iteration {number}: separating {config.corpus}")
        engine = run_pass(
            work.corpus, folder, separator=teacher, tagger=tagger, config=config.engine, retry_failed=retry_failed
        )
        shares = ", ".join(f"{step} {share:.0%}" for step, share in engine["step_fraction"].items())
        _LOGGER.info(f"iteration {number}: {engine['audio_s_per_s']:.0f} s of audio per second ({shares})")
    return folder, engine


def _select(work: Work, number: int, thresholds: Thresholds, stems: Location) -> tuple[Location, dict[str, Any]]:
    """Decide what is kept; returns the selection's folder and its manifest."""
    quality = work.judges.quality
    judge = quality.fingerprint if quality else None
    inputs = [read_json(stems / "stems" / "manifest.json")["fingerprint"], asdict(thresholds), judge]
    folder = work.pieces.place("tracks", number, inputs) / "tracks"
    with work.pieces.making(folder.parent):
        if work.pieces.shared and (folder / "manifest.json").is_file():
            return folder, read_json(folder / "manifest.json")
        manifest = write_tracks(
            stems / "stems",
            folder,
            thresholds,
            estimate=quality.estimate if quality else None,
            estimator_fingerprint=judge,
        )
    return folder, manifest


def _distil(work: Work, number: int, teacher: Location, tracks: Location) -> tuple[Location, dict[str, Any]]:
    """Train the student; returns its folder and what its history says of the training."""
    config = work.config
    training_data = TrainingData(clean=config.clean, clean_folds=config.clean_folds, tracks=str(tracks))
    training: dict[str, Any] = {
        "material": training_data,
        "config": config.distil,
        "start": teacher,
        "validation": config.training_validation,
    }
    folder = work.pieces.place("separators", number, training_identity(**training)) / "separator"
    with work.pieces.making(folder.parent):
        entry = work.distil(folder, **training)
    return folder, entry


def validate(work: Work, number: int, separator: Location) -> dict[str, Any] | None:
    """Figures of an iteration's separator on the run's validation; null where it has none."""
    config = work.config.validation
    if config is None:
        return None
    kept = separator.parent / f"validation-{fingerprint(asdict(config))}.json"
    with work.pieces.making(separator.parent):
        if work.pieces.shared and kept.is_file():
            figures: dict[str, Any] = read_json(kept)
            return figures
        loaded = load(separator)
        if not work.mixtures:
            work.mixtures.extend(draw_mixtures(config, sample_rate_hz=loaded.sample_rate_hz))
        figures = evaluate(estimator(loaded), work.mixtures)
        if work.pieces.shared:
            write_json(kept, figures)
    record_validation(number, figures["sdri_db"])
    _LOGGER.info(f"iteration {number}: validation SDRi {figures['sdri_db']:.2f} dB")
    return figures
