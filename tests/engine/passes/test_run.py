"""One pass on a real Ray: every row is a stem or a failure, made once, and the same after a kill."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile
import torch

from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import done_names
from engine.passes.run import run_pass
from engine.passes.shards import stem_shards, verify
from engine.passes.tasks import Slice
from engine.schema import SCORES_VERSION
from engine.separators import NetworkConfig, QuerySeparator, SeparatorSource, find_separator, save
from engine.taggers import find_tagger, save_tagger
from engine.taggers.network import ShareTagger, TagNetworkConfig
from tests.support import signals
from tests.support.models.clap import write_tiny_clap
from tests.support.signals import RATE_HZ, mixture, open_bands, read_failures, write_clips
from tune.demo import sounds as synth

pytestmark = pytest.mark.slow
_LABELS = ("rain", "siren", "bell")
_CONFIG = PassConfig(rows_per_task=4, shard_s=6.0, clip_s=3.0, num_gpus_per_actor=0.0)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Two CPUs, and a GPU that Ray is told of but does not exist."""
    ray.cloudpickle.register_pickle_by_value(signals)  # workers cannot import from the tests' folder
    with connect(num_cpus=2, num_gpus=1):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("separator")
    network = NetworkConfig(channels=16, num_blocks=2, num_bands=20, num_fft=256, hop_samples=128, sample_rate_hz=8000)
    save(QuerySeparator(network, _LABELS), folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good rows, one of them a long recording, and rows that fail in whole or in part."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = ["path,labels"]
    for number in range(12):
        rng = np.random.default_rng(number)
        seconds = 7.0 if number == 3 else 2.0
        sounds = [synth.sound(label, rng=rng, sample_rate_hz=16000, duration_s=seconds) for label in _LABELS[:2]]
        soundfile.write(folder / f"{number}.wav", 0.5 * np.sum(sounds, axis=0), 16000)
        lines.append(f"{number}.wav,rain;siren")
    (folder / "text.wav").write_text("not audio")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    lines += ["text.wav,rain;bell", "empty.wav,rain;bell", "nan.wav,rain;bell;siren", "gone.wav,rain;bell"]
    lines += ["0.wav,rain;trombone", "1.wav,rain", "2.wav,"]
    (folder / "natural.csv").write_text("\n".join(lines) + "\n")
    return folder / "natural.csv"


def test_every_row_is_a_stem_or_a_failure_with_its_reason(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    summary = run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=_CONFIG)
    failures = read_failures(tmp_path / "out").to_pylist()
    stems = [row for shard in stem_shards(tmp_path / "out" / "stems") for row in pq.read_table(shard).to_pylist()]
    reasons = {Path(row["path"]).name: row["step"] for row in failures if row["label"] is None}
    assert reasons == {
        "text.wav": "decode",
        "empty.wav": "decode",
        "nan.wav": "decode",
        "gone.wav": "decode",
        "2.wav": "manifest",
    }
    assert [row["label"] for row in failures if row["label"]] == ["trombone"]
    assert len(failures) == 6
    assert summary["num_failed"] == 2 + 2 + 3 + 2 + 1 + 1  # queries: a row without labels counts as one
    assert summary["num_queries"] == summary["num_stems"] + summary["num_failed"]
    assert summary["num_set_aside"] == 1
    assert summary["num_stems"] == len(stems)
    assert summary["num_queries"] == len(stems) + sum(row["num_queries"] for row in failures)
    # 11 short clips and one of 7 s in pieces of 3 s, two labels each, and the one known label of 0.wav's second row
    assert len(stems) == 2 * (11 + 3) + 1
    assert len({(row["clip_id"], row["label"]) for row in stems}) == len(stems)
    assert all(row["re_sdr_db"] is not None for row in stems)
    assert verify(tmp_path / "out" / "stems") == []
    assert sum(summary["step_fraction"].values()) == pytest.approx(1.0)


def test_a_pool_that_may_outgrow_the_cluster_does_not_stall(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(_CONFIG, max_actors=16)
    summary = run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=config)
    assert summary["num_stems"] == 2 * (11 + 3) + 1


def test_a_second_start_does_nothing_and_another_separator_setting_or_score_version_is_refused(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    first = run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=_CONFIG)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stems").iterdir()}
    assert (
        run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=_CONFIG) == first
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "stems").iterdir()} == written
    with pytest.raises(ValueError, match="another settings"):
        run_pass(
            read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=PassConfig(clip_s=2.0)
        )
    other = tmp_path / "other"
    save(QuerySeparator(NetworkConfig(channels=16, num_blocks=1, sample_rate_hz=8000), _LABELS), other)
    with pytest.raises(ValueError, match="another separator"):
        run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(other), config=_CONFIG)
    claim = tmp_path / "out" / "stems" / "pass.json"
    claim.write_text(claim.read_text().replace(f'"score version": {SCORES_VERSION}', '"score version": 1'))
    with pytest.raises(ValueError, match="another score version"):
        run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=_CONFIG)


