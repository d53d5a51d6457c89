"""Plausible remixes: which labels are drawn together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from engine.settings import deciding
from tests.support.remixes import LABELS, Natural, config, mixer, raw, tone_item
from train.data.config import MixConfig
from train.data.items import Item, track_items
from train.data.mixer import Mixer

TOGETHER = {("bell", "dog"): 7, ("bell", "dog", "rain"): 3, ("dog", "siren"): 2, ("bell",): 5}
"""Clips of a corpus by their labels."""
CLEAN = [tone_item(label, 0) for label in LABELS]


def corpus() -> list[Item]:
    """Tracks, one for each label of each clip."""
    return [
        replace(tone_item(label, 8), clip=f"{labels}-{number}", labels_present=frozenset(labels))
        for labels, num in TOGETHER.items()
        for number in range(num)
        for label in labels
    ]


def drawn(made: Mixer, num: int = 6000) -> dict[str, Counter[str]]:
    """Number of remixes by label of the first sound and label of the other one."""
    found: dict[str, Counter[str]] = {label: Counter() for label in LABELS}
    rng = np.random.default_rng(0)
    made.draw(0)  # loads the sounds
    for _ in range(num):
        remix = made.remix(rng)
        ((first,),) = (target.labels for target in remix.targets)
        (other,) = remix.labels_present - {first}
        found[first][other] += 1
    return found


def clean_mixer(**settings: object) -> Mixer:
    """A mixer that draws clean sounds alone; the tracks only say which labels occur together."""
    mix = config(clean_fraction=1.0, three_source_fraction=0.0, **settings)
    return mixer(CLEAN, mix, tracks=corpus())


def expected(label: str) -> dict[str, float]:
    together = {other: sum(num for labels, num in TOGETHER.items() if {label, other} <= {*labels}) for other in LABELS}
    weights = {other: num + 1 for other, num in together.items() if other != label}
    return {other: weight / sum(weights.values()) for other, weight in weights.items()}


@pytest.mark.parametrize("pool_s", [7200.0, 10.0], ids=["all-in-memory", "rotating"])
def test_labels_are_drawn_as_often_as_they_occur_together_plus_once(pool_s: float) -> None:
    made = clean_mixer(plausible={"fraction": 1.0}, pool_s=pool_s)
    found = drawn(made)
    assert made.pools["tracks"].rotates == (pool_s == 10.0) and not made.pools["clean"].rotates
    assert expected("bell") == {"dog": 11 / 18, "rain": 4 / 18, "siren": 1 / 18, "train": 1 / 18, "wind": 1 / 18}
    for label, counts in found.items():
        num = counts.total()
        assert num / 6000 == pytest.approx(1 / 6, abs=0.02), "the first label is drawn evenly, as without the setting"
        frequencies = {other: counts[other] / num for other in LABELS if other != label}
        assert frequencies == pytest.approx(expected(label), abs=0.05)


def test_the_other_remixes_stay_uniform() -> None:
    counts = drawn(clean_mixer(plausible={"fraction": 0.4}))["bell"]
    for other, frequency in expected("bell").items():
        assert counts[other] / counts.total() == pytest.approx(0.4 * frequency + 0.6 / 5, abs=0.05)


def test_clips_of_one_label_leave_all_remixes_uniform() -> None:
    alone = [tone_item(label, 8) for label in LABELS for _ in range(1 + 5 * (label == "bell"))]
    mix = config(clean_fraction=1.0, three_source_fraction=0.0, plausible={"fraction": 1.0})
    for tracks in (alone, []):
        for counts in drawn(mixer(CLEAN, mix, tracks=tracks)).values():
            assert [num / counts.total() for num in counts.values()] == pytest.approx([1 / 5] * 5, abs=0.06)


def test_a_fraction_of_0_draws_what_is_drawn_without_the_setting() -> None:
    zero, none = (mixer(CLEAN, config(plausible=one), tracks=corpus()) for one in ({"fraction": 0.0}, None))
    assert [raw(zero.batch(step)) for step in range(3)] == [raw(none.batch(step)) for step in range(3)]


def test_sounds_of_clips_with_a_common_label_are_not_mixed() -> None:
    """Not even if all sounds are tracks, so that a label's most frequent partner is in its own clip."""
    made = mixer(
        CLEAN, config(clean_fraction=0.0, three_source_fraction=0.5, plausible={"fraction": 1.0}), tracks=corpus()
    )
    made.draw(0)
    rng = np.random.default_rng(0)
    for _ in range(500):
        present = [label for sound in made.draw_sounds(rng, LABELS, 3) for label in sound.item.labels_present]
        assert len(present) == len(set(present))


def test_it_keeps_the_order_of_a_label_balance() -> None:
    """A label with 20 sounds is first as often as the balance says, and its partners are plausible."""
    rare = [tone_item("bell", 0), *[tone_item("dog", i) for i in range(8)], tone_item("wind", 0)]
    mix = config(
        clean_fraction=1.0, three_source_fraction=0.0, plausible={"fraction": 1.0}, label_balance={"balance": 0.0}
    )
    found = drawn(mixer(rare, mix))
    assert found["dog"].total() / 6000 == pytest.approx(0.8, abs=0.03)
    assert found["dog"]["bell"] / found["dog"].total() == pytest.approx(0.5, abs=0.04)


def test_labels_of_real_tracks_are_counted(natural: Natural) -> None:
    tracks = track_items(natural.tracks, sample_rate_hz=8000)
    made = mixer(CLEAN, config(plausible={"fraction": 1.0}), tracks=tracks)
    assert made.pools["tracks"].labels_of["trio"] == {"train", "bell", "rain"}, "its bell was not kept, but may sound"
    assert len(made.pools["tracks"].labels_of) == len({item.clip for item in tracks})


def test_settings_of_before_decide_the_same() -> None:
    assert "plausible" not in deciding(MixConfig())
    assert deciding(MixConfig(plausible={}))["plausible"] == {"fraction": 0.5}
