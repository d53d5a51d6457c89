"""How a search goes, as its trials report it; and the end of what losing trials leave on disk."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import ray.tune
import rich.table
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live

from engine.storage.files import remove_tree
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)

COLUMNS = ("trial", "schedule", "iteration", "SDRi dB", "kept h", "cost h", "state")


class Progress(ray.tune.Callback):  # type: ignore[misc]
    """Shows every trial's last figures on standard error; says them line by line where that is no terminal."""

    def __init__(self, stage: str, words: Callable[[dict[str, Any]], tuple[str, str]]) -> None:
        """``words`` gives a trial's name and its schedule in words, from what the trial is told."""
        self._stage, self._words = stage, words
        self._rows: dict[str, tuple[str, ...]] = {}
        self._live: Live | None = None

    def setup(self, **_: object) -> None:
        """Begin to show."""
        if sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def on_trial_start(self, *, trial: Trial, **_: object) -> None:
        """A trial has begun, or goes on."""
        self._show(trial, "runs")

    def on_trial_result(self, *, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: object) -> None:
        """A trial has an iteration behind it."""
        self._show(trial, "runs", result)

    def on_trial_complete(self, *, trial: Trial, **_: object) -> None:
        """A trial is done, or was stopped."""
        self._show(trial, "done")

    def on_trial_error(self, *, trial: Trial, **_: object) -> None:
        """A trial failed."""
        self._show(trial, "failed")

    def on_experiment_end(self, **_: object) -> None:
        """All are done."""
        self.close()

    def close(self) -> None:
        """Leave the last table where it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the screen, for Tune keeps its callbacks with an experiment."""
        return {**self.__dict__, "_live": None}

    def _show(self, trial: Trial, state: str, result: dict[str, Any] | None = None) -> None:
        figures = result or trial.last_result or {}
        name, words = self._words(trial.config)
        numbers = [
            f"{figures[key]:{form}}" if figures.get(key) is not None else ""
            for key, form in (("iteration", "d"), ("sdri_db", ".2f"), ("kept_h", ".3f"))
        ]
        cost = f"{figures['cost_s'] / 3600:.3f}" if "cost_s" in figures else ""
        name = name or trial.trial_id
        self._rows[trial.trial_id] = (name, words, *numbers, cost, state)
        if self._live is not None:
            table = rich.table.Table(title=self._stage, title_justify="left")
            for column in COLUMNS:
                table.add_column(column)
            for row in self._rows.values():
                table.add_row(*row)
            self._live.update(table, refresh=True)
        elif result is not None or state == "failed":
            _LOGGER.info(
                f"{self._stage}: {name} ({words})"
                + (
                    f", iteration {numbers[0]}: SDRi {numbers[1]} dB, kept {numbers[2]} h, cost {cost} h"
                    if result
                    else " failed"
                )
            )


class PruneLosingTrials(ray.tune.Callback):  # type: ignore[misc]
    """Removes the stems of losing trials as these end, while no other is at work on the shared pieces.

    Stems are gigabytes. Separators and selections are megabytes, and what a later trial may have in common with this
    one: they go when the search is over.
    """

    def __init__(self, pieces: Location, needed: Sequence[str], number: int) -> None:
        """``needed`` are pieces to keep in any case; those of the best ``number`` trials so far are kept too."""
        self._pieces, self._needed, self._number = pieces, set(needed), number

    def on_trial_complete(self, *, trials: list[Trial], trial: Trial, **_: object) -> None:
        """A trial is done, or was stopped."""
        self._prune(trials, trial)

    def on_trial_error(self, *, trials: list[Trial], trial: Trial, **_: object) -> None:
        """A trial failed."""
        self._prune(trials, trial)

    def _prune(self, trials: list[Trial], ended: Trial) -> None:
        if any(one.status in (Trial.RUNNING, Trial.PAUSED) and one is not ended for one in trials):
            return
        told = [one.last_result for one in trials if one.last_result and "pieces" in one.last_result]
        told.sort(key=lambda result: (-result["iteration"], -result["sdri_db"]))
        kept = self._needed | {name for result in told[: self._number] for name in json.loads(result["pieces"])}
        used = {name for result in told for name in json.loads(result["pieces"])}
        remove_artifacts(self._pieces, {name for name in used - kept if name.startswith("passes/")})


def remove_artifacts(pieces: Location, names: Iterable[str]) -> None:
    """Delete shared pieces that nobody will use again."""
    for name in sorted(names):
        with suppress(FileNotFoundError):
            remove_tree(pieces / name)


def loggers(names: Sequence[str], project: str) -> list[ray.tune.Callback]:
    """Ray's own callbacks for MLflow and Weights & Biases; ``ValueError`` where the package is not installed."""
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
            raise ValueError(f"loggers has {name}, which cannot be used ({error}); pip install {name}") from None
    return found
