"""Stages of a search, each an experiment of Ray Tune's: baselines, drawn schedules, and repeats of the finalists."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from tune.schedule import as_json
from tune.search.config import OBJECTIVES, SearchConfig
from tune.search.progress import (
    Progress,
    PruneLosingTrials,
    Recorder,
    TrialRecord,
    loggers,
    read_records,
    rows_of,
)
from tune.search.space import Space, describe
from tune.search.trial import GivenSchedule, TrialParameters, TrialTask, run_trial, schedule_of
from tune.search.verdict import TrialRow

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the search shows its own progress
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a search like every other command

# Memory that a trial reserves; it reserves no CPU, because its passes and trainings use all that there are.
_TRIAL_BYTES = 200e6
# Draws for a schedule that is new; then the space has none, or hardly any, and an old one is taken.
_MAX_DRAWS = 100


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
        given = [GivenSchedule(name=name, schedule=as_json(schedule)) for name, schedule in schedules.items()]
        return self._given("baselines", "baseline", given, self.task)

    def searched(self, deadline: float | None, needed: Sequence[str]) -> list[TrialRow]:
        """Trials of drawn schedules; the artifacts that are ``needed`` are kept in any case."""
        ended, begun = self._records("search")
        num_left = self.config.trials - len(ended)
        scheduler = self._scheduler(ended)
        searcher = self._searcher(ended, [record["config"]["params"] for record in begun][: max(0, num_left)])
        task = replace(self.task, deadline=deadline)
        return self._fit("search", ended, num_left, task=task, searcher=searcher, scheduler=scheduler, needed=needed)

    def _searcher(self, ended: Sequence[TrialRecord], begun: Sequence[Mapping[str, Any]]) -> Searcher:
        """A searcher that knows the trials that have ended, and first suggests those that were broken off."""
        config = self.config
        storage, study = optuna.storages.InMemoryStorage(), f"{len(ended)} of {config.trials}"
        directions = ["maximize" if OBJECTIVES[name] == "max" else "minimize" for name in config.objectives]
        known = optuna.create_study(storage=storage, study_name=study, directions=directions)
        for record in ended:
            known.add_trial(_known_trial(record, self.task.space, config.objectives))
        several = len(config.objectives) > 1
        sampler = optuna.samplers.TPESampler if config.searcher == "tpe" else optuna.samplers.RandomSampler
        return DistinctSearch(
            self.task.space,
            {as_json(schedule_of(record["config"], self.task.space)) for record in ended},
            metric=list(config.objectives) if several else "sdri_db",
            mode=[OBJECTIVES[name] for name in config.objectives] if several else "max",
            points_to_evaluate=[_optuna_names(params) for params in begun],
            sampler=sampler(seed=config.seed + len(ended) + len(begun)),  # the same seed would draw the first again
            study_name=study,
            storage=storage,
        )

    def _scheduler(self, ended: Sequence[TrialRecord]) -> TrialScheduler | None:
        """The early stopping, which knows the reports of the trials that have ended."""
        config = self.config
        if config.reduction_factor <= 1 or config.iterations <= 1:
            return None
        scheduler = ASHAScheduler(
            time_attr="iteration",
            metric="sdri_db",
            mode="max",
            max_t=config.iterations,
            reduction_factor=config.reduction_factor,
        )
        for record in ended:
            trial = Trial("known", trial_id=record["trial"], stub=True)
            scheduler.on_trial_add(None, trial)
            for report in record["reports"]:
                scheduler.on_trial_result(None, trial, report)
        return scheduler

    def finalists(self, baselines: Mapping[str, Sequence[Thresholds]], searched: Sequence[TrialRow]) -> list[TrialRow]:
        """The baselines and the best drawn schedules, each with several seeds, measured on both sets of mixtures."""
        finished = [row for row in searched if row["iteration"] == self.config.iterations]
        best: dict[str, str] = {}
        for row in sorted(finished, key=lambda row: -(row["sdri_db"] or 0.0)):
            if row["schedule"] not in best.values() and len(best) < self.config.finalists:
                best[row["name"]] = row["schedule"]
        chosen = {name: as_json(schedule) for name, schedule in baselines.items()} | best
        first_seed = self.task.work.config.distil.seed
        given = [
            GivenSchedule(name=name, schedule=schedule, seed=first_seed + number)
            for number in range(self.config.repeats)
            for name, schedule in chosen.items()
        ]
        return self._given("finalists", "repeat", given, replace(self.task, confirmation=self.confirmation))

    def _given(
        self, stage: str, kind: Literal["baseline", "repeat"], given: Sequence[GivenSchedule], task: TrialTask
    ) -> list[TrialRow]:
        """Run trials of given schedules, but for those that have ended."""
        ended, _ = self._records(stage)
        done = [record["config"]["given"] for record in ended]
        left = [one for one in given if one not in done]
        space = {"kind": kind, "given": ray.tune.grid_search(left)}
        return self._fit(stage, ended, 1 if left else 0, task=task, param_space=space)

    def _records(self, stage: str) -> tuple[list[TrialRecord], list[TrialRecord]]:
        """The trials of a stage that have ended, and those that were broken off."""
        records = read_records(self._path(stage))
        return (
            [record for record in records if record["state"] != "running"],
            [record for record in records if record["state"] == "running"],
        )

    def _path(self, stage: str) -> Location:
        return self.out / "trials" / f"{stage}.json"

    def _fit(
        self,
        stage: str,
        ended: Sequence[TrialRecord],
        num_samples: int,
        *,
        task: TrialTask,
        param_space: dict[str, Any] | None = None,
        searcher: Searcher | None = None,
        scheduler: TrialScheduler | None = None,
        needed: Sequence[str] | None = None,
    ) -> list[TrialRow]:
        """Run the trials of a stage that are left, and return the rows of all."""
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are in the report, with their reason
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        recorder = Recorder(self._path(stage), ended, self.config.iterations)
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(run_trial, task=task), {"CPU": 0, "memory": _TRIAL_BYTES}),
            param_space=param_space,
            tune_config=ray.tune.TuneConfig(
                num_samples=num_samples,
                max_concurrent_trials=num_concurrent(self.config),
                trial_dirname_creator=_dirname,
                reuse_actors=True,
                search_alg=searcher,
                scheduler=scheduler,
            ),
            run_config=ray.tune.RunConfig(
                name=f"{stage}-{uuid.uuid4().hex}",  # never a folder that was there before
                **storage(self.out / "tune"),
                verbose=0,
                callbacks=[recorder, *self._callbacks(stage, needed)],
            ),
        )
        if num_samples > 0:
            tuner.fit()
        return rows_of(read_records(self._path(stage)), self.task.space)

    def _callbacks(self, stage: str, needed: Sequence[str] | None) -> list[ray.tune.Callback]:
        callbacks: list[ray.tune.Callback] = [
            Progress(stage, functools.partial(_name_and_description, self.task.space))
        ]
        callbacks += loggers(self.config.loggers, project=f"clearsep-{stage}")
        if needed is not None and self.config.keep == "best":
            callbacks.append(PruneLosingTrials(self.task.work.artifacts.out, needed, self.config.finalists))
        return callbacks


class DistinctSearch(OptunaSearch):  # type: ignore[misc] # Ray Tune has no types
    """Optuna's searcher, which draws no schedule twice while it finds a new one: a second trial of it adds nothing.

    Args:
        space: Schedules that may be drawn.
        drawn: Schedules that are not to be drawn, as JSON.
        settings: Of :class:`ray.tune.search.optuna.OptunaSearch`.
    """

    def __init__(self, space: Space, drawn: Set[str] = frozenset(), **settings: Any) -> None:  # noqa: ANN401
        super().__init__(functools.partial(_suggest, space), **settings)
        self._schedules, self._drawn = space, set(drawn)
        self._draws: dict[str, str] = {}  # name of the draw that was taken for each trial

    def suggest(self, trial_id: str) -> TrialParameters:
        """Draw the parameters of a trial; see :class:`TrialParameters`."""
        for number in range(_MAX_DRAWS):
            draw = f"{trial_id}-{number}"
            parameters: TrialParameters = super().suggest(draw)
            schedule = as_json(schedule_of(parameters, self._schedules))
            if schedule not in self._drawn or number == _MAX_DRAWS - 1:
                break
            super().on_trial_complete(draw, error=True)
        self._draws[trial_id] = draw
        self._drawn.add(schedule)
        return parameters

    def on_trial_result(self, trial_id: str, result: Mapping[str, object]) -> None:
        """Take a report of a trial."""
        super().on_trial_result(self._draws[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        """Take the last report of a trial."""
        super().on_trial_complete(self._draws[trial_id], result, error)


def _suggest(space: Space, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    space.draw(_OptunaChooser(trial))
    return {"kind": "searched"}


class _OptunaChooser:
    """A chooser that lets Optuna choose."""

    def __init__(self, trial: optuna.trial.BaseTrial) -> None:
        self._trial = trial

    def number(self, name: str, low: float, high: float, step: float | None) -> float:
        return float(self._trial.suggest_float(f"params/{name}", low, high, step=step))

    def choice(self, name: str, options: Sequence[Any]) -> Any:  # noqa: ANN401 - any setting's value
        return self._trial.suggest_categorical(f"params/{name}", list(options))

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(f"params/{name}", low, high))


def _known_trial(record: TrialRecord, space: Space, objectives: Sequence[str]) -> optuna.trial.FrozenTrial:
    """A trial that has ended, as Optuna has it; one without a report has failed."""
    fixed = optuna.trial.FixedTrial(_optuna_names(record["config"]["params"]))
    _suggest(space, fixed)
    reports = record["reports"]
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if reports else optuna.trial.TrialState.FAIL,
        values=[reports[-1][name] for name in objectives] if reports else None,  # type: ignore[literal-required]
        params=fixed.params,
        distributions=fixed.distributions,
    )


def _optuna_names(params: Mapping[str, Any]) -> dict[str, Any]:
    return {f"params/{name}": value for name, value in params.items()}


def _dirname(trial: Trial) -> str:
    return f"trial_{trial.trial_id}"


def _name_and_description(space: Space, config: TrialParameters) -> tuple[str, str]:
    """The name of a trial, empty if its schedule was drawn, and its schedule in short."""
    return config["given"]["name"] if "given" in config else "", describe(schedule_of(config, space))
