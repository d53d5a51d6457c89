"""TODO tune/search/config.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.settings import build, override
from train.evaluation.mixtures import ValidationConfig

SEARCHERS = ("tpe", "random", "pbt", "pb2")
OBJECTIVES = {"sdri_db": "max", "cost_s": "min"}


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
