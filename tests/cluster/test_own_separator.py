"""A separator of the user's own, ``package.module:factory``, in every command and as a job on a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.storage.files import read_json
from tests.support.command import COMMAND, Cli
from tests.support.ray_nodes import StartedCluster

RATE_HZ = 8000
MODULE = """
import os


class Half:
    sample_rate_hz, labels = 8000, ("bell", "dog")

    def separate(self, mix_BT, queries, *, lengths=None):
        return 0.5 * mix_BT


def half(device):
    if "CLEARSEP_ENV_FILE" in os.environ:
        assert os.environ["OWN_SECRET"] == "hidden value"
    return Half()
"""


@pytest.fixture
def folder(tmp_path: Path, write_sources: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the module ``own_models``, clips and a manifest of mixtures."""
    tones = {hz: 0.3 * np.sin(2 * np.pi * hz * np.arange(RATE_HZ) / RATE_HZ) for hz in (400, 500, 900, 1100)}
    clips = [("b0", "bell", 1, tones[400]), ("b1", "bell", 1, tones[500])]
    clips += [("d0", "dog", 1, tones[900]), ("d1", "dog", 1, tones[1100])]
    write_sources(clips, folder=".")
    write_sources([(f"mix{i}", "x", 1, tones[400] + tones[900] * (i + 1)) for i in range(2)], folder="mixtures")
    (tmp_path / "natural.csv").write_text("path,labels\nmixtures/mix0.wav,bell;dog\nmixtures/mix1.wav,bell;dog\n")
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


def test_commands_take_it_by_its_dotted_name(cli: Cli, folder: Path) -> None:
    own = "own_models:half"
    report = cli("evaluate", own, "--clips", "clips.csv", "--num-mixtures", 3, "--json").document()
    assert report["num_stems"] == 6 and report["si_sdri_db"] == pytest.approx(0.0, abs=0.1)
    plan = cli("plan", "natural.csv", "--separator", own, "--rows", 2, "--json").document()
    assert (plan["num_clips"], plan["num_queries"], plan["num_failed"]) == (2, 4, 0)
    stems = cli("score", "mixtures/mix0.wav", "b0.wav", "d0.wav", "--labels", "bell,dog", "--separator", own, "--json")
    assert all(stem["scores"]["rival_leak_db"] is not None for stem in stems.document()["stems"])
    words = ["--clean", "clips.csv", "-o", "estimator", "--set", "num_mixtures=30", "--json"]
    assert cli("calibrate", own, *words).document()["num_stems"] == 60


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:quarter", "there is no 'quarter' in own_models"),
        ("no_such_models:half", "cannot import no_such_models of no_such_models:half"),
    ],
)
def test_a_wrong_name_is_an_error(cli: Cli, folder: Path, name: str, message: str) -> None:
    assert message in cli("evaluate", name, "--clips", "clips.csv").error()


def shadow(folder: Path, kind: str) -> None:
    """Give ``folder`` modules, packages or plain folders that have the names of our packages."""
    for name in ("engine", "train", "tune", "cluster"):
        path = {"modules": folder / f"{name}.py", "packages": folder / name / "__init__.py"}.get(
            kind, folder / name / "x"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('my own script has run')\n")


@pytest.mark.parametrize(
    ("kind", "start"),
    [("modules", [COMMAND]), ("packages", [sys.executable, "-m", "clearsep"]), ("folders", [COMMAND])],
    ids=["modules", "packages", "folders"],
)
def test_modules_of_the_user_with_our_names_break_nothing(folder: Path, kind: str, start: list[str]) -> None:
    """On PYTHONPATH and in the current folder; decoding has processes of its own."""
    shadow(folder, kind)
    words = ["plan", "natural.csv", "--separator", "own_models:half", "--rows", "2", "--json"]
    done = subprocess.run(
        [*start, *words], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["num_clips"], json.loads(done.stdout)["num_failed"]) == (2, 0)


def test_a_module_of_the_user_that_was_imported_before_is_an_error(folder: Path) -> None:
    (folder / "train.py").write_text("")
    code = "import train, clearsep"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: train must be the package of ")
    assert f"got {folder / 'train.py'}, which was imported before; import clearsep first" in done.stderr


@pytest.mark.slow
def test_it_separates_a_corpus_on_this_machine_and_as_a_job(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shadow(folder, "modules")
    env = os.environ | {"PYTHONPATH": str(folder)}
    command = ["separate-corpus", "natural.csv", "--separator", "own_models:half", "--set", "min_actors=1"]
    words = [COMMAND, *command, "-o", "here", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["num_stems"], summary["num_failed"]) == (4, 0)

    cluster = StartedCluster(tmp_path_factory.mktemp("cluster"), num_cpus=2)
    try:
        env |= cluster.env | {"RAY_API_SERVER_ADDRESS": cluster.address, "PYTHONPATH": str(folder)}
        secret = folder / "secret.env"
        secret.write_text("OWN_SECRET='hidden value'\n")
        # with a preflight, which runs the separator too
        words = [COMMAND, "submit", "--env-file", str(secret), *command, "-o", "there"]
        for _ in range(10):
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=300)
            if "No available agent" not in done.stderr:  # the cluster has just started
                break
            time.sleep(1.0)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "own_models:half" not in done.stderr
        stored = read_json(folder / "there" / "summary.json")
        assert stored["fingerprint"] == summary["fingerprint"], "the same separator gives the same stems"
        written = [
            path.read_bytes()
            for name in cluster.temp_folders
            for path in Path(name).glob("session_*/logs/**/*")
            if path.is_file()
        ]
        assert written and not any(b"hidden value" in data for data in written), "no log holds it"
        jobs = subprocess.check_output([COMMAND, "jobs", "list", "--json"], text=True, env=env)
        assert "there" in jobs and "hidden value" not in jobs
    finally:
        cluster.close()
