"""One trial of a search: a run under one schedule, of shared pieces, that reports every iteration to Ray Tune."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.corpus.read import read_corpus
from engine.scoring.estimator import load_estimator
from engine.selection.thresholds import Thresholds
from engine.storage.paths import Location, location
from train.distil import distil
from tune.artifacts import Artifacts
from tune.config import RunConfig
from tune.iteration import Work, iterate, validate
from tune.judges import Judges
from tune.schedule import resolve
from tune.search.space import FixedChooser, Space

KIND, WHICH, NAME, SCHEDULE, SEED, PARAMS = "kind", "which", "name", "schedule", "seed", "params"
"""What a trial is told: its kind, and which schedule by name, with which seed, or parameters to draw one from."""

HISTORY = "history"
"""What a trial reports of all its iterations so far, as JSON."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What all trials of a search have in common, as plain data."""

    config: RunConfig
    """The run; its schedule is each trial's own."""
    space: Space
    """What parameters are drawn from."""
    pieces: str
    """Folder of the shared pieces."""
    confirm: RunConfig | None = None
    """The same run on the validation that nothing is chosen by; null: not measured in this stage."""
    deadline: float | None = None
    """When no further iteration is begun, in seconds since the epoch."""
    threads: int = 1
    """CPU threads of a trial's own work."""


def plain(schedule: Sequence[Thresholds]) -> list[dict[str, Any]]:
    """A schedule as settings, without what is as it is by itself."""
    usual = asdict(Thresholds())
    return [{name: value for name, value in asdict(one).items() if value != usual[name]} for one in schedule]


def schedule_of(told: Mapping[str, Any], space: Space) -> tuple[Thresholds, ...]:
    """The schedule of a trial that was told so."""
    if WHICH in told:
        return resolve(json.loads(told[WHICH][SCHEDULE]))
    return space.draw(FixedChooser(fitted(told[PARAMS], space)))


def fitted(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Parameters as the space has them: population based training goes beyond its bounds."""
    bounds = space.free_numbers()
    return {
        name: min(max(value, bounds[name][0]), bounds[name][1]) if name in bounds else value
        for name, value in params.items()
    }


def run_trial(told: dict[str, Any], task: TrialTask) -> None:
    """Take a schedule through its iterations and report each; what other trials have made is not made again.

    A trial that goes on from another's checkpoint, or its own, begins with the schedule that is in it and reports what
    comes after.
    """
    torch.set_num_threads(task.threads)
    before = _prefix()
    ahead = schedule_of(told, task.space)
    schedule = (*before, *ahead[len(before) :])
    training = task.config.distil
    training = replace(training, seed=told.get(WHICH, {}).get(SEED, training.seed))
    config = replace(task.config, schedule=schedule, distil=training)
    pieces = Artifacts(out=location(task.pieces), shared=True)
    work = Work(
        config=config,
        corpus=read_corpus(config.corpus, class_map=config.class_map, audio_root=config.audio_root),
        pieces=pieces,
        judges=Judges(quality=load_estimator(config.quality) if config.quality else None, tagger=config.tagger),
        distil=distil if training.num_workers else _distil_apart,
    )
    assert config.separator is not None, "a search gives its trials the seed"
    teacher, cost_s, history = location(config.separator), 0.0, list[dict[str, Any]]()
    for number, thresholds in enumerate(schedule, 1):
        if task.deadline is not None and time.time() > task.deadline:
            return
        entry, teacher = iterate(work, number, thresholds, teacher)
        cost_s += entry["cost_s"]
        figures = _figures(entry, work, schedule, cost_s)
        if task.confirm is not None and number == len(schedule):
            figures |= _confirmed(work, task.confirm, number, teacher)
        history.append(figures)
        if number <= len(before):
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "schedule.json").write_text(json.dumps(plain(schedule[:number])))
            # Tune's own files of results are behind; what it knows of a trial for certain is the last of them
            told_last = figures | {HISTORY: json.dumps(history)}
            ray.tune.report(told_last, checkpoint=ray.tune.Checkpoint.from_directory(folder))


def _distil_apart(out: Location, *, start: Location, **training: Any) -> dict[str, Any]:  # noqa: ANN401 - its arguments
    """:func:`train.distil.distil` in a process of its own: in that of a trial Ray Train trains nothing.

    Ray ends it with the trial, and gives back the CPU that it holds.
    """
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # not in the trial's own, which holds no CPU
    apart = ray.remote(num_cpus=0.5, max_retries=0, scheduling_strategy=anywhere)(distil)
    entry: dict[str, Any] = ray.get(apart.remote(str(out), start=str(start), **training))
    return entry


def _prefix() -> tuple[Thresholds, ...]:
    """The iterations that a trial has behind it, from its checkpoint."""
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is None:
        return ()
    with checkpoint.as_directory() as folder:
        return resolve(json.loads(Path(folder, "schedule.json").read_text()))


def _figures(entry: dict[str, Any], work: Work, schedule: Sequence[Thresholds], cost_s: float) -> dict[str, Any]:
    """What Tune, the table and the report are told of an iteration."""
    return {
        "iteration": entry["iteration"],
        "sdri_db": entry["validation"]["sdri_db"],
        "si_sdri_db": entry["validation"]["si_sdri_db"],
        "kept_h": entry["kept_h"],
        "num_kept": entry["num_kept"],
        "num_stems": entry["num_stems"],
        "estimated_si_sdr_db": entry["estimated_si_sdr_db"],
        "cost_s": cost_s,
        "made_s": work.pieces.made_s,
        "pieces": json.dumps(sorted(work.pieces.used)),
        "schedule_so_far": json.dumps(plain(schedule)),
    }


def _confirmed(work: Work, confirm: RunConfig, number: int, separator: Location) -> dict[str, Any]:
    figures = validate(replace(work, config=confirm, mixtures=[]), number, separator)
    assert figures is not None, "a search has a validation to confirm on"
    return {"confirmed_sdri_db": figures["sdri_db"]}


def num_threads(max_concurrent: int) -> int:
    """CPU threads for each of so many trials at once."""
    return max(1, (os.cpu_count() or 1) // max_concurrent)
