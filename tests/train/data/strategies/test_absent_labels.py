"""Absent labels: silent targets in clips that name a label without containing it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.remixes import (
    RATE_HZ,
    Natural,
    config,
    contents,
    gain_at,
    mixer,
    mixtures,
    pitch_hz,
    tone,
    tone_item,
)
from train.data.items import Item
from train.data.strategies.absent_labels import absent_items


def test_a_label_that_the_filter_found_absent_has_a_silent_target_in_its_own_clip(natural: Natural) -> None:
    absent = absent_items(natural.tracks, sample_rate_hz=RATE_HZ)
    made = mixer([], config(silence_rate=1.0, absent_labels={"fraction": 1.0}, batch_size=16), absent=absent)
    seen = set()
    for mix_T, target_T, query in mixtures(made, 3):
        assert not target_T.any()
        fits = {name: np.correlate(whole_T, mix_T.numpy(), "valid") for name, whole_T in natural.mixtures.items()}
        clip = max(fits, key=lambda name: float(fits[name].max()))
        assert gain_at(natural.mixtures[clip], mix_T, int(fits[clip].argmax())) > 0.0
        seen.add((clip, query))
    assert seen == {("half", "dog"), ("trio", "bell"), ("none", "bell"), ("none", "dog")}


@pytest.mark.parametrize(("silence_rate", "absent_fraction"), [(0.4, 0.0), (0.4, 0.5), (0.4, 1.0), (0.0, 1.0)])
def test_fraction_of_silence_from_absent_labels_and_in_all(
    clean: list[Item], silence_rate: float, absent_fraction: float
) -> None:
    absent = [
        Item(**(vars(tone_item("dog", 9, labels_present=("bell",))) | {"load": lambda: tone(pitch_hz("bell", 9))}))
    ]
    mix = config(batch_size=64, silence_rate=silence_rate, absent_labels={"fraction": absent_fraction})
    rows = mixtures(mixer(clean, mix, absent=absent), 9)
    silent = [mix_T for mix_T, target_T, _ in rows if not target_T.any()]
    of_a_clip = sum(contents(mix_T).keys() == {("bell", 9)} for mix_T in silent)
    assert len(silent) / len(rows) == pytest.approx(silence_rate, abs=0.06 if silence_rate else 0.0)
    assert of_a_clip / len(rows) == pytest.approx(silence_rate * absent_fraction, abs=0.05)
    assert of_a_clip == len(silent) if absent_fraction == 1.0 else True
