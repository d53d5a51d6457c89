"""Passes and a complete run in S3, on a real Ray: the same bytes as on a local disk, whatever the network does."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from engine.selection.tracks import select_tracks
from engine.separators import find_separator, save
from engine.storage.files import read_json, sha256_file
from engine.storage.paths import Location, location
from engine.storage.s3 import S3Path
from tests.support.command import call_here
from tests.support.signals import RATE_HZ, TINY, mixture, read_failures, tiny_separator, two_bands
from train.data.config import MixConfig
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.run import run

if TYPE_CHECKING:
    from tests.support.s3_server import S3, Proxy  # pytest imports it itself, as a plug-in

pytest_plugins = ["tests.support.s3_server"]
pytestmark = pytest.mark.slow

NUM_CLIPS = 18
CONFIG = PassConfig(rows_per_task=3, shard_s=4.0, clip_s=2.0, num_gpus_per_actor=0.0)
SETTINGS = ("rows_per_task=3", "shard_s=4.0", "clip_s=2.0", "num_gpus_per_actor=0")


def secret() -> str:
    """The secret key, which must not be written anywhere."""
    return os.environ["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture(scope="module", autouse=True)
def address(s3_proxy: Proxy) -> Iterator[str]:
    """A Ray whose workers know the address of the server, and whose logs must not contain the secret key."""
    from tests.support.s3_server import environment

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment(s3_proxy).items():
            patch.setenv(name, value)
        with connect(num_cpus=2):
            yield ray.get_runtime_context().gcs_address
            logs = Path(ray._private.worker._global_node.get_logs_dir_path())
            assert [path for path in logs.rglob("*") if path.is_file() and secret().encode() in path.read_bytes()] == []


@pytest.fixture(autouse=True)
def no_secrets(s3: S3) -> Iterator[None]:
    """No object that was written holds a credential."""
    yield
    s3.proxy.reset()
    s3.proxy.start()
    keys = list(S3Path(s3.root).files())
    assert [key for key in keys if secret().encode() in (s3.get(key) or b"")] == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus (WAV and FLAC, one longer, one missing, one broken), single-source clips and a separator."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "audio").mkdir()
    lines = ["path,labels"]
    for number in range(NUM_CLIPS):
        name = f"audio/{number}.{'flac' if number % 2 else 'wav'}"
        seconds = 5 if number == 4 else 1
        soundfile.write(folder / name, mixture(seconds * RATE_HZ, seed=number), RATE_HZ, subtype="PCM_24")
        lines.append(f"{name},low;high")
    (folder / "audio" / "broken.flac").write_bytes(b"fLaC and nothing else")
    lines += ["audio/broken.flac,low;high", "audio/gone.wav,low;high", ",low"]
    (folder / "natural.csv").write_text("\n".join(lines) + "\n")
    lines = ["path,label,fold"]
    for number in range(4):
        for label, samples_T in zip(("low", "high"), two_bands(RATE_HZ, seed=40 + number), strict=True):
            soundfile.write(folder / "audio" / f"{label}{number}.flac", samples_T, RATE_HZ, subtype="PCM_24")
            lines.append(f"audio/{label}{number}.flac,{label},{1 + number % 2}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    save(tiny_separator(), folder / "separator")
    return folder


@pytest.fixture
def there(s3: S3, inputs: Path) -> str:
    """The same inputs in the bucket."""
    for path in inputs.rglob("*"):
        if path.is_file():
            s3.put(path.relative_to(inputs).as_posix(), path.read_bytes())
    return s3.root


@pytest.fixture(scope="module")
def local(address: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pass on this machine's disk."""
    out = tmp_path_factory.mktemp("local") / "out"
    run_pass(read_corpus(inputs / "natural.csv"), out, separator=find_separator(inputs / "separator"), config=CONFIG)
    return out


def separate(there: str) -> dict[str, Any]:
    corpus = read_corpus(f"{there}/natural.csv")
    return run_pass(corpus, f"{there}/out", separator=find_separator(f"{there}/separator"), config=CONFIG)


def assert_same(out: Location, local: Path) -> None:
    """Byte for byte, and with the same failures."""
    shards = stem_shards(local / "stems")
    assert [shard.name for shard in stem_shards(out / "stems")] == [shard.name for shard in shards]
    for shard in shards:
        assert (out / "stems" / shard.name).read_bytes() == shard.read_bytes(), shard.name
    assert verify(out / "stems") == []
    found, wanted = (read_failures(folder).to_pylist() for folder in (out, local))
    names = ("clip_id", "path", "label", "num_queries", "step")
    assert [[row[name] for name in names] for row in found] == [[row[name] for name in names] for row in wanted]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    done = call_here(monkeypatch, capsys, *words)
    assert secret() not in done.out + done.err
    return done.code, done.out, done.err


