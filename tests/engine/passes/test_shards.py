"""Selections over the stems of a pass: kept or rejected with its reason, readable wherever moved, damage noticed."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.shards import read_audio, read_clip, read_failures, stem_shards, verify
from engine.schema import ESTIMATES, SCORES
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import read_absent, read_tracks, write_tracks
from tests.support.signals import (
    RATE_HZ,
    BandSeparator,
    close_pass,
    run_stages,
    snr_db,
    two_bands,
    write_clips,
)

HIGH_GAINS = {"equal.wav": 1.0, "quiet.wav": 0.1, "faint.wav": 0.01, "faintest.wav": 0.003, "again.wav": 1.0}
DURATION_S = 0.5
PLACE = ("shard", "row", "first_row", "num_stems")
ADDED = (*PLACE, *ESTIMATES.names, "kept_by_floor")
FAINT = Thresholds(min_stem_level_db=-30.0)


def sources(name):
    """The stems of a clip: high is about 0, 20, 40 and 50 dB below low."""
    low_T, high_T = two_bands(round(DURATION_S * RATE_HZ), seed=list(HIGH_GAINS).index(name))
    return {"low": low_T, "high": np.float32(HIGH_GAINS[name]) * high_T}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A closed pass of one shard with ten stems, in two row groups, one that is empty and one with two stems."""
    folder = tmp_path_factory.mktemp("original")
    files = {name: np.sum(list(sources(name).values()), axis=0, dtype=np.float32) for name in HIGH_GAINS}
    corpus = read_corpus(write_clips(folder / "corpus", files))
    rows = corpus.clips.to_pylist()
    broken = [{**rows[0], "clip_id": "broken", "path": "nowhere.wav"}]
    extra = [{**rows[0], "clip_id": "extra"}]
    config = PassConfig(rows_per_task=5, part_s=100.0)
    out = folder / "pass"
    for number, some in enumerate((rows, broken, extra)):
        run_stages(some, corpus.root, folder / str(number), config=config)
        for path in (folder / str(number)).glob("*/part-*"):
            target = out / path.parent.name / path.name.replace("000000", f"{number:06d}")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    close_pass(out)
    return out


@pytest.fixture
def out(original, tmp_path):
    """A copy of the pass, free to spoil."""
    shutil.copytree(original, tmp_path / "run" / "pass")
    return tmp_path / "run" / "pass"


def identities(table):
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))


def test_the_pass_has_the_shards_that_the_tests_assume(original):
    shards = stem_shards(original / "stems")
    assert [pq.read_metadata(path).num_rows for path in shards] == [10, 0, 2]
    assert pq.ParquetFile(shards[0]).num_row_groups == 2
    assert len(read_failures(original)) == 1


def test_kept_and_rejected_are_the_stems(out):
    manifest = write_tracks(out / "stems", out / "tracks", FAINT)
    kept, rejected = (pq.read_table(out / "tracks" / f"{name}.parquet") for name in ("kept", "rejected"))
    assert not set(identities(kept)) & set(identities(rejected))
    everything = {
        (path.name, row) for path in stem_shards(out / "stems") for row in range(pq.read_metadata(path).num_rows)
    }
    assert set(identities(kept)) | set(identities(rejected)) == everything
    assert len(kept) + len(rejected) == len(everything) == 12
    assert manifest["num_stems"] == 12 and manifest["num_kept"] == len(kept) == 10
    assert manifest["num_rejected"] == {"min_stem_level_db": 2}
    assert manifest["kept_h"] == pytest.approx(10 * DURATION_S / 3600)
    assert manifest["kept_by_label"] == {"high": 4, "low": 6}
    assert manifest["thresholds"]["min_stem_level_db"] == -30.0
    assert json.loads((out / "tracks" / "manifest.json").read_text()) == manifest


