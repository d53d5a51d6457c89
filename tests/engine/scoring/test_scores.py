"""Score columns: the schema's names, the metrics' values, a row per stem, errors that name the stem."""

import pytest
import torch
from torch import Tensor

from engine import schema
from engine.scoring import metrics, spectra
from engine.scoring import scores as score

RATE_HZ = 16_000
BY_MODEL = dict.fromkeys(("cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db"))
"""Scores that need a separator or a tagger."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_have_the_names_of_the_schema_and_the_values_of_the_metrics() -> None:
    stems, mixture = noise(3, RATE_HZ), noise(RATE_HZ, seed=1)
    rows = score.score_clip(mixture_T=mixture, stems_ST=stems, sample_rate_hz=RATE_HZ)
    clip = {"stems_BST": stems, "mixture_BT": mixture}
    looked_at = spectra.Spectra.of(**clip, sample_rate_hz=RATE_HZ)
    by_spectra = ("coherence_fraction", "mixture_coherence_fraction", "mask_snr_db", "share_si_sdr_db", "contested_db")
    assert len(rows) == 3
    for index, row in enumerate(rows):
        assert list(row) == schema.SCORES.names
        assert {name: row.pop(name) for name in BY_MODEL} == BY_MODEL
        assert row == pytest.approx(
            {
                "re_sdr_db": float(metrics.re_sdr_db(**clip)),
                "re_si_sdr_db": float(metrics.re_si_sdr_db(**clip)),
                "remix_snr_db": float(metrics.remix_snr_db(**clip)),
                "stem_level_db": float(metrics.level_db(signal=stems[index], reference=mixture)),
                "active_fraction": float(metrics.active_fraction(stems[index], sample_rate_hz=RATE_HZ)),
                **{name: float(getattr(spectra, name)(looked_at)[index]) for name in by_spectra},
            },
            rel=1e-6,
        )


def test_values_are_rounded_to_float32() -> None:
    rows = score.score_clip(mixture_T=noise(500), stems_ST=noise(2, 500, seed=1), sample_rate_hz=RATE_HZ)
    table = schema.pa.Table.from_pylist(rows, schema=schema.SCORES)
    assert table.to_pylist() == rows


def test_perfect_stems() -> None:
    stems = noise(2, RATE_HZ)
    rows = score.score_clip(mixture_T=stems.double().sum(0), stems_ST=stems, sample_rate_hz=RATE_HZ)
    for row in rows:
        assert row["re_sdr_db"] == row["re_si_sdr_db"] == row["remix_snr_db"] == 100
        assert row["stem_level_db"] == pytest.approx(-3, abs=0.2)
        assert row["coherence_fraction"] == pytest.approx(0.9 / 31**0.5, abs=0.03)  # of independent noise


def test_only_coherence_shows_a_halved_mixture() -> None:
    mixture = noise(RATE_HZ)
    rows = score.score_clip(mixture_T=mixture, stems_ST=torch.stack([mixture, mixture]) / 2, sample_rate_hz=RATE_HZ)
    assert [row["remix_snr_db"] for row in rows] == [100, 100]
    assert [row["coherence_fraction"] for row in rows] == [1, 1]
    assert [row["stem_level_db"] for row in rows] == pytest.approx([-6.0206, -6.0206], abs=1e-3)


def test_the_level_shows_a_silent_stem() -> None:
    mixture = noise(RATE_HZ)
    stems = torch.stack([mixture, torch.zeros_like(mixture)])
    first, second = score.score_clip(mixture_T=mixture, stems_ST=stems, sample_rate_hz=RATE_HZ)
    assert [first["stem_level_db"], second["stem_level_db"]] == [0, -100]
    assert first["coherence_fraction"] == second["coherence_fraction"] == 0


def test_a_silent_clip_passes_nothing() -> None:
    (row,) = score.score_clip(mixture_T=torch.zeros(1000), stems_ST=torch.zeros(1, 1000), sample_rate_hz=RATE_HZ)
    assert row == BY_MODEL | {
        **dict.fromkeys(("re_sdr_db", "re_si_sdr_db", "remix_snr_db", "stem_level_db"), -100),
        **dict.fromkeys(("mask_snr_db", "share_si_sdr_db"), -100),
        **dict.fromkeys(("active_fraction", "mixture_coherence_fraction"), 0),
        **dict.fromkeys(("coherence_fraction", "contested_db")),
    }


def test_a_single_stem_has_no_coherence_and_nothing_contested() -> None:
    mixture = noise(1000)
    (row,) = score.score_clip(mixture_T=mixture, stems_ST=mixture[None], sample_rate_hz=RATE_HZ)
    assert row.pop("share_si_sdr_db") > 60  # in single precision
    assert row.pop("mixture_coherence_fraction") == pytest.approx(1, abs=1e-6)
    assert row == BY_MODEL | {
        **dict.fromkeys(("re_sdr_db", "re_si_sdr_db", "remix_snr_db", "mask_snr_db"), 100),
        **{"stem_level_db": 0, "active_fraction": 1, "coherence_fraction": None, "contested_db": None},
    }


@pytest.mark.parametrize(("num_samples", "is_defined"), [(1, False), (16, False), (511, False), (512, True)])
def test_re_sdr_is_undefined_for_fewer_samples_than_its_filter_has_taps(num_samples: int, is_defined: bool) -> None:
    clip = {"mixture_T": noise(num_samples), "stems_ST": noise(2, num_samples, seed=1)}
    rows = score.score_clip(**clip, sample_rate_hz=RATE_HZ)
    assert [row["re_sdr_db"] is not None for row in rows] == [is_defined] * 2
    assert all(row["remix_snr_db"] is not None for row in rows)


@pytest.mark.parametrize("num_samples", [1, 100, 5000])
@pytest.mark.parametrize("num_stems", [1, 3])
def test_batched_equals_one_by_one(num_samples: int, num_stems: int) -> None:
    mixtures, stems = noise(4, num_samples), noise(4, num_stems, num_samples, seed=1)
    stems[1] = 0
    mixtures[2] = 0
    batch = score.score_batch(mixtures_BT=mixtures, stems_BST=stems, sample_rate_hz=RATE_HZ)
    assert len(batch) == 4
    for mixture, stems_ST, rows in zip(mixtures, stems, batch, strict=True):
        alone = score.score_clip(mixture_T=mixture, stems_ST=stems_ST, sample_rate_hz=RATE_HZ)
        assert len(rows) == num_stems
        for row, expected in zip(rows, alone, strict=True):
            assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_samples_that_are_not_finite_raise_an_error_that_names_the_stem(value: float) -> None:
    mixtures, stems = noise(3, 50), noise(3, 2, 50)
    stems[2, 1, 7] = value
    with pytest.raises(ValueError, match="got NaN or infinity in stem 1 of clip 2"):
        score.score_batch(mixtures_BT=mixtures, stems_BST=stems, sample_rate_hz=RATE_HZ)
    mixtures[1, 49] = value
    with pytest.raises(ValueError, match="got NaN or infinity in the mixture of clip 1"):
        score.score_batch(mixtures_BT=mixtures, stems_BST=stems, sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    ("mixture", "stems"),
    [((10,), (2, 9)), ((10,), (0, 10)), ((0,), (2, 0)), ((10,), (10,)), ((2, 10), (2, 10))],
)
def test_shapes_that_differ_raise(mixture: tuple[int, ...], stems: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"must have shapes \[B, T\] and \[B, S, T\] with at least 1 stem and 1 sample, got"
    ):
        score.score_clip(mixture_T=torch.zeros(mixture), stems_ST=torch.zeros(stems), sample_rate_hz=RATE_HZ)
