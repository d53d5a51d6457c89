"""One trial of a search: a run with one schedule, on shared artifacts, that reports every iteration to Ray Tune."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import ray
import ray.tune
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.selection.thresholds import Thresholds
from engine.storage.paths import Location, location
from train.distil import distil
from train.evaluation.mixtures import ValidationSet
from tune.schedule import resolve_schedule
from tune.search.space import FixedChooser, Space
from tune.search.verdict import TrialReport
from tune.steps.artifacts import Artifacts
from tune.steps.iteration import IterationRecord, iterate, validate
from tune.steps.work import Work

if TYPE_CHECKING:
    from train.task import TrainingRecord


class GivenSchedule(TypedDict):
    """A schedule that is not drawn."""

    name: str
    """Name of a baseline, or number of the trial that drew the schedule."""
    schedule: str
    """Thresholds of every iteration, as JSON."""
    seed: NotRequired[int]
    """Seed of the training; the run's own if it is missing."""


class TrialParameters(TypedDict):
    """Parameters that Ray Tune gives to a trial: a schedule, or numbers and choices to draw one with."""

    kind: Literal["baseline", "searched", "repeat"]
    given: NotRequired[GivenSchedule]
    params: NotRequired[dict[str, Any]]


HISTORY = "history"
"""Key of all of a trial's reports so far, as JSON, in what it reports to Ray Tune."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """Everything that the trials of a search have in common; it is pickled."""

    work: Work
    """The run; every trial has a schedule of its own, and all share their artifacts."""
    space: Space
    """Schedules that may be drawn."""
    confirmation: ValidationSet | None = None
    """Mixtures by which nothing is chosen; null: not measured in this stage."""
    deadline: float | None = None
    """Time after which no iteration begins, in seconds since the epoch."""
    threads: int = 1
    """CPU threads of the trial's own process."""


def schedule_of(config: TrialParameters, space: Space) -> tuple[Thresholds, ...]:
    """The schedule of a trial."""
    if "given" in config:
        return resolve_schedule(json.loads(config["given"]["schedule"]))
    return space.draw(FixedChooser(config["params"]))


def run_trial(config: TrialParameters, task: TrialTask) -> None:
    """Take a schedule through its iterations and report each; artifacts that other trials have built are used."""
    torch.set_num_threads(task.threads)
    schedule, training = schedule_of(config, task.space), task.work.config.distil
    training = replace(training, threads_per_worker=training.threads_per_worker or task.threads)
    if "given" in config and "seed" in config["given"]:
        training = replace(training, seed=config["given"]["seed"])
    work = replace(
        task.work,
        config=replace(task.work.config, schedule=schedule, distil=training),
        artifacts=Artifacts(out=task.work.artifacts.out, shared=True),  # counts what this trial builds
        distil=distil if training.num_workers else _distil_apart,
    )
    teacher, cost_s, history = work.seed, 0.0, list[TrialReport]()
    for number, thresholds in enumerate(schedule, 1):
        if task.deadline is not None and time.time() > task.deadline:
            return
        record, teacher = iterate(work, number, thresholds, teacher)
        cost_s += record["cost_s"]
        report = _report(record, work, cost_s)
        if number == len(schedule):
            confirmed = validate(work, number, teacher, location(teacher.name).parent, task.confirmation)
            report["confirmed_sdri_db"] = confirmed["sdri_db"] if confirmed else None
        history.append(report)
        # The result files that Tune writes may lack the newest reports; it never loses the last one, so that has all.
        ray.tune.report({**report, "artifacts": json.dumps(report["artifacts"]), HISTORY: json.dumps(history)})


def _distil_apart(out: Location, **training: Any) -> TrainingRecord:  # noqa: ANN401 - the arguments of distil
    """Call :func:`train.distil.distil` in another process: Ray Train cannot train inside the process of a trial.

    Ray ends that process with the trial, and frees the CPU that it uses.
    """
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # the trial's own group has no CPU
    remote = ray.remote(num_cpus=0.5, max_retries=0, scheduling_strategy=anywhere)(distil)
    record: TrainingRecord = ray.get(remote.remote(str(out), **training))
    return record


def _report(record: IterationRecord, work: Work, cost_s: float) -> TrialReport:
    validation = record["validation"]
    assert validation is not None, "a search has a validation"
    return {
        "iteration": record["iteration"],
        "sdri_db": validation["sdri_db"],
        "si_sdri_db": validation["si_sdri_db"],
        "confirmed_sdri_db": None,
        "kept_h": record["kept_h"],
        "num_kept": record["num_kept"],
        "num_stems": record["num_stems"],
        "estimated_si_sdr_db": record["estimated_si_sdr_db"],
        "cost_s": cost_s,
        "built_s": work.artifacts.built_s,
        "artifacts": sorted(work.artifacts.used),
    }