def test_what_is_rejected_says_by_which_rule_with_value_and_limit(out):
    write_tracks(out / "stems", out / "tracks", Thresholds(min_re_sdr_db=10.0, min_stem_level_db=-30.0))
    rows = {row["path"]: row for row in pq.read_table(out / "tracks" / "rejected.parquet").to_pylist()}
    assert rows.keys() == {"faint.wav", "faintest.wav"}
    for row, level_db in ((rows["faint.wav"], -40.0), (rows["faintest.wav"], -50.46)):
        assert row["label"] == "high" and row["rejected_by"] == "min_stem_level_db"
        assert row["rejected_value"] == row["stem_level_db"] == pytest.approx(level_db, abs=0.1)
        assert row["rejected_limit"] == -30.0


def test_the_index_carries_the_identity_and_scores_of_the_stems_it_names(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    index, stems = read_tracks(out / "tracks")
    for row in index.to_pylist():
        shard = pq.read_table(stems / row["shard"])
        (stem,) = shard.slice(row["row"], 1).to_pylist()
        assert {name: stem[name] for name in row if name not in ADDED} == {
            name: value for name, value in row.items() if name not in ADDED
        }
        of_clip = [i for i, clip_id in enumerate(shard["clip_id"].to_pylist()) if clip_id == row["clip_id"]]
        assert of_clip == list(range(row["first_row"], row["first_row"] + row["num_stems"]))
        assert row["row"] in of_clip
    assert {"labels", "num_samples", *PLACE} <= set(index.column_names)
    assert not {"audio_flac", "mixture_flac"} & set(index.column_names)


def test_the_audio_of_a_track_is_its_source(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    index, stems = read_tracks(out / "tracks")
    for row in index.to_pylist():
        (samples_T,) = read_audio(stems, row["shard"], [row["row"]])
        assert samples_T.dtype == np.float32 and len(samples_T) == row["num_samples"]
        assert snr_db(estimate=samples_T, reference=sources(row["path"])[row["label"]]) > 60


def test_rows_are_read_in_the_order_asked(original):
    shard = stem_shards(original / "stems")[0].name
    one_by_one = [read_audio(original / "stems", shard, [row])[0] for row in range(10)]
    assert len({samples_T.tobytes() for samples_T in one_by_one}) == 10
    asked = [9, 0, 8, 7, 3, 9, 1]
    for samples_T, row in zip(read_audio(original / "stems", shard, asked), asked, strict=True):
        np.testing.assert_array_equal(samples_T, one_by_one[row])
    assert read_audio(original / "stems", shard, []) == []


def test_a_clip_is_read_with_its_mixture_and_its_stems_in_order(out):
    """The index of a selection says where, also where only one of the stems was kept; low is the first label."""
    write_tracks(out / "stems", out / "tracks", Thresholds(max_stem_level_db=-2.0, min_stem_level_db=-45.0))
    index, stems = read_tracks(out / "tracks")
    assert {row["path"] for row in index.to_pylist()} == {"equal.wav", "quiet.wav", "faint.wav", "again.wav"}
    for row in index.to_pylist():
        mixture_T, stems_ST = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
        truth = sources(row["path"])
        assert mixture_T.dtype == stems_ST.dtype == np.float32 and stems_ST.shape == (2, row["num_samples"])
        clip_T = np.sum(list(truth.values()), axis=0, dtype=np.float32)
        assert np.abs(mixture_T - clip_T).max() <= np.abs(clip_T).max() * 2.0**-23
        for samples_T, label in zip(stems_ST, ("low", "high"), strict=True):
            assert snr_db(estimate=samples_T, reference=truth[label]) > 60
        rows = range(row["first_row"], row["first_row"] + row["num_stems"])
        np.testing.assert_array_equal(stems_ST, read_audio(stems, row["shard"], rows))


def random_samples(num_samples, seed, *, num_bits=20):
    """Samples [T] that 24 bits hold exactly."""
    steps_T = np.random.default_rng(seed).integers(-(2**num_bits), 2**num_bits, num_samples)
    return (steps_T / 2.0**num_bits).astype(np.float32)


def test_a_clip_whose_stems_lie_in_two_row_groups_is_read_whole(write_pass):
    """Eight rows make a group; clips of three stems straddle its end. The mixtures are not the sums of the stems."""
    stems = [(f"clip{i // 3}", "abc"[i % 3], random_samples(300 + i // 3, i), {}) for i in range(18)]
    mixtures = {f"clip{i}": random_samples(300 + i, 100 + i) for i in range(6)}
    folder = write_pass(stems, mixtures=mixtures) / "stems"
    (shard,) = stem_shards(folder)
    assert pq.ParquetFile(shard).num_row_groups == 3
    for number in range(6):
        mixture_T, stems_ST = read_clip(folder, shard.name, first_row=3 * number, num_stems=3)
        np.testing.assert_array_equal(mixture_T, mixtures[f"clip{number}"])
        np.testing.assert_array_equal(stems_ST, [stems[3 * number + i][2] for i in range(3)])


def test_a_clip_without_its_mixture_is_an_error_that_says_where_and_what_to_do(write_pass):
    stems = [(clip_id, label, random_samples(300, 0), {}) for clip_id in ("whole", "bare") for label in "ab"]
    folder = write_pass(stems, mixtures={"bare": None}) / "stems"
    read_clip(folder, "part-000000-0000.parquet", first_row=0, num_stems=2)
    with pytest.raises(ValueError, match=r"part-000000-0000\.parquet holds no mixture at row 2; make the pass again"):
        read_clip(folder, "part-000000-0000.parquet", first_row=2, num_stems=2)
    assert len(read_audio(folder, "part-000000-0000.parquet", [2, 3])) == 2


def test_a_shard_from_before_mixtures_were_stored_is_the_same_error(write_pass):
    folder = write_pass([("clip", label, random_samples(300, 0), {}) for label in "ab"]) / "stems"
    shard = folder / "part-000000-0000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["mixture_flac", "mixture_exponent"]), shard)
    with pytest.raises(ValueError, match=r"part-000000-0000\.parquet holds no mixture"):
        read_clip(folder, shard.name, first_row=0, num_stems=2)
    assert len(read_audio(folder, shard.name, [0, 1])) == 2


def test_no_rules_keep_everything_and_strict_rules_nothing(out):
    assert write_tracks(out / "stems", out / "all", Thresholds())["num_kept"] == 12
    assert len(pq.read_table(out / "all" / "rejected.parquet")) == 0
    manifest = write_tracks(out / "stems", out / "none", Thresholds(max_stem_level_db=-99.0))
    assert manifest["num_kept"] == 0 and manifest["kept_h"] == 0.0 and manifest["kept_by_label"] == {}
    assert manifest["num_rejected"] == {"max_stem_level_db": 12}
    index, _ = read_tracks(out / "none")
    assert len(index) == 0 and "rejected_by" in pq.read_schema(out / "none" / "rejected.parquet").names


def test_rejections_are_counted_by_rule(out):
    manifest = write_tracks(out / "stems", out / "t", Thresholds(min_stem_level_db=-30.0, max_stem_level_db=-2.0))
    rejected = pq.read_table(out / "t" / "rejected.parquet")
    assert manifest["num_rejected"] == {"min_stem_level_db": 2, "max_stem_level_db": 3}
    assert sorted(rejected["rejected_by"].to_pylist()) == ["max_stem_level_db"] * 3 + ["min_stem_level_db"] * 2


def test_absent_labels_are_read_with_the_place_of_their_clip(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    absent, stems = read_absent(out / "tracks")
    kept, same = read_tracks(out / "tracks")
    assert stems == same == (out / "stems").resolve()
    rows = {row["path"]: row for row in absent.to_pylist()}
    assert rows.keys() == {"faint.wav", "faintest.wav"}
    assert set(kept.column_names) - {"kept_by_floor"} < set(absent.column_names)
    for path, row in rows.items():
        assert (row["label"], row["labels"], row["rejected_by"]) == ("high", ["low", "high"], "min_stem_level_db")
        mixture_T, stems_ST = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
        assert stems_ST.shape == (2, row["num_samples"])
        assert snr_db(estimate=mixture_T, reference=sources(path)["low"]) > 30
    write_tracks(out / "stems", out / "tracks", Thresholds(min_stem_level_db=-45.0, max_stem_level_db=-2.0))
    assert read_absent(out / "tracks")[0]["path"].to_pylist() == ["faintest.wav"]  # not the three that are too loud


def test_tampered_rejections_are_noticed(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    rejected = out / "tracks" / "rejected.parquet"
    pq.write_table(pq.read_table(rejected).slice(0, 1), rejected)
    with pytest.raises(ValueError, match=r"rejected\.parquet is not the file that its manifest recorded"):
        read_absent(out / "tracks")
    assert len(read_tracks(out / "tracks")[0]) == 10


def by_level(index):
    """An estimator for tests: the level of the stem plus 50, with an error of 2 dB."""
    levels = np.asarray(index["stem_level_db"])
    return pa.table([levels + 50, np.full(len(levels), 2.0)], names=ESTIMATES.names)


def test_estimates_are_asked_for_by_shard_stored_and_thresholded(out):
    asked, thresholds = [], Thresholds(min_estimated_si_sdr_db=25.0)

    def estimate(index):
        asked.append(index)
        return by_level(index)

    named = {"estimate": estimate, "estimator_fingerprint": "levels"}
    manifest = write_tracks(out / "stems", out / "tracks", thresholds, **named)
    assert [len(index) for index in asked] == [10, 0, 2]
    assert all({*SCORES.names, "label"} <= set(index.column_names) for index in asked)
    for name, number in (("kept", 10), ("rejected", 2)):
        table = pq.read_table(out / "tracks" / f"{name}.parquet")
        assert len(table) == number
        np.testing.assert_allclose(table["estimated_si_sdr_db"], np.asarray(table["stem_level_db"]) + 50)
        assert set(table["estimated_error_db"].to_pylist()) == {2.0}
    assert manifest["estimator_fingerprint"] == "levels"
    assert manifest["num_rejected"] == {"min_estimated_si_sdr_db": 2}
    other = write_tracks(out / "stems", out / "tracks", thresholds, estimate=by_level, estimator_fingerprint="other")
    assert other["fingerprint"] != manifest["fingerprint"]
    assert write_tracks(out / "stems", out / "none", Thresholds())["estimator_fingerprint"] is None
    assert pq.read_table(out / "none" / "kept.parquet")["estimated_si_sdr_db"].null_count == 12


@pytest.mark.parametrize(
    "estimate", [lambda index: by_level(index).slice(1), lambda index: by_level(index).select(["estimated_error_db"])]
)
def test_an_estimator_that_gives_something_else_is_an_error(out, estimate):
    with pytest.raises(ValueError, match=r"an estimator gives .* of each of 10 stems, this one gave"):
        write_tracks(out / "stems", out / "tracks", Thresholds(), estimate=estimate)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"min_tagger_margin_db": 0.0}, "min_tagger_margin_db asks for tagger_margin_db, which no .* with a tagger"),
        ({"min_estimated_si_sdr_db": 5.0}, "min_estimated_si_sdr_db asks for .* give an estimator .*--quality"),
        ({"label_floor_fraction": 0.5}, "rank_by asks for estimated_si_sdr_db, .*or choose another than rank_by"),
    ],
)
def test_a_rule_over_a_score_that_no_stem_has_is_an_error(write_pass, thresholds, message):
    out = write_pass([("clip", label, random_samples(300, 0), {"re_sdr_db": 20.0}) for label in "ab"])
    with pytest.raises(ValueError, match=message):
        write_tracks(out / "stems", out / "tracks", Thresholds(**thresholds))
    assert not (out / "tracks" / "manifest.json").exists()


def test_a_score_that_only_stems_cannot_have_is_no_error(write_pass):
    rules = Thresholds(max_coherence_fraction=0.5, max_contested_db=0.0)
    alone = write_pass([(clip_id, "a", random_samples(300, 0), {}) for clip_id in ("x", "y")], folder="alone")
    assert write_tracks(alone / "stems", alone / "tracks", rules)["num_kept"] == 2
    pairs = write_pass([("x", label, random_samples(300, 0), {}) for label in "ab"], folder="pairs")
    with pytest.raises(ValueError, match="max_coherence_fraction asks for coherence_fraction, which no stem has"):
        write_tracks(pairs / "stems", pairs / "tracks", rules)


def test_a_pass_from_before_a_score_existed_still_reads(write_pass):
    out = write_pass([("clip", label, random_samples(300, 0), {"re_sdr_db": 20.0}) for label in "ab"])
    shard = out / "stems" / "part-000000-0000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["mask_snr_db"]), shard)
    assert write_tracks(out / "stems", out / "tracks", Thresholds(min_re_sdr_db=10.0))["num_kept"] == 2
    assert read_tracks(out / "tracks")[0]["mask_snr_db"].null_count == 2
    with pytest.raises(ValueError, match="min_mask_snr_db asks for mask_snr_db, which no stem has; make the pass"):
        write_tracks(out / "stems", out / "tracks", Thresholds(min_mask_snr_db=1.0))


def reshard(out, order, sizes):
    """The stems of a pass of one shard, whole clips in another order and in shards of other sizes (in clips)."""
    stems = out / "stems"
    (shard,) = stem_shards(stems)
    table = pq.read_table(shard)
    clips = np.unique(np.asarray(table["clip_id"]))[order]
    manifest = json.loads((stems / "manifest.json").read_text()) | {"shards": {}}
    shard.unlink()
    for number, some in enumerate(np.split(clips, np.cumsum(sizes)[:-1])):
        parts = [table.filter(np.asarray(table["clip_id"]) == clip_id) for clip_id in some]
        pq.write_table(pa.concat_tables([table.slice(0, 0), *parts]), stems / f"part-{number:06d}-0000.parquet")
        manifest["shards"][f"part-{number:06d}-0000"] = ""
    (stems / "manifest.json").write_text(json.dumps(manifest))


def test_the_selection_depends_neither_on_order_nor_on_shards(write_pass):
    """Adaptive rules look at the whole pass; ranks have ties, which the clip decides."""
    thresholds = Thresholds(
        min_stem_level_db=-20.0,
        min_re_sdr_db=Quantile(quantile=0.3),
        min_remix_snr_db=Quantile(quantile=0.4, by_label=True),
        min_active_fraction=0.75,
        label_floor_fraction=0.55,
        label_cap_ratio=1.2,
        rank_by="active_fraction",
    )
    rng = np.random.default_rng(1)
    stems = []
    for number in range(40):
        for label in ("a", "b") if number % 4 else ("a", "c"):
            drawn = {"re_sdr_db": rng.normal(10, 5), "remix_snr_db": rng.normal(5, 5) - 4 * (label == "c")}
            levels = {"stem_level_db": rng.uniform(-24, 0), "active_fraction": rng.integers(0, 5) / 4}
            stems.append((f"clip{number:02d}", label, random_samples(64, number), drawn | levels))

    def selected(folder, order, sizes):
        out = write_pass(stems, folder=folder)
        reshard(out, order, sizes)
        manifest = write_tracks(out / "stems", out / "tracks", thresholds)
        kept, rejected = (pq.read_table(out / "tracks" / f"{name}.parquet") for name in ("kept", "rejected"))
        assert len(kept) + len(rejected) == manifest["num_stems"] == 80
        assert manifest["num_kept_by_floor"] == sum(kept["kept_by_floor"].to_pylist())
        columns = ["clip_id", "label", "rejected_by", "rejected_value", "rejected_limit"]
        why = {tuple(row.values())[:2]: tuple(row.values())[2:] for row in rejected.select(columns).to_pylist()}
        counts = {name: manifest[name] for name in ("num_kept", "num_kept_by_floor", "num_rejected", "kept_by_label")}
        return why, counts

    why, counts = selected("whole", np.arange(40), [40])
    assert counts["num_kept_by_floor"] > 0
    assert len(counts["num_rejected"]) == 4
    assert selected("again", rng.permutation(40), [1, 0, 25, 14]) == (why, counts)
    assert selected("thrice", np.arange(40)[::-1], [10] * 4) == (why, counts)


def test_another_selection_replaces_the_first_and_equal_ones_are_equal(out):
    first = write_tracks(out / "stems", out / "tracks", FAINT)
    other = write_tracks(out / "stems", out / "tracks", Thresholds(min_stem_level_db=-45.0))
    assert (first["num_kept"], other["num_kept"]) == (10, 11)
    assert first["fingerprint"] != other["fingerprint"]
    assert len(read_tracks(out / "tracks")[0]) == 11
    assert write_tracks(out / "stems", out / "tracks", FAINT) == first
    assert sorted(path.name for path in (out / "tracks").iterdir()) == [
        "kept.parquet",
        "manifest.json",
        "rejected.parquet",
    ]


def test_selecting_changes_no_stem(out):
    before = {path: path.read_bytes() for path in (out / "stems").iterdir()}
    write_tracks(out / "stems", out / "tracks", FAINT)
    assert {path: path.read_bytes() for path in (out / "stems").iterdir()} == before


@pytest.mark.parametrize("place", ["pass/tracks", "elsewhere/deep/tracks"])
def test_a_run_that_was_moved_still_reads(out, tmp_path, monkeypatch, place):
    run = out.parent
    monkeypatch.chdir(run)
    write_tracks(out / "stems", run / place, FAINT)
    expected = read_audio(out / "stems", "part-000000-0000.parquet", [9])[0]
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    index, stems = read_tracks(tmp_path / "moved" / place)
    assert stems.is_relative_to(tmp_path / "moved") and len(index) == 10
    np.testing.assert_array_equal(read_audio(stems, "part-000000-0000.parquet", [9])[0], expected)
    assert verify(stems) == []
    assert len(read_tracks(f"moved/{place}")[0]) == 10


def test_a_tampered_selection_is_noticed(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    kept = out / "tracks" / "kept.parquet"
    pq.write_table(pq.read_table(kept).slice(0, 3), kept)
    with pytest.raises(ValueError, match=r"kept\.parquet is not the file that its manifest recorded"):
        read_tracks(out / "tracks")


def test_a_changed_shard_is_noticed(out):
    assert verify(out / "stems") == []
    shard = out / "stems" / "part-000002-0000.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert verify(out / "stems") == ["part-000002-0000.parquet"]


@pytest.mark.parametrize(
    "use", [stem_shards, verify, lambda stems: write_tracks(stems, stems.parent / "tracks", FAINT)]
)
def test_a_missing_shard_is_named(out, use):
    (out / "stems" / "part-000001-0000.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its shards, first part-000001-0000\.parquet"):
        use(out / "stems")


@pytest.mark.parametrize(
    "use", [stem_shards, verify, lambda stems: write_tracks(stems, stems.parent / "tracks", FAINT)]
)
def test_an_unfinished_pass_is_no_source_of_tracks(out, use):
    (out / "stems" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not a finished pass: it has no manifest\.json"):
        use(out / "stems")
    assert not (out / "tracks").exists()


def test_a_shard_that_the_manifest_does_not_name_is_ignored(out):
    shutil.copy(out / "stems" / "part-000002-0000.parquet", out / "stems" / "part-000009-0000.parquet")
    assert len(stem_shards(out / "stems")) == 3
    assert write_tracks(out / "stems", out / "tracks", Thresholds())["num_stems"] == 12


def test_an_unfinished_selection_raises(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    (out / "tracks" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not a finished selection: it has no manifest\.json"):
        read_tracks(out / "tracks")


def test_a_selection_that_broke_off_is_not_taken_for_the_one_before(out):
    write_tracks(out / "stems", out / "tracks", FAINT)
    shard = out / "stems" / "part-000002-0000.parquet"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises((pa.ArrowInvalid, OSError, ValueError)):
        write_tracks(out / "stems", out / "tracks", Thresholds())
    with pytest.raises(ValueError, match="not a finished selection"):
        read_tracks(out / "tracks")
    assert not [path.name for path in (out / "tracks").iterdir() if path.name.startswith(".")]


def test_bands_are_what_this_file_says():
    """The stand-in finds the sources even 50 dB down, so levels above are those of the files."""
    low_T, high_T = sources("faintest.wav").values()
    (found_T,) = BandSeparator().separate(torch.from_numpy(low_T + high_T)[None], ["high"])
    assert snr_db(estimate=found_T, reference=high_T) > 60


def test_tracks_are_not_written_over_the_stems_they_select_from(out):
    before = {path: path.read_bytes() for path in (out / "stems").iterdir()}
    (out / "stems" / "pass.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the stems of a pass"):
        write_tracks(out / "stems", out / "stems", FAINT)
    assert {path: path.read_bytes() for path in before} == before