def test_a_pass_with_a_tagger_and_re_separation_stores_their_scores_and_refuses_another_tagger(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out, taggers = tmp_path / "out", [tmp_path / "clap", tmp_path / "tagger"]
    write_tiny_clap(taggers[0], audio=True)
    save_tagger(ShareTagger(TagNetworkConfig(sample_rate_hz=8000, channels=16), _LABELS), taggers[1])
    config = dataclasses.replace(_CONFIG, reseparate=True)
    clips = read_corpus(corpus)
    summary = run_pass(clips, out, separator=find_separator(checkpoint), tagger=find_tagger(taggers[0]), config=config)
    assert summary["step_s"]["assess"] > 0
    rows = [row for shard in stem_shards(out / "stems") for row in pq.read_table(shard).to_pylist()]
    assert all(row["tagger_margin_db"] is not None for row in rows)
    assert (out / "tagger" / "embeddings.json").is_file()
    assert all((row["rival_leak_db"] is None) == ("trombone" in row["labels"]) for row in rows)  # an only stem
    assert (
        run_pass(clips, out, separator=find_separator(checkpoint), tagger=find_tagger(taggers[0]), config=config)
        == summary
    )
    for tagger in (find_tagger(taggers[1]), None):
        with pytest.raises(ValueError, match="another tagger"):
            run_pass(clips, out, separator=find_separator(checkpoint), tagger=tagger, config=config)
    with pytest.raises(ValueError, match="another settings"):
        run_pass(clips, out, separator=find_separator(checkpoint), tagger=find_tagger(taggers[0]), config=_CONFIG)


def test_with_gpus_stems_are_scored_in_other_processes_and_come_out_the_same(ray_session: None, tmp_path: Path) -> None:
    clips = {f"{number}.wav": mixture(RATE_HZ, seed=number) for number in range(6)}
    corpus = read_corpus(write_clips(tmp_path / "corpus", clips))
    shares = {"gpu": None, "cpu": 0.0}  # null: one GPU
    bands = SeparatorSource.from_factory(open_bands)
    for name, share in shares.items():
        config = PassConfig(rows_per_task=4, shard_s=20.0, num_gpus_per_actor=share, autocast=False)
        run_pass(corpus, tmp_path / name, separator=bands, config=config)
    shards = stem_shards(tmp_path / "cpu" / "stems")
    assert sum(len(pq.read_table(shard)) for shard in shards) == 12
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "gpu" / "stems" / shard.name).read_bytes()


def test_a_clip_that_ends_the_worker_fails_alone_and_the_pass_ends(ray_session: None, tmp_path: Path) -> None:
    clips = {f"{number}.wav": mixture(RATE_HZ, seed=number) for number in range(8)}
    clips |= {"ends.wav": signals.marked(mixture(RATE_HZ, seed=8))}
    corpus = read_corpus(write_clips(tmp_path / "corpus", clips))
    config = PassConfig(num_gpus_per_actor=0.0, shard_s=100.0)
    separator = SeparatorSource.from_factory(signals.open_ending)
    summary = run_pass(corpus, tmp_path / "out", separator=separator, config=config)
    assert (summary["num_queries"], summary["num_stems"], summary["num_failed"]) == (18, 16, 2)
    rows = {row["path"]: (row["error_class"], row["attempts"]) for row in read_failures(tmp_path / "out").to_pylist()}
    assert rows == {"ends.wav": ("WorkerDied", 3)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "corpus",
        "failures",
        "stems",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_clip_that_loses_the_gpu_fails_alone(ray_session: None, tmp_path: Path) -> None:
    """A device-side assert: every later call of the process would fail, so it is replaced."""
    clips = {f"{number}.wav": mixture(RATE_HZ, seed=number) for number in range(8)}
    clips |= {"loses.wav": signals.marked(mixture(RATE_HZ, seed=8))}
    corpus = read_corpus(write_clips(tmp_path / "corpus", clips))
    separator = SeparatorSource.from_factory(signals.open_losing)
    summary = run_pass(corpus, tmp_path / "out", separator=separator, config=PassConfig(shard_s=100.0))
    assert (summary["num_queries"], summary["num_stems"], summary["num_failed"]) == (18, 16, 2)
    (row,) = read_failures(tmp_path / "out").to_pylist()
    assert (row["path"], row["error_class"], row["attempts"]) == ("loses.wav", "WorkerDied", 3)
    assert "device-side assert" in row["message"]


@pytest.mark.parametrize(("end", "reason"), [("die", "3 workers ended"), ("raise", r"KeyError: 'weights'")])
def test_a_separator_that_no_worker_can_open_ends_the_pass(
    ray_session: None, tmp_path: Path, end: str, reason: str
) -> None:
    corpus = read_corpus(write_clips(tmp_path / "corpus", {"0.wav": mixture(RATE_HZ)}))
    separator = SeparatorSource.from_factory(functools.partial(signals.open_here_alone, os.getpid(), end))
    config = PassConfig(num_gpus_per_actor=0.0)
    with pytest.raises(RuntimeError, match=f"cannot open .*open_here_alone in a worker .*{reason}"):
        run_pass(corpus, tmp_path / "out", separator=separator, config=config)


@pytest.mark.parametrize(("setting", "share"), [("num_cpus_per_actor", 2.0), ("num_gpus_per_actor", 2.0)])
def test_shares_that_the_cluster_cannot_give_are_refused_instead_of_waited_for(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path, setting: str, share: float
) -> None:
    with pytest.raises(ValueError, match=f"{setting} must .*, got 2; "):
        run_pass(
            read_corpus(corpus),
            tmp_path / "out",
            separator=find_separator(checkpoint),
            config=PassConfig(**{setting: share}),
        )
    assert not (tmp_path / "out").exists()  # other settings may follow


def _command(corpus: Path, checkpoint: Path, out: Path) -> list[str]:
    settings = {name: getattr(_CONFIG, name) for name in ("rows_per_task", "shard_s", "clip_s")}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "clearsep", "separate-corpus", str(corpus), "--separator", str(checkpoint)]
    return [*command, "-o", str(out), *overrides]


