"""Commands as jobs of a real Ray cluster that needs a token: submitting, following, stopping and resuming them."""

from __future__ import annotations

import json
import os
import shutil
import socket
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
from cluster import env_file, jobs, submit
from cluster.cli import parse_command
from cluster.packing import is_factory, pack
from engine.passes.speed import ray_metrics
from engine.storage.files import read_json
from tests.support import chaos
from tests.support.ray_nodes import BIN, StartedCluster

COMMAND = submit.Command(name="run", arguments=("run.yaml", "-o", "out"), out="out")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head:8265", "http://head:8265"),
        ("https://head/ray/", "https://head/ray"),
        (None, "http://127.0.0.1:8265"),
    ],
)
def test_the_address_is_that_of_the_dashboard(given: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert jobs.server_address(given) == address


@pytest.mark.parametrize("given", ["ray://head:10001", "http://user:secret@head:8265", "file:///tmp"])
def test_an_address_of_another_kind_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"give that of the cluster's dashboard|must hold no password") as caught:
        jobs.server_address(given)
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
def test_another_machines_address_without_token_or_tls_is_a_warning(
    address: str, mode: str | None, reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    warning = jobs.exposure_warning(address) or ""
    assert [reason for reason in ("run code on the cluster", "not encrypted") if reason in warning] == reasons


def test_on_this_machine_a_job_runs_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    line = submit.entrypoint(COMMAND, COMMAND.arguments, submit.JobConfig(preflight=False), here=True)
    cd, _ = line.split(" && ")
    assert subprocess.check_output(["sh", "-c", f"{cd} && pwd"], text=True).strip() == str(folder)
    assert line.endswith(f"exec {sys.executable} -P -m clearsep run run.yaml -o out")


def test_on_another_machine_a_job_runs_in_its_own_folder_with_the_nodes_python() -> None:
    command = submit.Command(name="separate-corpus", arguments=("a.csv",), out="s3://b/it's", separator="/s")
    line = submit.entrypoint(command, command.arguments, submit.JobConfig(), here=False)
    first, second = line.split(" && ")
    assert first == """python -P -m clearsep preflight '--out=s3://b/it'"'"'s' --separator=/s"""
    assert second == "exec python -P -m clearsep separate-corpus a.csv"


def test_results_must_not_go_to_the_jobs_own_folder_on_another_machine() -> None:
    with pytest.raises(ValueError, match=r"-o must be an s3:// address or an absolute path, got out .* give a bucket"):
        submit.check_paths(COMMAND, here=False)
    submit.check_paths(COMMAND, here=True)
    for out in ("s3://bucket/run", "/shared/run"):
        submit.check_paths(submit.Command(name="run", arguments=(), out=out), here=False)


def test_a_jobs_folder_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "my run.yaml"
    settings.write_text("steps: 1\n")
    folder = tmp_path / "sent"
    folder.mkdir()
    sent = pack(folder, [str(settings), "-o", "s3://b/run", "--set", "a=b.yaml"], here=False)
    assert sent == ["settings-0-my run.yaml", "-o", "s3://b/run", "--set", "a=b.yaml"]
    assert (folder / sent[0]).read_text() == "steps: 1\n"
    assert list(folder.rglob("__pycache__")) == []
    found = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import clearsep, tune.run, cluster.submit as s; print(clearsep.__file__, s.__file__)",
        ],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == [str(folder / "clearsep.py"), str(folder / "cluster" / "submit.py")], found.stderr


def test_a_separator_of_the_users_own_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its top-level package or file, whether an option or a YAML file names it; installed modules are not."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "models.py").write_text("def half(device): ...\n")
    (tmp_path / "single.py").write_text("def half(device): ...\n")
    (tmp_path / "run.yaml").write_text("corpus: natural.csv\nseparator: single:half\n")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "job"
    for arguments in (
        ["--separator", "mine.models:half", "numpy.random:rand"],
        ["run.yaml", "--set", "a=mine.models:b"],
    ):
        folder.mkdir()
        pack(folder, arguments, here=True)
        assert (folder / "mine" / "models.py").is_file()
        assert (folder / "single.py").is_file() == ("run.yaml" in arguments)
        assert not (folder / "numpy").exists()
        shutil.rmtree(folder)
    names = ("mine.models:half", "single:half", "s3://bucket/x", "/folder/a", "http://head:8265", "C:/x")
    assert [is_factory(name) for name in names] == [True, True, False, False, False, False]


