"""The synthetic corpus: reproducible, well formed, and as different as its labels claim."""

import csv
import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tune.demo.sounds import LABELS, sound, write_clips, write_corpus

RATE_HZ, HOP = 16000, 160


@functools.cache
def draw(label, i, sample_rate_hz=RATE_HZ, duration_s=3.0):
    rng = np.random.default_rng([7, LABELS.index(label), i])
    return sound(label, rng=rng, sample_rate_hz=sample_rate_hz, duration_s=duration_s)


def spectrogram(clip_T):
    """Power [frames, bins] of 32 ms windows every 10 ms."""
    frames = np.lib.stride_tricks.sliding_window_view(clip_T, 512)[::HOP] * np.hanning(512)
    return np.abs(np.fft.rfft(frames)) ** 2


def features(clip_T):
    """Level-free: band spectrum, how much each band varies and flickers, rhythm, flatness, tonality."""
    edges = np.unique(np.geomspace(2, 256, 19).astype(int))
    power = spectrogram(clip_T)
    bands = np.log10(np.add.reduceat(power, edges[:-1], axis=1) + 1e-7 * power.max())
    flux = np.abs(np.diff(bands, axis=0)).mean(0)
    envelope = power.sum(1) / power.sum()
    rhythm = np.abs(np.fft.rfft(envelope, 512))[1:160]
    rhythm = np.log10(np.add.reduceat(rhythm, [0, 3, 8, 20, 50, 100]) + 1e-3)
    mean_F = power.mean(0) + 1e-12
    flatness = np.log10(np.exp(np.log(mean_F[5:]).mean()) / mean_F[5:].mean())
    tonal = np.log10((power[:, 5:].max(1) / power[:, 5:].sum(1)) @ envelope)
    return np.array([*(bands.mean(0) - bands.mean()), *bands.std(0), *flux, *rhythm, flatness, tonal])


def active(power):
    """The frames within 30 dB of the loudest."""
    level = power.sum(1)
    return power[level > 1e-3 * level.max()]


@pytest.mark.parametrize("label", LABELS)
def test_clips_are_bounded_finite_and_never_silent(label):
    clips = [draw(label, i) for i in range(16)]
    for clip_T in clips:
        assert clip_T.dtype == np.float32 and clip_T.shape == (48000,)
        assert np.isfinite(clip_T).all() and 0.19 < np.abs(clip_T).max() <= 0.9
        assert abs(clip_T.mean()) < 0.01
        assert len(active(spectrogram(clip_T))) >= 3
    assert len({clip_T.tobytes() for clip_T in clips}) == len(clips)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("rate_hz", "duration_s"), [(16000, 0.25), (44100, 0.7), (32000, 1.0)])
def test_any_rate_and_duration(label, rate_hz, duration_s):
    for i in range(2):
        clip_T = draw(label, i, rate_hz, duration_s)
        assert clip_T.shape == (round(rate_hz * duration_s),)
        assert np.isfinite(clip_T).all() and np.abs(clip_T).max() > 0.19


def test_some_clips_are_only_partly_active():
    clips = [np.split(draw(label, i), 4) for label in ("engine", "rain") for i in range(16)]
    levels_db = np.array([[10 * np.log10(np.mean(q**2)) for q in quarters] for quarters in clips])
    padded = (levels_db.max(1) - levels_db.min(1) > 20).mean()
    assert 0.1 < padded < 0.7


def test_sound_depends_on_its_generator_alone():
    again = draw.__wrapped__("bell", 3)  # past the cache
    np.testing.assert_array_equal(draw("bell", 3), again)
    assert not np.array_equal(draw("bell", 3), draw("bell", 4))


def test_a_clip_is_a_function_of_seed_fold_label_and_index(tmp_path: Path):
    kwargs = {"fold": 2, "sample_rate_hz": RATE_HZ, "duration_s": 1.0}
    few = write_clips(tmp_path / "few", num_per_label=1, seed=5, **kwargs)
    many = write_clips(tmp_path / "many", num_per_label=2, seed=5, **kwargs)
    write_clips(tmp_path / "other", num_per_label=1, seed=6, **kwargs)
    assert [row for row in many if row["path"].endswith("-0.flac")] == few
    for row in few:
        same, again = (tmp_path / "few" / row["path"]), (tmp_path / "many" / row["path"])
        assert same.read_bytes() == again.read_bytes()
        assert same.read_bytes() != (tmp_path / "other" / row["path"]).read_bytes()


