"""The search for a schedule of thresholds with Ray Tune: baselines, drawn schedules, and repeats of the finalists."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.session import require_connection
from engine.corpus.contents import claim_contents
from engine.selection.thresholds import Thresholds
from engine.settings import Tree, build, merged, named_in, plain
from engine.storage.fingerprints import claim
from engine.storage.lock import lock
from engine.storage.paths import Name, location
from train.evaluation.mixtures import ValidationSet, resolve_validation
from tune.config import RunConfig
from tune.inputs import Inputs, claim_inputs, contents_only, require_known_labels, resolve
from tune.recipes import recipe_settings
from tune.run import begin
from tune.search.config import SearchConfig, read_search
from tune.search.progress import remove_artifacts
from tune.search.ray_orphans import orphans_removed
from tune.search.read_space import read_space
from tune.search.report import SearchSummary, write_report
from tune.search.space import RandomChooser, Space
from tune.search.stages import Stages, num_concurrent
from tune.search.trial import TrialTask
from tune.search.verdict import Candidate, TrialRow
from tune.steps.artifacts import Artifacts


def search(
    config: SearchConfig | Mapping[str, Any] | Name, out: Name, *, max_hours: float | None = None
) -> SearchSummary:
    """Search for the best schedule in folder ``out``; returns the summary of the report that is written there.

    ``config`` is a YAML file, or a mapping of settings as such a file has them (``clearsep settings`` lists them). Ray
    must be connected (:func:`connect`). The same call again resumes the search: finished trials stay, others use the
    artifacts that are there. After ``max_hours`` no trial begins another iteration, and the best so far are confirmed.
    Raises ``ValueError`` for settings that cannot work, and if ``out`` is in use or holds a search of other settings or
    audio.

    >>> settings = {"run": "run.yaml", "iterations": 1, "schedule": {"min_re_sdr_db": {"between": [-100, -90]}}}
    >>> with cs.connect():
    ...     summary = cs.search({**settings, "trials": 1, "finalists": 1, "repeats": 1}, "search")
    >>> len(summary["candidates"]) > 0
    True
    """
    require_connection()
    config, out = read_search(config), location(out)
    space, run_config = read_space(config.schedule, config.iterations), _run_config(config)
    baselines = baseline_schedules(config.iterations, run_config.schedule)
    needs_all = replace(run_config, schedule=_possible_thresholds(config, space, baselines))
    with named_in("set", RunConfig):
        inputs = resolve(needs_all)
    confirmation, artifacts = _confirmation(config, run_config, inputs), out / "artifacts"
    with lock(out, "search"), orphans_removed():
        is_begun = (out / "search.yaml").is_file()
        claim(out / "search.yaml", plain(config), what="a search", comparable=_comparable)
        settings = contents_only(plain(run_config))
        claim_inputs(inputs, out, what="a search", is_begun=is_begun, settings=settings, confirmation=confirmation)
        min_labels = run_config.engine.min_labels if run_config.labels is None else 0
        files = inputs.corpus.files(min_labels=min_labels)
        contents = claim_contents(
            out / "contents" / "corpus.parquet", inputs.corpus.root, files, what=f"files of {out}'s corpus"
        )
        work = begin(needs_all, inputs, out / "base")
        work = replace(work, config=run_config, artifacts=Artifacts(out=artifacts), contents=contents)
        task = TrialTask(work=work, space=space, threads=max(1, (os.cpu_count() or 1) // num_concurrent(config)))
        stages = Stages(config=config, task=task, confirmation=confirmation, out=out)
        deadline = None if max_hours is None else time.time() + max_hours * 3600.0
        first = stages.baselines(baselines)
        needed = sorted({name for row in first for name in row["artifacts"]})
        searched = stages.searched(deadline, needed)
        repeats = stages.finalists(baselines, searched)
        if config.keep == "best":
            used, kept = (
                {name for row in rows for name in row["artifacts"]} for rows in (searched, [*first, *repeats])
            )
            remove_artifacts(artifacts, used - kept)
        rows, candidates = [*first, *searched, *repeats], candidates_of(repeats, baselines)
        return write_report(out, rows, candidates, settings=plain(run_config), title="Search")


def _comparable(settings: Mapping[str, Any]) -> Tree:
    """The settings of the search itself; those of its run are compared by themselves."""
    return {name: value for name, value in contents_only(settings, SearchConfig).items() if name not in ("run", "set")}


def _run_config(config: SearchConfig) -> RunConfig:
    """The run that every trial is."""
    run_config = build(RunConfig, merged(recipe_settings(config.run), config.set))
    if run_config.validation is None:
        raise ValueError("validation must be set for a search, got null; set set.validation.clips")
    return run_config


def baseline_schedules(iterations: int, own: Sequence[Thresholds]) -> dict[str, tuple[Thresholds, ...]]:
    """ClearSep's constant 10 and 15 dB of Re-SDR, and the run's own schedule, cut or with its last entry repeated."""
    schedules = {f"ClearSep {db:g} dB": (Thresholds(min_re_sdr_db=db),) * iterations for db in (10.0, 15.0)}
    schedules["the run's own"] = tuple(own[min(number, len(own) - 1)] for number in range(iterations))
    return schedules


def _possible_thresholds(
    config: SearchConfig, space: Space, baselines: Mapping[str, Sequence[Thresholds]]
) -> tuple[Thresholds, ...]:
    """Thresholds of the baselines and of a sample of the space: the judges that they need are prepared in advance."""
    drawn = [space.draw(RandomChooser(np.random.default_rng([config.seed, number]))) for number in range(64)]
    return tuple(thresholds for schedule in (*baselines.values(), *drawn) for thresholds in schedule)


def _confirmation(config: SearchConfig, run_config: RunConfig, inputs: Inputs) -> ValidationSet:
    own = run_config.validation
    assert own is not None, "_run_config"
    confirmation = resolve_validation(
        config.confirmation or replace(own, seed=own.seed + 1), allow_outside=run_config.allow_outside
    )
    require_known_labels("confirmation", confirmation, inputs, run_config)
    return confirmation


def candidates_of(repeats: Sequence[TrialRow], baselines: Mapping[str, Sequence[Thresholds]]) -> list[Candidate]:
    """The repeated schedules by name, with a figure for each seed."""
    by_name: dict[str, list[TrialRow]] = {}
    for row in sorted(repeats, key=lambda row: row["seed"]):
        if row["confirmed_sdri_db"] is not None:
            by_name.setdefault(row["name"], []).append(row)
    order = dict.fromkeys(row["name"] for row in repeats if row["name"] in by_name)
    return [
        Candidate(
            name=name,
            description=by_name[name][0]["description"],
            schedule=json.loads(by_name[name][0]["schedule"]),
            choice_sdri_db=[row["sdri_db"] or 0.0 for row in by_name[name]],
            confirmed_sdri_db=[row["confirmed_sdri_db"] or 0.0 for row in by_name[name]],
            is_baseline=name in baselines,
        )
        for name in order
    ]
