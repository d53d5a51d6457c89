"""Stages of a search, each an experiment of Ray Tune's: baselines, drawn schedules, and repeats of the finalists."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import optuna
import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from engine.selection.thresholds import Thresholds
from engine.storage.paths import Location
from train.distil import storage
from train.evaluation.mixtures import ValidationSet
from tune.schedule import shortened
from tune.search.config import OBJECTIVES, SearchConfig
from tune.search.progress import Progress, PruneLosingTrials, loggers
from tune.search.space import Space, describe
from tune.search.trial import HISTORY, GivenSchedule, TrialParameters, TrialTask, run_trial, schedule_of
from tune.search.verdict import TRIALS, TrialReport, TrialRow

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the search shows its own progress
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a search like every other command

# Memory that a trial reserves; it reserves no CPU, because its passes and trainings use all that there are.
_TRIAL_BYTES = 200e6
_PREFIX = "trial_"


def num_concurrent(config: SearchConfig) -> int:
    """Trials that run at the same time."""
    if config.max_concurrent is not None:
        return config.max_concurrent
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) or resources.get("CPU", 1) // 2))


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a search; each resumes where it was stopped."""

    config: SearchConfig
    """The search."""
    task: TrialTask
    """What its trials have in common."""
    confirmation: ValidationSet
    """Mixtures by which nothing is chosen, for the finalists."""
    out: Location
    """Folder of the search."""

    def baselines(self, schedules: Mapping[str, Sequence[Thresholds]]) -> list[TrialRow]:
        """A trial for each of the named schedules."""
        given = [GivenSchedule(name=name, schedule=_as_json(schedule)) for name, schedule in schedules.items()]
        return self._fit("baselines", {"kind": "baseline", "given": ray.tune.grid_search(given)})

    def searched(self, deadline: float | None, needed: Sequence[str]) -> list[TrialRow]:
        """Trials of drawn schedules; the artifacts that are ``needed`` are kept in any case."""
        config, several = self.config, len(self.config.objectives) > 1
        sampler = optuna.samplers.TPESampler if config.searcher == "tpe" else optuna.samplers.RandomSampler
        searcher = OptunaSearch(
            functools.partial(_suggest, self.task.space),
            metric=list(config.objectives) if several else "sdri_db",
            mode=[OBJECTIVES[name] for name in config.objectives] if several else "max",
            sampler=sampler(seed=config.seed),
        )
        scheduler = None
        if config.reduction_factor > 1 and config.iterations > 1:
            scheduler = ASHAScheduler(
                time_attr="iteration",
                metric="sdri_db",
                mode="max",
                max_t=config.iterations,
                reduction_factor=config.reduction_factor,
            )
        task = replace(self.task, deadline=deadline)
        return self._fit("search", None, task=task, searcher=searcher, scheduler=scheduler, needed=needed)

    def finalists(self, baselines: Mapping[str, Sequence[Thresholds]], searched: Sequence[TrialRow]) -> list[TrialRow]:
        """The baselines and the best drawn schedules, each with several seeds, measured on both sets of mixtures."""
        finished = [row for row in searched if row["iteration"] == self.config.iterations]
        best: dict[str, str] = {}
        for row in sorted(finished, key=lambda row: -(row["sdri_db"] or 0.0)):
            if row["schedule"] not in best.values() and len(best) < self.config.finalists:
                best[row["name"]] = row["schedule"]
        chosen = {name: _as_json(schedule) for name, schedule in baselines.items()} | best
        first_seed = self.task.work.config.distil.seed
        given = [
            GivenSchedule(name=name, schedule=schedule, seed=first_seed + number)
            for number in range(self.config.repeats)
            for name, schedule in chosen.items()
        ]
        task = replace(self.task, confirmation=self.confirmation)
        return self._fit("finalists", {"kind": "repeat", "given": ray.tune.grid_search(given)}, task=task)

    def _fit(
        self,
        stage: str,
        param_space: dict[str, Any] | None,
        *,
        task: TrialTask | None = None,
        searcher: Searcher | None = None,
        scheduler: TrialScheduler | None = None,
        needed: Sequence[str] | None = None,
    ) -> list[TrialRow]:
        """Run a stage, or resume it, and return the rows of its trials."""
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are in the report, with their reason
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder = storage(self.out / "tune")
        path, filesystem = f"{folder['storage_path']}/{stage}", folder.get("storage_filesystem")
        trainable = ray.tune.with_resources(
            ray.tune.with_parameters(run_trial, task=task or self.task), {"CPU": 0, "memory": _TRIAL_BYTES}
        )
        if ray.tune.Tuner.can_restore(path, filesystem):
            tuner = ray.tune.Tuner.restore(path, trainable, param_space=param_space, storage_filesystem=filesystem)
        else:
            tuner = ray.tune.Tuner(
                trainable,
                param_space=param_space,
                tune_config=ray.tune.TuneConfig(
                    num_samples=self.config.trials if searcher else 1,
                    max_concurrent_trials=num_concurrent(self.config),
                    trial_dirname_creator=_dirname,
                    reuse_actors=True,
                    search_alg=searcher,
                    scheduler=scheduler,
                ),
                run_config=ray.tune.RunConfig(
                    name=stage, **folder, verbose=0, callbacks=self._callbacks(stage, needed)
                ),
            )
        return rows_of(tuner.fit(), self.task.space, self.config.iterations)

    def _callbacks(self, stage: str, needed: Sequence[str] | None) -> list[ray.tune.Callback]:
        callbacks: list[ray.tune.Callback] = [
            Progress(stage, functools.partial(_name_and_description, self.task.space))
        ]
        callbacks += loggers(self.config.loggers, project=f"clearsep-{stage}")
        if needed is not None and self.config.keep == "best":
            callbacks.append(PruneLosingTrials(self.task.work.artifacts.out, needed, self.config.finalists))
        return callbacks


