"""What a run or a pass is at, from files alone: every step, with and without a process that works on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.corpus.read import read_corpus
from engine.passes.records import STEPS, record_path, write_record
from engine.passes.slices import take
from engine.passes.tasks import WHOLE, Slice, Tasks
from engine.schema import failure
from engine.storage.files import write_json
from engine.storage.fingerprints import read_sealed
from engine.storage.lock import lock
from tests.conftest import RATE_HZ
from tests.support import ROOT
from tests.support.chaos import write_inputs
from tests.support.command import COMMAND, Cli
from tests.support.signals import write_clips
from tune.show.watch import Watch, activity_text

Write = Callable[..., Path]
SHARD = "shard-000000-0000"
NOBODY = ", nobody works on it: start the same command to resume"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two iterations that has just begun."""
    settings = {"schedule": [{}, {}], "seed_training": {"steps": 300}, "distil": {"steps": 1200}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run"


def text(path: Path) -> str:
    return activity_text(Watch(path).look())


def write(path: Path, content: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def open_again(out: Path, *, num_clips: int, num_queries: int, audio_s: float) -> None:
    """Make a pass of the writers look unfinished: with a complete record of its shard, and without its manifest."""
    (out / "stems" / "manifest.json").rename(out / "manifest.json")
    record = read_sealed(record_path(out, SHARD), dict[str, Any])
    counts = {"num_clips": num_clips, "num_queries": num_queries, "num_shards": 1, "audio_s": audio_s}
    write_record(out, SHARD, {**record, **counts, **{f"{step}_s": 0.0 for step in STEPS}})  # type: ignore[typeddict-item]


def test_the_steps_of_a_run_follow_its_files(run: Path, write_pass: Write, cli: Cli) -> None:
    folder = run / "iterations"
    assert text(run) == "iteration 0: training the seed, 0 of 300 steps" + NOBODY
    for step in (100, 200):
        write(folder / "0" / ".separator-training" / "identity" / f"state-{step:08d}-0123456789abcdef.pt")
    assert text(run) == "iteration 0: training the seed, 200 of 300 steps" + NOBODY
    write(folder / "0" / "separator" / "separator.json")
    assert text(run) == "iteration 0: evaluating" + NOBODY
    write(folder / "0" / "iteration.json")
    assert text(run) == "iteration 1: preparing" + NOBODY
    out = write_pass([("a", "rain", np.ones(800, np.float32), {})], folder="run/iterations/1")
    open_again(out, num_clips=1, num_queries=1, audio_s=0.1)
    assert text(run) == "iteration 1: separating, 1 clips" + NOBODY
    (out / "manifest.json").rename(out / "stems" / "manifest.json")
    assert text(run) == "iteration 1: filtering" + NOBODY
    write(out / "tracks" / "manifest.json")
    with lock(run, "run"):
        assert text(run).startswith(f"iteration 1: distilling, 0 of 1,200 steps, by process {os.getpid()} on ")
    write(out / "separator" / "separator.json")
    assert text(run) == "iteration 1: evaluating" + NOBODY
    write(out / "iteration.json")
    write(folder / "2" / "iteration.json")
    assert cli("watch", run).out == "done\n"
    assert cli("watch", run, "--json").document()["step"] == "done"


def test_a_pass_has_its_clips_and_failures_and_the_speed_since_the_first_look(
    tmp_path: Path, write_pass: Write, cli: Cli
) -> None:
    noise_T = np.random.default_rng(0).normal(0.0, 0.1, RATE_HZ).astype(np.float32)
    corpus = read_corpus(write_clips(tmp_path / "corpus", {f"{number}.wav": noise_T for number in range(4)}))
    first = corpus.clips.to_pylist()[0]
    failed = dict(failure(first, step="decode", error=ValueError("cannot read it; repair it")))
    out = write_pass([("a", "low", noise_T, {}), ("b", "low", noise_T, {})], failures=[failed])
    open_again(out, num_clips=3, num_queries=4, audio_s=2.0)
    counts = Tasks(out / "corpus").write(corpus, rows_per_task=2, min_labels=1)
    assert counts["num_clips"] == 4
    watch = Watch(out)
    found = watch.look()
    assert (found["done"], found["total"], found["num_failed"], found["audio_per_s"]) == (3, 4, 2, None)
    assert activity_text(found).startswith("separating, 3 of 4 clips, 2 queries failed")
    for path in [*out.glob(f"*/{SHARD}*")]:
        path.with_name(path.name.replace("000000", "000001")).write_bytes(path.read_bytes())
    again = watch.look()
    assert (again["done"], again["total"]) == (6, 6), "failed clips that are tried again count twice"
    assert (again["audio_per_s"] or 0.0) > 0.0
    assert f"6 of 6 clips, 4 queries failed{NOBODY}" in cli("watch", out, "--once").out
    for parts, end in (((WHOLE,), ""), ((Slice(1, 3), Slice(2, 3)), " and 1 more")):
        with ExitStack() as held:
            for part in parts:
                take(out, part, held)
            holder = watch.look()["holder"] or ""
            assert holder.startswith(f"process {os.getpid()} on ") and holder.endswith(end)
    assert watch.look()["holder"] is None


def test_a_given_seed_is_not_trained(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"separator": "seed"}))
    assert text(run) == "iteration 0: evaluating" + NOBODY


def test_what_is_neither_a_run_nor_a_pass_is_refused(tmp_path: Path, cli: Cli) -> None:
    assert "must be a run, a pass or a search" in cli("watch", tmp_path).error()
    for content in ("a: 1", "- a", "schedule: ["):
        (tmp_path / "config.yaml").write_text(content)
        assert "config.yaml" in cli("watch", tmp_path).error()


@pytest.mark.slow
def test_a_real_run_is_watched_from_another_process_until_it_is_done(tmp_path: Path) -> None:
    """Its command is killed as it distils, which the watch says, and started again."""
    config, out = write_inputs(tmp_path / "inputs"), tmp_path / "run"
    words = [sys.executable, "-m", "clearsep", "run", str(config), "-o", str(out)]
    own = {"cwd": ROOT, "env": {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, start_new_session=True, **own)  # type: ignore[call-overload,no-any-return]

    process, seen = start(), list[str]()
    while not (out / "config.yaml").is_file():
        assert process.poll() is None
    with subprocess.Popen([COMMAND, "watch", str(out), "--every", "0.2"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        for line in watch.stdout:
            seen.append(line)
            if line.startswith("iteration 1: distilling") and process.poll() is None and NOBODY not in "".join(seen):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if NOBODY in line and process.poll() is not None:
                process = start()
    assert process.wait(timeout=60) == 0 and watch.returncode == 0
    steps = list(dict.fromkeys(line.split(",")[0].strip() for line in seen if line.startswith("iteration")))
    wanted = ["iteration 1: separating", "iteration 1: distilling"]
    assert [step for step in steps if step in wanted] == wanted
    assert steps.index("iteration 1: distilling") < steps.index("iteration 2: separating")
    assert any(NOBODY in line for line in seen) and "done\n" in seen
    assert "SDRi dB" in "".join(seen), "it ends with the table of the iterations"
    assert json.loads((out / "summary.json").read_text())["iterations"][-1]["iteration"] == 2
