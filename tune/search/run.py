"""The search for a schedule of thresholds with Ray Tune: baselines, drawn schedules, and finalists with repeats."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import yaml

from engine.selection.thresholds import Thresholds
from engine.settings import build, merged
from engine.storage.files import write_bytes
from engine.storage.fingerprints import differences
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from tune.config import RunConfig, absolute
from tune.recipes import tree
from tune.run import begin, check
from tune.search.config import SearchConfig
from tune.search.progress import remove_artifacts
from tune.search.ray_orphans import _orphans_removed
from tune.search.report import write_report
from tune.search.space import RandomChooser, read_space
from tune.search.stages import Row, Stages, _num_concurrent
from tune.search.trial import TrialTask, num_threads
from tune.search.verdict import Candidate

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the search shows itself how it goes
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a search as it ends everything else


def search(config: SearchConfig, out: Name, *, max_hours: float | None = None) -> dict[str, Any]:
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
    drawn = [space.draw(RandomChooser(np.random.default_rng([config.seed, number]))) for number in range(64)]
    every = tuple(one for schedule in (*baselines.values(), *drawn) for one in schedule)
    corpus = check(replace(own, schedule=every))
    with lock(out, "search"), _orphans_removed():
        _claim(config, out)
        judges = begin(replace(own, schedule=every), corpus, out / "base").judges
        task = TrialTask(
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
        stages = Stages(config=config, task=task, out=out)
        first = stages.baselines(baselines)
        deadline = None if max_hours is None else time.time() + max_hours * 3600.0
        needed = sorted({name for row in first for name in row["pieces"]})
        found = stages.searched(deadline, needed)
        repeats = stages.finalists(baselines, found)
        if config.keep == "best":
            used, kept = ({piece for row in rows for piece in row["pieces"]} for rows in (found, [*first, *repeats]))
            remove_artifacts(out / "pieces", used - kept)
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
