"""Items of every kind of clip, and the weight that an estimated SI-SDR gives them."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from engine.audio.decoder import Decoder
from engine.corpus.sources import read_sources
from engine.errors import DecodeError, SilentError
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from tests.support.remixes import KINDS, LABELS, RATE_HZ, SCORES, Natural, Write, exact, kept_tracks, tone
from train.data.items import Item, clean_items, pair_items, track_items
from train.data.strategies.absent_labels import absent_items
from train.data.strategies.estimate_weights import trust
from train.data.strategies.natural_targets import natural_items


@pytest.mark.timeout(30)
def test_a_clip_that_holds_up_its_decoder_costs_its_time_limit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(time_limit_s=1.0)
    monkeypatch.setattr("train.data.items.shared_decoder", lambda: decoder)
    good, held_up = tmp_path / "bell" / "good.wav", tmp_path / "bell" / "held_up.wav"
    good.parent.mkdir()
    for path in (good, held_up):
        soundfile.write(path, tone(440.0), RATE_HZ)
    send = Decoder._send

    def stop_and_send(self: Decoder, child: Any, request: Any) -> Any:
        if "held_up" in request["source"]:
            os.kill(child.pid, signal.SIGSTOP)
        return send(self, child, request)

    monkeypatch.setattr(Decoder, "_send", stop_and_send)
    begin = time.monotonic()
    items = {Path(item.clip).stem: item for item in clean_items(read_sources(tmp_path), sample_rate_hz=RATE_HZ)}
    for _ in range(3):
        with pytest.raises(DecodeError, match="takes longer than 1 s"):
            items["held_up"].load()
    assert np.abs(items["good"].load()).max() > 0 and time.monotonic() - begin < 5
    decoder.close()


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_a_clip_without_sound_is_not_learned_from(tmp_path: Path, level: float) -> None:
    (tmp_path / "bell").mkdir()
    soundfile.write(tmp_path / "bell" / "a.wav", np.full(RATE_HZ, level), RATE_HZ)
    (item,) = clean_items(read_sources(tmp_path), sample_rate_hz=RATE_HZ)
    with pytest.raises(SilentError, match="must contain sound, got silence"):
        item.load()


@pytest.mark.parametrize("share", [False, True])
def test_tracks_of_single_stems_load_exactly_what_was_stored(write_pass: Write, tmp_path: Path, share: bool) -> None:
    audio = [exact(500 + i, seed=i) for i in range(20)]
    stems = [
        (f"clip{i}", LABELS[i % 3], samples_T, SCORES | {"stem_level_db": -30.0 if i % 5 == 4 else -3.0})
        for i, samples_T in enumerate(audio)
    ]
    select_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
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
        assert pair.duration_s == pytest.approx(2 * track.duration_s)  # both are in memory


def test_absent_items_are_the_clips_once_for_each_label_that_is_too_quiet(natural: Natural) -> None:
    items = absent_items(natural.tracks, sample_rate_hz=RATE_HZ)
    rejected = [(clip, label) for clip, (_, stems) in KINDS.items() for label, good in stems.items() if not good]
    assert [(item.clip, *item.labels) for item in items] == rejected
    for item in items:
        assert np.array_equal(item.load(), natural.mixtures[item.clip])
        assert item.labels[0] in item.labels_present


@pytest.mark.parametrize("items", [pair_items, absent_items])
def test_natural_clips_of_another_rate_are_refused(natural: Natural, items: type) -> None:
    with pytest.raises(ValueError, match=r"sample rate of 16000 Hz, got 8000 Hz; select tracks"):
        items(natural.tracks, sample_rate_hz=16000)


def test_estimates_are_those_of_the_selection_and_none_where_it_has_none(write_pass: Write, tmp_path: Path) -> None:
    audio = [exact(500, seed=i) for i in range(3)]
    stems = write_pass([(f"clip{i}", LABELS[i], audio[i], SCORES) for i in range(3)]) / "stems"
    columns = {"estimated_si_sdr_db": [7.5, None, -2.0], "estimated_error_db": [1.5, None, None]}

    class Estimator:
        fingerprint = "by hand"

        def estimate(self, scores: pa.Table) -> pa.Table:
            return pa.table({name: pa.array(values, pa.float32()) for name, values in columns.items()})

    for folder, estimator in (("with", Estimator()), ("without", None)):
        select_tracks(stems, tmp_path / folder, Thresholds(), estimator=estimator)
    for kind in (track_items, pair_items):
        found = kind(tmp_path / "with", sample_rate_hz=RATE_HZ)
        assert [(item.estimated_si_sdr_db, item.estimated_error_db) for item in found] == [
            (7.5, 1.5),
            (None, None),
            (-2.0, None),
        ]
        plain = kind(tmp_path / "without", sample_rate_hz=RATE_HZ)
        assert {(item.estimated_si_sdr_db, item.estimated_error_db) for item in plain} == {(None, None)}
        assert [trust(item, centre_db=0.0) for item in plain] == [1.0] * 3


def _estimated(si_sdr_db: float | None, error_db: float | None = None) -> Item:
    load = np.zeros(8, np.float32).copy
    names = {"labels": ("dog",), "labels_present": frozenset(["dog"]), "clip": "clip", "duration_s": 1.0, "load": load}
    return Item(**names, estimated_si_sdr_db=si_sdr_db, estimated_error_db=error_db)


def _trust(si_sdr_db: float | None, error_db: float | None = None, *, centre_db: float = 0.0) -> float:
    return trust(_estimated(si_sdr_db, error_db), centre_db=centre_db)


def test_the_weight_of_a_certain_estimate_is_the_fraction_of_energy_that_is_right() -> None:
    """SI-SDR of 3 dB: two parts right to one wrong; 10 dB: ten to one."""
    assert _trust(0.0) == pytest.approx(1 / 2)
    assert _trust(10 * math.log10(2)) == pytest.approx(2 / 3)
    assert _trust(10.0, 0.0) == pytest.approx(10 / 11)
    assert _trust(-10.0) == pytest.approx(1 / 11)
    assert _trust(6.0, centre_db=6.0) == pytest.approx(1 / 2)
    assert _trust(None, centre_db=6.0) == _trust(math.nan, centre_db=6.0) == 1.0


@pytest.mark.parametrize(("estimate_db", "error_db"), [(6.0, 4.0), (-3.0, 8.0), (12.0, 2.0), (0.0, 20.0)])
def test_the_weight_of_an_uncertain_estimate_is_the_mean_over_its_error(estimate_db: float, error_db: float) -> None:
    """Against the mean over the normal error, by quadrature."""
    errors = np.linspace(-6, 6, 4001)
    density = np.exp(-(errors**2) / 2)
    shares = 1 / (1 + 10 ** (-(estimate_db + error_db * errors) / 10))
    assert _trust(estimate_db, error_db) == pytest.approx(float((density * shares).sum() / density.sum()), abs=0.02)


def test_tracks_of_another_rate_are_refused(write_pass: Write, tmp_path: Path) -> None:
    folder = write_pass([("clip", "dog", tone(440), SCORES)], sample_rate_hz=16000)
    select_tracks(folder / "stems", tmp_path / "tracks", Thresholds())
    with pytest.raises(ValueError, match=r"sample rate of 8000 Hz, got 16000 Hz; select tracks"):
        track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ)


def test_a_folder_without_a_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json \(no finished selection\)"):
        track_items(tmp_path, sample_rate_hz=RATE_HZ)


def test_clean_items_have_their_folds_rate_and_length(write_sources: Write) -> None:
    clips = [(f"{label}-{fold}", label, fold, tone(440)) for label in ("bell", "dog") for fold in (1, 2)]
    items = clean_items(read_sources(write_sources(clips), folds=[2]), sample_rate_hz=4000, max_s=0.5)
    assert sorted(Path(item.clip).stem for item in items) == ["bell-2", "dog-2"]
    assert [len(item.load()) for item in items] == [2000, 2000]
