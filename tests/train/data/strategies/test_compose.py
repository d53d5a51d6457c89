"""All ablations: batches with and without them, and their settings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.support.remixes import RATE_HZ, Natural, config, mixer, pair_item, raw, tone_item
from train.data.config import MixConfig
from train.data.items import Item, pair_items
from train.data.strategies.absent_labels import absent_items

RECORDED = [  # settings, queries, mixtures and targets (each projected on a ramp), recorded from an earlier version
    (
        {"augment": True, "batch_size": 6, "natural_targets": {"fraction": 0.0}},
        [3, 1, 5, 1, 2, 1],
        [-0.3937, -0.2173, 0.5095, 0.1139, -0.1986, 0.1487],
        [-0.0621, 0.0103, 0.1917, 0.1299, -0.0479, 0.0168],
    ),
    (
        {"natural_targets": {"fraction": 0.5}},
        [3, 0, 4, 2],
        [-0.5061, 0.0099, -0.9767, 0.0721],
        [-0.1433, -0.4306, -0.2616, 0.1769],
    ),
    (
        {
            "silence_rate": 0.5,
            "three_source_fraction": 1.0,
            "clean_fraction": 0.2,
            "natural_targets": {"fraction": 0.0},
        },
        [3, 5, 3, 1],
        [-0.7866, -0.1557, 0.0751, 0.1372],
        [-0.133, 0.0026, 0.0, 0.2408],
    ),
]


@pytest.mark.parametrize(("settings", "index_B", "mix_B", "target_G"), RECORDED)
def test_batches_equal_recorded_ones(
    clean: list[Item],
    recordings: dict[str, list[Item]],
    settings: dict[str, Any],
    index_B: list[int],
    mix_B: list[float],
    target_G: list[float],
) -> None:
    """Numbers of commit f9875bf; bytes would differ between processors."""
    batch = mixer(clean, config(**settings), **recordings, seed=3, rank=1).batch(5)
    ramp_T = torch.linspace(-1.0, 1.0, 2000, dtype=torch.float64)
    assert batch.index_B.tolist() == index_B
    assert (batch.mix_BT.double() @ ramp_T).tolist() == pytest.approx(mix_B, abs=1e-4)
    assert (batch.target_GT.double() @ ramp_T).tolist() == pytest.approx(target_G, abs=1e-4)
    assert batch.weight_G.tolist() == [1.0] * len(target_G)
    assert batch.mixture_G.tolist() == list(range(len(target_G)))


def test_ablations_that_are_off_draw_nothing(clean: list[Item], recordings: dict[str, list[Item]]) -> None:
    """Batches are equal to the bit, although there are sounds for the ablations, and estimates."""
    estimated = [tone_item("dog", 8, estimate_db=-3.0), *recordings["tracks"]]
    pairs, absent = [pair_item("dog", 1.0)], [tone_item("bell", 9)]
    with_sounds = mixer(clean, config(silence_rate=0.3), tracks=estimated, pairs=pairs, absent=absent)
    without = mixer(clean, config(silence_rate=0.3), tracks=estimated)
    assert [raw(with_sounds.batch(step)) for step in range(4)] == [raw(without.batch(step)) for step in range(4)]


@pytest.mark.parametrize("pool_s", [7200.0, 3.0], ids=["all-in-memory", "rotating"])
def test_a_resumed_training_sees_the_same_with_every_ablation(
    clean: list[Item], recordings: dict[str, list[Item]], natural: Natural, pool_s: float
) -> None:
    mix = config(
        **{"pool_s": pool_s, "refresh_steps": 3, "augment": True, "batch_size": 8, "silence_rate": 0.3},
        **{"absent_labels": {"fraction": 0.5}, "clip_fraction": 0.3, "mixit": {"fraction": 0.3}},
        **{"natural_targets": {"fraction": 0.3}, "label_balance": {"balance": 0.3}},
        **{"estimate_weights": {"use": "draw"}, "consistency": {"weight": 0.5}},
    )
    sounds = recordings | {
        "pairs": pair_items(natural.tracks, sample_rate_hz=RATE_HZ),
        "absent": absent_items(natural.tracks, sample_rate_hz=RATE_HZ),
    }
    undisturbed, resumed = (mixer(clean, mix, **sounds) for _ in range(2))
    seen = [raw(undisturbed.batch(step)) for step in range(10)]
    assert [raw(resumed.batch(step)) for step in range(6, 10)] == seen[6:]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("three_source_fraction", 1.5),
        ("silence_rate", -0.1),
        ("clean_fraction", 2.0),
        ("natural_targets.fraction", 1.01),
        ("batch_size", 0),
        ("segment_s", 0.0),
        ("pool_s", -1.0),
        ("refresh_steps", 0),
        ("clip_fraction", 1.5),
        ("mixit.fraction", -1.0),
        ("absent_labels.fraction", 1.1),
        ("label_balance.balance", 2.0),
        ("consistency.weight", -0.5),
        ("estimate_weights.use", "some"),
        ("mixit.assignment", "worst"),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    outer, _, inner = name.partition(".")
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be .*, got {value!r}; "):
        MixConfig(**{outer: {inner: value} if inner else value})


def test_fractions_of_natural_mixtures_are_at_most_1_together() -> None:
    with pytest.raises(ValueError, match=r"clip_fraction and mixit\.fraction must be at most 1 together, got 1\.25"):
        MixConfig(clip_fraction=0.75, mixit={"fraction": 0.5})
