"""Records of a search's trials: written at every report, read after a kill, and turned into the table of trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from engine.selection.thresholds import Thresholds
from tune.schedule import as_json
from tune.search.progress import Recorder, read_records, rows_of
from tune.search.space import Space
from tune.search.trial import HISTORY

_SPACE = Space(iterations=2, thresholds={})
_GIVEN = {"name": "own", "schedule": as_json([Thresholds(min_re_sdr_db=3.0)] * 2), "seed": 5}


CONFIG = {"kind": "repeat", "given": _GIVEN}


class FailedTrial(Trial):
    """A trial whose error Tune has written to a file."""

    error_file: Path | None = None


def trial(name: str) -> Trial:
    return Trial("run", trial_id=name, stub=True, config=CONFIG)


def report(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "sdri_db": float(iteration), "artifacts": ["passes/a"], "cost_s": 1.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trials" / "finalists.json"


def reported(recorder: Recorder, one: Trial, num_iterations: int) -> None:
    recorder.on_trial_start(trial=one)
    history = [report(number) for number in range(1, num_iterations + 1)]
    if history:
        recorder.on_trial_result(trial=one, result={HISTORY: json.dumps(history)})


def test_every_end_of_a_trial_is_recorded_and_one_that_never_began_is_not(path: Path, tmp_path: Path) -> None:
    recorder, failed = Recorder(path, [], 2), FailedTrial("run", trial_id="failed", stub=True, config=CONFIG)
    for name, num_iterations in (("finished", 2), ("stopped", 1), ("never", 0)):
        reported(recorder, trial(name), num_iterations)
        recorder.on_trial_complete(trial=trial(name))
    reported(recorder, failed, 0)
    failed.error_file = tmp_path / "error.txt"
    failed.error_file.write_text("Traceback\nValueError: tracks must be there\n")
    recorder.on_trial_error(trial=failed)
    reported(recorder, trial("running"), 1)
    records = read_records(path)
    assert {record["trial"]: record["state"] for record in records} == {
        "finished": "finished",
        "stopped": "stopped",
        "failed": "failed",
        "running": "running",
    }
    rows = rows_of(records, _SPACE)
    assert [(row["trial"], row["iteration"], row["sdri_db"]) for row in rows] == [
        ("failed", 0, None),
        ("finished", 1, 1.0),
        ("finished", 2, 2.0),
        ("running", 1, 1.0),
        ("stopped", 1, 1.0),
    ]
    assert rows[0]["error"] == "ValueError: tracks must be there"
    assert {(row["name"], row["seed"], row["schedule"]) for row in rows} == {("own", 5, _GIVEN["schedule"])}


def test_trials_that_have_ended_stay_in_the_records_of_the_next_start(path: Path) -> None:
    first = Recorder(path, [], 2)
    reported(first, trial("finished"), 2)
    first.on_trial_complete(trial=trial("finished"))
    reported(first, trial("broken off"), 1)
    ended = [record for record in read_records(path) if record["state"] != "running"]
    second = Recorder(path, ended, 2)
    reported(second, trial("again"), 1)
    assert [record["trial"] for record in read_records(path)] == ["finished", "again"]
