"""The training loss against closed forms: orthogonal noise, silent targets, gains, and gradients that stay finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.losses import (
    clearsep_loss,
    clearsep_losses,
    soft_si_snr_db,
    soft_snr_db,
)

NUM_SAMPLES = 4000


def tone(cycles: int, power: float = 1.0) -> Tensor:
    """A sine [T] of mean power ``power`` and whole cycles: tones of different cycles are orthogonal."""
    phase_T = 2 * math.pi * cycles * torch.arange(NUM_SAMPLES, dtype=torch.float64) / NUM_SAMPLES
    return ((2 * power) ** 0.5 * phase_T.sin()).float()


TARGET, NOISE, RIVAL = tone(50), tone(70), tone(90)


def batch(*rows: Tensor) -> Tensor:
    return torch.stack(rows)


def both_db(estimate: Tensor, reference: Tensor, mixture: Tensor) -> tuple[float, float]:
    signals = {"estimate": batch(estimate), "reference": batch(reference), "mixture": batch(mixture)}
    return float(soft_snr_db(**signals)), float(soft_si_snr_db(**signals))


def loss_db(estimate: Tensor, reference: Tensor, mixture: Tensor) -> float:
    return float(clearsep_loss(estimate=batch(estimate), reference=batch(reference), mixture=batch(mixture)))


@pytest.mark.parametrize("noise_db", [0.0, -5.0, -10.0])
def test_orthogonal_noise_has_the_ratio_it_was_mixed_at(noise_db: float) -> None:
    estimate = TARGET + 10 ** (noise_db / 20) * NOISE
    assert both_db(estimate, TARGET, TARGET + RIVAL) == pytest.approx((-noise_db, -noise_db), abs=0.1)


def test_errors_30_db_below_the_mixture_stop_counting() -> None:
    """A perfect estimate of the whole mixture gains 30 dB, not infinity; an error at the floor costs 3 dB of them."""
    assert both_db(TARGET, TARGET, TARGET) == pytest.approx((30.0, 30.0), abs=0.01)
    assert both_db(TARGET + 1e-3**0.5 * NOISE, TARGET, TARGET)[0] == pytest.approx(27.0, abs=0.02)
    assert both_db(TARGET + 1e-4 * NOISE, TARGET, TARGET)[0] == pytest.approx(30.0, abs=0.01)


def test_the_mixture_as_estimate_has_the_level_of_its_target() -> None:
    snr_db, si_snr_db = both_db(TARGET + RIVAL, TARGET, TARGET + RIVAL)
    assert (snr_db, si_snr_db) == pytest.approx((0.0, 0.0), abs=0.02)


def test_a_silent_estimate_of_a_sound_gains_nothing() -> None:
    assert both_db(torch.zeros_like(TARGET), TARGET, TARGET + RIVAL)[0] == pytest.approx(0.0, abs=1e-4)


def test_silent_target_met_by_silence_is_0_db() -> None:
    silence = torch.zeros_like(TARGET)
    assert loss_db(silence, silence, TARGET + RIVAL) == pytest.approx(0.0, abs=1e-5)


def test_silent_target_answered_with_the_mixture_costs_30_db() -> None:
    mixture = TARGET + RIVAL
    assert loss_db(mixture, torch.zeros_like(mixture), mixture) == pytest.approx(30.0, abs=0.01)


def test_silent_target_is_dearer_the_more_leaks() -> None:
    mixture = TARGET + RIVAL
    leaks_db = (0, -10, -20, -30)
    costs = [loss_db(10 ** (leak / 20) * mixture, torch.zeros_like(mixture), mixture) for leak in leaks_db]
    assert costs == pytest.approx([30.0, 20.04, 10.41, 3.01], abs=0.02)


def test_snr_weighs_nine_times_si_snr() -> None:
    """At half the gain the two differ: 5.6 dB against the noise, 6.0 of which are the gain's."""
    estimate, mixture = 0.5 * (TARGET + 0.1 * NOISE), TARGET + RIVAL
    snr_db, si_snr_db = both_db(estimate, TARGET, mixture)
    assert snr_db == pytest.approx(10 * math.log10(1.002 / (0.25 + 0.0025 + 0.002)), abs=0.01)
    assert si_snr_db == pytest.approx(10 * math.log10((0.25 + 0.002) / (0.0025 + 0.002)), abs=0.01)
    assert loss_db(estimate, TARGET, mixture) == pytest.approx(-0.9 * snr_db - 0.1 * si_snr_db, abs=1e-4)


