"""Batches: groups of queries that share a target."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.remixes import RIGHT, batch_of, stems, two_clips
from train.losses import batch_loss, clearsep_loss, clearsep_losses


def test_regroup_adds_up_the_stems_of_a_group_and_gives_its_mixture() -> None:
    """The groups are not in order and not of one size; every stem gets its gradient."""
    mix_GT = torch.randn(3, 50)
    batch = batch_of(mix_GT, torch.randn(3, 50), [1, 0, 2, 1, 1, 0])
    stems_BT = torch.randn(6, 50, requires_grad=True)
    summed_GT, regrouped_GT = batch.regroup(stems_BT)
    wanted = [stems_BT[1] + stems_BT[5], stems_BT[0] + stems_BT[3] + stems_BT[4], stems_BT[2]]
    torch.testing.assert_close(summed_GT, torch.stack(wanted))
    assert torch.equal(regrouped_GT, mix_GT)
    (summed_GT * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert stems_BT.grad is not None
    assert stems_BT.grad[:, 0].tolist() == [10.0, 1.0, 100.0, 10.0, 10.0, 1.0]


def test_queries_of_one_target_in_different_mixtures_have_that_of_the_last() -> None:
    """As in Self-Remixing: on every device the same one."""
    batch = batch_of(torch.randn(2, 50), torch.randn(2, 50), [0, 1, 0])
    mix_BT = torch.randn(3, 50)
    _, mix_GT = dataclasses.replace(batch, mix_BT=mix_BT).regroup(torch.randn(3, 50))
    assert torch.equal(mix_GT, mix_BT[[2, 1]])


def test_the_loss_of_a_batch_is_the_mean_over_its_targets() -> None:
    made = two_clips()
    assert made.index_B.tolist() == [2, 0, 1, 2, 3]
    assert made.group_B.tolist() == [0, 1, 1, 2, 2]
    assert made.mixture_G.tolist() == [0, 1, 1]
    signals = {"estimate": made.target_GT, "reference": made.target_GT, "mixture": made.regroup(made.mix_BT)[1]}
    assert float(batch_loss(made, stems(RIGHT))) == pytest.approx(float(clearsep_loss(**signals)), abs=0.01)
    assert float(batch_loss(two_clips(weight=0.0), stems("d" + RIGHT[1:]))) == pytest.approx(
        float(clearsep_losses(**signals)[1:].mean()), abs=0.01
    )
