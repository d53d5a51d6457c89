"""One iteration of a run: separate and score the corpus, select tracks, distil a student, evaluate it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from cluster.gpu import call_on_gpu
from engine.passes.config import PassConfig, pass_identity
from engine.passes.run import run_pass
from engine.passes.shards import PassSummary, read_manifest
from engine.passes.slices import SliceName
from engine.passes.speed.ray_metrics import record_kept, record_validation
from engine.selection.labels.table import AcceptedLabels
from engine.selection.labels.update import LabelCounts, accepted_labels, counts_of
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import Selection, select_tracks
from engine.separators import SeparatorSource, find_separator
from engine.settings import named_in
from engine.storage.factories import own_device
from engine.storage.files import read_record, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.figures import Evaluation
from train.evaluation.mixtures import EvaluationMixture, ValidationSet, draw_mixtures
from train.task import training_identity
from tune.inputs import pass_config
from tune.steps.labels import events_of, move_labels
from tune.steps.work import Work

if TYPE_CHECKING:
    from train.task import TrainingRecord

_LOGGER = logging.getLogger(__name__)
_DRAWN: dict[str, list[EvaluationMixture]] = {}
"""The latest mixtures of this process by validation and rate, for a run measures all its separators on the same."""
_MOST_DRAWN = 2  # validation and confirmation of a search


class IterationRecord(TypedDict):
    """Record of a finished iteration, as ``iteration.json`` has it; iteration 0 is the seed, without a pass."""

    iteration: int
    separator: NotRequired[str]
    """Name of a seed of the user's own; only in iteration 0."""
    num_clips: int
    num_set_aside: int
    """Clips with too few labels, which were not separated."""
    num_queries: int
    """Labels of all separated clips."""
    num_stems: int
    num_failed: int
    """Queries without a stem."""
    labels: NotRequired[LabelCounts]
    """Labels of the corpus after the iteration, if they may move."""
    num_events: NotRequired[int]
    """Clips in which one label sounds alone, from which the student learns as from single-source clips."""
    audio_h: NotRequired[float]
    num_kept: int
    num_kept_by_floor: NotRequired[int]
    num_rejected: dict[str, int]
    """Rejected stems by the rule that rejected them."""
    kept_h: float
    kept_by_label: NotRequired[dict[str, int]]
    estimated_si_sdr_db: NotRequired[float | None]
    """Mean estimate over the kept stems; null if no threshold uses an estimate."""
    thresholds: dict[str, Any]
    validation: Evaluation | None
    cost_s: NotRequired[float]
    """Wall time of the pass and the training, whichever run built them."""
    wall_s: float
    """Wall time of the iteration in this run."""


def iterate(
    work: Work, number: int, thresholds: Thresholds, teacher: SeparatorSource, *, retry_failed: bool = False
) -> tuple[IterationRecord, SeparatorSource]:
    """Separate, score, select, distil and evaluate; returns the iteration's record and its student.

    Raises ``ValueError`` if the thresholds keep no stem.
    """
    started = time.perf_counter()
    stems, summary = separate(work, number, teacher, retry_failed=retry_failed)
    queried = work.labels
    labels, accepted = _move_labels(work, number, thresholds, stems)
    tracks, selection = _select(work, number, thresholds, stems, accepted, queried)
    outcomes = selection["num_kept"] + sum(selection["num_rejected"].values()) + summary["num_failed"]
    if outcomes != summary["num_queries"]:
        raise RuntimeError(
            f"cannot finish iteration {number} (kept, rejected and failed are {outcomes} of "
            f"{summary['num_queries']} queries); delete {tracks} and start the same command again"
        )
    if not selection["num_kept"]:
        raise ValueError(
            f"iteration {number} must keep at least one stem, got none of {selection['num_stems']} (rejected: "
            f"{selection['num_rejected']}, failed: {summary['num_failed']}); see the scores "
            f"with `clearsep inspect` on a shard in {stems / 'stems'}, try thresholds with `clearsep filter {stems}`, "
            "and give them to a new run"
        )
    record_kept(number, num_kept=selection["num_kept"], num_stems=selection["num_stems"])
    _LOGGER.info(f"iteration {number}: kept {selection['num_kept']} of {selection['num_stems']} stems; distilling")
    separator, training = _distil(work, number, teacher, tracks)
    record: IterationRecord = {
        "iteration": number,
        "num_clips": summary["num_clips"],
        "num_set_aside": summary["num_set_aside"],
        "num_queries": summary["num_queries"],
        "num_stems": summary["num_stems"],
        "num_failed": summary["num_failed"],
        "audio_h": summary["audio_h"],
        "estimated_si_sdr_db": selection["kept_estimated_si_sdr_db"],
        "num_kept": selection["num_kept"],
        "num_kept_by_floor": selection["num_kept_by_floor"],
        "num_rejected": selection["num_rejected"],
        "kept_h": selection["kept_h"],
        "kept_by_label": selection["kept_by_label"],
        "thresholds": selection["thresholds"],
        "validation": validate(work, number, find_separator(separator), separator.parent, work.inputs.validation),
        "cost_s": summary["wall_s"] + training["wall_s"],
        "wall_s": time.perf_counter() - started,
    }
    if labels is not None:
        record["labels"] = labels
        record["num_events"] = selection.get("num_events", 0)
    return record, find_separator(separator)


def _move_labels(
    work: Work, number: int, thresholds: Thresholds, stems: Location
) -> tuple[LabelCounts | None, AcceptedLabels | None]:
    """Move the labels if they may move; returns their counts then, and those that stems of this pass may have."""
    before = work.labels
    if before is None or not work.labels_move:
        return None, None
    made = read_manifest(stems / "stems", "fingerprint")["fingerprint"]
    work.labels, manifest = move_labels(work, number, thresholds, before, stems, made)
    return counts_of(manifest), accepted_labels(before, work.labels)


