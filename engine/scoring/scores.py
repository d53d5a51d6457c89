"""The scores of every stem that need only its clip: one row of `schema.SCORES` per stem.

Shape suffixes: B clips, S stems of a clip, T samples, N scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.schema import SCORES
from engine.scoring import metrics, spectra
from engine.scoring.energies import is_on_cpu, peak

Scores = dict[str, float | None]
"""Values of columns of `schema.SCORES` for one stem; None if undefined."""
_NAMES = (
    "re_sdr_db",
    "re_si_sdr_db",
    "remix_snr_db",
    "stem_level_db",
    "active_fraction",
    "coherence_fraction",
    "mixture_coherence_fraction",
    "mask_snr_db",
    "share_si_sdr_db",
    "contested_db",
)
_ALWAYS_DEFINED = _NAMES.index("re_si_sdr_db")
SAMPLES_AT_ONCE_ON_GPU = 2**23
"""Samples of stems on a GPU; their spectra take some 300 bytes a sample."""
_SAMPLES_AT_ONCE = 2**18  # of stems on a CPU, so that the results of one step are still in cache for the next


def score_clip(*, mixture_T: Tensor, stems_ST: Tensor, sample_rate_hz: int) -> list[Scores]:
    """Scores of each stem of one clip; see `score_batch`."""
    (rows,) = score_batch(mixtures_BT=mixture_T[None], stems_BST=stems_ST[None], sample_rate_hz=sample_rate_hz)
    return rows


@torch.no_grad()
def score_batch(*, mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> list[list[Scores]]:
    """Scores of clips of one length: for each clip a list of its stems' scores, with every name in `schema.SCORES`.

    Values are rounded to float32 like the columns, so that thresholds decide the same before and after a write.
    Coherence and contested energy are None for the only stem of a clip, Re-SDR is None for a clip with fewer samples
    than its filter has taps, and scores that need a separator or a tagger are None. Raises ValueError if shapes differ
    or are empty, or if a sample is not finite.
    """
    values = score_values(mixtures_BT=mixtures_BT, stems_BST=stems_BST, sample_rate_hz=sample_rate_hz)
    rows = [score_rows(stems) for stems in values.tolist()]
    if not all(rows):
        _check_finite(mixtures_BT, stems_BST)
    return rows


@torch.no_grad()
def score_values(*, mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> Tensor:
    """The same as values [B, S, N] for :func:`score_rows`, in float32 on the device, which is not waited for.

    An undefined score is NaN, and so are all scores of a clip with a sample that is not finite.
    """
    _check_shapes(mixtures_BT, stems_BST)
    at_once = _SAMPLES_AT_ONCE if is_on_cpu(stems_BST) else SAMPLES_AT_ONCE_ON_GPU
    num_clips = max(1, at_once // stems_BST[0].numel())
    parts = zip(torch.split(mixtures_BT, num_clips), torch.split(stems_BST, num_clips), strict=True)
    return torch.cat([_scored(mixtures, stems, sample_rate_hz) for mixtures, stems in parts])


def score_rows(values_SN: list[list[float]]) -> list[Scores]:
    """The scores of each stem of a clip from its values; none for a clip with a sample that is not finite."""
    if any(math.isnan(values[_ALWAYS_DEFINED]) for values in values_SN):
        return []
    others = dict.fromkeys(SCORES.names)
    return [
        others | {name: None if math.isnan(value) else value for name, value in zip(_NAMES, values, strict=True)}
        for values in values_SN
    ]


def _scored(mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> Tensor:
    clips = spectra.Spectra.of(stems_BST=stems_BST, mixture_BT=mixtures_BT, sample_rate_hz=sample_rate_hz)
    remix_scores = metrics.remix_scores_db(stems_BST=stems_BST, mixture_BT=mixtures_BT)
    re_sdr_db, re_si_sdr_db, remix_snr_db = (value_B[:, None] for value_B in remix_scores)
    has_re_sdr = mixtures_BT.shape[-1] >= metrics.FILTER_LENGTH  # the filter makes anything of fewer samples
    columns = (  # in the order of _NAMES, [B, S], or [B, 1] for the same of each stem
        re_sdr_db if has_re_sdr else None,
        re_si_sdr_db,
        remix_snr_db,
        metrics.level_db(signal=stems_BST, reference=mixtures_BT[:, None]),
        metrics.active_fraction(stems_BST, sample_rate_hz=sample_rate_hz),
        spectra.coherence_fraction(clips),
        spectra.mixture_coherence_fraction(clips),
        spectra.mask_snr_db(clips),
        spectra.share_si_sdr_db(clips),
        spectra.contested_db(clips) if stems_BST.shape[1] > 1 else None,
    )
    undefined = re_si_sdr_db.new_full((), math.nan)
    shape = stems_BST.shape[:2]
    values_BSN = torch.stack([(undefined if one is None else one).float().expand(shape) for one in columns], -1)
    peak_B = torch.maximum(peak(mixtures_BT)[..., 0], peak(stems_BST).amax((-2, -1)))
    return values_BSN.masked_fill(~torch.isfinite(peak_B)[:, None, None], math.nan)


def _check_shapes(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    agree = stems_BST.ndim == 3 and mixtures_BT.shape == (stems_BST.shape[0], stems_BST.shape[2])
    if not agree or stems_BST.numel() == 0:
        raise ValueError(
            "mixtures and stems must have shapes [B, T] and [B, S, T] with at least 1 stem and 1 sample, "
            f"got {tuple(mixtures_BT.shape)} and {tuple(stems_BST.shape)}; give each clip a mixture of its length"
        )


def _check_finite(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    for signal, samples in (("the mixture of clip {}", mixtures_BT), ("stem {1} of clip {0}", stems_BST)):
        bad = (~torch.isfinite(peak(samples)[..., 0])).nonzero().tolist()  # the peak of a signal with NaN is NaN
        if bad:
            where = signal.format(*bad[0])
            raise ValueError(f"every sample must be finite, got NaN or infinity in {where}; record it as a failure")
