"""Known answers in dB: closed forms, two independent implementations, invariances, ClearSep's blind spots."""

import fast_bss_eval
import numpy as np
import pytest
import torch
from mir_eval.separation import bss_eval_sources
from scipy.signal import lfilter
from torch import Tensor

from engine.scoring import bss_eval, metrics

RATE_HZ = 16_000
METRICS = [metrics.snr_db, metrics.si_sdr_db, metrics.bss_sdr_db]
REMIX_METRICS = [metrics.re_sdr_db, metrics.re_si_sdr_db, metrics.remix_snr_db]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def band(low_hz: float, high_hz: float, *, seed: int, num_samples: int = 2 * RATE_HZ) -> Tensor:
    """Noise in one band, of energy 1."""
    spectrum = torch.fft.rfft(noise(num_samples, seed=seed))
    hz = torch.fft.rfftfreq(num_samples, 1 / RATE_HZ)
    signal = torch.fft.irfft(torch.where((hz >= low_hz) & (hz < high_hz), spectrum, 0), num_samples)
    return signal / signal.norm()


def tone(hz: float, num_samples: int = 2 * RATE_HZ) -> Tensor:
    return torch.sin(2 * torch.pi * hz / RATE_HZ * torch.arange(num_samples, dtype=torch.float64))


def filtered_pairs(num_samples: int = 8000) -> tuple[Tensor, Tensor]:
    """Estimates and coloured references, [4, T]: the reference filtered, noise at 30, 10, 0 and -10 dB."""
    reference = torch.from_numpy(lfilter([1.0], [1.0, -0.7], noise(4, num_samples).numpy()))
    taps = noise(40, seed=1).numpy() * np.exp(-np.arange(40) / 8)
    image = torch.from_numpy(lfilter(taps, [1.0], reference.numpy()))
    gain = 10 ** (-torch.tensor([[30.0], [10.0], [0.0], [-10.0]], dtype=torch.float64) / 20)
    rest = noise(4, num_samples, seed=2)
    return image + gain * rest * image.norm(dim=-1, keepdim=True) / rest.norm(dim=-1, keepdim=True), reference


def close(actual: Tensor, expected: object, tolerance_db: float = 1e-3) -> bool:
    return actual.tolist() == pytest.approx(torch.as_tensor(expected).tolist(), abs=tolerance_db)


@pytest.mark.parametrize(("expected_db", "tolerance_db"), [(10, 1e-9), (25, 1e-9), (80, 1e-6), (98, 1e-4)])
def test_orthogonal_noise_gives_its_level(expected_db: float, tolerance_db: float) -> None:
    """As far as float64 goes: 1e-15 of the larger energy is 4e-7 dB of what lies 80 dB below, 3e-5 dB at 98 dB."""
    reference, rest = torch.zeros(2, 3000, dtype=torch.float64)
    reference[:1000], rest[2000:] = noise(2, 1000)  # further apart than 512 taps reach
    estimate = reference + rest * reference.norm() / rest.norm() * 10 ** (-expected_db / 20)
    assert close(metrics.snr_db(estimate=estimate, reference=reference), expected_db, tolerance_db)
    assert close(metrics.si_sdr_db(estimate=-3 * estimate, reference=reference), expected_db, tolerance_db)
    assert close(metrics.bss_sdr_db(estimate=0.2 * estimate, reference=reference), expected_db, tolerance_db)


def test_level_is_the_energy_ratio() -> None:
    reference, silence = noise(1000), torch.zeros(1000)
    gains = torch.tensor([[1.0], [0.1], [10.0], [-0.5]], dtype=torch.float64)
    assert close(metrics.level_db(signal=gains * reference, reference=reference), [0, -20, 20, -6.0206])
    assert metrics.level_db(signal=silence, reference=reference) == -100
    assert metrics.level_db(signal=silence, reference=silence) == -100
    assert metrics.level_db(signal=reference, reference=silence) == 100


@pytest.mark.filterwarnings("ignore:mir_eval")
def test_agrees_with_fast_bss_eval_and_mir_eval() -> None:
    estimate, reference = filtered_pairs()
    pairs = [(r[None], e[None]) for e, r in zip(estimate, reference, strict=True)]  # both take the reference first
    sdr_db = metrics.bss_sdr_db(estimate=estimate, reference=reference)
    assert close(sdr_db, torch.cat([fast_bss_eval.sdr(*pair) for pair in pairs]))
    assert close(sdr_db, [bss_eval_sources(*map(np.asarray, pair), False)[0][0] for pair in pairs])
    si_sdr_db = metrics.si_sdr_db(estimate=estimate, reference=reference)
    assert close(si_sdr_db, torch.cat([fast_bss_eval.si_sdr(*pair) for pair in pairs]))


