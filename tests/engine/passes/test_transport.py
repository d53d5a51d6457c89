"""Shards survive their journey: every part of them, and the arrays without a copy."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from engine.passes.transport import DecodedShard, SeparatedShard, ShardReport, WorkerUse, pack, unpack
from engine.scoring.stored import ScoredClip
from tests.support.signals import decoded, mixture

USE = WorkerUse("here", 0.5, 7)


def shard_of(*lengths):
    clips = [decoded(mixture(number, seed=number), clip_id=f"clip-{number}") for number in lengths]
    return DecodedShard(name="shard", clips=clips, failures=[], counts={"num_clips": len(lengths)})


@pytest.mark.parametrize("lengths", [(), (800,), (801, 80, 4000)])
def test_a_decoded_shard_arrives_as_it_was(lengths):
    shard = shard_of(*lengths)
    table = pack(shard)
    got = unpack(table)
    assert table.num_rows == 1
    assert replace(got, clips=[]) == replace(shard, clips=[])
    for clip, expected in zip(got.clips, shard.clips, strict=True):
        assert clip.row == expected.row and np.array_equal(clip.samples_T, expected.samples_T)


def test_arrays_of_an_unpacked_shard_are_those_of_the_table():
    table = pack(shard_of(801, 80, 4000))
    cell = np.frombuffer(table["arrays"].chunk(0).buffers()[2], np.uint8)
    for clip in unpack(table).clips:
        assert np.shares_memory(clip.samples_T, cell)
        assert clip.samples_T.ctypes.data % 64 == cell.ctypes.data % 64
        assert not clip.samples_T.flags.writeable, "another step may read it too"


def test_one_shard_of_several_in_a_table_arrives_as_it_was():
    shards = [replace(shard_of(80, 800), name="a"), replace(shard_of(), name="b"), replace(shard_of(400), name="c")]
    together = pa.concat_tables([pack(shard) for shard in shards])
    for table in (together, together.combine_chunks()):
        for number, shard in enumerate(shards):
            got = unpack(table.slice(number, 1))
            assert got.name == shard.name and len(got.clips) == len(shard.clips)
            assert all(
                np.array_equal(clip.samples_T, expected.samples_T)
                for clip, expected in zip(got.clips, shard.clips, strict=True)
            )


def test_a_separated_shard_arrives_as_it_was():
    signals_ST = np.arange(12, dtype=np.int32).reshape(3, 4)
    row = decoded(mixture(80)).row
    clip = ScoredClip(
        row=row,
        labels=["a", "b"],
        signals_ST=signals_ST,
        exponents=[0, 1, 2],
        scores=[{"x": 1.0}, {}],
        residual_level_db=-3.0,
    )
    shard = SeparatedShard(name="shard", clips=[clip], failures=[], counts={"score_s": 1.0}, use=USE)
    got = unpack(pack(shard))
    (got_clip,) = got.clips
    assert np.array_equal(got_clip.signals_ST, signals_ST) and got.use == USE
    assert replace(got_clip, signals_ST=0) == replace(clip, signals_ST=0)


def test_a_report_arrives_as_a_row():
    report = ShardReport(name="shard", record={"num_stems": 1}, failed={("score", "KeyError"): 2}, use=USE)
    (row,) = pack(report).to_pylist()
    assert unpack(row) == report