def test_a_batch_is_the_mean_of_its_rows() -> None:
    silence, mixture = torch.zeros_like(TARGET), TARGET + RIVAL
    rows = [(TARGET + 0.3 * NOISE, TARGET, mixture), (0.2 * mixture, silence, mixture), (NOISE, RIVAL, mixture)]
    estimate, reference, mixtures = (batch(*column) for column in zip(*rows, strict=True))
    together = float(clearsep_loss(estimate=estimate, reference=reference, mixture=mixtures))
    assert together == pytest.approx(sum(loss_db(*row) for row in rows) / 3, abs=1e-4)


@pytest.mark.parametrize("gain", [1e-3, 0.1, 10.0])
def test_loudness_of_the_recording_does_not_matter(gain: float) -> None:
    signals = (TARGET + 0.3 * NOISE, TARGET, TARGET + RIVAL)
    assert loss_db(*(gain * signal for signal in signals)) == pytest.approx(loss_db(*signals), abs=0.01)


@pytest.mark.parametrize("gain", [0.7, 2.0])
def test_si_snr_forgives_gain_and_snr_does_not(gain: float) -> None:
    estimate, mixture = TARGET + 10**-0.5 * NOISE, TARGET + RIVAL
    plain, scaled = both_db(estimate, TARGET, mixture), both_db(gain * estimate, TARGET, mixture)
    assert scaled[1] == pytest.approx(plain[1], abs=0.1)
    assert scaled[0] < plain[0] - 0.9


def test_loss_falls_as_the_estimate_nears_the_target() -> None:
    mixture = TARGET + RIVAL
    costs = [loss_db(TARGET + leak * RIVAL, TARGET, mixture) for leak in (1.0, 0.5, 0.2, 0.1, 0.0)]
    assert costs == sorted(costs, reverse=True)


SILENCE = torch.zeros(NUM_SAMPLES)


@pytest.mark.parametrize(
    ("estimate", "reference", "mixture"),
    [
        (SILENCE, SILENCE, SILENCE),
        (1e-6 * NOISE, SILENCE, SILENCE),
        (SILENCE, SILENCE, TARGET),
        (SILENCE, TARGET, TARGET),
        (TARGET, TARGET, TARGET),
        (TARGET, SILENCE, TARGET),
        (NOISE, TARGET, TARGET + NOISE),
        (-TARGET, TARGET, TARGET),
        (1e-20 * TARGET, 1e-20 * TARGET, 1e-20 * TARGET),
        (1e4 * TARGET, 1e4 * NOISE, 1e4 * (TARGET + NOISE)),
    ],
    ids=["all-zero", "quiet-in-silence", "silent-target-met", "silent-estimate", "perfect", "silent-target-missed",
         "orthogonal", "inverted", "denormal", "loud"],
)  # fmt: skip
def test_value_and_gradient_are_finite(estimate: Tensor, reference: Tensor, mixture: Tensor) -> None:
    estimate_BT = batch(estimate, estimate).requires_grad_()
    loss = clearsep_loss(estimate=estimate_BT, reference=batch(reference, SILENCE), mixture=batch(mixture, mixture))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(estimate_BT.grad).all()


def test_gradient_of_a_silent_target_pulls_towards_silence() -> None:
    estimate_BT = batch(0.1 * TARGET).requires_grad_()
    clearsep_loss(estimate=estimate_BT, reference=batch(SILENCE), mixture=batch(TARGET + RIVAL)).backward()
    direction = torch.nn.functional.cosine_similarity(estimate_BT.grad[0], TARGET, dim=0)
    assert float(direction) == pytest.approx(1.0, abs=1e-4)


def _signals() -> dict[str, Tensor]:
    mixture = TARGET + RIVAL
    return {
        "estimate": batch(TARGET + 0.3 * NOISE, NOISE, 0.9 * TARGET),
        "reference": batch(TARGET, RIVAL, torch.zeros_like(TARGET)),
        "mixture": batch(mixture, mixture, mixture),
    }


def test_weights_of_1_change_nothing_to_the_bit() -> None:
    assert torch.equal(clearsep_loss(**_signals(), weight=torch.ones(3)), clearsep_loss(**_signals()))


def test_a_weighted_loss_is_the_weighted_mean_of_the_rows() -> None:
    losses_B = clearsep_losses(**_signals())
    weighted = clearsep_loss(**_signals(), weight=torch.tensor([0.0, 1.0, 2.0]))
    assert float(weighted) == pytest.approx(float(losses_B[1] + 2 * losses_B[2]) / 3, abs=1e-4)
    signals = _signals() | {"estimate": _signals()["estimate"].requires_grad_()}
    clearsep_loss(**signals, weight=torch.tensor([0.0, 1.0, 2.0])).backward()
    assert signals["estimate"].grad.abs().amax(1)[0] == 0.0
    assert signals["estimate"].grad.abs().amax(1)[1:].min() > 0.0