@pytest.mark.parametrize("num_samples", [1, 2, 100, 511, 512, 513, 3585, 3586])
def test_blocks_agree_with_least_squares_at_every_length(num_samples: int) -> None:
    """The projection computed from the definition, for lengths below the filter's and at a block's edge."""
    length = 64
    estimate, reference = noise(2, num_samples)
    shifts = torch.stack([torch.nn.functional.pad(reference, (lag, length - 1 - lag)) for lag in range(length)])
    padded = torch.nn.functional.pad(estimate, (0, length - 1))
    target = torch.linalg.lstsq(shifts.T, padded[:, None]).solution[:, 0] @ shifts
    expected = metrics.snr_db(estimate=padded, reference=target)  # |target|² / |target - estimate|²
    assert close(metrics.bss_sdr_db(estimate=estimate, reference=reference, filter_length=length), expected, 1e-6)


# ClearSep's remix metrics and what they do not see: the toy table of two sources in disjoint bands

LOW, HIGH = band(200, 2000, seed=1), band(2500, 6000, seed=2)
MIXTURE, ARTEFACT = LOW + HIGH, band(200, 6000, seed=4)
REST = 0.1 * torch.nn.functional.normalize(noise(2, 2 * RATE_HZ, seed=3), dim=-1)
LATE_LOW, LATE_HIGH = torch.nn.functional.pad(torch.stack([LOW, HIGH]), (32, -32))  # 2 ms
PERFECT = (90, 100)
TOY = {  # stems, then the ranges of Re-SDR, Re-SISDR and remix SNR
    "oracle": (LOW, HIGH, PERFECT, PERFECT, PERFECT),
    "mixture and silence": (MIXTURE, 0 * MIXTURE, PERFECT, PERFECT, PERFECT),
    "mixture halved": (MIXTURE / 2, MIXTURE / 2, PERFECT, PERFECT, PERFECT),
    "labels swapped": (HIGH, LOW, PERFECT, PERFECT, PERFECT),
    "artefacts that cancel": (LOW + ARTEFACT, HIGH - ARTEFACT, PERFECT, PERFECT, PERFECT),
    "leak at -6 dB": (0.5 * LOW + 0.5 * HIGH, 0.5 * HIGH + 0.5 * LOW, PERFECT, PERFECT, PERFECT),
    "x0.3": (0.3 * LOW, 0.3 * HIGH, PERFECT, PERFECT, (3.09, 3.11)),  # 20 log10(1 / 0.7)
    "late by 2 ms": (LATE_LOW, LATE_HIGH, (25, 45), (-100, -10), (-4, -2)),
    "one source absent": (LOW, 0 * HIGH, (10, 100), (-0.1, 0.1), (2.9, 3.1)),
    "noise at -20 dB": (LOW + REST[0], HIGH + REST[1], (19.5, 20.5), (19.5, 20.5), (19.5, 20.5)),
}


@pytest.mark.parametrize("row", TOY.values(), ids=TOY.keys())
def test_toy_table(row) -> None:
    first, second, *ranges = row
    for metric, (least, most) in zip(REMIX_METRICS, ranges, strict=True):
        assert least <= metric(stems_BST=torch.stack([first, second]), mixture_BT=MIXTURE) <= most


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gain", [1e-150, -1.0, 1e150])
def test_scale(metric, gain: float) -> None:
    estimate, reference = filtered_pairs(2000)
    expected = metric(estimate=estimate, reference=reference)
    assert close(metric(estimate=gain * estimate, reference=gain * reference), expected, 1e-6)
    if metric is not metrics.snr_db:
        assert close(metric(estimate=gain * estimate, reference=reference), expected, 1e-6)


def test_bss_sdr_ignores_any_filter_of_512_taps_and_no_longer_one() -> None:
    reference = torch.nn.functional.pad(noise(4000), (0, 600))
    taps = noise(512, seed=1).numpy()
    image = torch.from_numpy(lfilter(taps, [1.0], reference.numpy()))
    assert metrics.bss_sdr_db(estimate=image, reference=reference) >= 90
    assert metrics.si_sdr_db(estimate=image, reference=reference) < 0
    assert metrics.bss_sdr_db(estimate=reference.roll(511), reference=reference) >= 90
    assert metrics.bss_sdr_db(estimate=reference.roll(512), reference=reference) < 0


def test_remix_scores_are_the_remix_metrics() -> None:
    clip = {"stems_BST": noise(2, 3, 2000), "mixture_BT": noise(2, 2000, seed=1)}
    for scores_B, metric in zip(metrics.remix_scores_db(**clip), REMIX_METRICS, strict=True):
        assert close(scores_B, metric(**clip), 1e-12)


@pytest.mark.parametrize("sdr_db", [0, 60, 90])
@pytest.mark.parametrize("pole", [0.0, 0.9, 0.999])
def test_bss_sdr_from_correlations_is_that_of_the_filtered_reference(monkeypatch, sdr_db: int, pole: float) -> None:
    """Also if the filter is long and large; the bands of a reference differ by up to 60 dB."""
    reference = torch.from_numpy(lfilter([1.0], [1.0, -pole], noise(4, 8000).numpy()))
    taps = noise(300, seed=1).numpy() * np.exp(-np.arange(300) / 60)
    image, rest = torch.from_numpy(lfilter(taps, [1.0], reference.numpy())), noise(4, 8000, seed=2)
    estimate = image + 10 ** (-sdr_db / 20) * rest * image.norm() / rest.norm()
    quick_db = metrics.bss_sdr_db(estimate=estimate, reference=reference)
    monkeypatch.setattr(bss_eval, "_WORST_ERROR", 0.0)  # always by filtering
    assert close(quick_db, metrics.bss_sdr_db(estimate=estimate, reference=reference))