def _as_json(schedule: Sequence[Thresholds]) -> str:
    return json.dumps(shortened(schedule))


def _suggest(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    space.draw(_OptunaChooser(trial))
    return {"kind": "searched"}


class _OptunaChooser:
    """A chooser that lets Optuna choose."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return float(self._trial.suggest_float(f"params/{name}", low, high, step=step))

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        return self._trial.suggest_categorical(f"params/{name}", list(options))

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(f"params/{name}", low, high))


def _dirname(trial: Trial) -> str:
    return f"{_PREFIX}{trial.trial_id}"


def _name_and_description(space: Space, config: TrialParameters) -> tuple[str, str]:
    """The name of a trial, empty if its schedule was drawn, and its schedule in short."""
    return config["given"]["name"] if "given" in config else "", describe(schedule_of(config, space))


def rows_of(results: ray.tune.ResultGrid, space: Space, num_iterations: int) -> list[TrialRow]:
    """A row for every trial and iteration, and a row of iteration 0 for a trial that failed before its first report."""
    rows = [row for result in results for row in _trial_rows(result, space, num_iterations)]
    return sorted(rows, key=lambda row: (row["trial"], row["iteration"]))  # Tune's own order changes with a restart


def _trial_rows(result: ray.tune.Result, space: Space, num_iterations: int) -> list[TrialRow]:
    reports: list[TrialReport] = json.loads((result.metrics or {}).get(HISTORY, "[]"))
    error = None if result.error is None else _last_line(result.error)
    if not reports and error is None:
        return []  # the time was up before the trial began
    config: TrialParameters = result.config
    given, trial = config.get("given"), Path(result.path).name.removeprefix(_PREFIX)
    is_finished = bool(reports) and reports[-1]["iteration"] == num_iterations
    schedule = schedule_of(config, space)
    row: dict[str, Any] = {
        **dict.fromkeys(TRIALS.names),
        "trial": trial,
        "kind": config["kind"],
        "name": given["name"] if given else trial,
        "params": json.dumps(config.get("params", {})),
        "schedule": _as_json(schedule),
        "description": describe(schedule),
        "seed": given.get("seed", 0) if given else 0,
        "iteration": 0,
        "artifacts": [],
        "state": "failed" if error else "finished" if is_finished else "stopped",
        "error": error,
    }
    rows = [row | report for report in reports] or [row]
    return cast(list[TrialRow], rows)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
