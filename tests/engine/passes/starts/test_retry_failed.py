"""A pass with too many failures on a real Ray, as its user sees it: stopped, inspected, repaired and finished."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import soundfile

from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import done_names
from engine.passes.run import run_pass
from engine.passes.shards import stem_shards, verify
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks
from engine.separators import find_separator
from tests.support.command import call_here
from tests.support.signals import RATE_HZ, TINY, mixture, read_failures, tiny_checkpoint, write_clips
from train.data.config import MixConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.run import run

pytestmark = pytest.mark.slow
NUM_CLIPS, NUM_TASKS = 200, 20
MISSING = [number for number in range(NUM_CLIPS) if number % 5 < 3]  # 60 % of them, in every task
SETTINGS = (
    *("rows_per_task=10", "shard_s=15.0", "clip_s=3.0", "min_clip_s=0.5", "num_gpus_per_actor=0"),
    "batch_s=0.5",  # one clip in a batch: others in the batch change the last bit of its stems
)
Files = dict[str, Any]
Command = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray shared by the commands of this module."""
    with connect(num_cpus=2):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def files() -> Files:
    return {f"{number:03d}.wav": mixture(RATE_HZ // 2, seed=number) for number in range(NUM_CLIPS)}


@pytest.fixture(scope="module")
def corpus(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a corpus, 60 % of whose files are missing."""
    folder = tmp_path_factory.mktemp("corpus")
    manifest = write_clips(folder, files)
    for number in MISSING:
        (folder / f"{number:03d}.wav").unlink()
    return manifest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("separator"))


def repair(corpus: Path, files: Files) -> None:
    for number in MISSING:
        soundfile.write(corpus.parent / f"{number:03d}.wav", files[f"{number:03d}.wav"], RATE_HZ, subtype="FLOAT")


def words(corpus: Path, checkpoint: Path, out: Path, *more: str, settings: tuple[str, ...] = SETTINGS) -> list[str]:
    overrides = [word for setting in settings for word in ("--set", setting)]
    return ["separate-corpus", str(corpus), "--separator", str(checkpoint), "-o", str(out), *overrides, *more]


def spawned(words: list[str], address: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command, env = [sys.executable, "-m", "clearsep", *words], os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, on the Ray that it is connected to."""

    def call(words: list[str]) -> subprocess.CompletedProcess[str]:
        done = call_here(monkeypatch, capsys, *words)
        return subprocess.CompletedProcess(words, done.code, done.out, done.err)

    return call


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return str(done.stderr).strip().splitlines()[-1]


def contents(out: Path) -> set[tuple[Any, ...]]:
    """Clip, label, audio and scores of every stem of a closed pass."""
    rows = [row for shard in stem_shards(out / "stems") for row in pq.read_table(shard).to_pylist()]
    found = {tuple(value for name, value in row.items() if name != "labels") for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def stopped(
    address: str, corpus: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A pass over the incomplete corpus, and the output of its command."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    return out, spawned(words(corpus, checkpoint, out), address)


@pytest.fixture(scope="module")
def undisturbed(
    address: str, files: Files, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Manifest and pass of the complete corpus."""
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = write_clips(folder / "corpus", files)
    config = PassConfig(rows_per_task=10, shard_s=15.0, clip_s=3.0, min_clip_s=0.5, num_gpus_per_actor=0.0, batch_s=0.5)
    run_pass(read_corpus(manifest), folder / "out", separator=find_separator(checkpoint), config=config)
    return manifest, folder / "out"


def test_a_pass_with_too_many_failures_stops_early_with_reasons_and_remedies(
    stopped: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = stopped
    assert (done.returncode, done.stdout) == (1, "")
    message = last_line(done)
    pattern = r"error: failed queries must be at most max_failed_fraction = 0\.5 of all, got (\d+) of (\d+) \("
    num_failed, num_queries = map(int, re.findall(pattern, message)[0])
    assert 200 <= num_queries < 2 * NUM_CLIPS and 0.5 < num_failed / num_queries < 0.7
    assert "in decode: " in message and "cannot open it" in message
    assert f"list them with `clearsep failures {out}`" in message
    assert "remove the cause and start the same command with --retry-failed" in message
    assert "start the same command again" not in message  # it would stop again
    assert len(read_failures(out)) < len(MISSING) and not (out / "stems" / "manifest.json").exists()


def test_its_failures_are_listed_with_their_reasons(stopped: tuple[Path, Any], command: Command) -> None:
    out, _ = stopped
    done = command(["failures", str(out), "--json"])
    value = json.loads(done.stdout)
    rows = read_failures(out).to_pylist()
    assert done.returncode == 0 and value["failures"] == rows and value["num_rows"] == len(rows) >= 50
    assert value["num_queries"] == sum(row["num_queries"] for row in rows) == 2 * len(rows)
    assert sum(reason["num_queries"] for reason in value["reasons"]) == value["num_queries"]
    assert {int(row["path"][:3]) for row in rows} <= set(MISSING)
    table = command(["failures", str(out)])
    assert "Reasons" in table.stdout and f"the first 50 of {len(rows)}" in table.stdout


def test_the_same_command_stops_again_and_a_higher_limit_lets_it_pass(
    stopped: tuple[Path, Any], corpus: Path, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped[0], out)
    again = command(words(corpus, checkpoint, out))
    assert again.returncode == 1 and "must be at most max_failed_fraction = 0.5" in last_line(again)
    done = command(words(corpus, checkpoint, out, "--set", "max_failed_fraction=1", "--json"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["num_failed"] == 2 * len(MISSING) and summary["num_stems"] == 2 * (NUM_CLIPS - len(MISSING))
    assert summary["num_queries"] == 2 * NUM_CLIPS and len(read_failures(out)) == len(MISSING)


def test_a_retry_with_the_files_in_place_makes_only_these_and_the_data_are_those_of_an_undisturbed_pass(
    address: str,
    stopped: tuple[Path, Any],
    undisturbed: tuple[Path, Path],
    corpus: Path,
    checkpoint: Path,
    files: Files,
    command: Command,
    tmp_path: Path,
) -> None:
    """Shards that existed before do not change; a second retry does nothing."""
    repaired, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus.parent, repaired)
    shutil.copytree(stopped[0], out)
    repair(repaired / corpus.name, files)
    done_before = [
        out / "stems" / f"{name}{suffix}" for name in done_names(out) for suffix in (".parquet", ".done.json")
    ]
    untouched = {path: path.stat().st_mtime_ns for path in done_before}  # the stop may have left one without a record
    retry = words(repaired / corpus.name, checkpoint, out, "--retry-failed", "--json")
    done = spawned(retry, address)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert contents(out) == contents(undisturbed[1])
    assert len(read_failures(out)) == 0 and verify(out / "stems") == []
    summary = json.loads(done.stdout)
    wanted = json.loads((undisturbed[1] / "summary.json").read_text())
    for name in ("num_clips", "num_queries", "num_stems", "num_failed", "num_set_aside"):
        assert summary[name] == wanted[name], name
    assert summary["audio_h"] == pytest.approx(wanted["audio_h"])
    times = {path: path.stat().st_mtime_ns for path in (out / "stems").iterdir()}
    assert json.loads(command(retry).stdout) == summary
    assert {path: path.stat().st_mtime_ns for path in (out / "stems").iterdir()} == times
    assert len(list((out / "corpus").glob("retry-*.parquet"))) == 1


def test_a_pass_with_other_settings_is_refused_with_the_difference(
    undisturbed: tuple[Path, Path], checkpoint: Path, command: Command
) -> None:
    manifest, out = undisturbed
    settings = tuple(setting.replace("clip_s=3.0", "clip_s=2.0") for setting in SETTINGS)
    done = command(words(manifest, checkpoint, out, settings=settings))
    assert (done.returncode, done.stdout) == (2, "")
    assert "got a pass with another settings (clip_s 3.0, not 2.0);" in last_line(done)


def started(words: list[str], out: Path) -> subprocess.Popen[str]:
    """A command on a Ray of its own that has finished some of its shards, but not most of them."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clearsep", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    while not done_names(out) and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


def test_a_folder_in_use_is_refused_and_a_terminated_pass_ends_with_a_message_and_resumes(
    undisturbed: tuple[Path, Path], checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    """The first command is frozen until the second one was refused."""
    manifest, out = undisturbed[0], tmp_path / "out"
    command_line = words(manifest, checkpoint, out)
    process = started(command_line, out)
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGSTOP)
        second = command(command_line)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"{out} is in use by process {process.pid} on " in last_line(second)
        process.send_signal(signal.SIGCONT)
        terminated = time.monotonic()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (143, "")
    assert stderr.strip().splitlines()[-1] == "terminated; start the same command again to resume"
    assert "Traceback" not in stderr and time.monotonic() - terminated < 60
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    before = set(done_names(out))
    assert 0 < len(before) < len(done_names(undisturbed[1]))
    done = command(command_line)
    assert done.returncode == 0, done.stderr
    shards = stem_shards(undisturbed[1] / "stems")
    assert [shard.name for shard in shards] == [shard.name for shard in stem_shards(out / "stems")]
    assert all(shard.read_bytes() == (out / "stems" / shard.name).read_bytes() for shard in shards)


def test_a_command_that_is_terminated_while_ray_starts_ends_with_the_same_message(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Ray replaces the command's signal handler by its own while it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clearsep", *words(corpus, checkpoint, tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    try:
        while not psutil.Process(process.pid).children() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert stderr.strip().splitlines()[-1] == "terminated; start the same command again to resume"


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    """A run of one iteration over ten clips, six of them missing."""
    clips = {f"{number}.wav": mixture(RATE_HZ, seed=number) if number < 4 else None for number in range(10)}
    training = DistilConfig(
        steps=2,
        mix=MixConfig(batch_size=2, segment_s=0.25),
        validate_every_steps=2,
        num_workers=0,
        threads_per_worker=1,
    )
    return RunConfig(
        corpus=str(write_clips(tmp_path / "corpus", clips)),
        separator=str(tiny_checkpoint(tmp_path / "separator")),
        network=TINY,
        engine=PassConfig(rows_per_task=4, num_gpus_per_actor=0.0),
        schedule=(Thresholds(min_re_sdr_db=-99.0),),
        distil=training,
    )


def test_a_run_with_too_many_failures_finishes_with_a_retry(
    address: str, run_config: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"at most engine\.max_failed_fraction = 0\.5 of all, got 12 of 20"):
        run(run_config, out)
    with pytest.raises(RuntimeError, match=r"got 12 of 20"):
        run(run_config, out)
    for number in range(4, 9):  # one stays missing
        path = Path(run_config.corpus).parent / f"{number}.wav"
        soundfile.write(path, mixture(RATE_HZ, seed=number), RATE_HZ, subtype="FLOAT")
    summary = run(run_config, out, retry_failed=True)
    entry = summary["iterations"][1]
    assert (entry["num_clips"], entry["num_queries"], entry["num_stems"], entry["num_failed"]) == (10, 20, 18, 2)
    assert entry["num_kept"] == 18 == len(read_tracks(out / "iterations" / "1" / "tracks")[0])
    with pytest.raises(
        ValueError,
        match=r"cannot retry failed clips of .* \(all its students are trained, so nothing would use their stems\)",
    ):
        run(run_config, out, retry_failed=True)
    assert run(run_config, out) == summary


def test_a_run_whose_student_is_trained_gets_no_other_tracks(
    address: str, run_config: RunConfig, tmp_path: Path
) -> None:
    """As after a stop between training and the iteration's record: without a retry the run resumes."""
    out = tmp_path / "run"
    config = dataclasses.replace(run_config, engine=dataclasses.replace(run_config.engine, max_failed_fraction=1.0))
    summary = run(config, out)
    (out / "iterations" / "1" / "iteration.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"cannot retry failed clips of iteration 1 .*student has already learned.*without --retry-failed",
    ):
        run(config, out, retry_failed=True)
    again = run(config, out)["iterations"][1]
    assert again | {"wall_s": 0.0} == summary["iterations"][1] | {"wall_s": 0.0}
