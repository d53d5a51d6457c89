"""Sharing a clip out among its stems: known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.scoring.metrics import si_sdr_db, snr_db
from engine.scoring.sharing import share_mixture
from tests.support.signals import RATE_HZ, band_noise, mixture, tone


def _share(mixture_T: np.ndarray, *stems_T: np.ndarray) -> torch.Tensor:
    stems_ST = torch.from_numpy(np.stack(stems_T))
    return share_mixture(mixture_T=torch.from_numpy(mixture_T), stems_ST=stems_ST, sample_rate_hz=RATE_HZ)


def _apart() -> tuple[np.ndarray, np.ndarray]:
    """Two bands with a gap between them that is wider than the window's main lobe, so that no point holds both."""
    low_T = band_noise(2 * RATE_HZ, low_hz=50.0, high_hz=800.0, seed=0)
    return low_T, band_noise(2 * RATE_HZ, low_hz=1200.0, high_hz=3500.0, seed=1)


def test_the_shares_add_up_to_the_mixture_whatever_the_stems() -> None:
    mix_T = mixture(2 * RATE_HZ)
    noise = np.random.default_rng(0).normal(0.0, 0.1, (3, len(mix_T))).astype(np.float32)
    shares_ST = _share(mix_T, *noise)
    assert snr_db(estimate=shares_ST.sum(0), reference=torch.from_numpy(mix_T)) > 90.0


def test_true_stems_of_disjoint_bands_stay_what_they_are() -> None:
    low_T, high_T = _apart()
    shares_ST = _share(low_T + high_T, low_T, high_T)
    reference_ST = torch.from_numpy(np.stack([low_T, high_T]))
    assert snr_db(estimate=shares_ST, reference=reference_ST).min() > 30.0


def test_a_leak_of_minus_6_db_is_reduced_to_the_ratio_of_the_magnitudes() -> None:
    """Each stem holds the other at half its level: where one sounds, it gets 1 / (1 + 1/2) = 2/3 and the other 1/3."""
    low_T, high_T = tone(500.0, 2.0), tone(2000.0, 2.0)
    shares_ST = _share(low_T + high_T, low_T + 0.5 * high_T, high_T + 0.5 * low_T)
    expected_ST = torch.from_numpy(np.stack([2 * low_T + high_T, 2 * high_T + low_T]) / 3.0)
    assert snr_db(estimate=shares_ST, reference=expected_ST).min() > 25.0


def test_what_no_query_took_goes_to_the_stem_that_is_there() -> None:
    """The teacher lost half of the level of both; the shares have it again."""
    low_T, high_T = _apart()
    shares_ST = _share(low_T + high_T, 0.5 * low_T, 0.5 * high_T)
    reference_ST = torch.from_numpy(np.stack([low_T, high_T]))
    assert snr_db(estimate=0.5 * reference_ST, reference=reference_ST).max() == pytest.approx(6.02, abs=0.01)
    assert snr_db(estimate=shares_ST, reference=reference_ST).min() > 30.0
    assert si_sdr_db(estimate=shares_ST, reference=reference_ST).min() > 30.0


def test_silent_stems_and_a_silent_mixture_are_shared_evenly() -> None:
    mix_T = mixture(RATE_HZ)
    silence = np.zeros_like(mix_T)
    shares_ST = _share(mix_T, silence, silence)
    assert snr_db(estimate=shares_ST[0], reference=0.5 * torch.from_numpy(mix_T)) > 60.0
    assert _share(silence, mix_T, mix_T).abs().max() == 0.0
