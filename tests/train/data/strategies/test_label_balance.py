"""The label balance: how often a label is drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.remixes import CLIPS_PER_LABEL, LABELS, config, mixer, mixtures, pair_item, tone_item
from train.data.items import Item


@pytest.mark.parametrize("label_balance", [1.0, 0.5, 0.0])
def test_labels_are_drawn_evenly_or_by_how_many_sounds_they_have(label_balance: float) -> None:
    counts = {"bell": 1, "dog": 4, "rain": 16}
    items = [tone_item(label, number) for label, number in counts.items() for number in range(number)]
    made = mixer(items, config(batch_size=200, label_balance={"balance": label_balance}))
    drawn = Counter(query for *_, query in mixtures(made, 6))
    weights = {label: number ** (1 - label_balance) for label, number in counts.items()}
    for label, weight in weights.items():
        assert drawn[label] / 1200 == pytest.approx(weight / sum(weights.values()), abs=0.04)


def test_balance_counts_sounds_that_a_rotating_pool_has_not_loaded() -> None:
    items = [tone_item(label, number) for label, count in (("bell", 2), ("dog", 8)) for number in range(count)]
    made = mixer(items, config(batch_size=200, label_balance={"balance": 0.0}, pool_s=4.0))
    drawn = Counter(query for *_, query in mixtures(made, 4))
    assert drawn["dog"] / 800 == pytest.approx(0.8, abs=0.04)


def test_labels_of_clips_are_drawn_by_the_balance(clean: list[Item]) -> None:
    pairs = [pair_item("dog", 0.5)] * 9 + [pair_item("bell", 0.5)]
    for label_balance, share in ((1.0, 0.5), (0.0, 0.9)):
        mix = config(clip_fraction=1.0, label_balance={"balance": label_balance}, batch_size=200)
        queries = [query for *_, query in mixtures(mixer(clean, mix, pairs=pairs), 2)]
        assert queries.count("dog") / 400 == pytest.approx(share, abs=0.06)
    assert CLIPS_PER_LABEL * len(LABELS) == len(clean)
