"""Mixture consistency: the queries of a clip, and the loss of the sum of its stems."""

from __future__ import annotations

import pytest
import torch

from tests.support.remixes import NUM_SAMPLES, RIGHT, SINES, config, groups_of, mixer, pair_item, sine, stems, two_clips
from train.data.config import MixConfig
from train.data.items import Item
from train.data.strategies.compose import loss_of
from train.data.strategies.consistency import consistency_loss
from train.losses import batch_loss, clearsep_loss


def test_a_clip_has_queries_for_all_its_labels_and_only_its_track_has_weight(clean: list[Item]) -> None:
    pairs = [
        pair_item("dog", 0.5, labels_present=("rain", "bell")),
        pair_item("wind", 0.5, labels_present=("owl",)),
        pair_item("train", 1.0),
    ]
    made = mixer(clean, config(clip_fraction=1.0, consistency={"weight": 1.0}, batch_size=32), pairs=pairs)
    batch = made.batch(0)
    _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
    seen = set()
    for mixture in range(32):
        groups = groups_of(batch, mixture, made.labels)
        first = groups[0][0]
        seen.add(tuple(queries for _, queries in groups))
        assert bool(batch.is_complete_G[first]) == (groups[0][1] != ("wind",))  # owl is not a label of the separator
        for group, _ in groups[1:]:
            assert float(batch.weight_G[group]) == 0.0
            torch.testing.assert_close(batch.target_GT[first] + batch.target_GT[group], mix_GT[first])
    assert seen == {(("dog",), ("bell", "rain")), (("wind",),), (("train",),)}
    assert len(set(batch.weight_G[batch.weight_G > 0].tolist())) == 1
    assert float(batch.weight_G.mean()) == pytest.approx(1.0)


def test_consistency_is_the_loss_of_the_sum_of_a_complete_mixture() -> None:
    """30 dB for the complete one of two mixtures; the queries of the other name only a part of it."""
    made = two_clips()
    assert float(consistency_loss(made, stems(RIGHT))) == pytest.approx(-30.0 / 2, abs=0.01)
    assert float(consistency_loss(made, stems("cdcba"))) == pytest.approx(-30.0 / 2, abs=0.01)
    assert float(consistency_loss(made, stems("ccabd"))) == pytest.approx(-30.0 / 2, abs=0.01)
    mixture = made.mix_BT[1]
    signals = {"reference": mixture[None], "mixture": mixture[None]}
    lost_c = 0.5 * float(clearsep_loss(estimate=(mixture - SINES["c"])[None], **signals))
    without_c = torch.cat([stems("cabd"), torch.zeros(1, NUM_SAMPLES)])
    assert float(consistency_loss(made, without_c)) == pytest.approx(lost_c, abs=1e-3)
    assert float(consistency_loss(two_clips(is_complete=False), stems(RIGHT))) == 0.0


def test_consistency_is_added_by_its_weight() -> None:
    made, noisy = two_clips(), stems(RIGHT) + 0.3 * sine(110)
    plain = float(batch_loss(made, noisy))
    weighted = float(loss_of(MixConfig(consistency={"weight": 0.5}))(made, noisy))
    assert weighted == pytest.approx(plain + 0.5 * float(consistency_loss(made, noisy)), abs=1e-4)
