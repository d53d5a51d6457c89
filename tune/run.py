"""A run: a seed separator, a corpus and a schedule, taken through all iterations; goes on where it was stopped."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import yaml

from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.run import require_clips
from engine.schema import plain_label
from engine.separators import load, read_description, save
from engine.storage.files import read_json, write_bytes, write_json
from engine.storage.fingerprints import differences
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from train.data.training_data import TrainingData
from train.distil import distil
from train.evaluation.mixtures import ValidationConfig
from train.task import HOW
from tune.artifacts import Artifacts
from tune.config import RunConfig
from tune.iteration import Work, iterate, validate
from tune.judges import Judges, check_judges, prepare_judges

_LOGGER = logging.getLogger(__name__)


def run(config: RunConfig, out: Name, *, retry_failed: bool = False) -> dict[str, Any]:
    """Take a run through all its iterations in folder ``out``; returns the summary that is kept in ``summary.json``.

    Every step leaves its result on disk; the same call again goes on after the last one that is whole. With
    ``retry_failed`` the clips that failed in the iteration at hand are tried again. Raises ``ValueError`` where ``out``
    is in use, holds a run of another config, other than one whose schedule this one continues, or has all its
    iterations behind it and nothing to try again.
    """
    out = location(out)
    corpus = check(config)
    with lock(out, "run"):
        _claim(config, out)
        if retry_failed and (out / "iterations" / str(len(config.schedule)) / "iteration.json").is_file():
            raise ValueError(
                f"all iterations of {out} are done and their students have learned: a clip that is separated now "
                "changes nothing; start a new run, or a pass of the failed clips (separate-corpus)"
            )
        work = begin(config, corpus, out)
        for number, thresholds in enumerate(config.schedule, 1):
            folder = out / "iterations" / str(number)
            if not (folder / "iteration.json").is_file():
                teacher = out / "iterations" / str(number - 1) / "separator"
                entry, _ = iterate(work, number, thresholds, teacher, retry_failed=retry_failed)
                retry_failed = False
                write_json(folder / "iteration.json", entry)
                summarise(out)
        return summarise(out)


def begin(config: RunConfig, corpus: Corpus, out: Location) -> Work:
    """Make, or find in ``out``, what comes before the first iteration: the seed, its figures, and the judges."""
    work = Work(config=config, corpus=corpus, pieces=Artifacts(out=out), judges=Judges())
    _seed(work)
    work.judges = prepare_judges(config, out)
    return work


def check(config: RunConfig) -> Corpus:
    """Read all inputs before anything is made or trained; ``ValueError`` for what could only fail hours later."""
    corpus = read_corpus(config.corpus, class_map=config.class_map, audio_root=config.audio_root)
    require_clips(corpus, config.engine)
    check_judges(config)
    labels: list[str] = []
    if config.clean is not None:
        labels = read_sources(config.clean, folds=config.clean_folds)["label"].to_pylist()
    if config.separator is not None:
        labels = read_description(config.separator)["labels"]
    known = {plain_label(label) for label in labels}
    for name in ("validation", "training_validation"):
        validation: ValidationConfig | None = getattr(config, name)
        if validation is None:
            continue
        wanted = set(read_sources(validation.clips, folds=validation.folds)["label"].to_pylist())
        if unknown := sorted(label for label in wanted if plain_label(label) not in known):
            raise ValueError(f"{name} has clips of {unknown}, which the seed cannot know; take them out of its clips")
    return corpus


def _claim(config: RunConfig, out: Location) -> None:
    """Store the resolved config, or compare it with the one that is there."""
    path = out / "config.yaml"
    wanted = yaml.safe_load(yaml.safe_dump(_plain(asdict(config))))
    if path.is_file():
        found = yaml.safe_load(path.read_text())
        done = len(found.get("schedule", []))
        comparable = wanted | {"schedule": wanted["schedule"][:done]}
        if changed := differences(_deciding(found), _deciding(comparable)):
            raise ValueError(f"{out} holds a run with another {changed}; give another folder")
    write_bytes(path, yaml.safe_dump(wanted, sort_keys=False).encode())


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say only how fast a pass is and when it gives up: they may change as a run goes."""
    kept = PassConfig().identity()
    found = settings | {"engine": {key: value for key, value in settings.get("engine", {}).items() if key in kept}}
    for name in ("distil", "seed_training"):
        found[name] = {key: value for key, value in settings.get(name, {}).items() if key not in HOW}
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401 - walks any JSON-like value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _seed(work: Work) -> None:
    """Iteration 0: a separator and its validation."""
    config, folder = work.config, work.pieces.place("seed", 0, None)
    if (folder / "iteration.json").is_file():
        return
    started = time.perf_counter()
    if config.separator is not None:
        history = read_description(config.separator)["history"]
        save(load(config.separator), folder / "separator", history=history)
    else:
        _LOGGER.info(f"iteration 0: training the seed for {config.seed_training.steps} steps")
        distil(
            folder / "separator",
            training_data=TrainingData(clean=config.clean, clean_folds=config.clean_folds),
            config=config.seed_training,
            network=config.network,
            validation=config.training_validation,
        )
    counts = {
        "num_clips": 0,
        "num_set_aside": 0,
        "num_queries": 0,
        "num_stems": 0,
        "num_kept": 0,
        "num_rejected": {},
        "num_failed": 0,
        "kept_h": 0.0,
    }
    entry = {"iteration": 0, **counts, "thresholds": {}, "validation": validate(work, 0, folder / "separator")}
    write_json(folder / "iteration.json", entry | {"wall_s": time.perf_counter() - started})
    summarise(work.pieces.out)


def summarise(out: Location) -> dict[str, Any]:
    """Gather the finished iterations of a run into its ``summary.json``."""
    folders = {int(path.parent.name): path for path in (out / "iterations").glob("*/iteration.json")}
    summary = {"iterations": [read_json(folders[number]) for number in sorted(folders)]}
    write_json(out / "summary.json", summary)
    return summary
