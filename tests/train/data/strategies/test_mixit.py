"""MixIT: mixtures of two natural clips, and the assignment of stems to them."""

from __future__ import annotations

import pytest
import torch

from tests.support.remixes import CLIPS, RIGHT, SINES, config, contents, groups_of, mixer, stems, two_clips
from train.data.batch import Batch
from train.data.config import MixConfig
from train.data.items import Item
from train.data.strategies.compose import loss_of
from train.data.strategies.mixit import best_assignment, best_groups, mixit_loss
from train.losses import batch_loss, clearsep_losses


def test_two_natural_clips_are_each_the_target_of_all_their_labels(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    """The trio is left out: it has a label in common with every other clip."""
    natural = [one for one in recordings["natural"] if one.clip != "trio"]
    made = mixer(clean, config(mixit={"fraction": 1.0}, batch_size=16), natural=natural)
    seen = set()
    for batch in (made.batch(step) for step in range(4)):
        assert batch.mixture_G.tolist() == [number for number in range(16) for _ in (0, 1)]
        assert batch.is_complete_G.all()
        _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
        for mixture in range(16):
            groups = groups_of(batch, mixture, made.labels)
            assert not set(groups[0][1]) & set(groups[1][1])
            for group, queries in groups:
                (clip,) = [
                    name for name, sounds in CLIPS.items() if set(sounds) == contents(batch.target_GT[group]).keys()
                ]
                assert queries == tuple(label for label, _ in CLIPS[clip])
                seen.add(clip)
            first, second = (group for group, _ in groups)
            assert torch.equal(mix_GT[first], mix_GT[second])
            torch.testing.assert_close(batch.target_GT[first] + batch.target_GT[second], mix_GT[first])
    assert seen == CLIPS.keys() - {"trio"}


@pytest.mark.parametrize(("mixit_fraction", "natural_fraction"), [(0.25, 0.0), (0.4, 0.5)])
def test_fractions_of_two_natural_clips_and_of_one_in_the_other_mixtures(
    clean: list[Item], recordings: dict[str, list[Item]], mixit_fraction: float, natural_fraction: float
) -> None:
    mix = config(mixit={"fraction": mixit_fraction}, natural_targets={"fraction": natural_fraction}, batch_size=64)
    made = mixer(clean, mix, natural=[one for one in recordings["natural"] if one.clip != "trio"])
    two, one = 0, 0
    for batch in (made.batch(step) for step in range(6)):
        in_group_G, is_of_two_G = batch.group_B.bincount(), batch.mixture_G.bincount()[batch.mixture_G] == 2
        two += int(is_of_two_G.sum()) // 2
        one += int((~is_of_two_G & (in_group_G > 1)).sum())
    assert two / 384 == pytest.approx(mixit_fraction, abs=0.06)
    assert one / 384 == pytest.approx(natural_fraction * (1 - mixit_fraction), abs=0.06)


def test_clips_with_a_label_in_common_are_not_mixed_with_each_other(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    natural = [one for one in recordings["natural"] if "bell" in one.labels]
    assert len(natural) > 1
    batch = mixer(clean, config(mixit={"fraction": 1.0}, batch_size=16), natural=natural).batch(0)
    assert batch.mixture_G.tolist() == list(range(16))
    assert not batch.is_complete_G.any()


@pytest.mark.parametrize(
    ("order", "assigned"), [("abcd", "0011"), ("cdab", "1100"), ("acbd", "0101"), ("dbca", "1010")]
)
def test_mixit_finds_which_clip_each_stem_is_of(order: str, assigned: str) -> None:
    targets_2T = two_clips().target_GT[1:]
    found_N = best_assignment(stems_NT=stems(order), target_2T=targets_2T, mixture_T=targets_2T.sum(0))
    assert found_N.tolist() == [int(digit) for digit in assigned]


def test_mixit_may_give_all_stems_to_one_clip() -> None:
    """No stem contains c or d, so every stem that is assigned to their clip would be an error."""
    targets_2T = two_clips().target_GT[1:]
    halves_NT = 0.5 * stems("aabb")
    found_N = best_assignment(stems_NT=halves_NT, target_2T=targets_2T, mixture_T=targets_2T.sum(0))
    assert found_N.tolist() == [0, 0, 0, 0]


def test_mixit_takes_the_least_loss_of_all_ways_to_assign() -> None:
    generator = torch.Generator().manual_seed(0)
    stems_NT, target_2T = torch.randn(5, 400, generator=generator), torch.randn(2, 400, generator=generator)
    mixture_T = target_2T.sum(0)

    def cost(assigned: list[int]) -> float:
        parts = [stems_NT[torch.tensor(assigned) == which].sum(0) for which in (0, 1)]
        signals = {"reference": target_2T, "mixture": mixture_T.expand(2, -1)}
        return float(clearsep_losses(estimate=torch.stack(parts), **signals).sum())

    found = best_assignment(stems_NT=stems_NT, target_2T=target_2T, mixture_T=mixture_T).tolist()
    costs = [cost([number >> bit & 1 for bit in range(5)]) for number in range(32)]
    assert cost(found) == pytest.approx(min(costs), abs=1e-4)


def test_more_stems_than_can_be_tried_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 6 stems to assign, got 7; assign them by label"):
        best_assignment(stems_NT=torch.ones(7, 8), target_2T=torch.ones(2, 8), mixture_T=torch.ones(8))


def test_labels_pay_for_swapped_stems_and_mixit_does_not() -> None:
    """The stem of the single target is not reassigned: a wrong one costs as much under both losses."""
    best = loss_of(MixConfig(mixit={"assignment": "best"}))
    assert loss_of(MixConfig()) is loss_of(MixConfig(mixit={"assignment": "labels"})) is batch_loss
    made, swapped = two_clips(), stems("ccdab")
    assert best_groups(made, swapped).tolist() == [0, 2, 2, 1, 1]
    assert float(best(made, stems(RIGHT))) == float(batch_loss(made, stems(RIGHT)))
    assert float(best(made, swapped)) == pytest.approx(float(best(made, stems(RIGHT))), abs=1e-3)
    assert float(batch_loss(made, swapped)) > float(best(made, swapped)) + 15.0
    wrong = stems("acdab")
    assert float(best(made, wrong)) > float(best(made, swapped)) + 8.0


def test_every_stem_has_a_gradient_under_mixit_even_if_a_clip_gets_none() -> None:
    made = two_clips()
    stems_BT = torch.cat([stems("c"), 0.4 * stems("aabb")]).requires_grad_()
    assert set(best_groups(made, stems_BT).tolist()) == {0, 1}
    loss = mixit_loss(made, stems_BT)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(stems_BT.grad).all()
    assert (stems_BT.grad[1:].abs().amax(1) > 0.0).all()


def test_queries_of_consistency_alone_are_not_reassigned() -> None:
    made = Batch(
        mix_BT=(SINES["a"] + SINES["b"]).repeat(2, 1),
        index_B=torch.tensor([0, 1]),
        group_B=torch.tensor([0, 1]),
        target_GT=stems("ab"),
        weight_G=torch.tensor([2.0, 0.0]),
        mixture_G=torch.tensor([0, 0]),
        is_complete_G=torch.tensor([True, True]),
        rivals=torch.zeros(2, 2),
    )
    assert best_groups(made, stems("ba")).tolist() == [0, 1]
    assert float(batch_loss(made, stems("ab"))) == pytest.approx(float(batch_loss(made, stems("ac"))), abs=1e-3)
