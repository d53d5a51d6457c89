"""Stem shards: rows and clips are read exactly, and missing or damaged shards are noticed."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.passes.shards import read_audio, read_clip, stem_shards, verify
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from tests.support.closed_pass import random_samples, rewrite_shard
from tests.support.signals import read_failures


def test_the_pass_has_the_shards_that_the_tests_assume(closed_pass):
    shards = stem_shards(closed_pass / "stems")
    assert [pq.read_metadata(path).num_rows for path in shards] == [10, 0, 2]
    assert pq.ParquetFile(shards[0]).num_row_groups == 2
    assert len(read_failures(closed_pass)) == 1


def test_rows_are_read_in_the_requested_order(closed_pass):
    shard = stem_shards(closed_pass / "stems")[0].name
    one_by_one = [read_audio(closed_pass / "stems", shard, [row])[0] for row in range(10)]
    assert len({samples_T.tobytes() for samples_T in one_by_one}) == 10
    rows = [9, 0, 8, 7, 3, 9, 1]
    for samples_T, row in zip(read_audio(closed_pass / "stems", shard, rows), rows, strict=True):
        np.testing.assert_array_equal(samples_T, one_by_one[row])
    assert read_audio(closed_pass / "stems", shard, []) == []


def test_a_clip_whose_stems_are_in_two_row_groups_is_read_completely(write_pass):
    """A group has eight rows, so clips of three stems cross its end. The mixtures are not the sums of the stems."""
    stems = [(f"clip{i // 3}", "abc"[i % 3], random_samples(300 + i // 3, i), {}) for i in range(18)]
    mixtures = {f"clip{i}": random_samples(300 + i, 100 + i) for i in range(6)}
    folder = write_pass(stems, mixtures=mixtures) / "stems"
    (shard,) = stem_shards(folder)
    assert pq.ParquetFile(shard).num_row_groups == 3
    for number in range(6):
        mixture_T, found = read_clip(folder, shard.name, first_row=3 * number, num_stems=3)
        np.testing.assert_array_equal(mixture_T, mixtures[f"clip{number}"])
        np.testing.assert_array_equal([*found.values()], [stems[3 * number + i][2] for i in range(3)])


def test_a_clip_without_its_mixture_is_an_error(write_pass):
    stems = [(clip_id, label, random_samples(300, 0), {}) for clip_id in ("whole", "bare") for label in "ab"]
    folder = write_pass(stems, mixtures={"bare": None}) / "stems"
    read_clip(folder, "shard-000000-0000.parquet", first_row=0, num_stems=2)
    with pytest.raises(
        ValueError, match=r"shard-000000-0000\.parquet must have a mixture at row 2, got none; make the pass again"
    ):
        read_clip(folder, "shard-000000-0000.parquet", first_row=2, num_stems=2)
    assert len(read_audio(folder, "shard-000000-0000.parquet", [2, 3])) == 2


def test_a_shard_without_mixtures_is_the_same_error(write_pass):
    folder = write_pass([("clip", label, random_samples(300, 0), {}) for label in "ab"]) / "stems"
    shard = folder / "shard-000000-0000.parquet"
    rewrite_shard(folder, shard.name, pq.read_table(shard).drop_columns(["mixture_flac", "mixture_exponent"]))
    with pytest.raises(ValueError, match=r"shard-000000-0000\.parquet must have a mixture"):
        read_clip(folder, shard.name, first_row=0, num_stems=2)
    assert len(read_audio(folder, shard.name, [0, 1])) == 2


def test_a_changed_shard_is_noticed(out):
    assert verify(out / "stems") == []
    shard = out / "stems" / "shard-000002-0000.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert verify(out / "stems") == ["shard-000002-0000.parquet"]


@pytest.mark.parametrize(
    "use", [stem_shards, verify, lambda stems: select_tracks(stems, stems.parent / "tracks", Thresholds())]
)
def test_a_missing_shard_is_named(out, use):
    (out / "stems" / "shard-000001-0000.parquet").unlink()
    with pytest.raises(ValueError, match=r"cannot find 1 of the shards of .*the first is shard-000001-0000\.parquet"):
        use(out / "stems")


@pytest.mark.parametrize(
    "use", [stem_shards, verify, lambda stems: select_tracks(stems, stems.parent / "tracks", Thresholds())]
)
def test_an_unfinished_pass_is_refused(out, use):
    (out / "stems" / "manifest.json").unlink()
    (out / "stems" / "pass.json").write_text("{}")  # a pass writes it first
    with pytest.raises(ValueError, match=r"cannot find .*manifest\.json \(the pass is not finished\)"):
        use(out / "stems")
    assert not (out / "tracks").exists()


def test_a_shard_that_the_manifest_does_not_name_is_ignored(out):
    shutil.copy(out / "stems" / "shard-000002-0000.parquet", out / "stems" / "shard-000009-0000.parquet")
    assert len(stem_shards(out / "stems")) == 3
    assert select_tracks(out / "stems", out / "tracks", Thresholds())["num_stems"] == 12
