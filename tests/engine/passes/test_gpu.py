"""An actor with a GPU: several shards at once, scored on it; on a CPU with a stand-in for the card."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.passes import separate
from engine.passes.config import PassConfig
from engine.passes.records import shard_records
from engine.passes.separate import Separate
from engine.passes.transport import DecodedShard, pack
from engine.passes.write import Write
from engine.scoring import energies, scores, spectra, stored
from engine.storage.in_hand import InHand
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, decoded, mixture

CONFIG = PassConfig(reseparate=True, separate_limit_s=60.0)
LENGTHS = (800, 900, 800, 800)


class StandInEvent:
    """An event of a card whose work is done when it is begun."""

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    """Makes actors that take the CPU for a card."""
    for module in (energies, scores, spectra, stored):
        monkeypatch.setattr(module, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(stored, "_fetched", torch.clone)
    upload = separate.uploaded
    monkeypatch.setattr(separate, "uploaded", lambda clips, device: upload(clips, "cpu"))
    for name, value in {"Event": StandInEvent, "synchronize": int, "max_memory_allocated": int}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", int)

    def make(separator=None, **given):
        actor = Separate(lambda _: separator or BandSeparator(), lambda _: BandTagger(), CONFIG, **given)
        actor.device = "card"
        return actor

    return make


def shards():
    for number in range(3):
        clips = [
            decoded(mixture(length, seed=10 * number + place), clip_id=f"clip-{number}-{place}")
            for place, length in enumerate(LENGTHS)
        ]
        num_clips = len(clips)
        counts = {"num_clips": num_clips, "num_queries": 2 * num_clips, "num_shards": 3, "audio_s": 1, "decode_s": 0.1}
        yield DecodedShard(name=f"shard-000000-{number:04d}", clips=clips, failures=[], counts=counts)


def written(out, actor, at_once):
    write = Write(str(out), RATE_HZ)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda shard: write(actor(shard)), [pack(shard) for shard in shards()]))
    return [pq.read_table(path).to_pylist() for path in sorted((out / "stems").glob("*.parquet"))]


def test_a_card_makes_the_same_shards_as_a_cpu(tmp_path, stand_in, monkeypatch):
    on_card = written(tmp_path / "card", stand_in(hand=InHand(tmp_path / "in-hand")), 3)
    monkeypatch.undo()
    on_cpu = written(tmp_path / "cpu", Separate(lambda _: BandSeparator(), lambda _: BandTagger(), CONFIG), 1)
    assert [len(rows) for rows in on_card] == [2 * len(LENGTHS)] * 3
    for rows, expected in zip(on_card, on_cpu, strict=True):
        for row, other in zip(rows, expected, strict=True):
            numbers = {name: value for name, value in other.items() if isinstance(value, float)}
            assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=2e-3)
            assert {name: row[name] for name in row.keys() - numbers} == {
                name: other[name] for name in other.keys() - numbers
            }


def test_shards_at_once_are_the_same_as_one_after_the_other(tmp_path, stand_in):
    assert written(tmp_path / "three", stand_in(), 3) == written(tmp_path / "one", stand_in(), 1)


def test_a_record_says_how_long_the_shard_had_the_card(tmp_path, stand_in):
    written(tmp_path, stand_in(), 3)
    for record in dict(shard_records(tmp_path)).values():
        assert 0 < record["separate_s"] < record["gpu_s"]
        assert record["gpu_s"] <= record["separate_s"] + record["assess_s"] + record["score_s"]


def test_no_two_shards_have_the_card_at_once(tmp_path, stand_in):
    inside, most = [], []

    class Counted(BandSeparator):
        def inspect(self, mix_BT):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    written(tmp_path, stand_in(Counted()), 3)
    assert max(most) == 1


def test_a_batch_that_cannot_be_scored_costs_one_clip(tmp_path, stand_in, monkeypatch):
    score, sizes = stored.score_together, []

    def failing(items, **given):
        sizes.append(len(items))
        if any(item.clip.row["clip_id"] == "clip-1-2" for item in items):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(items, **given)

    monkeypatch.setattr(separate, "score_together", failing)
    written(tmp_path, stand_in(), 1)
    assert sizes == [3, 1, 3, 1, 1, 1, 1, 3, 1], "clips of one length together, and alone after the error"
    records = dict(shard_records(tmp_path)).values()
    assert [record["num_failed"] for record in records] == [0, 2, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_shards_as_a_cpu(tmp_path):
    def make(on_gpu):
        config = replace(CONFIG, autocast=False)
        return Separate(lambda _: BandSeparator(), lambda _: BandTagger(), config, on_gpu)

    on_gpu, on_cpu = (written(tmp_path / str(gpu), make(gpu), 3 if gpu else 1) for gpu in (True, False))
    for rows, expected in zip(on_gpu, on_cpu, strict=True):
        for row, other in zip(rows, expected, strict=True):
            assert row["audio_flac"] == other["audio_flac"] and row["mixture_flac"] == other["mixture_flac"]
            numbers = {name: value for name, value in other.items() if isinstance(value, float)}
            assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=2e-3)
    assert np.all([record["gpu_s"] > 0 for record in dict(shard_records(tmp_path / "True")).values()])