def separate(
    work: Work,
    number: int,
    teacher: SeparatorSource,
    *,
    retry_failed: bool = False,
    slice: SliceName | None = None,
) -> tuple[Location, PassSummary]:
    """Separate and score the corpus, or a slice of it; returns the pass's folder and its summary."""
    corpus, config, tagger = work.corpus, pass_config(work.config), work.judges.tagger
    if teacher.sample_rate_hz != work.student_rate_hz:
        config = replace(config, stem_rate_hz=work.student_rate_hz)
    identity = pass_identity(corpus, separator=teacher, tagger=tagger, config=config)
    folder = work.artifacts.path_for("passes", number, identity | {"contents": work.contents})
    if retry_failed and (folder / "separator" / "separator.json").is_file():
        raise ValueError(
            f"cannot retry failed clips of iteration {number} in {work.artifacts.out} (its student has already learned "
            "from its tracks); run the command without --retry-failed, or delete the iteration's separator"
        )
    # A pass uses the whole cluster: two at a time would starve each other.
    with work.artifacts.building(folder, one_at_a_time="passes"):
        _LOGGER.info(f"iteration {number}: separating {work.config.corpus}")
        with named_in("engine", PassConfig):
            summary = run_pass(
                corpus,
                folder,
                separator=teacher,
                tagger=tagger,
                config=config,
                retry_failed=retry_failed,
                slice=slice,
            )
        steps = ", ".join(f"{step} {fraction:.0%}" for step, fraction in summary["step_fraction"].items())
        _LOGGER.info(f"iteration {number}: {summary['audio_s_per_s']:.0f} s of audio per second ({steps})")
        if "limit" in summary:
            _LOGGER.info(f"iteration {number}: {summary['limit']['advice']}")
    return folder, summary


def _select(
    work: Work,
    number: int,
    thresholds: Thresholds,
    stems: Location,
    accepted: AcceptedLabels | None,
    queried: Location | None,
) -> tuple[Location, Selection]:
    """Select the tracks of a pass that queried some labels; returns their folder and manifest."""
    estimator = work.judges.estimator
    pass_fingerprint = read_manifest(stems / "stems", "fingerprint")["fingerprint"]
    inputs = [pass_fingerprint, asdict(thresholds), estimator.fingerprint if estimator else None]
    inputs += [accepted.fingerprint] if accepted else []
    if thresholds.event_from is not None and work.judges.presence is not None:
        inputs.append(work.judges.presence.fingerprint)
    folder = work.artifacts.path_for("tracks", number, inputs) / "tracks"
    with work.artifacts.building(folder.parent):
        if work.artifacts.shared and (folder / "manifest.json").is_file():
            return folder, read_record(folder / "manifest.json", Selection)
        events = events_of(work, thresholds, queried, stems) if queried is not None else None
        return folder, select_tracks(
            stems / "stems", folder, thresholds, estimator=estimator, accepted=accepted, events=events
        )


def _distil(work: Work, number: int, teacher: SeparatorSource, tracks: Location) -> tuple[Location, TrainingRecord]:
    """Train the student; returns its folder and the record of its training.

    A teacher that is no checkpoint has no weights to start from: its student is trained from scratch.
    """
    data = TrainingData(clean=work.inputs.clean, tracks=str(tracks))
    start = teacher.name if teacher.is_trainable else None
    network = None if teacher.is_trainable else work.config.network
    how: dict[str, Any] = {
        "data": data,
        "config": work.config.distil,
        "start": start,
        "network": network,
        "validation": work.inputs.training_validation,
        "text_encoder": None if teacher.is_trainable else work.config.text_encoder,
    }
    identity = training_identity(**how)
    folder = work.artifacts.path_for("separators", number, identity) / "separator"
    with work.artifacts.building(folder.parent):
        return folder, work.distil(folder, **how)


def validate(
    work: Work, number: int, separator: SeparatorSource, folder: Location, validation: ValidationSet | None
) -> Evaluation | None:
    """Figures of an iteration's separator on a validation; null if there is none.

    If artifacts are shared, the figures are kept in ``folder`` for other runs. They are computed in 32-bit floating
    point, on a GPU of this machine or of the cluster if there is one.
    """
    if validation is None:
        return None
    name = fingerprint(validation.identity)
    path = folder / f"validation-{name}.json"
    with work.artifacts.building(folder):
        if work.artifacts.shared and path.is_file():
            return read_record(path, Evaluation)
        source = separator.with_labels(validation.sources.labels, folder / "queries")
        evaluation = call_on_gpu(_measure, source, validation, work.student_rate_hz)
        if work.artifacts.shared:
            write_json(path, evaluation)
    record_validation(number, evaluation["sdri_db"])
    _LOGGER.info(f"iteration {number}: validation SDRi {evaluation['sdri_db']:.2f} dB")
    return evaluation


def _measure(separator: SeparatorSource, validation: ValidationSet, sample_rate_hz: int) -> Evaluation:
    """Figures of a separator, in the process that computes them."""
    key = fingerprint([validation.identity, sample_rate_hz])
    if key not in _DRAWN:
        drawn = draw_mixtures(validation, sample_rate_hz=sample_rate_hz)
        while len(_DRAWN) >= _MOST_DRAWN:
            del _DRAWN[next(iter(_DRAWN))]
        _DRAWN[key] = drawn
    system = SeparatorSystem(separator.open(own_device()), sample_rate_hz=sample_rate_hz)
    return evaluate(system, _DRAWN[key])