def test_remix_metrics_ignore_the_order_of_the_stems() -> None:
    stems, mixture = noise(2, 3, 2000), noise(2, 2000, seed=1)
    for metric in REMIX_METRICS:
        expected = metric(stems_BST=stems, mixture_BT=mixture)
        assert close(metric(stems_BST=stems[:, [2, 0, 1]], mixture_BT=mixture), expected, 1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_batched_equals_one_by_one(metric) -> None:
    estimate, reference = filtered_pairs(2000)
    reference[1] = 0  # one that is singular among some that are not
    estimate[2] = reference[2] = tone(1000, 2000)
    expected = torch.stack([metric(estimate=e, reference=r) for e, r in zip(estimate, reference, strict=True)])
    assert close(metric(estimate=estimate, reference=reference), expected, 1e-9)
    crossed = metric(estimate=estimate[:, None], reference=reference)
    assert close(crossed.diagonal(), expected, 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", METRICS)
def test_same_on_cuda(metric) -> None:
    estimate, reference = filtered_pairs(2000)
    actual = metric(estimate=estimate.cuda(), reference=reference.cuda()).cpu()
    assert close(actual, metric(estimate=estimate, reference=reference), 1e-6)


@pytest.mark.parametrize("num_samples", [1, 2, 100, 4000])
@pytest.mark.parametrize("metric", METRICS)
def test_silence_and_short_clips(metric, num_samples: int) -> None:
    signal, silence = noise(num_samples), torch.zeros(num_samples)
    assert metric(estimate=signal, reference=signal) == 100
    assert metric(estimate=signal, reference=silence) == -100
    assert metric(estimate=silence, reference=silence) == -100
    assert metric(estimate=silence, reference=signal) == (0 if metric is metrics.snr_db else -100)


SMOOTH = tone(50, 8000) * torch.hann_window(8000, dtype=torch.float64) ** 4  # normal equations of rank 10 or so


@pytest.mark.parametrize("reference", [tone(1000), tone(0) + 1, LOW, SMOOTH, torch.eye(1, 4000)[0]])
def test_bss_sdr_where_the_filter_is_undetermined(reference: Tensor) -> None:
    rest = noise(reference.shape[-1]) * 0.1 * reference.square().mean().sqrt()
    assert metrics.bss_sdr_db(estimate=reference, reference=reference) >= 90
    assert 19 < metrics.bss_sdr_db(estimate=reference + rest, reference=reference) < 25
    assert metrics.bss_sdr_db(estimate=rest, reference=reference) < 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lengths", [(10, 9), (1, 10), (0, 0)])
def test_lengths_that_differ_or_are_zero_raise(metric, lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got .{lengths[0]}, {lengths[1]}"):
        metric(estimate=torch.zeros(lengths[0]), reference=torch.zeros(lengths[1]))


def test_filter_without_taps_and_rate_of_zero_raise() -> None:
    with pytest.raises(ValueError, match="filter_length must be at least 1 sample, got 0"):
        metrics.bss_sdr_db(estimate=noise(10), reference=noise(10), filter_length=0)


@pytest.mark.parametrize("gain", [1.0, -1e-12, 1e12])
@pytest.mark.parametrize(("sounding", "expected"), [([3], 0.1), ([0, 1, 9], 0.3), (range(10), 1.0), ([], 0.0)])
def test_active_fraction_is_the_fraction_of_windows_with_sound(
    sounding: list[int], expected: float, gain: float
) -> None:
    signal = torch.zeros(10, RATE_HZ // 10, dtype=torch.float64)
    signal[list(sounding)] = tone(440, RATE_HZ // 10)
    assert float(metrics.active_fraction(gain * signal.flatten(), sample_rate_hz=RATE_HZ)) == expected


@pytest.mark.parametrize(("quiet_db", "expected"), [(-39.0, 1.0), (-41.0, 0.5)])
def test_windows_within_40_db_of_the_loudest_are_active(quiet_db: float, expected: float) -> None:
    loud = tone(500, RATE_HZ)
    signal = torch.cat([loud, 10 ** (quiet_db / 20) * loud])
    assert float(metrics.active_fraction(signal, sample_rate_hz=RATE_HZ)) == expected


def test_active_fraction_is_batched_and_defined_for_clips_under_a_window() -> None:
    signals = torch.stack([tone(440, 100), torch.zeros(100, dtype=torch.float64)])
    assert metrics.active_fraction(signals, sample_rate_hz=RATE_HZ).tolist() == [1, 0]
    assert metrics.active_fraction(signals[:, 1:2], sample_rate_hz=RATE_HZ).tolist() == [1, 0]
