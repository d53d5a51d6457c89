"""What can be loaded, of every kind of clip, and how far an estimate of its quality is trusted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.corpus.sources import part_of
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import write_tracks
from tests.support.remixes import KINDS, LABELS, RATE_HZ, SCORES, Natural, Write, exact, kept_tracks
from train.data.items import Item, absent_items, clean_items, natural_items, pair_items, track_items


@pytest.mark.parametrize("share", [False, True])
def test_tracks_of_single_stems_load_exactly_what_was_stored(write_pass: Write, tmp_path: Path, share: bool) -> None:
    audio = [exact(500 + i, seed=i) for i in range(20)]
    stems = [
        (f"clip{i}", LABELS[i % 3], samples_T, SCORES | {"stem_level_db": -30.0 if i % 5 == 4 else -3.0})
        for i, samples_T in enumerate(audio)
    ]
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    items = track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ, share=share)
    assert [(item.clip, item.labels) for item in items] == [
        (f"clip{i}", (LABELS[i % 3],)) for i in range(20) if i % 5 != 4
    ]
    for item in items:
        wanted_T = audio[int(item.clip.removeprefix("clip"))]
        assert item.duration_s == pytest.approx(len(wanted_T) / RATE_HZ)
        assert np.array_equal(item.load(), wanted_T)


def test_bare_tracks_load_exactly_the_stored_stems_of_every_kind_of_clip(natural: Natural) -> None:
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ, share=False)
    assert [(item.clip, *item.labels) for item in items] == kept_tracks()
    for item in items:
        assert np.array_equal(item.load(), natural.stems[item.clip, item.labels[0]])


def test_shared_tracks_are_what_refining_the_stored_clip_gives(natural: Natural) -> None:
    """Of all stems of the clip, the rejected ones too; a clip with a label without a stem is left as it is."""
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ)
    assert [(item.clip, *item.labels) for item in items] == kept_tracks()
    for item in items:
        (label,), loaded_T = item.labels, item.load()
        stored_T = natural.stems[item.clip, label]
        assert loaded_T.dtype == np.float32
        assert item.duration_s == pytest.approx(len(loaded_T) / RATE_HZ)
        if item.clip in ("pair", "half", "trio"):
            assert np.array_equal(loaded_T, natural.shares(item.clip)[label])
            assert np.abs(loaded_T - stored_T).max() > 0.1
        else:
            assert np.array_equal(loaded_T, stored_T)


def test_shared_tracks_of_a_clip_add_up_to_it(natural: Natural) -> None:
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ, share=True)
    shares = [item.load() for item in items if item.clip == "pair"]
    assert len(shares) == 2
    assert np.abs(np.sum(shares, axis=0) - natural.mixtures["pair"]).max() < 1e-5


def test_natural_items_are_the_whole_clips_of_which_every_label_has_a_stem_and_one_was_kept(natural: Natural) -> None:
    items = natural_items(natural.tracks, sample_rate_hz=RATE_HZ)
    assert [(item.clip, item.labels) for item in items] == [(clip, KINDS[clip][0]) for clip in ("pair", "half", "trio")]
    for item in items:
        loaded_T = item.load()
        assert loaded_T.dtype == np.float32
        assert np.array_equal(loaded_T, natural.mixtures[item.clip])
        assert item.duration_s == pytest.approx(len(loaded_T) / RATE_HZ)


@pytest.mark.parametrize("share", [False, True])
def test_pairs_are_the_tracks_with_the_clips_that_they_are_of(natural: Natural, share: bool) -> None:
    pairs = pair_items(natural.tracks, sample_rate_hz=RATE_HZ, share=share)
    tracks = track_items(natural.tracks, sample_rate_hz=RATE_HZ, share=share)
    assert [(item.clip, *item.labels) for item in pairs] == kept_tracks()
    for pair, track in zip(pairs, tracks, strict=True):
        target_T, mixture_T = pair.load()
        assert np.array_equal(target_T, track.load())
        assert np.array_equal(mixture_T, natural.mixtures[pair.clip])
        assert pair.labels_present == track.labels_present == frozenset(KINDS[pair.clip][0])
        assert pair.duration_s == pytest.approx(2 * track.duration_s)  # both are held in memory


def test_absent_items_are_the_clips_once_for_each_label_that_is_too_quiet(natural: Natural) -> None:
    items = absent_items(natural.tracks, sample_rate_hz=RATE_HZ)
    rejected = [(clip, label) for clip, (_, stems) in KINDS.items() for label, good in stems.items() if not good]
    assert [(item.clip, *item.labels) for item in items] == rejected
    for item in items:
        assert np.array_equal(item.load(), natural.mixtures[item.clip])
        assert item.labels[0] in item.labels_present


@pytest.mark.parametrize("items", [pair_items, absent_items])
def test_natural_clips_of_another_rate_are_refused(natural: Natural, items: type) -> None:
    with pytest.raises(ValueError, match=r"8000 Hz.*16000"):
        items(natural.tracks, sample_rate_hz=16000)


def test_estimates_are_those_of_the_selection_and_none_where_it_has_none(write_pass: Write, tmp_path: Path) -> None:
    audio = [exact(500, seed=i) for i in range(3)]
    stems = write_pass([(f"clip{i}", LABELS[i], audio[i], SCORES) for i in range(3)]) / "stems"
    columns = {"estimated_si_sdr_db": [7.5, None, -2.0], "estimated_error_db": [1.5, None, None]}

    def estimate(index: pa.Table) -> pa.Table:
        return pa.table({name: pa.array(values, pa.float32()) for name, values in columns.items()})

    for folder, how in (("with", {"estimate": estimate, "estimator_fingerprint": "by hand"}), ("without", {})):
        write_tracks(stems, tmp_path / folder, Thresholds(), **how)
    for kind in (track_items, pair_items):
        found = kind(tmp_path / "with", sample_rate_hz=RATE_HZ)
        assert [(item.estimated_si_sdr_db, item.estimated_error_db) for item in found] == [
            (7.5, 1.5),
            (None, None),
            (-2.0, None),
        ]
        plain = kind(tmp_path / "without", sample_rate_hz=RATE_HZ)
        assert {(item.estimated_si_sdr_db, item.estimated_error_db) for item in plain} == {(None, None)}
        assert [item.weight(0.0) for item in plain] == [1.0] * 3


def _estimated(si_sdr_db: float | None, error_db: float | None = None) -> Item:
    load = np.zeros(8, np.float32).copy
    names = {"labels": ("dog",), "heard": frozenset(["dog"]), "clip": "clip", "duration_s": 1.0, "load": load}
    return Item(**names, estimated_si_sdr_db=si_sdr_db, estimated_error_db=error_db)


def test_a_certain_estimate_weighs_as_the_share_of_the_energy_that_is_right() -> None:
    """SI-SDR of 3 dB: two parts right to one wrong; 10 dB: ten to one."""
    assert _estimated(0.0).weight(0.0) == pytest.approx(1 / 2)
    assert _estimated(10 * math.log10(2)).weight(0.0) == pytest.approx(2 / 3)
    assert _estimated(10.0, 0.0).weight(0.0) == pytest.approx(10 / 11)
    assert _estimated(-10.0).weight(0.0) == pytest.approx(1 / 11)
    assert _estimated(6.0).weight(6.0) == pytest.approx(1 / 2)
    assert _estimated(None).weight(6.0) == _estimated(math.nan).weight(6.0) == 1.0


@pytest.mark.parametrize(("estimate_db", "error_db"), [(6.0, 4.0), (-3.0, 8.0), (12.0, 2.0), (0.0, 20.0)])
def test_an_uncertain_estimate_weighs_as_it_does_on_average(estimate_db: float, error_db: float) -> None:
    """Against the mean over the normal error, by quadrature."""
    errors = np.linspace(-6, 6, 4001)
    density = np.exp(-(errors**2) / 2)
    shares = 1 / (1 + 10 ** (-(estimate_db + error_db * errors) / 10))
    assert _estimated(estimate_db, error_db).weight(0.0) == pytest.approx(
        float((density * shares).sum() / density.sum()), abs=0.02
    )


# Parts of single-source clips.


def sources(counts: dict[str, int]) -> pa.Table:
    """Clips by label, out of order."""
    rows = [{"path": f"{label}/{i:02d}.wav", "label": label} for label, count in counts.items() for i in range(count)]
    return pa.Table.from_pylist([rows[i] for i in np.random.default_rng(0).permutation(len(rows))])


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_parts_hold_each_clip_once_and_an_even_share_of_every_label(num_parts: int) -> None:
    clips = sources({"dog": 7, "rain": 12, "bell": 1})
    parts = [part_of(clips, part, num_parts).to_pylist() for part in range(num_parts)]
    everything = [row for part in parts for row in part]
    assert len(everything) == len(clips) and all(row in everything for row in clips.to_pylist())
    for label, count in {"dog": 7, "rain": 12, "bell": 1}.items():
        shares = [sum(row["label"] == label for row in part) for part in parts]
        assert max(shares) - min(shares) <= 1 and sum(shares) == count
    for number, part in enumerate(parts):
        rest = part_of(clips, number, num_parts, inside=False).to_pylist()
        assert rest == [row for row in clips.to_pylist() if row not in part], "in the order in which they were"


def test_neighbours_in_name_stay_together() -> None:
    first = part_of(sources({"dog": 8}), 0, 2)
    assert sorted(first["path"].to_pylist()) == [f"dog/{i:02d}.wav" for i in range(4)]


def test_parts_do_not_depend_on_the_order_of_the_list() -> None:
    clips = sources({"dog": 7, "rain": 5})
    reordered = clips.take(pa.array(range(len(clips) - 1, -1, -1)))
    for part in range(3):
        assert set(part_of(clips, part, 3)["path"].to_pylist()) == set(part_of(reordered, part, 3)["path"].to_pylist())


def test_clean_items_leave_out_the_part_that_is_held_out(write_sources: Write) -> None:
    clips = write_sources([(f"{label}{i}", label, i % 2, exact(100, seed=i)) for label in "ab" for i in range(8)])
    everything = {item.clip for item in clean_items(clips, folds=None, sample_rate_hz=RATE_HZ)}
    halves = [
        {item.clip for item in clean_items(clips, folds=None, sample_rate_hz=RATE_HZ, without=(part, 2))}
        for part in (0, 1)
    ]
    assert len(everything) == 16 and [len(half) for half in halves] == [8, 8]
    assert halves[0] | halves[1] == everything
    folds = clean_items(clips, folds=[1], sample_rate_hz=RATE_HZ, without=(0, 2))
    assert sorted(Path(item.clip).stem for item in folds) == ["a5", "a7", "b5", "b7"], "parts are of the folds asked"
