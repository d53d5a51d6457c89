"""A pass belongs to the contents of its corpus: one that moved is the same, another of the same names is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile

from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import claim_files, failure_rows, plan_retry
from engine.passes.run import run_pass
from engine.passes.tasks import Tasks
from engine.separators import find_separator
from tests.support.signals import RATE_HZ, mixture, run_stages, tiny_checkpoint, write_clips

if TYPE_CHECKING:
    from tests.support.s3_server import S3

pytest_plugins = ["tests.support.s3_server"]
CONFIG = PassConfig(clip_s=1.0, min_clip_s=0.1, shard_s=2.0, rows_per_task=2, min_labels=1, num_gpus_per_actor=0.0)
BROKEN = ("2.wav", "5.wav")


def write_corpus(folder: Path, *, seed: int = 0, broken: tuple[str, ...] = ()) -> Path:
    """Six recordings of the same names for every seed, one of them of three clips."""
    files: dict[str, np.ndarray | bytes] = {
        f"{number}.wav": mixture((3 if number == 1 else 1) * RATE_HZ, seed=10 * seed + number) for number in range(6)
    }
    return write_clips(folder, files | {name: b"no audio" for name in broken})


class Started:
    """A pass without Ray that is started as ``run_pass`` starts it."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def start(self, manifest: Path | str, *, retry_failed: bool = False, max_shards: int | None = None) -> list[str]:
        """Returns the names of the shards that this start made."""
        corpus = read_corpus(manifest)
        claim_files(self.out, corpus, min_labels=1, retry_failed=retry_failed)
        if retry_failed:
            plan_retry(self.out, rows_per_task=CONFIG.rows_per_task)
        Tasks(self.out / "corpus").write(corpus, rows_per_task=CONFIG.rows_per_task, min_labels=1)
        return run_stages(list(corpus.sorted_clips()), corpus.root, self.out, config=CONFIG, max_shards=max_shards)

    @property
    def stems(self) -> set[tuple[str, bytes]]:
        shards = [pq.read_table(path) for path in (self.out / "stems").glob("shard-*.parquet")]
        return {(row["path"], row["audio_flac"]) for shard in shards for row in shard.to_pylist()}

    @property
    def failed(self) -> set[str]:
        return {row["path"] for _, row in failure_rows(self.out)}


@pytest.fixture
def started(tmp_path: Path) -> Started:
    return Started(tmp_path / "out")


