"""The state of a search from the files that it writes: its trials, the best of them, and the passes at work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from ray.tune.experiment import Trial

from engine.selection.thresholds import Thresholds
from engine.storage.files import write_json
from engine.storage.lock import lock
from tests.support.command import Cli, spawn
from tune.schedule import as_json
from tune.search.progress import Recorder
from tune.search.trial import HISTORY
from tune.show.watch_search import SearchWatch

NOBODY = "nobody works on it: start the same command to resume"


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """The folder of a search that has just begun."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.yaml").write_text(yaml.safe_dump({"trials": 16, "iterations": 2}))
    return tmp_path / "search"


def trial(name: str, kind: str = "searched") -> Trial:
    given = {"name": "ClearSep 10 dB", "schedule": as_json([Thresholds(min_re_sdr_db=10.0)] * 2)}
    config = {"kind": kind} | ({"params": {}} if kind == "searched" else {"given": given})
    return Trial("run", trial_id=name, stub=True, config=config)


def reported(recorder: Recorder, one: Trial, *sdri_db: float) -> None:
    recorder.on_trial_start(trial=one)
    history = [{"iteration": number, "sdri_db": value} for number, value in enumerate(sdri_db, 1)]
    recorder.on_trial_result(trial=one, result={HISTORY: json.dumps(history)})


def text(path: Path) -> str:
    return SearchWatch(path).snapshot().text


def test_a_search_shows_its_stage_its_trials_and_the_best(
    search: Path, write_pass: Callable[..., Path], cli: Cli
) -> None:
    assert text(search) == f"preparing, {NOBODY}"
    baselines = Recorder(search / "trials" / "baselines.json", [], 2)
    baseline = trial("0", "baseline")
    reported(baselines, baseline, 5.0)
    assert text(search) == (
        "baselines, 0 trials ended, 1 running, ClearSep 10 dB at iteration 2 of 2, best SDRi 5.00 dB "
        f"(ClearSep 10 dB, iteration 1), {NOBODY}"
    )
    reported(baselines, baseline, 5.0, 6.0)
    baselines.on_trial_complete(trial=baseline)
    drawn = Recorder(search / "trials" / "search.json", [], 2)
    for name, figures, ends in (("a", (4.0, 7.0), True), ("b", (3.0,), True), ("c", (), False), ("d", (6.5,), False)):
        reported(drawn, one := trial(name), *figures)
        if ends:
            drawn.on_trial_complete(trial=one)
    out = write_pass([("x", "rain", np.ones(800, np.float32), {})], folder="search/artifacts/passes/0123")
    (out / "stems" / "manifest.json").rename(out / "manifest.json")
    with lock(search, "search"):
        line = cli("watch", search, "--once").out
        assert (
            "search, 2 of 16 trials ended, 1 stopped, 2 running, c at iteration 1 of 2, d at iteration 2 of 2" in line
        )
        assert f"best SDRi 7.00 dB (a, iteration 2), by process {os.getpid()} on " in line
        found = cli("watch", search, "--json").document()
    states = {one["name"]: (one["state"], one["iteration"], one["sdri_db"]) for one in found["trials"]}
    assert states == {
        "ClearSep 10 dB": ("finished", 2, 6.0),
        "a": ("finished", 2, 7.0),
        "b": ("stopped", 1, 3.0),
        "c": ("running", 1, None),
        "d": ("running", 2, 6.5),
    }
    assert (found["step"], found["total"], found["num_iterations"]) == ("search", 16, 2)
    assert found["best"]["name"] == "a" and found["passes"]["passes/0123"]["step"] == "separating"
    table = cli("watch", search, "--once").out
    assert "passes/0123" in table and "2 of 2" in table


def test_a_search_that_has_ended_is_done_until_it_is_resumed(search: Path, cli: Cli) -> None:
    repeats = Recorder(search / "trials" / "finalists.json", [], 2)
    reported(repeats, one := trial("0", "repeat"), 5.0, 6.0)
    repeats.on_trial_complete(trial=one)
    write_json(search / "summary.json", {})
    assert text(search) == "done, 1 trials ended"
    assert "done, 1 trials ended" in cli("watch", search, "--every", "0.1").out, "it ends by itself"
    with lock(search, "search"):
        assert text(search).startswith("finalists, 1 trials ended, by process")
    reported(repeats, trial("1", "repeat"))
    assert text(search).startswith("finalists, 1 trials ended, 1 running, ClearSep 10 dB at iteration 1 of 2, nobody")


def test_damaged_settings_are_an_error_and_no_ray_has_to_run(search: Path, cli: Cli) -> None:
    assert spawn("watch", search, "--once").out == f"preparing, {NOBODY}\n"
    (search / "search.yaml").write_text("trials: [")
    assert "cannot read" in cli("watch", search).error()
    (search / "search.yaml").write_text("a: 1")
    assert "search.yaml must have settings of a run or a search" in cli("watch", search).error()
