"""Calibration of presence models with a tagger that errs at random and a separator that finds nothing out."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest
import soundfile
import torch

from engine.corpus.sources import read_sources
from engine.separators.batching import BatchedSeparator
from engine.separators.queries import as_query
from engine.taggers.presence import CLIP, REST, STEM
from train.judges.calibrate import CalibrationConfig
from train.judges.presence import PresenceJudge, calibrate_presence

RATE_HZ = 4000
PITCH_HZ = {f"tone {number}": 150.0 * (number + 1) for number in range(8)}


class ErringTagger:
    """Tags are levels of pitches with an error of 15 dB that depends on the audio alone."""

    labels, sample_rate_hz = tuple(PITCH_HZ), RATE_HZ

    def tag(self, audio_BT, *, lengths=None):
        """See the protocol."""
        lengths = lengths or [audio_BT.shape[1]] * len(audio_BT)
        return torch.stack([self._tags(audio_T[:length]) for audio_T, length in zip(audio_BT, lengths, strict=True)])

    def _tags(self, audio_T):
        times_T = torch.arange(len(audio_T)) / RATE_HZ
        waves = [torch.exp(2j * torch.pi * pitch * times_T) for pitch in PITCH_HZ.values()]
        levels = torch.tensor([20.0 * float(torch.log10((audio_T * wave_T).mean().abs() + 1e-2)) for wave_T in waves])
        seed = int.from_bytes(hashlib.sha256(audio_T.numpy().tobytes()).digest()[:8], "big")
        return levels.float() + torch.from_numpy(np.random.default_rng(seed).normal(0.0, 15.0, len(waves))).float()


class Nothing:
    """Gives a tenth of the mixture, whatever the query."""

    labels, sample_rate_hz = tuple(PITCH_HZ), RATE_HZ
    uses_unwanted = True

    def __init__(self):
        self.queries = defaultdict(list)

    def separate(self, mix_BT, queries, *, lengths=None):
        """See the protocol."""
        for mix_T, query in zip(mix_BT, map(as_query, queries), strict=True):
            self.queries[mix_T.numpy().tobytes()].append((query.text, [part.sound for part in query.unwanted]))
        return 0.1 * mix_BT


SEPARATOR = Nothing()


@pytest.fixture(scope="module")
def presence(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    times_T = np.arange(RATE_HZ) / RATE_HZ
    for label, pitch in PITCH_HZ.items():
        (folder / label).mkdir()
        for number in range(2):
            wave_T = 0.5 * np.sin(2 * np.pi * pitch * times_T + number)
            soundfile.write(folder / label / f"{number}.wav", wave_T, RATE_HZ)
    separator = BatchedSeparator(separator=SEPARATOR, device="cpu")
    judge = PresenceJudge(tagger=ErringTagger(), separator=separator, clean=read_sources(folder))
    return calibrate_presence([judge], CalibrationConfig(num_mixtures=200, max_s=1.0), tagger="t", about={})


def test_a_strong_tag_of_the_clip_speaks_for_a_label_whatever_its_stem(presence):
    """If the truth chose the queries, the absent ones would be those of strong tags, and the tag would say nothing."""
    for kind in (CLIP, STEM, REST):
        weight = dict(zip(presence.model(kind).names, presence.model(kind).weight, strict=True))
        assert weight["clip_tag_db"] > 0.5


def test_queries_exclude_what_those_of_a_pass_do(presence):
    """The likely labels exclude each other; the one that is only tried excludes them, and none excludes it."""
    assert len(SEPARATOR.queries) == 200
    for queries in SEPARATOR.queries.values():
        excluded = {label for _, unwanted in queries for label in unwanted}
        (tried,) = {label for label, _ in queries} - excluded
        assert all(set(unwanted) == excluded - {label} for label, unwanted in queries)
        assert tried in PITCH_HZ


def test_what_does_not_depend_on_the_label_says_nothing(presence):
    weight = dict(zip(presence.model(STEM).names, presence.model(STEM).weight, strict=True))
    assert abs(weight["stem_level_db"]) < 0.3 and abs(weight["active_fraction"]) < 0.3


def test_every_label_has_a_threshold_that_finds_some_of_its_clips(presence):
    limits = presence.thresholds(0.6)
    assert set(limits) == set(PITCH_HZ)
    assert np.mean([limit["recall"] for limit in limits.values()]) > 0.3