@pytest.mark.parametrize("max_shards", [None, 1, 3])
def test_another_corpus_of_the_same_names_is_refused_and_one_that_moved_resumes(
    started: Started, tmp_path: Path, max_shards: int | None
) -> None:
    one, other = (write_corpus(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    started.start(one, max_shards=max_shards)
    made = started.stems
    for retry_failed in (False, True) if max_shards is None else (False,):
        with pytest.raises(ValueError, match=r"files of the corpus of .*got 6 of 6 files that were replaced since: '0"):
            started.start(other, retry_failed=retry_failed)
    if max_shards is not None:
        with pytest.raises(ValueError, match=r"got \d of 6 files .*no stems yet"):
            started.start(other, retry_failed=True)
    assert started.stems == made
    shutil.copytree(one.parent, tmp_path / "moved", copy_function=shutil.copyfile)
    started.start(tmp_path / "moved" / one.name)
    undisturbed = Started(tmp_path / "undisturbed")
    undisturbed.start(one)
    assert started.stems == undisturbed.stems and len(started.stems) == 2 * 8


def test_a_single_replaced_file_is_refused_wherever_the_pass_is(started: Started, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus")
    started.start(manifest, max_shards=1)
    for name in [f"{number}.wav" for number in range(6)]:
        path = manifest.parent / name
        before = path.read_bytes()
        soundfile.write(path, mixture(RATE_HZ, seed=99), RATE_HZ, subtype="FLOAT")
        with pytest.raises(ValueError, match=f"got 1 of 6 files that were replaced since: '{name}'; restore them"):
            started.start(manifest)
        path.write_bytes(before)
    started.start(manifest)


@pytest.mark.parametrize("max_shards", [None, 1])
def test_broken_files_may_be_repaired_and_others_not(started: Started, tmp_path: Path, max_shards: int | None) -> None:
    """Also those that a pass, which stopped because too many failed, had not come to yet."""
    manifest, good = write_corpus(tmp_path / "corpus", broken=BROKEN), write_corpus(tmp_path / "good")
    (manifest.parent / "0.wav").unlink()
    started.start(manifest, max_shards=max_shards)
    for name in ("0.wav", *BROKEN):
        shutil.copyfile(good.parent / name, manifest.parent / name)
    started.start(manifest, retry_failed=True)
    undisturbed = Started(tmp_path / "undisturbed")
    undisturbed.start(good)
    assert started.stems == undisturbed.stems and not started.failed
    shutil.copyfile(manifest.parent / "4.wav", manifest.parent / "2.wav")
    for retry_failed in (False, True):
        with pytest.raises(ValueError, match=r"got 1 of 6 .*'2.wav'"):  # it has stems by now
            started.start(manifest, retry_failed=retry_failed)


def test_a_failed_file_may_be_repaired_more_than_once_and_its_failure_stands_until_the_retry(
    started: Started, tmp_path: Path
) -> None:
    manifest, good = write_corpus(tmp_path / "corpus", broken=BROKEN), write_corpus(tmp_path / "good")
    started.start(manifest)
    assert started.failed == set(BROKEN)
    for data in (b"still no audio", b"nor this", (good.parent / "2.wav").read_bytes()):
        (manifest.parent / "2.wav").write_bytes(data)
        assert started.start(manifest) == [] and started.failed == set(BROKEN)
        started.start(manifest, retry_failed=True)
    assert started.failed == {"5.wav"}


def test_a_file_that_is_gone_is_a_failure_and_must_come_back_as_it_was(started: Started, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus")
    started.start(manifest, max_shards=1)
    shutil.move(manifest.parent / "1.wav", tmp_path / "1.wav")
    started.start(manifest)
    assert started.failed | {path for path, _ in started.stems} == {f"{number}.wav" for number in range(6)}
    shutil.move(tmp_path / "1.wav", manifest.parent / "1.wav")
    started.start(manifest, retry_failed=True)
    assert not started.failed


def test_rows_that_share_a_file_keep_it_once(started: Started, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    rows = [f"1.wav,low;high,{start / 10},{start / 10 + 0.5}" for start in range(20)]
    manifest = tmp_path / "corpus" / "rows.csv"
    manifest.write_text("\n".join(["path,labels,start_s,end_s", *rows]))
    started.start(manifest, max_shards=1)
    assert pq.read_table(started.out / "corpus" / "contents.parquet")["path"].to_pylist() == ["1.wav"]
    soundfile.write(tmp_path / "corpus" / "1.wav", mixture(3 * RATE_HZ, seed=7), RATE_HZ, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"got 1 of 1 files that were replaced since: '1.wav'"):
        started.start(manifest)


def test_a_pass_of_an_older_version_is_refused_in_words(started: Started, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus")
    started.start(manifest)
    (started.out / "corpus" / "contents.parquet").unlink()
    with pytest.raises(ValueError, match=r"must have the contents .* got a pass of an older version.*another folder"):
        started.start(manifest)


def test_a_corpus_in_s3_is_told_from_another_by_its_objects(started: Started, tmp_path: Path, s3: S3) -> None:
    one, other = (write_corpus(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    for prefix, manifest in (("a", one), ("moved", one), ("other", other)):
        for path in manifest.parent.iterdir():
            s3.put(f"{prefix}/{path.name}", path.read_bytes())
    started.start(f"{s3.root}/a/{one.name}", max_shards=2)
    with pytest.raises(ValueError, match="got 6 of 6 files that were replaced since"):
        started.start(f"{s3.root}/other/{one.name}")
    s3.put("a/3.wav", (other.parent / "3.wav").read_bytes())
    with pytest.raises(ValueError, match=r"got 1 of 6 files that were replaced since: '3.wav'"):
        started.start(f"{s3.root}/a/{one.name}")
    started.start(f"{s3.root}/moved/{one.name}", max_shards=1)
    started.start(one)  # downloaded
    assert len(started.stems) == 2 * 8


@pytest.mark.slow
def test_on_a_real_cluster_a_finished_pass_is_that_of_its_files_alone(tmp_path: Path) -> None:
    one, other = (write_corpus(tmp_path / str(seed), seed=seed, broken=BROKEN[:1]) for seed in (0, 1))
    separator, out = find_separator(tiny_checkpoint(tmp_path / "separator")), tmp_path / "out"

    def start(manifest: Path, **more: Any) -> dict[str, Any]:
        return dict(run_pass(read_corpus(manifest), out, separator=separator, config=CONFIG, **more))

    with connect(num_cpus=2):
        first = start(one)
        shutil.copytree(one.parent, tmp_path / "moved", copy_function=shutil.copyfile)
        assert start(tmp_path / "moved" / one.name) == first
        for retry_failed in (False, True):
            with pytest.raises(ValueError, match="got 5 of 6 files that were replaced since"):
                start(other, retry_failed=retry_failed)
        with pytest.raises(ValueError, match="another settings"):
            run_pass(read_corpus(one), out, separator=separator, config=dataclasses.replace(CONFIG, clip_s=2.0))
        shutil.copyfile(other.parent / "3.wav", one.parent / "2.wav")
        assert start(one) == first
        repaired = start(one, retry_failed=True)
        assert (repaired["num_failed"], repaired["num_stems"]) == (0, first["num_stems"] + 2)


def test_a_pass_without_a_connection_is_refused_and_starts_no_ray_that_others_could_reach(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "corpus", {"a.wav": mixture(RATE_HZ, seed=1)})
    separator = find_separator(tiny_checkpoint(tmp_path / "separator"))
    with pytest.raises(RuntimeError, match=r"Ray must be connected for this, got no connection; call it in a `with cs"):
        run_pass(read_corpus(manifest), tmp_path / "out", separator=separator, config=CONFIG)
    assert not ray.is_initialized() and not (tmp_path / "out").exists()
