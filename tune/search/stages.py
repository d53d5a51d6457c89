"""TODO tune/search/stages.py."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from engine.selection.thresholds import Thresholds
from engine.storage.paths import Location, location
from train.distil import storage
from tune.config import absolute
from tune.search.config import OBJECTIVES, SearchConfig
from tune.search.progress import Progress, PruneLosingTrials, loggers
from tune.search.space import RandomChooser, Space, describe
from tune.search.trial import (
    HISTORY,
    KIND,
    NAME,
    PARAMS,
    SCHEDULE,
    SEED,
    WHICH,
    TrialTask,
    plain,
    run_trial,
    schedule_of,
)

Row = dict[str, Any]
"""A trial at one iteration: what ``tune.findings.TRIALS`` has, and ``pieces`` and ``confirmed_sdri_db``."""
FIGURES = (
    *("sdri_db", "si_sdri_db", "kept_h", "num_kept", "num_stems"),
    *("estimated_si_sdr_db", "cost_s", "made_s"),
)
_TRIAL_BYTES = 200e6  # of memory that a trial holds, and no CPU: its passes and trainings want all there are
_PREFIX = "trial_"


def _num_concurrent(config: SearchConfig) -> int:
    if config.max_concurrent is not None:
        return config.max_concurrent
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) or resources.get("CPU", 1) // 2))


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a search, each an experiment of Ray Tune's that is gone on with where it was stopped."""

    config: SearchConfig
    """The search."""
    task: TrialTask
    """What its trials have in common."""
    out: Location
    """Its folder."""

    def baselines(self, schedules: Mapping[str, Sequence[Thresholds]]) -> list[Row]:
        """A trial for each of the named schedules."""
        which = [{NAME: name, SCHEDULE: json.dumps(plain(schedule))} for name, schedule in schedules.items()]
        return self._fit("baselines", {KIND: "baseline", WHICH: ray.tune.grid_search(which)})

    def searched(self, deadline: float | None, needed: Sequence[str]) -> list[Row]:
        """Trials of drawn schedules; pieces that are ``needed`` stay whatever becomes of them."""
        config, task = self.config, replace(self.task, deadline=deadline)
        if config.searcher in ("tpe", "random"):
            sampler = optuna.samplers.TPESampler if config.searcher == "tpe" else optuna.samplers.RandomSampler
            several = len(config.objectives) > 1
            searcher = OptunaSearch(
                functools.partial(_suggest, task.space),
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
            return self._fit(
                "search",
                None,
                task=task,
                searcher=searcher,
                scheduler=scheduler,
                number=config.trials,
                needed=needed,
            )
        draws = [RandomChooser(np.random.default_rng([config.seed, number])) for number in range(config.trials)]
        for draw in draws:
            task.space.draw(draw)
        told = {KIND: "searched", PARAMS: ray.tune.grid_search([draw.params for draw in draws])}
        return self._fit("search", told, task=task, scheduler=_population(config, task.space), needed=needed)

    def finalists(self, baselines: Mapping[str, Sequence[Thresholds]], found: Sequence[Row]) -> list[Row]:
        """The best of what was found and the baselines, each with several seeds, measured on both draws."""
        own = self.task.config
        assert own.validation is not None, "_run_config"
        anew = self.config.confirmation or replace(own.validation, seed=own.validation.seed + 1)
        task = replace(self.task, confirm=absolute(replace(own, validation=anew)))
        whole = [row for row in found if row["iteration"] == self.config.iterations]
        best: dict[str, str] = {}
        for row in sorted(whole, key=lambda row: -row["sdri_db"]):
            if row["schedule"] not in best.values() and len(best) < self.config.finalists:
                best[row["name"]] = row["schedule"]
        chosen = {name: json.dumps(plain(schedule)) for name, schedule in baselines.items()} | best
        which = [
            {NAME: name, SCHEDULE: schedule, SEED: own.distil.seed + number}
            for number in range(self.config.repeats)
            for name, schedule in chosen.items()
        ]
        return self._fit("finalists", {KIND: "repeat", WHICH: ray.tune.grid_search(which)}, task=task)

    def _fit(
        self,
        stage: str,
        told: dict[str, Any] | None,
        *,
        task: TrialTask | None = None,
        searcher: Searcher | None = None,
        scheduler: TrialScheduler | None = None,
        number: int = 1,
        needed: Sequence[str] | None = None,
    ) -> list[Row]:
        """The rows of a stage's trials, after it was begun or gone on with."""
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is in the table, with its reason
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        places = storage(self.out / "tune")
        path = f"{places['storage_path']}/{stage}"
        trainable = ray.tune.with_resources(
            ray.tune.with_parameters(run_trial, task=task or self.task), {"CPU": 0, "memory": _TRIAL_BYTES}
        )
        callbacks = [Progress(stage, functools.partial(_words, self.task.space))]
        callbacks += loggers(self.config.loggers, project=f"clearsep-{stage}")
        if needed is not None and self.config.keep == "best":
            callbacks.append(PruneLosingTrials(location(self.task.pieces), needed, self.config.finalists))
        if ray.tune.Tuner.can_restore(path, places.get("storage_filesystem")):
            tuner = ray.tune.Tuner.restore(
                path, trainable, param_space=told, storage_filesystem=places.get("storage_filesystem")
            )
        else:
            tuner = ray.tune.Tuner(
                trainable,
                param_space=told,
                tune_config=ray.tune.TuneConfig(
                    num_samples=number,
                    max_concurrent_trials=_num_concurrent(self.config),
                    trial_dirname_creator=_dirname,
                    reuse_actors=True,
                    search_alg=searcher,
                    scheduler=scheduler,
                ),
                run_config=ray.tune.RunConfig(
                    name=stage,
                    **places,
                    verbose=0,
                    callbacks=callbacks,
                ),
            )
        return rows_of(tuner.fit(), self.task.space, self.config.iterations)


def _suggest(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    space.draw(_Suggested(trial))
    return {KIND: "searched"}


class _Suggested:
    """A chooser that asks Optuna."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return float(self._trial.suggest_float(f"{PARAMS}/{name}", low, high, step=step))

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        return self._trial.suggest_categorical(f"{PARAMS}/{name}", list(options))

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(f"{PARAMS}/{name}", low, high))


def _population(config: SearchConfig, space: Space) -> TrialScheduler:
    """Population based training of what belongs to an iteration alone."""
    bounds = space.free_numbers()
    if not bounds:
        raise ValueError(
            f"{config.searcher} changes thresholds on the way, and of none is each iteration's value free; give one "
            "shapes: [free], or search with tpe"
        )
    same = {"time_attr": "training_iteration", "metric": "sdri_db", "mode": "max", "perturbation_interval": 1}
    if config.searcher == "pb2":
        return PB2(**same, hyperparam_bounds={PARAMS: {name: list(ends) for name, ends in bounds.items()}})
    mutations = {PARAMS: {name: ray.tune.uniform(*ends) for name, ends in bounds.items()}}
    return PopulationBasedTraining(**same, hyperparam_mutations=mutations)


def _dirname(trial: Trial) -> str:
    return f"{_PREFIX}{trial.trial_id}"


def _words(space: Space, told: dict[str, Any]) -> tuple[str, str]:
    """A trial's name, where it has one, and its schedule in words."""
    return told.get(WHICH, {}).get(NAME, ""), describe(schedule_of(told, space))


def rows_of(results: ray.tune.ResultGrid, space: Space, num_iterations: int) -> list[Row]:
    """A row a trial and iteration; of a trial that failed before its first report one of iteration 0."""
    rows: list[Row] = []
    for result in results:
        told: dict[str, Any] = result.config
        trial = Path(result.path).name.removeprefix(_PREFIX)
        name, words = _words(space, told)
        reports: list[Row] = json.loads((result.metrics or {}).get(HISTORY, "[]"))
        error = None if result.error is None else _last_line(result.error)
        if not reports and error is None:
            continue  # the time was up before it began
        whole = bool(reports) and reports[-1]["iteration"] == num_iterations
        about = {
            "trial": trial,
            "kind": told[KIND],
            "name": name or trial,
            "params": json.dumps(told.get(PARAMS, {})),
            "seed": told.get(WHICH, {}).get(SEED, 0),
            "state": "failed" if error else "finished" if whole else "stopped",
            "error": error,
        }
        for report in reports or [{}]:
            row = about | {name: report.get(name) for name in FIGURES} | {"iteration": int(report.get("iteration", 0))}
            row["schedule"] = report.get("schedule_so_far") or json.dumps(plain(schedule_of(told, space)))
            row["words"] = words
            row["pieces"] = json.loads(report["pieces"]) if report else []
            row["confirmed_sdri_db"] = report.get("confirmed_sdri_db")
            rows.append(row)
    return sorted(rows, key=lambda row: (row["trial"], row["iteration"]))  # Tune's order changes with a restart


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
