"""Re-separation by an exact separator: closed forms of both scores."""

import math

import numpy as np
import pytest
import torch

from engine.schema import SeparatedClip
from engine.scoring.reseparate import reseparate
from engine.separators.batching import BatchedSeparator
from tests.support.signals import RATE_HZ, BandSeparator, MarkedSeparator, decoded, marked, tone, two_bands


class FourBands(BandSeparator):
    """Bands of 500 Hz, so that clips can have labels that they do not share; counts its queries."""

    labels = ("a", "b", "c", "d")

    def __init__(self):
        super().__init__()
        self.num_queries = 0

    def separate(self, mix_BT, queries, *, lengths=None):
        self.num_queries += len(queries) if mix_BT.numel() else 0
        return super().separate(mix_BT, queries, lengths=lengths)

    def _band(self, mix_T, label):
        hz_F = torch.fft.rfftfreq(len(mix_T), 1 / RATE_HZ)
        inside_F = torch.floor(hz_F / 500.0) == self.labels.index(label)
        return torch.fft.irfft(torch.fft.rfft(mix_T.double()) * inside_F, len(mix_T)).float()


HZ = {"a": 200.0, "b": 700.0, "c": 1200.0, "d": 1700.0}


def sound(label):
    return tone(HZ[label], 1.0)


def separated(stems, *, clip_id, labels=None, labels_present=None):
    """A clip of given stems, with their labels."""
    labels = list(labels or stems)
    stems_ST = torch.from_numpy(np.stack([np.float32(stem_T) for stem_T in stems.values()]))
    clip = decoded(stems_ST.sum(0), labels_present or labels, clip_id=clip_id)
    return SeparatedClip(clip=clip, labels=labels, mixture_T=stems_ST.sum(0), stems_ST=stems_ST)


def scored(*clips, separator=None, batch_s=100.0, seed=0):
    return reseparate(list(clips), BatchedSeparator(separator=separator or FourBands(), batch_s=batch_s), seed=seed)


def clean_clip(labels="ab", clip_id="first"):
    return separated({label: sound(label) for label in labels}, clip_id=clip_id)


OTHER = clean_clip("cd", "other")


def test_clean_stems_are_found_again_and_rivals_find_nothing_in_them():
    for rows in scored(clean_clip(), OTHER):
        for row in rows:
            assert row["cycle_si_sdr_db"] > 80
            assert row["rival_leak_db"] < -90


@pytest.mark.parametrize("leak_db", [-20.0, -6.0, 0.0])
def test_a_leak_is_found_by_the_rival_and_lost_in_the_cycle(leak_db):
    """The first stem holds the rival's sound at a level: closed forms of both scores."""
    gain = 10 ** (leak_db / 20)
    stems = {"a": sound("a") + gain * sound("b"), "b": sound("b")}
    (first, second), _ = scored(separated(stems, clip_id="first"), OTHER)
    found_db = 10 * math.log10(gain**2 / (1 + gain**2))
    assert first["rival_leak_db"] == pytest.approx(found_db, abs=0.05)
    assert first["cycle_si_sdr_db"] == pytest.approx(10 * math.log10(1 / gain**2), abs=0.05)
    assert second["rival_leak_db"] < -80 and second["cycle_si_sdr_db"] > 80


def test_both_scores_show_half_the_mixture_in_each_stem():
    half_T = (sound("a") + sound("b")) / 2
    rows, _ = scored(separated({"a": half_T, "b": half_T}, clip_id="first"), OTHER)
    for row in rows:
        assert row["cycle_si_sdr_db"] == pytest.approx(0.0, abs=0.05)
        assert row["rival_leak_db"] == pytest.approx(-3.01, abs=0.05)


def test_swapped_stems_leak_completely():
    rows, _ = scored(separated({"a": sound("b"), "b": sound("a")}, clip_id="first"), OTHER)
    for row in rows:
        assert row["rival_leak_db"] == pytest.approx(0.0, abs=0.05)
        assert row["cycle_si_sdr_db"] < -60


def test_a_silent_stem_has_the_lowest_scores_without_a_query():
    separator = FourBands()
    silence_T = np.zeros(RATE_HZ)
    rows, _ = scored(
        separated({"a": sound("a"), "b": silence_T}, clip_id="first"),
        separated({"c": silence_T, "d": silence_T}, clip_id="other"),
        separator=separator,
    )
    assert rows[1] == {"cycle_si_sdr_db": -100, "rival_leak_db": -100}
    assert rows[0]["cycle_si_sdr_db"] is None, "a silent stem is no partner"
    assert separator.num_queries == 1


