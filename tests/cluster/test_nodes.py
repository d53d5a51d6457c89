"""A submitted run on nodes that come and go gives the data of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.passes.records import done_names
from engine.separators import read_description
from tests.support import chaos
from tests.support.ray_nodes import BIN, StartedCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedCluster]:
    """A head with one CPU that needs a token."""
    started = StartedCluster(tmp_path_factory.mktemp("nodes"), num_cpus=1)
    yield started
    started.close()


def clearsep(*words: object, env: dict[str, str], ends_with: int = 0) -> str:
    """Standard output of a command."""
    command = [str(BIN / "clearsep"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == ends_with, done.stderr + done.stdout
    return done.stdout


class Submitted:
    """A command that runs on the cluster."""

    def __init__(self, cluster: StartedCluster, *words: object) -> None:
        # Sums depend on the number of threads, which Ray sets to 1 for a job that holds no CPU.
        threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
        self.env = cluster.env | {"RAY_API_SERVER_ADDRESS": cluster.address} | threads
        self.job = clearsep("submit", "--no-wait", "--env", "OMP_NUM_THREADS", *words, env=self.env).strip()

    def until(self, seen: Callable[[], object], what: str, limit_s: float = 240.0) -> None:
        """Wait for something to be seen while the job runs."""
        until = time.monotonic() + limit_s
        while not seen():
            for _ in range(200):  # asking for the state takes seconds of a CPU that the job needs
                time.sleep(0.05)
                if seen():
                    return
            state = json.loads(clearsep("jobs", "status", self.job, "--json", env=self.env))
            assert state["exit_code"] is None, f"the job ended before {what}: {self.log()}"
            assert time.monotonic() < until, f"not seen in {limit_s:.0f} s: {what}; {self.log()}"

    def log(self) -> str:
        return clearsep("jobs", "logs", self.job, env=self.env)

    def end(self) -> str:
        """The log, once the job has succeeded."""
        return clearsep("jobs", "logs", "--follow", self.job, env=self.env)


def at_work(node: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """The node's workers of a kind."""
    try:
        return chaos.find_workers(kind, [node.pid])
    except psutil.NoSuchProcess:
        return []


def test_a_run_survives_the_loss_of_nodes_in_each_step_and_uses_new_ones(
    cluster: StartedCluster, tmp_path: Path, undisturbed: chaos.Undisturbed
) -> None:
    out = tmp_path / "out"
    first = cluster.add()
    run = Submitted(cluster, "run", undisturbed.config, "-o", out)
    iteration = out / "iterations" / "1"
    run.until(lambda: done_names(iteration) and at_work(first, "actor"), "the first node at work on the pass")
    cluster.preempt(first, notice_s=3)
    others = [cluster.add(), cluster.add()]
    run.until((iteration / "tracks" / "manifest.json").exists, "the end of the pass")
    run.until(lambda: any(at_work(node, "trainer") for node in (*others, cluster.head)), "a training")
    lost = next((node for node in others if at_work(node, "trainer")), others[0])
    cluster.kill(lost)
    (left,) = (node for node in others if node is not lost)
    run.until(lambda: at_work(left, "actor"), "the node that is left at work on the second pass")
    assert "iteration 2" in run.end()

    expected, found = undisturbed.contents, chaos.contents(out)
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in found if found[name] != expected[name]} == {}


def test_an_elastic_training_continues_with_the_remaining_workers(cluster: StartedCluster, tmp_path: Path) -> None:
    chaos.write_inputs(tmp_path / "inputs")
    steps = 120
    settings = {
        "num_workers": "[1, 4]",
        "use_gpu": "false",
        "steps": steps,
        "validate_every_steps": 20,
        "threads_per_worker": 1,
        "mix": "{batch_size: 4, segment_s: 0.5}",
    }
    network = {"channels": 32, "num_blocks": 2, "num_bands": 24, "num_fft": 256, "hop_samples": 128}
    words = [f"distil.{name}={value}" for name, value in settings.items()]
    words += [f"network.{name}={value}" for name, value in (network | {"sample_rate_hz": 8000}).items()]
    other = cluster.add()
    cluster.until_nodes(2)
    clips = tmp_path / "inputs" / "clips.csv"
    out = tmp_path / "student"
    run = Submitted(
        cluster,
        *("distil", "-o", out, "--from", "scratch", "--clean", clips, "--folds", 1),
        *(word for setting in words for word in ("--set", setting)),
    )
    run.until(lambda: at_work(other, "trainer") and at_work(cluster.head, "trainer"), "workers on both nodes")
    run.until((tmp_path / ".student-training" / "progress.jsonl").read_text, "a checkpoint")
    cluster.kill(other)
    run.end()
    entry = read_description(out)["history"][-1]
    assert entry["steps"] == steps
    assert [point["step"] for point in entry["curve"]] == [float(step) for step in range(20, steps + 1, 20)]