def test_a_pass_in_s3_writes_the_bytes_of_one_on_disk_and_other_commands_read_them(
    there: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = location(f"{there}/out")
    summary = separate(there)
    assert_same(out, local)
    wanted = read_json(local / "summary.json")
    names = ("num_clips", "num_set_aside", "num_queries", "num_stems", "num_failed", "audio_h", "separator_fingerprint")
    assert {name: summary[name] for name in names} == {name: wanted[name] for name in names}
    assert separate(there) == summary

    code, printed, _ = command(monkeypatch, capsys, "failures", str(out), "--json")
    rows = json.loads(printed)["failures"]
    assert code == 0 and sorted(row["path"] for row in rows) == ["", "audio/broken.flac", "audio/gone.wav"]
    code, printed, _ = command(monkeypatch, capsys, "inspect", str(out), "--json")
    value = json.loads(printed)
    assert code == 0 and (value["kind"], value["num_stems"]) == ("pass", 2 * (NUM_CLIPS + 2))
    assert value["damaged_shards"] == []
    rules = ("--set", "min_re_sdr_db=-5", "--set", "min_stem_level_db=-20")
    code, printed, _ = command(monkeypatch, capsys, "filter", str(out), "-o", f"{there}/tracks", *rules, "--json")
    tracks = json.loads(printed)
    here = select_tracks(local / "stems", tmp_path / "tracks", Thresholds(min_re_sdr_db=-5.0, min_stem_level_db=-20.0))
    assert code == 0 and tracks["sha256"] == here["sha256"] and tracks["num_stems"] == here["num_stems"]
    code, printed, _ = command(monkeypatch, capsys, "inspect", f"{there}/tracks", "--json")
    assert code == 0 and json.loads(printed)["num_kept"] == here["num_kept"]


def num_writes(s3: S3, text: str) -> int:
    """Number of writes of keys with a text in them that the server has carried out."""
    return sum(text in request.path and request.method == "PUT" for request in list(s3.proxy.requests))


def wait_for(s3: S3, text: str, number: int) -> None:
    deadline_s = time.monotonic() + 120
    while num_writes(s3, text) < number:
        assert time.monotonic() < deadline_s, f"{number} writes of {text} did not come"
        time.sleep(0.01)


def test_faults_of_network_and_server_during_a_pass_change_no_byte(s3: S3, there: str, local: Path) -> None:
    """Answers that break off, five seconds of 503, and a server that stops and starts again."""
    happened = []

    def disturb() -> None:
        wait_for(s3, ".done.json", 1)
        s3.unavailable_for(5.0)
        happened.append("unavailable")
        time.sleep(6.0)
        wait_for(s3, ".done.json", 2)
        s3.proxy.stop()
        time.sleep(4.0)
        s3.proxy.start()
        happened.append("away")

    s3.proxy.faults.cut_every = 4
    disturber = threading.Thread(target=disturb, daemon=True)
    disturber.start()
    separate(there)
    disturber.join(60)
    assert happened == ["unavailable", "away"] and s3.proxy.faults.counts["get"] > 20
    assert any(request.status == 503 for request in s3.proxy.requests)
    s3.proxy.reset()
    assert_same(location(f"{there}/out"), local)


def test_a_folder_in_use_is_refused_and_a_killed_pass_resumes(
    s3: S3,
    there: str,
    local: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first command is frozen while the second one starts, and then killed."""
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["separate-corpus", f"{there}/natural.csv", "--separator", f"{there}/separator", "-o", f"{there}/out"]
    words += overrides
    first = subprocess.Popen(
        [sys.executable, "-m", "clearsep", *words],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(s3, ".done.json", 1)
        first.send_signal(signal.SIGSTOP)
        code, out, err = command(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert f"{there}/out is in use by process {first.pid} on " in err
    finally:
        first.kill()
        printed = b"".join(first.communicate())
    assert secret().encode() not in printed
    before = set(done_names(location(f"{there}/out")))
    assert before and not location(f"{there}/out/stems/manifest.json").is_file()
    code, _, err = command(monkeypatch, capsys, *words)
    assert code == 0, err
    assert_same(location(f"{there}/out"), local)


def run_config(root: str) -> RunConfig:
    """A run of one iteration from single-source clips, trained in this process."""
    training = DistilConfig(
        steps=4, mix=MixConfig(batch_size=2, segment_s=0.5), validate_every_steps=2, num_workers=0, threads_per_worker=1
    )
    return RunConfig(
        corpus=f"{root}/natural.csv",
        clean=f"{root}/clips.csv",
        clean_folds=(1,),
        network=dataclasses.replace(TINY),
        seed_training=training,
        distil=training,
        engine=CONFIG,
        schedule=(Thresholds(min_re_sdr_db=-90.0),),
        validation=ValidationConfig(clips=f"{root}/clips.csv", folds=(2,), num_mixtures=2),
    )


def test_a_run_in_s3_trains_the_same_separators_as_a_local_run(
    there: str, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    here = run(run_config(str(inputs)), tmp_path / "run")
    far = run(run_config(there), f"{there}/run")
    names = ("num_clips", "num_queries", "num_stems", "num_kept", "num_failed", "validation")
    for one, other in zip(here["iterations"], far["iterations"], strict=True):
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
    for number in (0, 1):
        folders = tmp_path / "run" / "iterations" / str(number), location(f"{there}/run/iterations/{number}")
        weights = [next(iter(folder.glob("separator/*.safetensors"))) for folder in folders]
        assert sha256_file(weights[0]) == sha256_file(weights[1]), number
    assert_same(location(f"{there}/run/iterations/1"), tmp_path / "run" / "iterations" / "1")
    assert run(run_config(there), f"{there}/run") == far
    printed = capsys.readouterr()
    assert secret() not in caplog.text + printed.out + printed.err