@pytest.mark.parametrize("others", [[], [clean_clip("bc", "other")], [clean_clip("ad", "x"), clean_clip("db", "y")]])
def test_clips_that_share_a_label_are_no_partners(others):
    rows = scored(clean_clip(), *others)[0]
    assert [row["cycle_si_sdr_db"] for row in rows] == [None, None]
    assert all(row["rival_leak_db"] < -80 for row in rows)


def test_shared_labels_are_found_in_any_spelling_and_without_a_stem():
    named_too = separated({"c": sound("c")}, clip_id="other", labels_present=["c", "The sound of A"])
    assert scored(clean_clip(), named_too)[0][0]["cycle_si_sdr_db"] is None


def test_an_only_stem_has_no_rival():
    (row,), _ = scored(separated({"a": sound("a")}, clip_id="first", labels_present=["a", "whale"]), OTHER)
    assert row["rival_leak_db"] is None
    assert row["cycle_si_sdr_db"] > 80


def test_the_rival_is_the_loudest_other_stem():
    stems = {"a": sound("a") + 0.5 * sound("b"), "b": 0.5 * sound("b"), "c": sound("c")}
    with_loud_c, with_loud_b = (
        separated(stems | {"c": gain * sound("c")}, clip_id="first", labels="abc") for gain in (1.0, 0.1)
    )
    assert scored(with_loud_c)[0][0]["rival_leak_db"] < -80
    assert scored(with_loud_b)[0][0]["rival_leak_db"] == pytest.approx(10 * math.log10(0.25 / 1.25), abs=0.05)


def test_partners_of_another_length_are_cut_or_repeated():
    short = separated({label: sound(label)[:3000] for label in "cd"}, clip_id="short")
    long = separated({label: np.tile(sound(label), 3) for label in "ab"}, clip_id="long")
    for rows in scored(short, long):
        assert all(row["cycle_si_sdr_db"] > 10 for row in rows)  # a repetition clicks


@pytest.mark.parametrize("batch_s", [1e-9, 3.0, 1000.0])
def test_scores_do_not_depend_on_how_queries_are_batched(batch_s):
    clips = [blurred("ab", "first"), blurred("cd", "other"), blurred("ab", "third"), blurred("d", "fourth")]
    assert scored(*clips, batch_s=batch_s) == scored(*clips)


def blurred(labels, clip_id):
    """Stems with noise, so that every draw changes their scores."""
    rng = np.random.default_rng(len(clip_id))
    noise_ST = 0.05 * rng.standard_normal((len(labels), RATE_HZ))
    stems = {label: sound(label) + noise_T for label, noise_T in zip(labels, noise_ST, strict=True)}
    return separated(stems, clip_id=clip_id)


def test_draws_depend_only_on_the_seed_and_the_clips_id():
    first, other = blurred("ab", "first"), blurred("c", "other")
    expected = scored(first, other)[0]
    assert scored(first, other)[0] == expected
    assert scored(other, first)[1] == expected, "the position of a clip does not matter"
    assert scored(first, other, seed=1)[0] != expected
    renamed = separated(dict(zip("ab", first.stems_ST, strict=True)), clip_id="renamed")
    assert scored(renamed, other)[0] != expected


@pytest.mark.parametrize("num_clips", [2, 5])
def test_there_are_at_most_two_queries_per_stem(num_clips):
    separator = FourBands()
    clips = [clean_clip("ab" if number % 2 else "cd", f"clip-{number}") for number in range(num_clips)]
    scored(*clips, separator=separator)
    assert separator.num_queries == 2 * 2 * num_clips


def test_a_separation_that_fails_is_undefined_and_does_not_affect_other_clips():
    low_T, high_T = two_bands(RATE_HZ)
    bad = separated({"low": marked(low_T), "high": high_T}, clip_id="bad")
    good = separated({"low": low_T, "high": high_T}, clip_id="good")
    bad_rows, good_rows = scored(bad, good, separator=MarkedSeparator())
    assert bad_rows[0]["rival_leak_db"] is None
    assert all(row["rival_leak_db"] < -80 for row in (bad_rows[1], *good_rows))


def test_a_stem_that_is_not_finite_is_undefined_and_is_no_partner():
    broken = clean_clip("cd", "broken")
    broken.stems_ST[0, 5] = np.nan
    rows, broken_rows = scored(clean_clip(), broken)
    assert broken_rows[0] == {"cycle_si_sdr_db": None, "rival_leak_db": None}
    assert all(row["cycle_si_sdr_db"] > 80 for row in (*rows, broken_rows[1]))


def test_no_clips():
    assert scored() == []
