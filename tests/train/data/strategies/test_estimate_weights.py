"""Estimate weights: the weight of a track, in the draw and in the loss."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.support.remixes import config, contents, mixer, mixtures, pair_item, tone_item
from train.data.items import Item


def weights(how: str) -> dict[str, str] | None:
    return None if how == "none" else {"use": how}


@pytest.mark.parametrize(("how", "share"), [("none", 1 / 2), ("loss", 1 / 2), ("draw", 2 / 3)])
def test_tracks_of_a_label_are_drawn_by_their_estimate(how: str, share: float) -> None:
    """One track without an estimate and one of which half the energy is right."""
    tracks = [tone_item("dog", 0), tone_item("dog", 1, estimate_db=0.0)]
    made = mixer([tone_item("bell", 0)], config(batch_size=200, estimate_weights=weights(how)), tracks=tracks)
    drawn = Counter(number for mix_T, *_ in mixtures(made, 4) for label, number in contents(mix_T) if label == "dog")
    assert drawn[0] / drawn.total() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("how", "ratio"), [("none", 1.0), ("draw", 1.0), ("loss", 1 / 5)])
def test_the_weight_of_a_target_is_the_fraction_that_is_right(how: str, ratio: float) -> None:
    """A fifth of the energy is right: -6 dB. Silence for an absent sound and a clean clip are certain."""
    tracks = [tone_item("dog", 1, estimate_db=-10 * np.log10(4))]
    made = mixer([tone_item("bell", 0)], config(batch_size=32, estimate_weights=weights(how)), tracks=tracks)
    batch = made.batch(0)
    assert float(batch.weight_G.mean()) == pytest.approx(1.0)
    by_label = {made.labels[int(i)]: float(w) for i, w in zip(batch.index_B, batch.weight_G, strict=True)}
    assert by_label["dog"] / by_label["bell"] == pytest.approx(ratio)
    silent = mixer(
        [tone_item("bell", 0), tone_item("rain", 0)],
        config(silence_rate=1.0, estimate_weights=weights(how)),
        tracks=tracks,
    )
    assert silent.batch(0).weight_G.tolist() == [1.0] * 4


def test_the_centre_is_the_estimate_of_weight_one_half() -> None:
    tracks = [tone_item("dog", 1, estimate_db=5.0)]
    mix = config(batch_size=32, estimate_weights={"use": "loss", "centre_db": 5.0})
    batch = mixer([tone_item("bell", 0)], mix, tracks=tracks).batch(0)
    low, high = sorted(set(batch.weight_G.tolist()))
    assert low / high == pytest.approx(1 / 2)


def test_a_clip_has_the_weight_of_its_track() -> None:
    half_right = Item(**(vars(pair_item("dog", 0.5)) | {"estimated_si_sdr_db": 0.0}))
    made = mixer([], config(clip_fraction=1.0, batch_size=32, estimate_weights={"use": "loss"}),
                 pairs=[half_right, pair_item("bell", 0.5)])  # fmt: skip
    batch = made.batch(0)
    by_label = {made.labels[int(i)]: float(w) for i, w in zip(batch.index_B, batch.weight_G, strict=True)}
    assert by_label["dog"] / by_label["bell"] == pytest.approx(1 / 2)