def test_dependencies_are_pinned_to_the_local_versions() -> None:
    import torch

    pinned = dict(line.split("==") for line in submit.requirements())
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert {"torchaudio", "pyarrow", "boto3", "numpy"} <= pinned.keys()
    assert not {"ray", "pytest", "onnx"} & pinned.keys()


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", -9, 247), ("STOPPED", -15, 143)],
)
def test_the_exit_code_of_a_job_is_that_of_its_command(status: str, driver: int | None, code: int) -> None:
    info = JobDetails(type=JobType.SUBMISSION, entrypoint="x", status=JobStatus(status), driver_exit_code=driver)
    assert jobs.exit_code(info) == code


def test_the_arguments_of_a_command_are_parsed_before_it_is_sent() -> None:
    app = clearsep.command_line()
    command = parse_command(app, "distil", ["-o", "s3://b/d", "--from", "s3://b/s", "--set", "distil.steps=3"])
    assert (command.out, command.separator) == ("s3://b/d", "s3://b/s")
    assert parse_command(app, "distil", ["-o", "d", "--from", "scratch"]).separator is None
    assert parse_command(app, "demo", []).out == "runs/demo"
    assert parse_command(app, "run", ["laptop", "-o", "r", "--set", "separator=mine:half"]).separator == "mine:half"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("OWN_A=1\nOWN_B=two words\n", {"OWN_A": "1", "OWN_B": "two words"}),
        ("# a comment\n\nexport OWN_A='x=y'\nOWN_B=\"'\"\n", {"OWN_A": "x=y", "OWN_B": "'"}),
        ("OWN_A=\r\nOWN_B=$HOME", {"OWN_A": "", "OWN_B": "$HOME"}),
    ],
)
def test_a_file_of_variables_is_read(
    text: str, values: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.env"
    path.write_text(text)
    monkeypatch.setattr(os, "environ", {"CLEARSEP_ENV_FILE": str(path)})
    env_file.load_env_file()
    assert os.environ == {"CLEARSEP_ENV_FILE": str(path)} | values


def test_a_wrong_file_of_variables_is_an_error_without_its_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.env"
    monkeypatch.setenv("CLEARSEP_ENV_FILE", str(path))
    with pytest.raises(OSError, match=r"cannot read the environment file .* mount it on every node"):
        env_file.load_env_file()
    path.write_text("OWN_A=1\nhidden value\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must be NAME=VALUE, got another form; correct") as caught:
        env_file.load_env_file()
    assert "hidden" not in str(caught.value)


def clearsep_command(
    *words: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``clearsep`` in a process of its own."""
    command = [str(BIN / "clearsep"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=500, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["submit", "evaluate", "x"],
            "a submitted command must be one of demo, run, tune, separate-corpus, distil, got evaluate",
        ),
        (["submit", "run", "laptop", "-o", "x", "--address", "auto"], "--address must come before the command's name"),
        (["submit", "run", "laptop", "--sett", "a=b", "-o", "x"], "--sett"),
        (
            ["submit", "--env", "NO_SUCH_NAME", "run", "laptop", "-o", "x"],
            "environment variable NO_SUCH_NAME must be set",
        ),
        (
            ["submit", "--env-file", "secret.env", "run", "laptop", "-o", "x"],
            "--env-file must be the absolute path of a file on every node, got secret.env; mount a secret there",
        ),
        (["submit", "--metadata", "x", "run", "laptop", "-o", "x"], "--metadata must be KEY=VALUE, got 'x'"),
        (["submit", "--cpus", "-1", "run", "laptop", "-o", "x"], "num_cpus must be at least 0, got -1"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_sent(words: list[str], message: str) -> None:
    done = clearsep_command(*words, env=os.environ | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_cluster_is_an_error() -> None:
    done = clearsep_command("submit", "--address", "http://127.0.0.1:1", "run", "laptop", "-o", "x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot reach a Ray cluster at http://127.0.0.1:1 (no answer); start one")
    assert "Traceback" not in done.stderr


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
    return lambda *words, more=None: clearsep_command(*words, env=env | (more or {}), cwd=tmp_path)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_cluster_whose_agent_has_no_port_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    code = "import sys, clearsep, cluster.submit; cluster.submit._READY_S = 3.0; clearsep.main()"
    words = ["submit", "demo", "-o", str(tmp_path / "out")]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        cluster = StartedCluster(tmp_path, agent_port=other.getsockname()[1])
        try:
            env = cluster.env | {"RAY_API_SERVER_ADDRESS": cluster.address}
            done = subprocess.run(
                [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=120, check=False
            )
        finally:
            cluster.close()
    assert done.returncode == 1, done.stderr
    assert "cannot submit a job (the cluster has had no agent" in done.stderr
    assert "--dashboard-agent-listen-port=PORT" in done.stderr


@pytest.mark.slow
def test_the_token_is_needed(ray_cluster: StartedCluster, cli: Cli) -> None:
    for other in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = cli("submit", "run", "laptop", "-o", "x", more=other)
        assert done.returncode == 2, done.stderr
        assert "(it refused the token); set RAY_AUTH_MODE=token" in done.stderr
        assert ray_cluster.token not in done.stderr + done.stdout


@pytest.mark.slow
def test_the_jobs_exit_code_and_log_are_the_commands(cli: Cli) -> None:
    done = cli("submit", "--no-preflight", "--metadata", "team=birds", "run", "no-such-recipe", "-o", "out")
    assert done.returncode == 2, done.stderr
    assert "no-such-recipe" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("failed: Job entrypoint command failed with exit code 2")
    (job,) = [job for job in document(cli("jobs", "list", "--json")) if job["metadata"].get("team") == "birds"]
    assert (job["status"], job["exit_code"], job["command"], job["out"]) == ("FAILED", 2, "run", "out")
    assert document(cli("jobs", "status", job["job"], "--json"))["exit_code"] == 2
    assert "no-such-recipe" in cli("jobs", "logs", job["job"]).stdout
    unknown = cli("jobs", "status", "clearsep-none")
    assert (unknown.returncode, "there is no job clearsep-none" in unknown.stderr) == (2, True), unknown.stderr


@pytest.mark.slow
def test_a_node_with_a_problem_keeps_the_command_from_starting(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder should be")
    done = cli("submit", "run", "laptop", "-o", "out/run")
    assert done.returncode == 1
    assert "the cluster is not ready" in done.stdout
    assert "Error" in done.stdout
    assert "corpus" not in done.stdout  # `run` would have complained about it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_command_resumes_a_stopped_job(ray_cluster: StartedCluster, cli: Cli, tmp_path: Path) -> None:
    chaos.write_inputs(tmp_path / "inputs")
    settings = yaml.safe_load((tmp_path / "inputs" / "run.yaml").read_text())
    settings = json.loads(json.dumps(settings).replace(f"{tmp_path}/", ""))  # relative to where the user is
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["submit", "--env", "MY_SETTING"]
    secret = {"MY_SETTING": "spoken"}
    run = ["run", "run.yaml", "-o", "out"]

    first = cli(*words, "--no-wait", *run, more=secret)
    assert first.returncode == 0, first.stderr
    assert "warning: the values of MY_SETTING are readable in the job's metadata" in first.stderr
    job = first.stdout.strip()
    again = cli(*words, "--no-wait", *run, more=secret)
    assert again.stdout.strip() == job
    assert "already running as job" in again.stderr

    until = time.monotonic() + 300
    while not (tmp_path / "out" / "iterations" / "1" / "stems" / "pass.json").exists():
        assert time.monotonic() < until, cli("jobs", "logs", job).stdout
        time.sleep(0.2)
    stopped = document(cli("jobs", "stop", job, "--json"))
    assert (stopped["status"], stopped["exit_code"]) == ("STOPPED", 143)
    assert not (tmp_path / "out" / "summary.json").exists() or len(read_json(tmp_path / "out" / "summary.json")) < 3
    seed = (tmp_path / "out" / "iterations" / "0" / "separator" / "weights.safetensors").stat().st_mtime_ns

    resumed = cli(*words, "--no-wait", *run, more=secret).stdout.strip()
    metrics = ray_cluster.metrics_until(
        lambda: document(cli("jobs", "status", resumed, "--json"))["exit_code"] is not None
    )
    done = cli("jobs", "logs", "--follow", resumed)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "iteration 2" in done.stdout
    assert (tmp_path / "out" / "iterations" / "0" / "separator" / "weights.safetensors").stat().st_mtime_ns == seed
    entries = read_json(tmp_path / "out" / "summary.json")["iterations"]
    assert [entry["iteration"] for entry in entries] == [0, 1, 2]

    assert {
        name for name in ray_metrics.COUNTERS if metrics.get(f"ray_{name}_total", 0.0) > 0
    } == ray_metrics.COUNTERS.keys()
    on_cpu = ray_metrics.GAUGES.keys() - {"clearsep_vram_bytes"}
    assert {name for name in ray_metrics.GAUGES if f"ray_{name}" in metrics} == on_cpu

    printed = cli("jobs", "list", "--json").stdout + done.stdout + done.stderr + cli("jobs", "logs", job).stdout
    assert ray_cluster.token not in printed
