"""Callbacks of a search: records of trials, progress on standard error, removal of losing trials' stems, loggers.

The records are ours because Ray Tune restores an experiment by unpickling files of its folder: anyone who can
write there could run code. They are JSON; trials that were broken off are tried again, on the artifacts that exist.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import ray.tune
from ray.tune.experiment import Trial
from rich.live import Live

from engine.cli.display import console, rich_table
from engine.storage.files import read_json, remove_tree, write_json
from engine.storage.paths import Location
from tune.schedule import as_json
from tune.search.space import Space, describe
from tune.search.trial import HISTORY, TrialParameters, schedule_of
from tune.search.verdict import TRIALS, TrialReport, TrialRow

_LOGGER = logging.getLogger(__name__)
_COLUMNS = ("trial", "schedule", "iteration", "SDRi dB", "kept h", "cost h", "state")


class TrialRecord(TypedDict):
    """All that is known of a trial."""

    trial: str
    config: TrialParameters
    state: Literal["running", "finished", "stopped", "failed"]
    error: str | None
    """Last line of the error of a failed trial."""
    reports: list[TrialReport]


def read_records(path: Location) -> list[TrialRecord]:
    """The records of a stage, in the order in which its trials began; none if it has not begun."""
    records: list[TrialRecord] = read_json(path) if path.is_file() else []
    return records


class Recorder(ray.tune.Callback):  # type: ignore[misc]
    """Writes the records of a stage; those of an earlier start that have ended stay."""

    def __init__(self, path: Location, ended: Sequence[TrialRecord], num_iterations: int) -> None:
        self._path, self._num_iterations = path, num_iterations
        self._records = {record["trial"]: record for record in ended}

    def on_trial_start(self, *, trial: Trial, **_: object) -> None:
        self._update(trial, state="running")

    def on_trial_result(self, *, trial: Trial, result: Mapping[str, Any], **_: object) -> None:
        self._update(trial, reports=json.loads(result.get(HISTORY, "[]")))

    def on_trial_complete(self, *, trial: Trial, **_: object) -> None:
        reports = self._records[trial.trial_id]["reports"] if trial.trial_id in self._records else []
        if not reports:  # the time was up before it began: another start begins it
            self._records.pop(trial.trial_id, None)
            write_json(self._path, list(self._records.values()))
            return
        self._update(trial, state="finished" if reports[-1]["iteration"] == self._num_iterations else "stopped")

    def on_trial_error(self, *, trial: Trial, **_: object) -> None:
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        self._update(trial, state="failed", error=(lines or ["unknown error"])[-1])

    def _update(self, trial: Trial, **changes: Any) -> None:  # noqa: ANN401 - fields of a record
        record = self._records.setdefault(
            trial.trial_id,
            TrialRecord(trial=trial.trial_id, config=trial.config, state="running", error=None, reports=[]),
        )
        self._records[trial.trial_id] = cast(TrialRecord, {**record, **changes})
        write_json(self._path, list(self._records.values()))


def rows_of(records: Sequence[TrialRecord], space: Space) -> list[TrialRow]:
    """A row for every trial and iteration, and a row of iteration 0 for a trial that failed before its first report."""
    rows = [row for record in records for row in _rows_of_one(record, space)]
    return sorted(rows, key=lambda row: (row["trial"], row["iteration"]))


def _rows_of_one(record: TrialRecord, space: Space) -> list[TrialRow]:
    config, trial = record["config"], record["trial"]
    given, schedule = config.get("given"), schedule_of(config, space)
    row: dict[str, Any] = {
        **dict.fromkeys(TRIALS.names),
        "trial": trial,
        "kind": config["kind"],
        "name": given["name"] if given else trial,
        "params": json.dumps(config.get("params", {})),
        "schedule": as_json(schedule),
        "description": describe(schedule),
        "seed": given.get("seed", 0) if given else 0,
        "iteration": 0,
        "artifacts": [],
        "state": record["state"],
        "error": record["error"],
    }
    return cast(list[TrialRow], [row | report for report in record["reports"]] or [row])


class Progress(ray.tune.Callback):  # type: ignore[misc]
    """Shows the last figures of every trial: a table on a terminal, else a log line for each report."""

    def __init__(self, stage: str, describe: Callable[[TrialParameters], tuple[str, str]]) -> None:
        """``describe`` returns the name of a trial and its schedule in short."""
        self._stage, self._describe = stage, describe
        self._rows: dict[str, tuple[str, ...]] = {}
        self._live: Live | None = None

    def setup(self, **_: object) -> None:
        if (screen := console(stderr=True)).is_terminal:
            self._live = Live(console=screen, auto_refresh=False)
            self._live.start()

    def on_trial_start(self, *, trial: Trial, **_: object) -> None:
        self._show(trial, "running")

    def on_trial_result(self, *, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **_: object) -> None:
        self._show(trial, "running", result)

    def on_trial_complete(self, *, trial: Trial, **_: object) -> None:
        self._show(trial, "done")

    def on_trial_error(self, *, trial: Trial, **_: object) -> None:
        self._show(trial, "failed")

    def on_experiment_end(self, **_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # Tune stores its callbacks with the experiment

    def _show(self, trial: Trial, state: str, result: Mapping[str, Any] | None = None) -> None:
        figures = result or trial.last_result or {}
        name, schedule = self._describe(trial.config)
        name = name or trial.trial_id
        formats = (("iteration", "d"), ("sdri_db", ".2f"), ("kept_h", ".3f"))
        numbers = [f"{figures[key]:{form}}" if figures.get(key) is not None else "" for key, form in formats]
        cost = f"{figures['cost_s'] / 3600:.3f}" if "cost_s" in figures else ""
        self._rows[trial.trial_id] = (name, schedule, *numbers, cost, state)
        if self._live is not None:
            self._live.update(rich_table(self._stage, _COLUMNS, self._rows.values()), refresh=True)
        elif result is not None:
            iteration, sdri, kept = numbers
            text = f"iteration {iteration}: SDRi {sdri} dB, kept {kept} h, cost {cost} h"
            _LOGGER.info(f"{self._stage}: {name} ({schedule}), {text}")
        elif state == "failed":
            _LOGGER.info(f"{self._stage}: {name} ({schedule}) failed")


class PruneLosingTrials(ray.tune.Callback):  # type: ignore[misc]
    """Removes the stems of losing trials when a trial ends, while no other uses the shared artifacts.

    Stems take gigabytes. Separators and selections take megabytes, and a later trial may need the same ones, so they
    are removed when the search is over.
    """

    def __init__(self, artifacts: Location, needed: Sequence[str], num_best: int) -> None:
        """Artifacts that are ``needed``, and those of the best ``num_best`` trials so far, are kept."""
        self._artifacts, self._needed, self._num_best = artifacts, set(needed), num_best

    def on_trial_complete(self, *, trials: list[Trial], trial: Trial, **_: object) -> None:
        if any(one.status == Trial.RUNNING and one is not trial for one in trials):
            return
        reports = [one.last_result for one in trials if one.last_result and "artifacts" in one.last_result]
        reports.sort(key=lambda report: (-report["iteration"], -report["sdri_db"]))
        best = {name for report in reports[: self._num_best] for name in json.loads(report["artifacts"])}
        used = {name for report in reports for name in json.loads(report["artifacts"])}
        unused = used - best - self._needed
        remove_artifacts(self._artifacts, {name for name in unused if name.startswith("passes/")})

    on_trial_error = on_trial_complete


def remove_artifacts(folder: Location, names: Iterable[str]) -> None:
    """Delete shared artifacts that no trial will use again."""
    for name in sorted(names):
        with suppress(FileNotFoundError):
            remove_tree(folder / name)


def loggers(names: Sequence[str], project: str) -> list[ray.tune.Callback]:
    """Ray's callbacks for MLflow and Weights & Biases; ``ValueError`` if a package is not installed."""
    found: list[ray.tune.Callback] = []
    for name in names:
        try:
            if name == "mlflow":
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                found.append(MLflowLoggerCallback(experiment_name=project))
            else:
                from ray.air.integrations.wandb import WandbLoggerCallback

                found.append(WandbLoggerCallback(project=project))
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"cannot use the logger {name} ({error}); pip install {name}") from None
    return found
