"""Rendering: the same samples as torchaudio, numpy and engine.audio.levels make of a crop, one at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchaudio

from engine.audio.levels import active_rms
from tests.support.remixes import RATE_HZ, config
from train.data.drawn import NUM_KNOTS, SPEEDS, Crop, DrawnBatch, Target, TrainingMixture, collate, crop_width
from train.data.render import Renderer

NUM_SAMPLES = 2050  # no multiple of the windows of 0.1 s
SAMPLES_N = torch.from_numpy(np.random.default_rng(0).normal(0.0, 0.1, 20_000).astype(np.float32))
OTHERS_N = SAMPLES_N.flip(0).contiguous()


def crop(speed: int, **changes: object) -> Crop:
    width = crop_width(NUM_SAMPLES, speed)
    values: dict[str, object] = {"samples_N": SAMPLES_N, "first": 700 + 10 * speed, "num_samples": width}
    return Crop(**{**values, "speed": speed, "knots_db": None, "rms": 0.2, **changes})


def drawn_of(*mixtures: TrainingMixture) -> DrawnBatch:
    return collate(mixtures, {"a": 0, "b": 1}, num_samples=NUM_SAMPLES)


def alone(*crops: Crop) -> TrainingMixture:
    return TrainingMixture(
        crops=crops, labels_present=frozenset("a"), targets=(Target(labels=("a",), crops=crops[:1]),)
    )


def rendered(drawn: DrawnBatch) -> tuple[torch.Tensor, torch.Tensor]:
    render = Renderer(config(segment_s=NUM_SAMPLES / RATE_HZ), sample_rate_hz=RATE_HZ, device=torch.device("cpu"))
    batch = render(drawn)
    return batch.mix_BT, batch.target_GT


def by_hand(one: Crop, level_of: Crop | None = None) -> np.ndarray:
    """The crop by other means, ``[T]``."""
    samples_T = _coloured(one)
    level = active_rms(_coloured(level_of) if level_of else samples_T, sample_rate_hz=RATE_HZ)
    return samples_T * (one.rms / level)


def _coloured(one: Crop) -> np.ndarray:
    cut = one.samples_N[one.first : one.first + one.num_samples]
    if one.speed:
        cut = torchaudio.functional.resample(cut, *SPEEDS[one.speed])
    samples_T = np.zeros(NUM_SAMPLES, np.float32)
    samples_T[: len(cut)] = cut[:NUM_SAMPLES]
    if one.knots_db is None:
        return samples_T
    spectrum_F = np.fft.rfft(samples_T)
    curve_db = np.interp(np.linspace(0, NUM_KNOTS - 1, len(spectrum_F)), range(NUM_KNOTS), one.knots_db)
    return np.fft.irfft(spectrum_F * 10 ** (curve_db / 20), NUM_SAMPLES).astype(np.float32)


@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
@pytest.mark.parametrize("coloured", [False, True], ids=["flat", "coloured"])
def test_a_crop_is_what_it_is_by_hand(short: bool, coloured: bool) -> None:
    """Every speed, in one batch; a short sound has zeros after its end."""
    knots_db = np.random.default_rng(1).normal(0.0, 6.0, NUM_KNOTS) if coloured else None
    changes = {"knots_db": knots_db} | ({"num_samples": 1111} if short else {})
    crops = [crop(speed, **changes) for speed in (3, 0, 4, 2, 1)]
    mix_BT, target_GT = rendered(drawn_of(*map(alone, crops)))
    np.testing.assert_allclose(mix_BT.numpy(), np.stack([by_hand(one) for one in crops]), atol=3e-6)
    assert torch.equal(mix_BT, target_GT)


def test_signals_are_sums_of_crops_of_any_pool() -> None:
    first, second, third = crop(0), crop(2, samples_N=OTHERS_N), crop(2, first=5000)
    mixture = alone(first, second, third)
    rest = Target(labels=("b",), crops=mixture.crops, minus=(first,))
    silence = Target(labels=("b",), crops=(), weight=0.5)
    mix_BT, target_GT = rendered(
        drawn_of(alone(second), dataclasses.replace(mixture, targets=(*mixture.targets, rest, silence)))
    )
    one, two, three = (by_hand(each) for each in mixture.crops)
    np.testing.assert_allclose(mix_BT.numpy(), np.stack([two, *[one + two + three] * 3]), atol=3e-6)
    np.testing.assert_allclose(target_GT.numpy(), np.stack([two, one, two + three, 0 * one]), atol=3e-6)
    assert not target_GT[3].any()


def test_a_track_gets_the_gain_of_its_clip() -> None:
    clip = crop(1)
    track = crop(1, first=9000, level_of=clip)
    _, target_GT = rendered(drawn_of(alone(track)))
    np.testing.assert_allclose(target_GT[0].numpy(), by_hand(track, level_of=clip), atol=3e-6)


def test_silence_stays_silence() -> None:
    mix_BT, _ = rendered(drawn_of(alone(crop(4, samples_N=torch.zeros(20_000), knots_db=np.ones(NUM_KNOTS)))))
    assert not mix_BT.any()


def test_crops_that_are_sent_alone_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card gets of sounds that it has no room for; the card is the CPU here."""
    crops = [crop(speed, num_samples=num) for speed, num in ((3, 1500), (0, 2051), (3, 2279), (1, 1641))]
    drawn = drawn_of(alone(*crops[:2]), alone(*crops[2:]), alone(crop(0, samples_N=OTHERS_N)))
    wanted = rendered(drawn)
    monkeypatch.setattr("train.data.drawn._sent", lambda values, device: values)
    sent = drawn.to(torch.device("cuda"))
    assert sum(part.samples_N.numel() for part in sent.parts) < 5 * 2 * 2600
    assert all(torch.equal(one, other) for one, other in zip(wanted, rendered(sent), strict=True))
