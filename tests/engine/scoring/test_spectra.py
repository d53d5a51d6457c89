"""Scores over time and frequency: closed forms for stems that overlap, bounds for silent and short ones."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from engine.scoring.spectra import (
    Spectra,
    coherence_fraction,
    contested_db,
    mask_snr_db,
    mixture_coherence_fraction,
    share_si_sdr_db,
)
from tests.support.signals import RATE_HZ, band_noise, mixture, tone, two_bands

FRACTIONS = (mixture_coherence_fraction, coherence_fraction)
SCORES = (mask_snr_db, share_si_sdr_db, contested_db, *FRACTIONS)
FIRST = np.zeros(RATE_HZ, np.float32)
FIRST[:2048] = band_noise(2048, low_hz=100.0, high_hz=3000.0, seed=5)
LAST = np.roll(FIRST, 5120)
"""Two sounds of one energy with more than a frame between them; the hop of 256 samples divides all their times."""


def spectra_of(stems, mixture_T):
    return Spectra.of(
        stems_BST=torch.as_tensor(np.stack(stems)), mixture_BT=torch.as_tensor(mixture_T), sample_rate_hz=RATE_HZ
    )


def scored(score, stems, mixture_T):
    return score(spectra_of(stems, mixture_T)).tolist()


def db(ratio):
    return 10 * math.log10(ratio)


def test_sources_with_a_pause_between_them_have_the_best_scores():
    clip = [FIRST, LAST], FIRST + LAST
    assert scored(mask_snr_db, *clip) == [100, 100]
    assert scored(contested_db, *clip) == [-100, -100]
    assert min(scored(share_si_sdr_db, *clip)) > 70
    assert scored(mixture_coherence_fraction, *clip) == pytest.approx([0.5**0.5] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("stems", "mask_snr_at_least", "contested_at_most"),
    [
        (two_bands(RATE_HZ), 21, -23),  # their bands touch, and frames smear the border
        ((tone(500, 1.0), tone(2000, 1.0)), 31, -40),
    ],
)
def test_disjoint_bands_have_good_scores(stems, mask_snr_at_least, contested_at_most):
    clip = stems, sum(stems)
    assert min(scored(mask_snr_db, *clip)) > mask_snr_at_least
    assert max(scored(contested_db, *clip)) < contested_at_most
    assert min(scored(share_si_sdr_db, *clip)) > 24


@pytest.mark.parametrize(("num_stems", "odds"), [(2, 1 / 3), (3, 1 / 8)])
def test_equal_parts_of_the_mixture_have_their_closed_form(num_stems, odds):
    """Each stem is 1/n of the clip and of all stems: q is 1/n², and its odds q / (1 - q)."""
    mix_T = mixture(RATE_HZ)
    clip = [mix_T / num_stems] * num_stems, mix_T
    assert scored(mask_snr_db, *clip) == pytest.approx([db(odds)] * num_stems, abs=1e-3)
    assert scored(contested_db, *clip) == pytest.approx([0] * num_stems, abs=1e-3)
    assert min(scored(share_si_sdr_db, *clip)) > 70
    assert scored(mixture_coherence_fraction, *clip) == pytest.approx([1] * num_stems, abs=1e-6)


@pytest.mark.parametrize("leak", [0.1, 0.25, 0.5])
def test_a_leak_has_its_closed_form(leak):
    """The first stem has a part of the second source, which the second stem lacks."""
    first_T, second_T = FIRST + leak * LAST, (1 - leak) * LAST
    clip = [first_T, second_T], FIRST + LAST
    taken = leak**2, (1 - leak) ** 2  # of the second source: mask times share
    assert scored(mask_snr_db, *clip) == pytest.approx(
        [db((1 + taken[0] ** 2) / (taken[0] * (1 - taken[0]))), db(taken[1] / (1 - taken[1]))], abs=1e-3
    )
    assert scored(contested_db, *clip) == pytest.approx(
        [db(leak**2 / (1 + leak**2)), 2 * db(leak / (1 - leak))], abs=1e-3
    )
    assert min(scored(share_si_sdr_db, *clip)) > 60  # stems that add up to the clip are their shares of it


@pytest.mark.parametrize("part", [0.1, 0.3])
def test_stems_that_leave_some_of_the_clip_are_not_their_shares_of_it(part):
    """Both stems have the same part of the second source, so their shares of it are halves."""
    clip = [FIRST + part * LAST, part * LAST], FIRST + LAST
    stem, share = np.array([1, part]), np.array([1, 0.5])  # of first and last
    target = (stem @ share) ** 2 / (share @ share)
    expected = db(target / (stem @ stem - target))
    found, alone = scored(share_si_sdr_db, *clip)
    assert found == pytest.approx(expected, abs=1e-2)
    assert alone > 60


def test_only_coherence_shows_the_mixture_next_to_silence():
    mix_T = mixture(RATE_HZ)
    clip = [mix_T, np.zeros_like(mix_T)], mix_T
    assert scored(mask_snr_db, *clip) == [100, -100]
    assert scored(share_si_sdr_db, *clip) == [100, -100]
    assert scored(contested_db, *clip) == [-100, -100]
    assert scored(mixture_coherence_fraction, *clip) == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize("gain", [1.0, -1.0, 0.01, -30.0])
def test_a_copy_of_the_mixture_is_one_at_any_gain_and_polarity(gain):
    mix_T = mixture(RATE_HZ)
    found = scored(mixture_coherence_fraction, [np.float32(gain) * mix_T, two_bands(RATE_HZ, seed=3)[0]], mix_T)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[1] < 0.5


def test_silence_has_the_lowest_scores():
    silence_T = np.zeros(RATE_HZ, np.float32)
    for mix_T in (silence_T, mixture(RATE_HZ)):
        for score in (mask_snr_db, share_si_sdr_db, contested_db):
            assert scored(score, [silence_T] * 2, mix_T) == [-100, -100]
        for score in FRACTIONS:
            assert scored(score, [silence_T] * 2, mix_T) == [0, 0]


def test_stems_of_a_silent_clip_are_finite():
    for score in SCORES:
        assert np.isfinite(scored(score, two_bands(RATE_HZ), np.zeros(RATE_HZ, np.float32))).all()


def test_an_only_stem_has_no_contested_energy_and_no_coherence():
    assert scored(contested_db, [FIRST], FIRST + LAST) == [-100]
    assert coherence_fraction(spectra_of([FIRST], FIRST + LAST)) is None


def noise(duration_s, seed=0):
    return np.random.default_rng(seed).standard_normal(round(duration_s * RATE_HZ)).astype(np.float32)


def coherence(first_T, second_T):
    found = scored(coherence_fraction, [first_T, second_T], first_T + second_T)
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("gain", [1.0, -1.0, 1e-4, -300.0])
@pytest.mark.parametrize("signal_T", [noise(2), two_bands(RATE_HZ)[0], tone(440, 1.0), noise(0.01)])
def test_copies_cohere_at_any_gain_and_polarity(signal_T, gain):
    assert coherence(signal_T, np.float32(gain) * signal_T) == pytest.approx(1, abs=1e-6)


SILENCE = np.zeros(RATE_HZ, np.float32)
PAIRS = {
    "delay of 2 ms": (noise(2), np.roll(noise(2), RATE_HZ * 2 // 1000), 0.993),
    "filtered": (noise(2), lfilter([1.0], [1.0, -0.9], noise(2)).astype(np.float32), 0.983),
    "leak at -6 dB": (noise(10), noise(10, 1) + 0.5 * noise(10), 0.5 / 1.25**0.5),  # |Sxy| / √(Sxx Syy)
    "noise, 2 s": (noise(2), noise(2, 1), 0.9 / 62**0.5),
    "noise, 10 s": (noise(10), noise(10, 1), 0.9 / 312**0.5),
    "noise, 0.2 s": (noise(0.2), noise(0.2, 1), 0.9 / 30**0.5),
    "bands": (*two_bands(2 * RATE_HZ), 0.01),
    "tones": (tone(500, 2.0), tone(1000, 2.0), 0.02),
    "tones between bins": (tone(510, 2.0), tone(1010, 2.0), 0.02),
    "silence": (tone(500, 1.0), SILENCE, 0),
    "silences": (SILENCE, SILENCE, 0),
}


@pytest.mark.parametrize(("first_T", "second_T", "expected"), PAIRS.values(), ids=PAIRS.keys())
def test_coherence(first_T, second_T, expected):
    assert coherence(first_T, second_T) == pytest.approx(expected, abs=0.01 if expected else 0)


def test_a_stem_coheres_as_much_as_with_the_most_similar_other():
    first_T, second_T, third_T, fourth_T = (noise(2, seed) for seed in range(4))
    stems = [first_T, second_T + 0.5 * first_T, third_T, fourth_T + 2 * second_T]
    pairs = [[coherence(one, other) if one is not other else 0.0 for other in stems] for one in stems]
    assert scored(coherence_fraction, stems, sum(stems)) == pytest.approx([max(row) for row in pairs], abs=1e-4)


@pytest.mark.parametrize("num_samples", [1, 2, 100, 511, 513])
def test_clips_about_a_frame_or_shorter_have_defined_values(num_samples):
    low_T, high_T = (signal_T[99 : 99 + num_samples] for signal_T in two_bands(RATE_HZ))
    for score in SCORES:
        lowest, highest = (0, 1) if score in FRACTIONS else (-100, 100)
        assert all(lowest <= value <= highest for value in scored(score, [low_T, high_T], low_T + high_T))


def test_batched_equals_one_by_one():
    clips = [two_bands(3000, seed=seed) for seed in range(3)] + [(np.zeros(3000, np.float32),) * 2]
    stems_BST = torch.tensor(np.array(clips))
    stems_BST[1, 0] += 0.3 * stems_BST[1, 1]
    mixture_BT = 0.9 * stems_BST.sum(1)
    together = Spectra.of(stems_BST=stems_BST, mixture_BT=mixture_BT, sample_rate_hz=RATE_HZ)
    for score in SCORES:
        alone = [
            score(Spectra.of(stems_BST=stems_ST, mixture_BT=mixture_T, sample_rate_hz=RATE_HZ))
            for stems_ST, mixture_T in zip(stems_BST, mixture_BT, strict=True)
        ]
        torch.testing.assert_close(score(together), torch.stack(alone), rtol=0, atol=1e-3)


@pytest.mark.parametrize("gain", [1e-30, 1e-3, 1e30])
def test_the_gain_of_the_whole_clip_changes_nothing(gain):
    low_T, high_T = (signal_T.astype(np.float64) for signal_T in two_bands(RATE_HZ))
    stems, mix_T = [low_T + 0.2 * high_T, 0.7 * high_T], low_T + high_T
    for score in SCORES:
        expected = scored(score, stems, mix_T)
        assert scored(score, [gain * stem_T for stem_T in stems], gain * mix_T) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rate_hz", [0, -8000])
def test_a_rate_that_is_not_positive_is_refused(rate_hz):
    with pytest.raises(ValueError, match=f"sample_rate_hz must be positive, got {rate_hz}"):
        Spectra.of(stems_BST=torch.ones(1, 10), mixture_BT=torch.ones(10), sample_rate_hz=rate_hz)


@pytest.mark.parametrize(("num_stem", "num_mixture"), [(10, 9), (0, 0)])
def test_lengths_that_differ_or_are_zero_are_refused(num_stem, num_mixture):
    with pytest.raises(ValueError, match=r"sample"):
        Spectra.of(stems_BST=torch.ones(1, num_stem), mixture_BT=torch.ones(num_mixture), sample_rate_hz=RATE_HZ)
