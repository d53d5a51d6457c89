"""A tagging pass without Ray over real files: every clip is a row of tags or a failure, whatever goes wrong with it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.labels.tag import TAGS, Tag, TagAndWrite, WriteTags, tagging_config
from engine.passes.records import missing_tasks, plan_retry, read_totals
from engine.passes.tasks import Tasks
from tests.support.signals import RATE_HZ, BandTagger, mixture, read_failures, two_bands

CONFIG = tagging_config(PassConfig(clip_s=2.0, min_clip_s=0.5, shard_s=4.0, rows_per_task=3))


@pytest.fixture
def folder(tmp_path):
    """Four clips of three files, one broken file and one silent one."""
    recordings = tmp_path / "recordings"
    (recordings / "more").mkdir(parents=True)
    low_T, high_T = two_bands(2 * RATE_HZ, seed=0)
    soundfile.write(recordings / "low.wav", low_T, RATE_HZ)
    soundfile.write(recordings / "high.wav", high_T, RATE_HZ)
    soundfile.write(recordings / "more" / "long.wav", np.concatenate([low_T, high_T]), RATE_HZ)
    soundfile.write(recordings / "silent.wav", np.zeros(RATE_HZ), RATE_HZ)
    (recordings / "broken.wav").write_bytes(b"RIFF, but no more")
    return recordings


def tagged(folder, out, tagger=None, *, writes=False):
    """Make what is missing of a pass that tags."""
    corpus, tasks = read_corpus(folder, needs_labels=False), Tasks(out / "corpus")
    tasks.write(corpus, rows_per_task=CONFIG.rows_per_task, min_labels=CONFIG.min_labels)
    decode = Decode(CONFIG, root=corpus.root, out=str(out), sample_rate_hz=RATE_HZ)
    write = WriteTags(str(out), RATE_HZ)
    opened = lambda _: tagger or BandTagger()  # noqa: E731
    actor = TagAndWrite(write, opened, CONFIG) if writes else Tag(opened, CONFIG)
    for task in missing_tasks(out, read_totals(out)):
        for shard in decode(pa.Table.from_pylist([task])):
            _ = actor(shard) if writes else write(actor(shard))
    return corpus


def rows_of(out):
    tables = [pq.read_table(path) for path in sorted((out / "stems").glob("*.parquet"))]
    assert all(table.schema.equals(TAGS) for table in tables)
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: (row["path"], row["start_s"] or 0.0))


def test_every_clip_is_a_row_of_tags_or_a_failure(folder, tmp_path):
    out = tmp_path / "out"
    tagged(folder, out)
    rows = rows_of(out)
    found = [(row["path"], row["labels"], row["start_s"], row["end_s"]) for row in rows]
    assert found == [
        ("high.wav", [], None, None),
        ("low.wav", [], None, None),
        ("more/long.wav", ["more"], 0.0, 2.0),
        ("more/long.wav", ["more"], 2.0, 4.0),
    ]
    failures = {row["path"]: (row["step"], row["num_queries"]) for row in read_failures(out).to_pylist()}
    assert failures == {"broken.wav": ("decode", 1), "silent.wav": ("decode", 1)}
    totals = read_totals(out)
    assert (totals.num_clips, totals.num_queries, totals.num_stems, totals.num_failed) == (6, 6, 4, 2)


def test_a_row_has_the_windows_of_its_clip(folder, tmp_path):
    tagged(folder, tmp_path / "out")
    row = rows_of(tmp_path / "out")[3]  # the high part of the long recording
    assert row["window_start_s"] == [0.0, 0.5, 1.0] and row["window_end_s"] == [1.0, 1.5, 2.0]
    tags_WL = np.reshape(row["tags_db"], (3, len(BandTagger.labels)))
    assert BandTagger.labels[int(tags_WL[0].argmax())] == "high"
    assert all(row["is_active"])


def test_both_actors_write_the_same_bytes(folder, tmp_path):
    for name, writes in (("two", False), ("one", True)):
        tagged(folder, tmp_path / name, writes=writes)
    two, one = ({p.name: p.read_bytes() for p in (tmp_path / n / "stems").glob("*.parquet")} for n in ("two", "one"))
    assert two == one and two


class Moody(BandTagger):
    """Fails with batches of more than one clip, and with whatever is quiet."""

    def tag(self, audio_BT, *, lengths=None):
        if len(audio_BT) > 3:
            raise MemoryError("too many windows")
        if audio_BT.abs().max() < 0.01:
            raise ValueError("a clip must be loud; turn it up")
        return super().tag(audio_BT, lengths=lengths)


@pytest.mark.parametrize("outcome", [lambda _: None, lambda x: x[:, :1], lambda x: x * torch.nan])
def test_whatever_a_tagger_returns_costs_the_clips_alone(folder, tmp_path, outcome):
    tagger = BandTagger()
    tag = tagger.tag
    tagger.tag = lambda *args, **more: outcome(tag(*args, **more))
    tagged(folder, tmp_path / "out", tagger)
    errors = {(row["step"], row["error_class"]) for row in read_failures(tmp_path / "out").to_pylist()}
    assert ("tag", "ValueError") in errors and read_totals(tmp_path / "out").num_failed == 6


def test_a_tagger_that_fails_costs_the_clips_that_it_fails_with(folder, tmp_path):
    soundfile.write(folder / "quiet.wav", 0.005 * mixture(2 * RATE_HZ, seed=1), RATE_HZ)
    tagged(folder, tmp_path / "out", Moody())
    failures = {row["path"]: row for row in read_failures(tmp_path / "out").to_pylist()}
    assert len(rows_of(tmp_path / "out")) == 4
    assert (failures["quiet.wav"]["step"], failures["quiet.wav"]["error_class"]) == ("tag", "ValueError")
    assert plan_retry(tmp_path / "out", rows_per_task=3) == 3
    tagged(folder, tmp_path / "out")
    totals = read_totals(tmp_path / "out")
    assert (totals.num_clips, totals.num_stems, totals.num_failed) == (7, 5, 2)
