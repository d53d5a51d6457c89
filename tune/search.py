"""The search for a schedule of thresholds with Ray Tune: baselines, drawn schedules, and finalists with repeats."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the search shows itself how it goes
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a search as it ends everything else

import numpy as np
import optuna
import ray
import ray.tune
import yaml
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from engine.filter import Thresholds
from engine.lock import held
from engine.storage import Location, Name, differences, location, write_bytes
from train.distil import storage
from train.evaluate import ValidationConfig
from tune.findings import Candidate, write_report
from tune.loop import RunConfig, absolute, begin, check
from tune.progress import Keep, Progress, loggers, remove_pieces
from tune.recipes import build, merged, override, tree
from tune.space import Recorded, Space, describe, read_space
from tune.trial import (
    HISTORY,
    KIND,
    NAME,
    PARAMS,
    SCHEDULE,
    SEED,
    WHICH,
    Task,
    num_threads,
    plain,
    run_trial,
    schedule_of,
)

Say = Callable[[str], None]
Row = dict[str, Any]
"""A trial at one iteration: what ``tune.findings.TRIALS`` has, and ``pieces`` and ``confirmed_sdri_db``."""
SEARCHERS = ("tpe", "random", "pbt", "pb2")
FIGURES = (
    *("sdri_db", "si_sdri_db", "kept_h", "num_kept", "num_stems"),
    *("estimated_si_sdr_db", "cost_s", "made_s"),
)
OBJECTIVES = {"sdri_db": "max", "cost_s": "min"}
_TRIAL_BYTES = 200e6  # of memory that a trial holds, and no CPU: its passes and trainings want all there are
_TIDY_S = 2.0
_PREFIX = "trial_"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched and how."""

    run: str = "laptop"
    """The run that every trial is: a recipe's name or a YAML file of settings."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of that run which are other here."""
    iterations: int = 2
    """Iterations of a trial."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Thresholds by name, each a value, a shape, or a range to search: see ``tune.space``."""
    trials: int = 16
    """Schedules to draw, beside the baselines."""
    searcher: str = "tpe"
    """tpe (Optuna) or random; pbt or pb2: ``trials`` is the population, whose free thresholds change on the way."""
    objectives: tuple[str, ...] = ("sdri_db",)
    """What is sought: sdri_db, or with tpe and random also cost_s, which is what a schedule costs by itself."""
    reduction_factor: float = 3.0
    """Of this many trials one goes on after iteration 1, and again after so many times as many (ASHA, with tpe and
    random); 1: all go on."""
    max_concurrent: int | None = None
    """Trials at once; null: a GPU each, without any one for every two CPUs."""
    seed: int = 0
    """Of the draws."""
    finalists: int = 2
    """Best schedules that are repeated, and the baselines with them, with other seeds."""
    repeats: int = 3
    """Trainings of each, with seeds of their own, for one is noise."""
    confirmation: ValidationConfig | None = None
    """What the winner is confirmed on; null: the run's validation, drawn anew from the same clips."""
    keep: str = "best"
    """Stems and separators to keep: best (of baselines, finalists and what is ahead) or all."""
    loggers: tuple[str, ...] = ()
    """Beside TensorBoard: mlflow, wandb (packages that are to be installed)."""

    def __post_init__(self) -> None:
        for name in ("iterations", "trials", "finalists", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 at least")
        for name, known in (("searcher", SEARCHERS), ("keep", ("best", "all"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(known)}")
        if not self.objectives or not set(self.objectives) <= OBJECTIVES.keys() or "sdri_db" not in self.objectives:
            raise ValueError(f"objectives is {list(self.objectives)}; give sdri_db, or sdri_db and cost_s")
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor is {self.reduction_factor}; give 2 to 4, or 1 to stop no trial early")
        if self.searcher in ("pbt", "pb2") and len(self.objectives) > 1:
            raise ValueError(f"{self.searcher} seeks one objective; give objectives: [sdri_db], or search with tpe")
        if unknown := sorted(set(self.loggers) - {"mlflow", "wandb"}):
            raise ValueError(f"loggers has {unknown}; give mlflow or wandb (TensorBoard's logs are always written)")


def read_search(path: str | Path, overrides: Iterable[str] = ()) -> SearchConfig:
    """The search of a YAML file, with ``key.sub=value`` overrides."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the YAML file of a search") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping with a schedule, such as `schedule: {{min_re_sdr_db: ...}}`")
    return build(SearchConfig, override(settings, overrides))


def search(config: SearchConfig, out: Name, *, max_hours: float | None = None, say: Say = print) -> dict[str, Any]:
    """Search for the best schedule in folder ``out`` and report it there; returns the report's values.

    Started again it goes on: trials that are done stay, others go on from the pieces that are there. After
    ``max_hours`` no trial begins another iteration and the best so far are confirmed. Raises ``ValueError`` for
    settings that cannot work and where ``out`` is in use or holds another search.
    """
    out = location(out)
    space = read_space(config.schedule, config.iterations)
    run_config = _run_config(config)
    own = absolute(run_config)
    baselines = baseline_schedules(config.iterations, own.schedule)
    drawn = [space.draw(Recorded(np.random.default_rng([config.seed, number]))) for number in range(64)]
    every = tuple(one for schedule in (*baselines.values(), *drawn) for one in schedule)
    corpus = check(replace(own, schedule=every))
    with held(out, "search"), _orphans_removed():
        _claim(config, out)
        judges = begin(replace(own, schedule=every), corpus, out / "base", say).judges
        task = Task(
            config=replace(
                own,
                separator=str(out / "base" / "iterations" / "0" / "separator"),
                tagger=judges.tagger,
                quality=own.quality or (str(out / "base" / "quality") if judges.quality else None),
            ),
            space=space,
            pieces=str(out / "pieces"),
            threads=num_threads(_num_concurrent(config)),
        )
        stages = Stages(config=config, task=task, out=out, say=say)
        first = stages.baselines(baselines)
        deadline = None if max_hours is None else time.time() + max_hours * 3600.0
        needed = sorted({name for row in first for name in row["pieces"]})
        found = stages.searched(deadline, needed)
        repeats = stages.finalists(baselines, found)
        if config.keep == "best":
            used, kept = ({piece for row in rows for piece in row["pieces"]} for rows in (found, [*first, *repeats]))
            remove_pieces(out / "pieces", used - kept)
        candidates = _candidates(repeats, baselines)
        settings = _plain(asdict(run_config))
        return write_report(out, [*first, *found, *repeats], candidates, settings=settings, title="Search")


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read


def _run_config(config: SearchConfig) -> RunConfig:
    """The run that every trial is."""
    run_config = build(RunConfig, {"corpus": "", **merged(tree(config.run), config.set)})
    if run_config.validation is None:
        raise ValueError("a search compares separators; set validation in the run's settings (set.validation.clips)")
    return run_config


def baseline_schedules(iterations: int, own: Sequence[Thresholds]) -> dict[str, tuple[Thresholds, ...]]:
    """ClearSep's constant 10 and 15 dB of Re-SDR, and the run's own schedule, cut or with its last entry repeated."""
    found = {f"ClearSep {db:g} dB": (Thresholds(min_re_sdr_db=db),) * iterations for db in (10.0, 15.0)}
    found["the run's own"] = tuple(own[min(number, len(own) - 1)] for number in range(iterations))
    return found


def _claim(config: SearchConfig, out: Location) -> None:
    """Store the settings, or compare them with those that are there."""
    path, wanted = out / "search.yaml", _plain(asdict(config))
    if path.is_file() and (changed := differences(yaml.safe_load(path.read_text()), wanted)):
        raise ValueError(f"{out} holds a search with another {changed}; give another folder")
    write_bytes(path, yaml.safe_dump(wanted, sort_keys=False).encode())


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
    task: Task
    """What its trials have in common."""
    out: Location
    """Its folder."""
    say: Say
    """Where it tells how it goes."""

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
        draws = [Recorded(np.random.default_rng([config.seed, number])) for number in range(config.trials)]
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
        task: Task | None = None,
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
        callbacks = [Progress(stage, functools.partial(_words, self.task.space), self.say)]
        callbacks += loggers(self.config.loggers, project=f"clearsep-{stage}")
        if needed is not None and self.config.keep == "best":
            callbacks.append(Keep(location(self.task.pieces), needed, self.config.finalists))
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


def _candidates(repeats: Sequence[Row], baselines: Mapping[str, Sequence[Thresholds]]) -> list[Candidate]:
    """The finalists by name, with their figures by seed."""
    done = [row for row in repeats if row["confirmed_sdri_db"] is not None]
    names = dict.fromkeys(row["name"] for row in done)
    found = []
    for name in names:
        rows = sorted((row for row in done if row["name"] == name), key=lambda row: row["seed"])
        found.append(
            Candidate(
                name=name,
                words=rows[0]["words"],
                schedule=json.loads(rows[0]["schedule"]),
                choice_sdri_db=[row["sdri_db"] for row in rows],
                confirmed_sdri_db=[row["confirmed_sdri_db"] for row in rows],
                is_baseline=name in baselines,
            )
        )
    return found


@contextmanager
def _orphans_removed() -> Iterator[None]:
    """Give back what trainings of trials that ended in their middle still hold: Ray keeps it for the whole job.

    Their placement groups were made by controllers that are gone; nobody else would remove them.
    """
    done = threading.Event()

    def tidy() -> None:
        from ray._private.state import state
        from ray.core.generated import gcs_pb2
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        nobody, removed = ray.ActorID.nil().binary(), gcs_pb2.PlacementGroupTableData.REMOVED
        while not done.wait(_TIDY_S):
            for data in state._connect_and_get_accessor().get_placement_group_table():
                group = gcs_pb2.PlacementGroupTableData.FromString(data)
                ours = group.creator_job_id == ray.get_runtime_context().job_id.binary()
                gone = ours and group.creator_actor_dead and group.creator_actor_id not in (b"", nobody)
                if gone and not group.is_detached and group.state != removed:
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))

    thread = threading.Thread(target=tidy, daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
