"""A small closed pass, shared by the tests of shards and of selections."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.storage.files import sha256_file
from engine.storage.fingerprints import read_sealed, write_sealed
from tests.support.signals import RATE_HZ, close_pass, run_stages, two_bands, write_clips

HIGH_GAINS = {"equal.wav": 1.0, "quiet.wav": 0.1, "faint.wav": 0.01, "faintest.wav": 0.003, "again.wav": 1.0}
DURATION_S = 0.5


def sources(name):
    """The stems of a clip: high is about 0, 20, 40 and 50 dB quieter than low."""
    low_T, high_T = two_bands(round(DURATION_S * RATE_HZ), seed=list(HIGH_GAINS).index(name))
    return {"low": low_T, "high": np.float32(HIGH_GAINS[name]) * high_T}


@pytest.fixture(scope="module")
def closed_pass(tmp_path_factory):
    """A closed pass of three shards: with ten stems in two row groups, with none and with two."""
    folder = tmp_path_factory.mktemp("closed")
    files = {name: np.sum(list(sources(name).values()), axis=0, dtype=np.float32) for name in HIGH_GAINS}
    corpus = read_corpus(write_clips(folder / "corpus", files))
    rows = corpus.clips.to_pylist()
    broken = [{**rows[0], "clip_id": "broken", "path": "nowhere.wav"}]
    extra = [{**rows[0], "clip_id": "extra"}]
    config = PassConfig(rows_per_task=5, shard_s=100.0, min_clip_s=DURATION_S)
    out = folder / "pass"
    for number, some in enumerate((rows, broken, extra)):
        run_stages(some, corpus.root, folder / str(number), config=config)
        for path in (folder / str(number)).glob("*/shard-*"):
            target = out / path.parent.name / path.name.replace("000000", f"{number:06d}")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    close_pass(out)
    return out


def rewrite_shard(stems, name, table):
    """Write a shard again as another version would have: its new checksum is in the manifest."""
    pq.write_table(table, stems / name)
    manifest = read_sealed(stems / "manifest.json", dict)
    manifest["shards"][Path(name).stem] = sha256_file(stems / name)
    manifest.pop("footer_sha256", None)
    write_sealed(stems / "manifest.json", manifest)


def random_samples(num_samples, seed, *, num_bits=20):
    """Samples [T] that 24 bits store exactly."""
    steps_T = np.random.default_rng(seed).integers(-(2**num_bits), 2**num_bits, num_samples)
    return (steps_T / 2.0**num_bits).astype(np.float32)


@pytest.fixture
def out(closed_pass, tmp_path):
    """A copy of the pass that a test may change."""
    shutil.copytree(closed_pass, tmp_path / "run" / "pass")
    return tmp_path / "run" / "pass"
