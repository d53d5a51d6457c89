"""Commands as jobs of a real Ray cluster that asks for a token; what is sent, followed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType

import clearsep
from cluster import submit as jobs
from cluster.cli import _parsed
from engine.passes import ray_metrics as gauges
from engine.storage.files import read_json
from tests.support import chaos
from tests.support.ray_nodes import BIN, StartedCluster

COMMAND = jobs.Command(name="run", arguments=("run.yaml", "-o", "out"), out="out")


@pytest.mark.parametrize(
    ("named", "address"),
    [
        ("head:8265", "http://head:8265"),
        ("https://head/ray/", "https://head/ray"),
        (None, "http://127.0.0.1:8265"),
    ],
)
def test_an_address_is_that_of_the_dashboard(named: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert jobs.address_of(named) == address


@pytest.mark.parametrize("named", ["ray://head:10001", "http://user:secret@head:8265", "file:///tmp"])
def test_an_address_of_another_kind_is_refused(named: str) -> None:
    with pytest.raises(ValueError, match=r"dashboard|no password") as caught:
        jobs.address_of(named)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "mode", "reasons"),
    [
        ("http://127.0.0.1:8265", None, []),
        ("http://localhost:8265", None, []),
        ("http://[::1]:8265", None, []),
        ("http://10.0.0.7:8265", None, ["run code on the cluster", "not encrypted"]),
        ("http://10.0.0.7:8265", "token", ["not encrypted"]),
        ("https://ray.example.org", None, ["run code on the cluster"]),
        ("https://ray.example.org", "token", []),
    ],
)
def test_an_address_elsewhere_without_token_or_tls_is_warned_of(
    address: str, mode: str | None, reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    told = jobs.exposure(address) or ""
    assert [reason for reason in ("run code on the cluster", "not encrypted") if reason in told] == reasons


def test_on_this_machine_a_job_runs_where_its_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    line = jobs.entrypoint(COMMAND, COMMAND.arguments, jobs.JobConfig(preflight=False), here=True)
    place, _ = line.split(" && ")
    assert subprocess.check_output(["sh", "-c", f"{place} && pwd"], text=True).strip() == str(folder)
    assert line.endswith(f"exec {sys.executable} -P -m clearsep run run.yaml -o out")


def test_elsewhere_it_runs_in_its_own_folder_with_the_nodes_python() -> None:
    asked = jobs.Command(name="separate-corpus", arguments=("a.csv",), out="s3://b/it's", separator="/s")
    line = jobs.entrypoint(asked, asked.arguments, jobs.JobConfig(), here=False)
    first, second = line.split(" && ")
    assert first == """python -P -m clearsep preflight '--out=s3://b/it'"'"'s' --separator=/s"""
    assert second == "exec python -P -m clearsep separate-corpus a.csv"


def test_elsewhere_results_must_not_lie_in_the_jobs_own_folder() -> None:
    with pytest.raises(ValueError, match=r"out would lie in the job's own folder .* s3:// address"):
        jobs.check_paths(COMMAND, here=False)
    jobs.check_paths(COMMAND, here=True)
    for out in ("s3://bucket/run", "/shared/run"):
        jobs.check_paths(jobs.Command(name="run", arguments=(), out=out), here=False)


def test_what_is_sent_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "my run.yaml"
    settings.write_text("steps: 1\n")
    folder = tmp_path / "sent"
    folder.mkdir()
    sent = jobs.pack(folder, [str(settings), "-o", "s3://b/run", "--set", "a=b.yaml"], here=False)
    assert sent == ["settings-0-my run.yaml", "-o", "s3://b/run", "--set", "a=b.yaml"]
    assert (folder / sent[0]).read_text() == "steps: 1\n"
    assert list(folder.rglob("__pycache__")) == []
    found = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import clearsep, tune.loop, cluster.submit as s; print(clearsep.__file__, s.__file__)",
        ],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == [str(folder / "clearsep.py"), str(folder / "cluster" / "submit.py")], found.stderr


def test_dependencies_are_pinned_to_what_is_here() -> None:
    import torch

    pinned = dict(line.split("==") for line in jobs.requirements())
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert {"torchaudio", "pyarrow", "boto3", "numpy"} <= pinned.keys()
    assert not {"ray", "pytest", "transformers"} & pinned.keys()


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", -9, 247), ("STOPPED", -15, 143)],
)
def test_a_jobs_exit_code_is_its_commands(status: str, driver: int | None, code: int) -> None:
    info = JobDetails(type=JobType.SUBMISSION, entrypoint="x", status=JobStatus(status), driver_exit_code=driver)
    assert jobs.exit_code(info) == code


def test_a_commands_arguments_are_read_before_it_is_sent() -> None:
    asked = _parsed(clearsep.app, "distil", ["-o", "s3://b/d", "--from", "s3://b/s", "--set", "distil.steps=3"])
    assert (asked.out, asked.separator) == ("s3://b/d", "s3://b/s")
    assert _parsed(clearsep.app, "distil", ["-o", "d", "--from", "scratch"]).separator is None
    assert _parsed(clearsep.app, "demo", []).out == "runs/demo"


def say(*words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What ``clearsep`` answers."""
    command = [str(BIN / "clearsep"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=500, check=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit", "evaluate", "x"], "evaluate is not submitted"),
        (["submit", "run", "laptop", "-o", "x", "--address", "auto"], "give --address before"),
        (["submit", "run", "laptop", "--sett", "a=b", "-o", "x"], "--sett"),
        (["submit", "--env", "NO_SUCH_NAME", "run", "laptop", "-o", "x"], "NO_SUCH_NAME is not set here"),
        (["submit", "--metadata", "x", "run", "laptop", "-o", "x"], "KEY=VALUE"),
        (["submit", "--cpus", "-1", "run", "laptop", "-o", "x"], "num_cpus is -1"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_sent(words: list[str], told: str) -> None:
    said = say(*words, env=os.environ | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"})
    assert said.returncode == 2
    assert told in said.stderr
    assert "Traceback" not in said.stderr


def test_a_cluster_that_is_not_there_is_said_so() -> None:
    said = say("submit", "--address", "http://127.0.0.1:1", "run", "laptop", "-o", "x")
    assert said.returncode == 1
    assert said.stderr.startswith("error: no Ray cluster answers at http://127.0.0.1:1; start one")
    assert "Traceback" not in said.stderr


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedCluster]:
    cluster = StartedCluster(tmp_path_factory.mktemp("cluster"), num_cpus=2)
    yield cluster
    cluster.close()


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(ray_cluster: StartedCluster, tmp_path: Path) -> Cli:
    """``clearsep`` with the cluster's token, in a folder of the test's own."""
    env = ray_cluster.env | {"RAY_API_SERVER_ADDRESS": ray_cluster.address}
    return lambda *words, more=None: say(*words, env=env | (more or {}), cwd=tmp_path)


def shown(said: subprocess.CompletedProcess[str]) -> Any:
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


@pytest.mark.slow
def test_without_the_token_nothing_is_let_in(ray_cluster: StartedCluster, cli: Cli) -> None:
    for other in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        said = cli("submit", "run", "laptop", "-o", "x", more=other)
        assert said.returncode == 2, said.stderr
        assert "did not accept the token: set RAY_AUTH_MODE=token" in said.stderr
        assert ray_cluster.token not in said.stderr + said.stdout


@pytest.mark.slow
def test_the_jobs_exit_code_and_words_are_the_commands(cli: Cli) -> None:
    said = cli("submit", "--no-preflight", "--metadata", "team=birds", "run", "no-such-recipe", "-o", "out")
    assert said.returncode == 2, said.stderr
    assert "no-such-recipe" in said.stdout
    assert said.stderr.splitlines()[-1].endswith("failed: Job entrypoint command failed with exit code 2")
    (job,) = [job for job in shown(cli("jobs", "list", "--json")) if job["metadata"].get("team") == "birds"]
    assert (job["status"], job["exit_code"], job["command"], job["out"]) == ("FAILED", 2, "run", "out")
    assert shown(cli("jobs", "status", job["job"], "--json"))["exit_code"] == 2
    assert "no-such-recipe" in cli("jobs", "logs", job["job"]).stdout
    unknown = cli("jobs", "status", "clearsep-none")
    assert (unknown.returncode, "knows no job clearsep-none" in unknown.stderr) == (2, True), unknown.stderr


@pytest.mark.slow
def test_a_node_that_is_not_fit_keeps_the_command_from_beginning(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder should be")
    said = cli("submit", "run", "laptop", "-o", "out/run")
    assert said.returncode == 1
    assert "do not begin like this" in said.stdout
    assert "Error" in said.stdout
    assert "corpus" not in said.stdout  # which `run` would have asked for


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_job_is_gone_on_with_by_the_same_line(ray_cluster: StartedCluster, cli: Cli, tmp_path: Path) -> None:
    chaos.write_inputs(tmp_path / "inputs")
    settings = yaml.safe_load((tmp_path / "inputs" / "run.yaml").read_text())
    settings = json.loads(json.dumps(settings).replace(f"{tmp_path}/", ""))  # relative to where the user is
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["submit", "--env", "MY_SETTING", "--env", "AWS_SECRET_ACCESS_KEY"]
    secret = {"MY_SETTING": "spoken", "AWS_SECRET_ACCESS_KEY": "hidden-value"}
    run = ["run", "run.yaml", "-o", "out"]

    first = cli(*words, "--no-wait", *run, more=secret)
    assert first.returncode == 0, first.stderr
    assert "sees the value of AWS_SECRET_ACCESS_KEY" in first.stderr
    job = first.stdout.strip()
    again = cli(*words, "--no-wait", *run, more=secret)
    assert again.stdout.strip() == job
    assert "at work there already" in again.stderr

    until = time.monotonic() + 300
    while not (tmp_path / "out" / "iterations" / "1" / "stems" / "pass.json").exists():
        assert time.monotonic() < until, cli("jobs", "logs", job).stdout
        time.sleep(0.2)
    stopped = shown(cli("jobs", "stop", job, "--json"))
    assert (stopped["status"], stopped["exit_code"]) == ("STOPPED", 143)
    assert not (tmp_path / "out" / "summary.json").exists() or len(read_json(tmp_path / "out" / "summary.json")) < 3
    seed = (tmp_path / "out" / "iterations" / "0" / "separator" / "weights.safetensors").stat().st_mtime_ns

    goes_on = cli(*words, "--no-wait", *run, more=secret).stdout.strip()
    metrics = ray_cluster.metrics_until(
        lambda: shown(cli("jobs", "status", goes_on, "--json"))["exit_code"] is not None
    )
    done = cli("jobs", "logs", "--follow", goes_on)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "iteration 2" in done.stdout
    assert (tmp_path / "out" / "iterations" / "0" / "separator" / "weights.safetensors").stat().st_mtime_ns == seed
    entries = read_json(tmp_path / "out" / "summary.json")["iterations"]
    assert [entry["iteration"] for entry in entries] == [0, 1, 2]

    assert {name for name in gauges.COUNTERS if metrics.get(f"ray_{name}_total", 0.0) > 0} == gauges.COUNTERS.keys()
    on_cpu = gauges.GAUGES.keys() - {"clearsep_vram_bytes"}
    assert {name for name in gauges.GAUGES if f"ray_{name}" in metrics} == on_cpu

    told = cli("jobs", "list", "--json").stdout + done.stdout + done.stderr + cli("jobs", "logs", job).stdout
    assert ray_cluster.token not in told
    assert "hidden-value" not in told
