"""The plan of a pass against the pass itself: counts, failures, bytes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.records import done_names, read_totals
from engine.passes.speed.plan import plan_pass
from engine.taggers import TaggerSource
from tests.support.command import call_here
from tests.support.signals import (
    RATE_HZ,
    BandSeparator,
    BandTagger,
    FixedSource,
    mixture,
    run_stages,
    tiny_checkpoint,
    write_clips,
)

CONFIG = PassConfig(clip_s=2.0, min_clip_s=0.5, shard_s=4.0, batch_s=8.0, rows_per_task=4)


class Counting(BandSeparator):
    """Collects the samples of every query."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def _band(self, mix_T, label):
        self.queries.append(mix_T.numpy().tobytes())
        return super()._band(mix_T, label)


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """A folder for temporary files, empty after every test but for the corpus in use."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    left = [path.name for path in folder.iterdir()]
    assert [name for name in left if not name.startswith(("clearsep-corpus-", "torchinductor_"))] == []


@pytest.fixture
def write(tmp_path):
    def written(files, **kwargs):
        return read_corpus(write_clips(tmp_path / "corpus", files, **kwargs))

    return written


def costs(corpus, *, separator=None, **kwargs):
    source = FixedSource(separator=separator or BandSeparator())
    return plan_pass(corpus, separator=source, **{"config": CONFIG, **kwargs})


def clips(num, *, seconds=1.0):
    return {f"{number:02d}.wav": mixture(round(seconds * RATE_HZ), seed=number) for number in range(num)}


def wilson(fraction, number):
    """The interval by its definition: the fractions that are at most 1.96 standard errors from the measured one."""
    grid = np.linspace(0, 1, 200_001)
    inside = grid[np.abs(fraction - grid) <= 1.96 * np.sqrt(grid * (1 - grid) / number)]
    return inside[0], inside[-1]


def test_a_plan_has_the_counts_of_the_pass(write, tmp_path):
    """All rows are drawn, so the expected counts are exact: clips, clips of a long recording, two failures."""
    files = clips(12) | {"long.wav": mixture(9 * RATE_HZ, seed=50), "gone.wav": None, "text.wav": b"not audio"}
    corpus = write(files | {"single.wav": mixture(RATE_HZ)}, labels={"single.wav": ("low",)})
    cost = costs(corpus, num_rows=100)
    run_stages(
        [row for row in corpus.clips.to_pylist() if len(row["labels"]) > 1], corpus.root, tmp_path, config=CONFIG
    )
    totals = read_totals(tmp_path)
    for name in ("num_clips", "num_queries", "num_failed"):
        assert cost[name] == getattr(totals, name), name
    assert (cost["num_rows"], cost["num_set_aside"], cost["sample_rows"]) == (16, 1, 15)
    assert cost["audio_h"] == pytest.approx(totals.audio_s / 3600) == pytest.approx(21 / 3600)
    assert cost["sample_audio_s"] == pytest.approx(21)
    assert cost["failed_fraction"] == pytest.approx(4 / 38)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "stems").glob("*.parquet"))
    assert cost["stem_gib"] * 2**30 == pytest.approx(num_bytes, rel=0.3)


def test_a_sample_is_scaled_to_the_corpus(write, tmp_path):
    corpus = write(clips(40))
    cost = costs(corpus, num_rows=10)
    assert (cost["num_clips"], cost["num_queries"], cost["num_failed"]) == (40, 80, 0)
    assert cost["sample_rows"] == 10 and cost["audio_h"] == pytest.approx(40 / 3600)
    run_stages(corpus.clips.to_pylist(), corpus.root, tmp_path, config=CONFIG)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "stems").glob("*.parquet"))
    assert cost["stem_gib"] * 2**30 == pytest.approx(num_bytes, rel=0.3)
    assert cost["num_shards"] == len(done_names(tmp_path)) == 20


def test_half_of_the_files_broken_is_a_fraction_of_one_half_with_the_interval_of_the_rows_drawn(write):
    """All labels of a clip fail together: twenty rows are twenty independent trials, not forty."""
    files = clips(20) | {f"{number}.wav": b"no audio" if number % 2 else None for number in range(20, 40)}
    cost = costs(write(files), num_rows=40)
    assert cost["failed_fraction"] == 0.5 and cost["num_failed"] == 40 and cost["num_clips"] == 40
    low, high = wilson(0.5, 40)
    assert cost["failed_fraction_low"] == pytest.approx(low, abs=1e-4)
    assert cost["failed_fraction_high"] == pytest.approx(high, abs=1e-4)


def test_a_sample_without_failures_leaves_an_upper_bound(write):
    cost = costs(write(clips(8)), num_rows=8)
    assert cost["failed_fraction"] == 0 and cost["failed_fraction_low"] == pytest.approx(0, abs=1e-12)
    assert cost["failed_fraction_high"] == pytest.approx(wilson(0.0, 8)[1], abs=1e-4)


def test_rows_of_the_manifest_that_are_no_clips_count_as_in_the_pass(tmp_path):
    """Each counts as its labels, at least one."""
    manifest = write_clips(tmp_path / "corpus", clips(6))
    manifest.write_text(manifest.read_text() + ",low; high\n00.wav,low; high\n01.wav,\n")
    cost = costs(read_corpus(manifest), num_rows=6)
    assert cost["num_rows"] == cost["num_clips"] == 9
    assert (cost["num_queries"], cost["num_failed"]) == (12 + 5, 5)
    assert cost["failed_fraction"] == pytest.approx(5 / 17) and cost["failed_fraction_low"] == pytest.approx(5 / 17)


def test_a_seed_draws_the_same_rows_and_another_others(write):
    corpus, drawn = write(clips(30)), []
    for seed in (0, 0, 1):
        separator = Counting()
        costs(corpus, separator=separator, num_rows=5, seed=seed)
        drawn.append(set(separator.queries))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(some) == 5 for some in drawn)


def test_hours_are_of_the_audio_and_divided_by_the_cpus(write):
    corpus = write(clips(12))
    one, eight = costs(corpus, num_rows=12, num_cpus=1), costs(corpus, num_rows=12, num_cpus=8)
    for cost, number in ((one, 1), (eight, 8)):
        workers_h = cost["core_h"] + cost["read_wait_h"] + cost["write_wait_h"]
        assert cost["num_cpus"] == number and workers_h == pytest.approx(sum(cost["step_h"].values()))
        assert cost["wall_h"] == pytest.approx(max(cost["core_h"], workers_h / 2) / number) and cost["core_h"] > 0
        assert cost["limit"]["limit"] in ("CPUs", "reading", "writing") and cost["limit"]["gpu_busy_fraction"] is None
    assert all(math.isfinite(hours) and hours >= 0 for hours in one["step_h"].values())
    assert one["step_h"].keys() == {"decode", "separate", "assess", "score", "write"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_the_plan_has_no_gpu_time(write):
    cost = costs(write(clips(4)), num_rows=4, num_gpus=8)
    assert cost["gpu_h"] == cost["num_gpus"] == 0 and cost["measured_on"].startswith("CPU")
    table = dict(engine_rows(cost))
    assert table["GPU time"] == "none: measured without a GPU" and "GPUs" not in table["wall time"]


def engine_rows(cost):
    from engine.cli.tables import plan_table

    return plan_table(cost).rows


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({"gone.wav": None}, CONFIG, "at least one sampled row must be separated, got none of 1; "),
        (
            {"a.wav": mixture(RATE_HZ)},
            PassConfig(min_labels=3),
            "at least one clip must have 3 or more labels, got none of 1 clips; .*--set min_labels=1",
        ),
    ],
)
def test_a_corpus_that_cannot_be_planned_is_refused(write, files, config, message):
    with pytest.raises(ValueError, match=message):
        costs(write(files), config=config)


def test_the_number_of_threads_is_restored(write):
    torch.set_num_threads(2)
    costs(write(clips(2)), num_rows=2)
    assert torch.get_num_threads() == 2


def call(monkeypatch, capsys, *words):
    monkeypatch.setenv("COLUMNS", "200")
    done = call_here(monkeypatch, capsys, "plan", *words)
    return done.code, done.out, done.err


def test_the_command_prints_the_plan_as_json_and_as_a_table(tmp_path, monkeypatch, capsys):
    manifest = write_clips(tmp_path / "corpus", clips(9) | {"gone.wav": None})
    checkpoint = tiny_checkpoint(tmp_path / "separator")
    words = (manifest, "--separator", checkpoint, "--rows", 10, "--cpus", 4, "--set", "clip_s=2.0")
    code, out, _ = call(monkeypatch, capsys, *words, "--json")
    cost = json.loads(out)
    assert code == 0 and (cost["num_clips"], cost["num_queries"], cost["num_failed"]) == (10, 20, 2)
    assert cost["num_cpus"] == 4 and cost["sample_rows"] == 10
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0 and "Plan, from 10 rows (9 s of audio)" in out and "failures expected" in out
    code, out, err = call(monkeypatch, capsys, manifest, "--separator", checkpoint, "--rows", 0)
    assert (code, out) == (2, "") and "'--rows': Input should be greater than or equal to 1" in err


def test_long_recordings_are_planned_by_their_clips(write):
    recording_s = 30.0
    cost = costs(write({"long.wav": mixture(round(recording_s * RATE_HZ), seed=1)}), num_rows=1)
    assert cost["num_clips"] == 15 and cost["num_queries"] == 30
    assert cost["num_shards"] == 8 and cost["audio_h"] == pytest.approx(recording_s / 3600)


def test_a_tagger_alone_is_planned_for_the_pass_that_tags_all_clips(tmp_path):
    folder = tmp_path / "recordings"
    write_clips(folder, clips(6), labels={f"{number:02d}.wav": ("low",) for number in range(6)})
    corpus = read_corpus(folder, needs_labels=False)
    tagger = TaggerSource(
        name="bands",
        fingerprint=BandTagger.fingerprint,
        factory=lambda _: BandTagger(),
        sample_rate_hz=RATE_HZ,
        labels=BandTagger.labels,
    )
    cost = plan_pass(corpus, separator=None, tagger=tagger, config=CONFIG)
    assert (cost["num_clips"], cost["num_queries"], cost["num_failed"], cost["num_set_aside"]) == (6, 6, 0, 0)
    assert 0 < cost["stem_gib"] * 2**30 < 6 * 16384 and cost["step_h"]["separate"] > 0
    with pytest.raises(ValueError, match="there is no model; give --separator, or --tagger alone"):
        plan_pass(corpus, separator=None)
