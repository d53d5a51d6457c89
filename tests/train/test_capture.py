"""Graphs of a separator's forward and backward pass, and batches made on a card: the same as without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.separators import QuerySeparator
from tests.conftest import TINY
from tests.support.remixes import batch_of, config, mixer, pair_item, tone_item
from train.capture import captured, half_precision

CARD = torch.device("cuda:0")
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_what_cannot_be_captured_trains_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    separator, batch = QuerySeparator(TINY, ["a", "b"]), batch_of(torch.zeros(1, 4000), torch.zeros(1, 4000), [0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "make_graphed_callables", _refuse)
        assert captured(separator, batch) is separator
    assert "training without CUDA graphs (operation not permitted)" in caplog.text


def _refuse(*_: object, **__: object) -> None:
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@on_a_card
@pytest.mark.parametrize(("bits", "worst"), [(32, 1e-4), (16, 0.05)])
def test_a_captured_separator_has_the_stems_and_gradients_of_the_separator(
    bits: int, worst: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits == 32:
        monkeypatch.setattr("train.capture.half_precision", _in_32_bits)
    precision = _in_32_bits if bits == 32 else half_precision
    torch.manual_seed(0)
    separator = QuerySeparator(TINY, ["a", "b", "c"]).to(CARD).train()
    separator.queries.rivals_LQ.data.normal_()
    query, mixes = torch.tensor([0, 2], device=CARD), torch.randn(3, 2, 8000, device=CARD)
    rivals = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], device=CARD)
    sample = batch_of(mixes[0].cpu(), mixes[0].cpu(), [0, 1])
    model = captured(separator, replace(sample, mix_BT=mixes[0].clone(), index_B=query, rivals=rivals))
    assert model is not separator
    for mix_BT in (*mixes, mixes[0, :, :5000]):  # the last one has another length
        results = []
        for each in (separator, model):
            with precision(CARD):
                stems_BT = each(mix_BT, query, rivals)
            gradients = torch.autograd.grad(stems_BT.float().square().mean(), list(separator.parameters()))
            results.append([one.detach().float().clone() for one in (stems_BT, *gradients)])
        for one, other in zip(*results, strict=True):
            assert (other - one).norm() <= worst * one.norm() + 1e-9


def _in_32_bits(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


@on_a_card
@pytest.mark.parametrize("room", [True, False], ids=["on-the-card", "in-cpu-memory"])
def test_batches_of_a_card_are_those_of_the_cpu(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not room:
        monkeypatch.setattr("train.data.pools._CARD_FRACTION", 0.0)
    clean = [tone_item(label, number) for label in ("bell", "dog", "rain") for number in range(3)]
    mix = config(augment=True, batch_size=16, clip_fraction=0.3, silence_rate=0.2)
    here = mixer(clean, mix, pairs=[pair_item("dog", 0.5)])
    there = mixer(clean, mix, pairs=[pair_item("dog", 0.5)], device=CARD)
    for step in range(4):
        one, other = here.batch(step), there.batch(step)
        assert other.mix_BT.device == CARD and torch.equal(one.index_B, other.index_B.cpu())
        torch.testing.assert_close(one.mix_BT, other.mix_BT.cpu(), rtol=0.0, atol=1e-5)
        torch.testing.assert_close(one.target_GT, other.target_GT.cpu(), rtol=0.0, atol=1e-5)
        assert torch.equal(other.mix_BT, there.batch(step).mix_BT)