def test_a_killed_pass_resumes_and_ends_as_if_undisturbed(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """kill -9 of the process group when the first shard is done; the same command then makes the rest."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = subprocess.Popen(_command(corpus, checkpoint, killed), start_new_session=True)
    while not done_names(killed) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = set(done_names(killed))
    assert before
    subprocess.run(_command(corpus, checkpoint, killed), check=True, stdout=subprocess.DEVNULL)
    run_pass(read_corpus(corpus), undisturbed, separator=find_separator(checkpoint), config=_CONFIG)
    shards = stem_shards(undisturbed / "stems")
    assert [shard.name for shard in shards] == [shard.name for shard in stem_shards(killed / "stems")]
    for shard in shards:
        assert shard.read_bytes() == (killed / "stems" / shard.name).read_bytes()
    assert read_failures(killed).equals(read_failures(undisturbed))


def test_slices_of_one_pass_at_the_same_time_one_of_them_killed_make_the_same_bytes(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """kill -9 of slice 1/2 when its first shard is done, while slice 2/2 is at work on the same cluster."""
    sliced, whole = tmp_path / "sliced", tmp_path / "whole"
    process = subprocess.Popen(
        [*_command(corpus, checkpoint, sliced), "--set", "num_gpus_per_actor=0", "--slice", "1/2"],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    separated = functools.partial(
        run_pass, read_corpus(corpus), separator=find_separator(checkpoint), config=_CONFIG, out=sliced
    )
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(_kill_when_done, process, sliced, Slice(1, 2))
        second = separated(slice="2/2")
        killed.result()
    assert second["missing_slices"] == ["1/2"] and done_names(sliced, part=Slice(1, 2))
    last, undisturbed = separated(slice="1/2"), separated(out=whole)
    names = ("num_clips", "num_queries", "num_stems", "num_failed", "audio_h", "fingerprint")
    assert {name: last[name] for name in names} == {name: undisturbed[name] for name in names}
    for shard in stem_shards(whole / "stems"):
        assert shard.read_bytes() == (sliced / "stems" / shard.name).read_bytes()
    assert read_failures(sliced).equals(read_failures(whole)) and verify(sliced / "stems") == []


def _kill_when_done(process: subprocess.Popen[bytes], out: Path, part: Slice) -> None:
    while not done_names(out, part=part) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_an_interrupted_pass_exits_with_130_and_a_message(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    """As Ctrl-C does, to the whole process group."""
    process = subprocess.Popen(
        _command(corpus, checkpoint, tmp_path / "out"),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out" / "stems" / "pass.json").is_file() and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, "the pass was over before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.strip().splitlines()[-1] == "interrupted; start the same command again to resume"
    assert "Traceback" not in stderr


def test_a_pass_that_cannot_write_is_an_error_and_keeps_finished_work(
    ray_session: None, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A folder has the name of a shard: the worker's error is one line, and the other shards are kept."""
    (tmp_path / "out" / "stems" / "shard-000001-0000.parquet").mkdir(parents=True)
    done = subprocess.run(_command(corpus, checkpoint, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot finish the pass (IsADirectoryError")
    assert last.endswith("; start the same command again to resume")
    (tmp_path / "out" / "stems" / "shard-000001-0000.parquet").rmdir()
    again = run_pass(read_corpus(corpus), tmp_path / "out", separator=find_separator(checkpoint), config=_CONFIG)
    assert again["num_stems"] == 29


def test_a_full_disk_is_an_error_that_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on file size, set in a child process, replaces the full disk: the write fails half way."""
    (tmp_path / "old").write_bytes(b"kept")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from engine.storage.files import write_bytes; write_bytes(sys.argv[1], bytes(100000))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "old")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"kept"