def test_corpus_table_names_every_file(tmp_path: Path):
    table = write_corpus(tmp_path, num_per_label={1: 2, 5: 1}, seed=0, duration_s=0.5)
    assert table == tmp_path / "clips.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "fold"] and len(rows) == 3 * len(LABELS)
    assert {row["path"] for row in rows} == {f"audio/{p.name}" for p in (tmp_path / "audio").iterdir()}
    assert sum(row["fold"] == "5" for row in rows) == len(LABELS)
    info = soundfile.info(tmp_path / rows[0]["path"])
    assert (info.samplerate, info.frames, info.channels, info.subtype) == (RATE_HZ, 8000, 1, "PCM_16")


def test_labels_can_be_told_apart_yet_each_is_many_sounds():
    """Nearest centroid, trained on 10 clips a label, tested on 6 others; chance is 12.5 %."""
    x = np.array([[features(draw(label, i)) for i in range(16)] for label in LABELS])
    within = (x - x.mean(1, keepdims=True)).reshape(-1, x.shape[-1]).std(0)
    train, test = x[:, :10] / within, x[:, 10:] / within
    distance = np.linalg.norm(test[:, :, None] - train.mean(1), axis=-1)
    accuracy = (distance.argmin(-1) == np.arange(len(LABELS))[:, None]).mean()
    assert accuracy > 0.7
    spread = x.reshape(-1, x.shape[-1]).var(0)
    fraction_within = (within**2 / spread).mean()
    assert 0.2 < fraction_within < 0.9
    # few clips do not cover a label: with more of them, the nearest known one is nearer
    few = np.linalg.norm(test[:, :, None] - train[:, None, :3], axis=-1).min(-1).mean()
    many = np.linalg.norm(test[:, :, None] - train[:, None], axis=-1).min(-1).mean()
    assert few > 1.1 * many


def test_siren_moves_in_frequency_and_bell_does_not():
    def constancy(label, i):
        """How alike the spectra of two moments are, for the least favourable lag of up to a second."""
        shape = np.sqrt(active(spectrogram(draw(label, i))))
        shape /= np.linalg.norm(shape, axis=1, keepdims=True)
        lags = range(10, min(100, len(shape) - 10), 5)
        return min(np.mean(np.sum(shape[lag:] * shape[:-lag], axis=1)) for lag in lags)

    sirens, bells = ([constancy(label, i) for i in range(16)] for label in ("siren", "bell"))
    assert np.median(sirens) < 0.45 < 0.6 < np.median(bells)


def test_clock_is_periodic_and_steps_are_not_quite():
    def unevenness(label, i):
        """Median deviation of the time between one tick and the next but one, as a fraction of it."""
        level = np.abs(draw(label, i, RATE_HZ, 6.0)).reshape(-1, 40).max(1)  # 2.5 ms
        times, faintest = [], 0.25 * level.max()
        while level.max() > faintest:
            times.append(at := int(level.argmax()))
            level[max(0, at - 40) : at + 40] = 0  # one event in 0.1 s
        gaps = np.subtract(*(np.sort(times)[k : len(times) - 2 + k] for k in (2, 0)))
        return np.median(np.abs(gaps / np.median(gaps) - 1)) if len(gaps) > 2 else np.nan

    clocks, steps = ([unevenness(x, i) for i in range(12)] for x in ("clock_tick", "footsteps"))
    assert np.nanmedian(clocks) < 0.006 < 0.012 < np.nanmedian(steps)
    assert np.isfinite(clocks).sum() >= 8


def test_where_the_energy_lies():
    def centroid_hz(label):
        power = [spectrogram(draw(label, i)).mean(0) for i in range(12)]
        return np.median([np.arange(257) @ p / p.sum() * RATE_HZ / 512 for p in power])

    assert centroid_hz("bird_chirp") > 2500 > 1200 > centroid_hz("engine")


def test_unknown_label_names_the_nearest():
    with pytest.raises(ValueError, match="there is no sound 'dog bark'; did you mean 'dog_bark'"):
        sound("dog bark", rng=np.random.default_rng(0))


@pytest.mark.parametrize("bad", [{"sample_rate_hz": 8000}, {"duration_s": 0.1}])
def test_too_low_or_too_short_is_refused(bad):
    with pytest.raises(ValueError, match=r"at least 16000 Hz and 0\.25 s, got"):
        draw("rain", 0, **bad)
