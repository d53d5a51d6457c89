"""Stems of long recordings in several channels: joins without a step, the stereo image, exact lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.files.stream import separated_blocks
from engine.files.windows import WindowedSeparator
from engine.separators import QuerySeparator
from tests.conftest import TINY
from tests.support.answers import BandPass, as_blocks, snr_db, stems_of

RATE_HZ = 8000
DURATION_S = 35.3  # four windows of 10 s
TIME_T = np.arange(round(DURATION_S * RATE_HZ)) / RATE_HZ


def tone(hz: float, gain: float = 0.3) -> np.ndarray:
    return gain * np.sin(2 * np.pi * hz * TIME_T)


def noise(num_channels: int = 1, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((num_channels, len(TIME_T)))


def smooth_db(levels: np.ndarray) -> float:
    """The greatest change of a level from one window to the next, in dB."""
    return float(np.abs(np.diff(10 * np.log10(levels))).max())


# Joins.


@pytest.mark.parametrize("signal", [tone(437.0), noise()[0]], ids=["tone", "noise"])
@pytest.mark.parametrize("query", ["all", "low", "high"])
def test_a_joined_stem_is_the_stem_of_one_piece(signal, query):
    (stem_CT,) = stems_of(signal[None], BandPass(), [query], rate_hz=RATE_HZ, size=12_345)
    whole_T = BandPass().separate(torch.from_numpy(signal[None]).float(), [query])[0].numpy()
    difference_T = (stem_CT[0] - whole_T)[300:-300]
    assert 10 * np.log10(np.mean(signal**2) / np.mean(difference_T**2)) > 100
    assert stem_CT.shape == (1, len(signal))


def test_the_built_in_network_has_no_step_in_level_or_phase_at_a_join():
    separator = QuerySeparator(TINY, ["bell"]).eval()
    signal = tone(437.0)
    (stem_CT,) = stems_of(signal[None], separator, ["bell"], rate_hz=RATE_HZ)
    cycles = stem_CT[0][: len(TIME_T) // 800 * 800].reshape(-1, 800)[2:-2]  # of 0.1 s
    turned = (cycles * np.exp(-2j * np.pi * 437.0 * TIME_T[: cycles.size]).reshape(cycles.shape)).mean(1)
    assert smooth_db(np.abs(turned) ** 2) < 0.1
    assert np.abs(np.angle(turned[1:] / turned[:-1])).max() < np.radians(0.5)
    with torch.no_grad():
        whole_BT = separator(
            torch.from_numpy(signal[None]).float(), torch.tensor([0]), torch.zeros(1, len(separator.labels))
        )
    assert snr_db(stem_CT[0], whole_BT[0].numpy()) > 35  # its statistics are of a window


def test_a_recording_that_fits_a_window_is_separated_in_one_piece():
    separator = QuerySeparator(TINY, ["bell"]).eval()
    signal = noise()[:, : 9 * RATE_HZ]
    (stem_CT,) = stems_of(signal, separator, ["bell"], rate_hz=RATE_HZ, size=7000)
    whole_BT = separator.separate(torch.from_numpy(signal).float(), ["bell"])
    assert np.array_equal(stem_CT, whole_BT.numpy())


@pytest.mark.parametrize("num_samples", [1, 100, 80_000, 80_001, 152_000, 152_001, 160_000])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_every_length_is_kept(num_samples, num_channels):
    signal = noise(num_channels)[:, :num_samples]
    (stem_CT,) = stems_of(signal, BandPass(), ["all"], rate_hz=RATE_HZ, size=30_000)
    assert snr_db(stem_CT, signal) > 100


def test_windows_of_a_batch_give_the_same_stems():
    signal = noise()[0].astype(np.float32)
    stems = []
    for batch_s in (0.0, 60.0):
        windows = WindowedSeparator(BandPass(), ["low", "high"], batch_s=batch_s)
        parts = [*windows.push(signal[:100_000]), *windows.push(signal[100_000:]), *windows.finish()]
        assert np.array_equal(np.concatenate([mix_T for mix_T, _ in parts]), signal)
        stems.append(np.concatenate([stems_QT for _, stems_QT in parts], axis=1))
    assert snr_db(stems[1], stems[0]) > 100


# Rates.


@pytest.mark.parametrize("rate_hz", [6000, 11_025, 44_100])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_another_rate_is_converted_there_and_back(rate_hz, num_channels):
    time_T = np.arange(25 * rate_hz + 7) / rate_hz
    signal = np.stack([0.3 * np.sin(2 * np.pi * 500 * time_T)] * num_channels)
    (low_CT, high_CT) = stems_of(signal, BandPass(), ["low", "high"], rate_hz=rate_hz)
    edge = rate_hz // 5
    assert low_CT.shape == signal.shape
    assert snr_db(low_CT[:, edge:-edge], signal[:, edge:-edge]) > 60
    assert np.abs(high_CT[:, edge:-edge]).max() < 1e-3


# Image.


@pytest.mark.parametrize("separator", ["band-pass", "network"])
def test_equal_channels_stay_equal_and_are_the_mono_stem(separator):
    separator = BandPass() if separator == "band-pass" else QuerySeparator(TINY, ["low"]).eval()
    mono = noise()
    (mono_CT,) = stems_of(mono, separator, ["low"], rate_hz=RATE_HZ)
    (stereo_CT,) = stems_of(np.repeat(mono, 2, axis=0), separator, ["low"], rate_hz=RATE_HZ)
    assert snr_db(stereo_CT[0], stereo_CT[1]) > 100
    assert snr_db(stereo_CT[0], mono_CT[0]) > 100


def test_the_channels_of_a_stem_are_mixed_to_the_mono_stem():
    signal = noise(2) + np.stack([tone(440.0), 0.2 * tone(2000.0)])
    separator = QuerySeparator(TINY, ["bell"]).eval()
    (stem_CT,) = stems_of(signal, separator, ["bell"], rate_hz=RATE_HZ)
    (mono_CT,) = stems_of(signal.mean(0, keepdims=True), separator, ["bell"], rate_hz=RATE_HZ)
    assert snr_db(stem_CT.mean(0), mono_CT[0]) > 60


def test_a_source_at_one_side_stays_there():
    left, right = tone(440.0) + tone(700.0, 0.1), tone(2500.0)
    low_CT, high_CT = stems_of(np.stack([left, right]), BandPass(), ["low", "high"], rate_hz=RATE_HZ)
    inner = slice(2000, -2000)
    for stem_CT, side, wanted in ((low_CT, 0, left), (high_CT, 1, right)):
        near, far = stem_CT[side, inner], stem_CT[1 - side, inner]
        assert snr_db(near, wanted[inner]) > 40
        assert np.sum(far**2) < 1e-4 * np.sum(near**2)


@pytest.mark.parametrize("gain_db", [-20.0, -6.0, 3.0])
def test_level_differences_of_channels_are_kept_in_every_band(gain_db):
    gain = 10 ** (gain_db / 20)
    tones = [(250.0, gain), (700.0, 1 / gain), (1800.0, gain), (3100.0, 1.0)]
    signal = np.stack([sum(tone(hz) for hz, _ in tones), sum(g * tone(hz) for hz, g in tones)])
    stems = stems_of(signal, BandPass(), ["low", "high"], rate_hz=RATE_HZ)
    for hz, ratio in tones:
        stem_CT = stems[0 if hz < 1000 else 1][:, 2000:-2000]
        levels_C = np.abs(stem_CT @ np.exp(-2j * np.pi * hz * TIME_T[2000:-2000]))
        assert abs(20 * np.log10(levels_C[1] / levels_C[0] / ratio)) < 0.5


def test_channels_of_opposite_sign_are_separated_too():
    """A decoder names one channel as the mixture where the mean would be silence."""
    signal = np.stack([tone(440.0), -tone(440.0)])
    blocks = (replace(block, mono_channels=(0,)) for block in as_blocks(signal, RATE_HZ))
    stem_CT = np.concatenate([stems_QCT[0] for _, stems_QCT in separated_blocks(blocks, BandPass(), ["low"])], axis=1)
    assert snr_db(stem_CT[:, 2000:-2000], signal[:, 2000:-2000]) > 60


def test_stems_and_residual_of_silence_are_silence():
    signal = np.zeros((2, 20_000))
    assert not stems_of(signal, BandPass(), ["all", "low"], rate_hz=RATE_HZ).any()
