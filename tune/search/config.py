"""Settings of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.settings import Count, Number, Seed, build, config, override, plain, read_yaml
from engine.storage.paths import Name
from train.evaluation.mixtures import ValidationConfig

OBJECTIVES = {"sdri_db": "max", "cost_s": "min"}
"""Every objective, with the direction in which it is better."""


@config
class SearchConfig:
    """Settings of a search for a schedule."""

    run: str = "laptop"
    """The run that every trial is: a recipe's name or a YAML file of settings."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that replace those of that run."""
    iterations: Count = 2
    """Iterations of a trial."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Thresholds by name, each a value, a shape, or a range to search (see ``tune/search/space.py``)."""
    trials: Count = 16
    """Schedules to draw, in addition to the baselines."""
    searcher: Literal["tpe", "random"] = "tpe"
    """How schedules are drawn: by Optuna's tree-structured Parzen estimator, or at random."""
    objectives: tuple[Literal["sdri_db", "cost_s"], ...] = ("sdri_db",)
    """Figures to improve: ``sdri_db``, and optionally ``cost_s``, the cost of a schedule without shared artifacts."""
    reduction_factor: Annotated[Number, Field(ge=1)] = 3.0
    """ASHA reduction factor: at each rung only the best 1/reduction_factor of the trials continue; 1: all continue."""
    max_concurrent: Count | None = None
    """Trials at the same time; null: one for each GPU, without GPUs one for every two CPUs."""
    seed: Seed = 0
    """Seed of the draws."""
    finalists: Count = 2
    """Number of the best schedules that are repeated with other seeds, as are the baselines."""
    repeats: Count = 3
    """Trainings of each finalist and baseline, each with a seed of its own: the result of a single one is noisy."""
    confirmation: ValidationConfig | None = None
    """Mixtures on which the winner is confirmed; null: those of the run's validation, drawn again with another seed."""
    keep: Literal["best", "all"] = "best"
    """Artifacts to keep: ``best`` (of the baselines, the finalists and the best trials) or ``all``."""
    loggers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Loggers in addition to TensorBoard, which is always on; their packages must be installed."""

    def __post_init__(self) -> None:
        if "sdri_db" not in self.objectives:
            raise ValueError(f"objectives must have sdri_db, got {list(self.objectives)}; add sdri_db")


def read_search(source: SearchConfig | Mapping[str, Any] | Name, overrides: Iterable[str] = ()) -> SearchConfig:
    """The search of a YAML file or mapping, with ``key.sub=value`` overrides; a search config is returned as it is."""
    if isinstance(source, SearchConfig):
        return source
    example = "schedule: {min_re_sdr_db: {between: [0, 20]}}"
    settings = plain(source) if isinstance(source, Mapping) else read_yaml(str(source), example)
    return build(SearchConfig, override(settings, overrides))
