"""Natural clips with one track as the target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.remixes import RATE_HZ, Natural, config, gain_at, mixer, mixtures, pair_item
from train.data.items import Item, pair_items


@pytest.mark.parametrize("share", [False, True])
def test_a_clip_is_the_mixture_and_its_track_at_the_same_position_the_target(natural: Natural, share: bool) -> None:
    pairs = pair_items(natural.tracks, sample_rate_hz=RATE_HZ, share=share)
    made = mixer([], config(clip_fraction=1.0, batch_size=16), pairs=pairs)
    clips = {clip: samples_T.astype(np.float64) for clip, samples_T in natural.mixtures.items()}
    seen = set()
    for mix_T, target_T, query in mixtures(made, 3):
        fits = {clip: np.correlate(whole_T, mix_T.double().numpy(), "valid") for clip, whole_T in clips.items()}
        clip = max(fits, key=lambda name: float(fits[name].max()))
        first = int(fits[clip].argmax())
        divided = share and clip in ("pair", "half", "trio")
        track_T = natural.shares(clip)[query] if divided else natural.stems[clip, query]
        assert gain_at(natural.mixtures[clip], mix_T, first) == pytest.approx(
            gain_at(track_T, target_T, first), rel=1e-4
        )
        seen.add((clip, query))
    assert seen == {(pair.clip, *pair.labels) for pair in pairs}


def test_speed_and_colour_are_the_same_for_clip_and_track() -> None:
    made = mixer([], config(clip_fraction=1.0, batch_size=32, augment=True), pairs=[pair_item("dog", 0.25)])
    for mix_T, target_T, _ in mixtures(made, 2):
        torch.testing.assert_close(target_T, 0.25 * mix_T, atol=1e-6, rtol=1e-4)


def test_a_clip_has_the_level_of_any_source_and_its_target_is_active() -> None:
    """The track sounds for a tenth of the clip's time; it is always in the crop, wholly where the crop is longer."""
    pairs = [pair_item("dog", 0.5, at=slice(8000, 8800))]
    made = mixer([], config(clip_fraction=1.0, batch_size=64, gain_db=0.0), pairs=pairs)
    for mix_T, target_T, _ in mixtures(made, 2):
        assert float(mix_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)
        assert int((target_T != 0.0).sum()) >= 790
        torch.testing.assert_close(target_T[target_T != 0.0], 0.5 * mix_T[target_T != 0.0])


@pytest.mark.parametrize(("clip_fraction", "tolerance"), [(0.0, 0.0), (0.3, 0.06), (1.0, 0.0)])
def test_fraction_of_clips(clean: list[Item], clip_fraction: float, tolerance: float) -> None:
    mix = config(batch_size=64, clip_fraction=clip_fraction, silence_rate=0.2)
    rows = mixtures(
        mixer(clean, mix, pairs=[pair_item("dog", 0.5), pair_item("bell", 0.5, labels_present=("rain",))]), 6
    )
    noise = [(target_T, query) for mix_T, target_T, query in rows if (torch.fft.rfft(mix_T).abs() > 0.1).sum() > 500]
    assert len(noise) / len(rows) == pytest.approx(clip_fraction, abs=tolerance + 1e-9)
    assert {query for target_T, query in noise if target_T.any()} <= {"dog", "bell"}
    if noise:  # some have a query for an absent sound
        assert np.mean([bool(target_T.any()) for target_T, _ in noise]) == pytest.approx(0.8, abs=0.09)
