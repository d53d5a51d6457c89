"""Selections of the stems of a pass: kept or rejected with a reason, readable after a move, damage noticed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.passes.shards import read_audio, read_clip, stem_shards, verify
from engine.schema import ESTIMATES, SCORES
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import read_absent, read_tracks, select_tracks
from tests.support.closed_pass import DURATION_S, random_samples, rewrite_shard, sources
from tests.support.signals import BandSeparator, snr_db

PLACE = ("shard", "row", "first_row", "num_stems")
ADDED = (*PLACE, *ESTIMATES.names, "kept_by_floor")
FAINT = Thresholds(min_stem_level_db=-30.0)


def identities(table):
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))


def test_kept_and_rejected_are_the_stems(out):
    manifest = select_tracks(out / "stems", out / "tracks", FAINT)
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


def test_rejected_stems_have_rule_value_and_limit(out):
    select_tracks(out / "stems", out / "tracks", Thresholds(min_re_sdr_db=10.0, min_stem_level_db=-30.0))
    rows = {row["path"]: row for row in pq.read_table(out / "tracks" / "rejected.parquet").to_pylist()}
    assert rows.keys() == {"faint.wav", "faintest.wav"}
    for row, level_db in ((rows["faint.wav"], -40.0), (rows["faintest.wav"], -50.46)):
        assert row["label"] == "high" and row["rejected_by"] == "min_stem_level_db"
        assert row["rejected_value"] == row["stem_level_db"] == pytest.approx(level_db, abs=0.1)
        assert row["rejected_limit"] == -30.0


def test_the_index_has_the_identity_and_scores_of_its_stems(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
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
    select_tracks(out / "stems", out / "tracks", FAINT)
    index, stems = read_tracks(out / "tracks")
    for row in index.to_pylist():
        (samples_T,) = read_audio(stems, row["shard"], [row["row"]])
        assert samples_T.dtype == np.float32 and len(samples_T) == row["num_samples"]
        assert snr_db(estimate=samples_T, reference=sources(row["path"])[row["label"]]) > 60


def test_a_clip_is_read_with_its_mixture_and_its_stems_in_order(out):
    """The index of a selection has its rows, also if only one of the stems was kept; low is the first label."""
    select_tracks(out / "stems", out / "tracks", Thresholds(max_stem_level_db=-2.0, min_stem_level_db=-45.0))
    index, stems = read_tracks(out / "tracks")
    assert {row["path"] for row in index.to_pylist()} == {"equal.wav", "quiet.wav", "faint.wav", "again.wav"}
    for row in index.to_pylist():
        mixture_T, found = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
        stems_ST = np.stack([*found.values()])
        truth = sources(row["path"])
        assert mixture_T.dtype == stems_ST.dtype == np.float32 and stems_ST.shape == (2, row["num_samples"])
        clip_T = np.sum(list(truth.values()), axis=0, dtype=np.float32)
        assert np.abs(mixture_T - clip_T).max() <= np.abs(clip_T).max() * 2.0**-23
        for samples_T, label in zip(stems_ST, ("low", "high"), strict=True):
            assert snr_db(estimate=samples_T, reference=truth[label]) > 60
        rows = range(row["first_row"], row["first_row"] + row["num_stems"])
        np.testing.assert_array_equal(stems_ST, read_audio(stems, row["shard"], rows))


def test_no_rules_keep_all_and_strict_rules_none(out):
    assert select_tracks(out / "stems", out / "all", Thresholds())["num_kept"] == 12
    assert len(pq.read_table(out / "all" / "rejected.parquet")) == 0
    manifest = select_tracks(out / "stems", out / "none", Thresholds(max_stem_level_db=-99.0))
    assert manifest["num_kept"] == 0 and manifest["kept_h"] == 0.0 and manifest["kept_by_label"] == {}
    assert manifest["num_rejected"] == {"max_stem_level_db": 12}
    index, _ = read_tracks(out / "none")
    assert len(index) == 0 and "rejected_by" in pq.read_schema(out / "none" / "rejected.parquet").names


def test_rejections_are_counted_by_rule(out):
    manifest = select_tracks(out / "stems", out / "t", Thresholds(min_stem_level_db=-30.0, max_stem_level_db=-2.0))
    rejected = pq.read_table(out / "t" / "rejected.parquet")
    assert manifest["num_rejected"] == {"min_stem_level_db": 2, "max_stem_level_db": 3}
    assert sorted(rejected["rejected_by"].to_pylist()) == ["max_stem_level_db"] * 3 + ["min_stem_level_db"] * 2


def test_absent_labels_are_read_with_the_rows_of_their_clip(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
    absent, stems = read_absent(out / "tracks")
    kept, same = read_tracks(out / "tracks")
    assert stems == same == (out / "stems").resolve()
    rows = {row["path"]: row for row in absent.to_pylist()}
    assert rows.keys() == {"faint.wav", "faintest.wav"}
    assert set(kept.column_names) - {"kept_by_floor"} < set(absent.column_names)
    for path, row in rows.items():
        assert (row["label"], row["labels"], row["rejected_by"]) == ("high", ["low", "high"], "min_stem_level_db")
        mixture_T, found = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
        stems_ST = np.stack([*found.values()])
        assert stems_ST.shape == (2, row["num_samples"])
        assert snr_db(estimate=mixture_T, reference=sources(path)["low"]) > 30
    select_tracks(out / "stems", out / "tracks", Thresholds(min_stem_level_db=-45.0, max_stem_level_db=-2.0))
    assert read_absent(out / "tracks")[0]["path"].to_pylist() == ["faintest.wav"]  # not the three that are too loud


def test_tampered_rejections_are_noticed(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
    rejected = out / "tracks" / "rejected.parquet"
    pq.write_table(pq.read_table(rejected).slice(0, 1), rejected)
    with pytest.raises(ValueError, match=r"rejected\.parquet must have the checksum in its manifest"):
        read_absent(out / "tracks")
    assert len(read_tracks(out / "tracks")[0]) == 10


class ByLevel:
    """An estimator for tests: the level of the stem plus 50, with an error of 2 dB; keeps what it was given."""

    def __init__(self, fingerprint="levels"):
        self.fingerprint, self.given = fingerprint, []

    def estimate(self, index):
        self.given.append(index)
        levels = np.asarray(index["stem_level_db"])
        return pa.table([levels + 50, np.full(len(levels), 2.0)], names=ESTIMATES.names)


def test_estimates_are_computed_by_shard_stored_and_thresholded(out):
    estimator, thresholds = ByLevel(), Thresholds(min_estimated_si_sdr_db=25.0)
    manifest = select_tracks(out / "stems", out / "tracks", thresholds, estimator=estimator)
    assert [len(index) for index in estimator.given] == [10, 0, 2]
    assert all({*SCORES.names, "label"} <= set(index.column_names) for index in estimator.given)
    for name, number in (("kept", 10), ("rejected", 2)):
        table = pq.read_table(out / "tracks" / f"{name}.parquet")
        assert len(table) == number
        np.testing.assert_allclose(table["estimated_si_sdr_db"], np.asarray(table["stem_level_db"]) + 50)
        assert set(table["estimated_error_db"].to_pylist()) == {2.0}
    assert manifest["estimator_fingerprint"] == "levels"
    assert manifest["num_rejected"] == {"min_estimated_si_sdr_db": 2}
    other = select_tracks(out / "stems", out / "tracks", thresholds, estimator=ByLevel("other"))
    assert other["fingerprint"] != manifest["fingerprint"]
    assert select_tracks(out / "stems", out / "none", Thresholds())["estimator_fingerprint"] is None
    assert pq.read_table(out / "none" / "kept.parquet")["estimated_si_sdr_db"].null_count == 12


@pytest.mark.parametrize(
    "change", [lambda estimates: estimates.slice(1), lambda estimates: estimates.select(["estimated_error_db"])]
)
def test_an_estimator_that_returns_another_table_is_an_error(out, change):
    estimator = ByLevel()
    estimate = estimator.estimate
    estimator.estimate = lambda index: change(estimate(index))
    with pytest.raises(ValueError, match=r"an estimator must return .* of 10 stems, got"):
        select_tracks(out / "stems", out / "tracks", Thresholds(), estimator=estimator)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (
            {"min_tagger_margin_db": 0.0},
            r"cannot apply min_tagger_margin_db \(no stem has tagger_margin_db\); .* with a tagger",
        ),
        ({"min_estimated_si_sdr_db": 5.0}, "cannot apply min_estimated_si_sdr_db .* give an estimator .*--estimator"),
        (
            {"label_floor_fraction": 0.5},
            r"cannot apply rank_by \(no stem has estimated_si_sdr_db\); .*or choose another rank_by",
        ),
    ],
)
def test_a_rule_over_a_score_that_no_stem_has_is_an_error(write_pass, thresholds, message):
    out = write_pass([("clip", label, random_samples(300, 0), {"re_sdr_db": 20.0}) for label in "ab"])
    with pytest.raises(ValueError, match=message):
        select_tracks(out / "stems", out / "tracks", Thresholds(**thresholds))
    assert not (out / "tracks" / "manifest.json").exists()


def test_a_score_that_an_only_stem_cannot_have_is_no_error(write_pass):
    rules = Thresholds(max_coherence_fraction=0.5, max_contested_db=0.0)
    alone = write_pass([(clip_id, "a", random_samples(300, 0), {}) for clip_id in ("x", "y")], folder="alone")
    assert select_tracks(alone / "stems", alone / "tracks", rules)["num_kept"] == 2
    pairs = write_pass([("x", label, random_samples(300, 0), {}) for label in "ab"], folder="pairs")
    with pytest.raises(ValueError, match=r"cannot apply max_coherence_fraction \(no stem has coherence_fraction\)"):
        select_tracks(pairs / "stems", pairs / "tracks", rules)


def test_a_pass_without_a_newer_score_is_read(write_pass):
    out = write_pass([("clip", label, random_samples(300, 0), {"re_sdr_db": 20.0}) for label in "ab"])
    shard = out / "stems" / "shard-000000-0000.parquet"
    rewrite_shard(shard.parent, shard.name, pq.read_table(shard).drop_columns(["mask_snr_db"]))
    assert select_tracks(out / "stems", out / "tracks", Thresholds(min_re_sdr_db=10.0))["num_kept"] == 2
    assert read_tracks(out / "tracks")[0]["mask_snr_db"].null_count == 2
    with pytest.raises(ValueError, match=r"cannot apply min_mask_snr_db \(no stem has mask_snr_db\); make the pass"):
        select_tracks(out / "stems", out / "tracks", Thresholds(min_mask_snr_db=1.0))


def reshard(out, order, sizes):
    """Rewrite a pass of one shard with its clips in another order and in shards of other sizes (in clips)."""
    stems = out / "stems"
    (shard,) = stem_shards(stems)
    table = pq.read_table(shard)
    clips = np.unique(np.asarray(table["clip_id"]))[order]
    manifest = json.loads((stems / "manifest.json").read_text()) | {"shards": {}}
    shard.unlink()
    for number, some in enumerate(np.split(clips, np.cumsum(sizes)[:-1])):
        parts = [table.filter(np.asarray(table["clip_id"]) == clip_id) for clip_id in some]
        pq.write_table(pa.concat_tables([table.slice(0, 0), *parts]), stems / f"shard-{number:06d}-0000.parquet")
        manifest["shards"][f"shard-{number:06d}-0000"] = ""
    (stems / "manifest.json").write_text(json.dumps(manifest))


def test_the_selection_depends_neither_on_order_nor_on_shards(write_pass):
    """Quantiles, floor and cap use all stems of the pass; ties of ranks are broken by clip."""
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
        manifest = select_tracks(out / "stems", out / "tracks", thresholds)
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
    first = select_tracks(out / "stems", out / "tracks", FAINT)
    other = select_tracks(out / "stems", out / "tracks", Thresholds(min_stem_level_db=-45.0))
    assert (first["num_kept"], other["num_kept"]) == (10, 11)
    assert first["fingerprint"] != other["fingerprint"]
    assert len(read_tracks(out / "tracks")[0]) == 11
    assert select_tracks(out / "stems", out / "tracks", FAINT) == first
    assert sorted(path.name for path in (out / "tracks").iterdir()) == [
        "kept.parquet",
        "manifest.json",
        "rejected.parquet",
    ]


def test_selecting_changes_no_stem(out):
    before = {path: path.read_bytes() for path in (out / "stems").iterdir()}
    select_tracks(out / "stems", out / "tracks", FAINT)
    assert {path: path.read_bytes() for path in (out / "stems").iterdir()} == before


@pytest.mark.parametrize("place", ["pass/tracks", "elsewhere/deep/tracks"])
def test_a_run_can_be_moved(out, tmp_path, monkeypatch, place):
    run = out.parent
    monkeypatch.chdir(run)
    select_tracks(out / "stems", run / place, FAINT)
    expected = read_audio(out / "stems", "shard-000000-0000.parquet", [9])[0]
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    index, stems = read_tracks(tmp_path / "moved" / place)
    assert stems.is_relative_to(tmp_path / "moved") and len(index) == 10
    np.testing.assert_array_equal(read_audio(stems, "shard-000000-0000.parquet", [9])[0], expected)
    assert verify(stems) == []
    assert len(read_tracks(f"moved/{place}")[0]) == 10


def test_a_tampered_selection_is_noticed(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
    kept = out / "tracks" / "kept.parquet"
    pq.write_table(pq.read_table(kept).slice(0, 3), kept)
    with pytest.raises(ValueError, match=r"kept\.parquet must have the checksum in its manifest"):
        read_tracks(out / "tracks")


def test_an_unfinished_selection_raises(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
    (out / "tracks" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"cannot find .*manifest\.json \(no finished selection\)"):
        read_tracks(out / "tracks")


def test_an_interrupted_selection_is_not_taken_for_the_previous_one(out):
    select_tracks(out / "stems", out / "tracks", FAINT)
    shard = out / "stems" / "shard-000002-0000.parquet"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises((pa.ArrowInvalid, OSError, ValueError)):
        select_tracks(out / "stems", out / "tracks", Thresholds())
    with pytest.raises(ValueError, match="no finished selection"):
        read_tracks(out / "tracks")
    assert not [path.name for path in (out / "tracks").iterdir() if path.name.startswith(".")]


def test_the_separator_is_exact_enough_for_this_file():
    """It separates sources that are 50 dB quieter, so the levels in these tests are those of the files."""
    low_T, high_T = sources("faintest.wav").values()
    (found_T,) = BandSeparator().separate(torch.from_numpy(low_T + high_T)[None], ["high"])
    assert snr_db(estimate=found_T, reference=high_T) > 60


def test_tracks_are_not_written_over_their_stems(out):
    before = {path: path.read_bytes() for path in (out / "stems").iterdir()}
    (out / "stems" / "pass.json").write_text("{}")
    with pytest.raises(ValueError, match="must not be the folder of a pass"):
        select_tracks(out / "stems", out / "stems", FAINT)
    assert {path: path.read_bytes() for path in before} == before
