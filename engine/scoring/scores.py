"""The scores of every stem that need only its clip: one row of `schema.SCORES` per stem.

Shape suffixes: B clips, S stems of a clip, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.schema import SCORES
from engine.scoring import metrics, spectra
from engine.scoring.energies import peak

Scores = dict[str, float | None]
"""Values of columns of `schema.SCORES` for one stem; None if undefined."""
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
    _check_shapes(mixtures_BT, stems_BST)
    _check_finite(mixtures_BT, stems_BST)
    num_clips = max(1, _SAMPLES_AT_ONCE // stems_BST[0].numel()) if stems_BST.device.type == "cpu" else len(stems_BST)
    return [
        rows
        for mixtures, stems in zip(torch.split(mixtures_BT, num_clips), torch.split(stems_BST, num_clips), strict=True)
        for rows in _scored(mixtures, stems, sample_rate_hz)
    ]


def _scored(mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> list[list[Scores]]:
    clips = spectra.Spectra.of(stems_BST=stems_BST, mixture_BT=mixtures_BT, sample_rate_hz=sample_rate_hz)
    re_sdr_db, re_si_sdr_db, remix_snr_db = metrics.remix_scores_db(stems_BST=stems_BST, mixture_BT=mixtures_BT)
    has_re_sdr = mixtures_BT.shape[-1] >= metrics.FILTER_LENGTH  # the filter makes anything of fewer samples
    columns: dict[str, Tensor | None] = {
        "re_sdr_db": re_sdr_db if has_re_sdr else None,
        "re_si_sdr_db": re_si_sdr_db,
        "remix_snr_db": remix_snr_db,
        "stem_level_db": metrics.level_db(signal=stems_BST, reference=mixtures_BT[:, None]),
        "active_fraction": metrics.active_fraction(stems_BST, sample_rate_hz=sample_rate_hz),
        "coherence_fraction": spectra.coherence_fraction(clips),
        "mixture_coherence_fraction": spectra.mixture_coherence_fraction(clips),
        "mask_snr_db": spectra.mask_snr_db(clips),
        "share_si_sdr_db": spectra.share_si_sdr_db(clips),
        "contested_db": spectra.contested_db(clips) if stems_BST.shape[1] > 1 else None,
    }
    return _rows(dict.fromkeys(SCORES.names) | columns, stems_BST.shape)


def _rows(columns: dict[str, Tensor | None], shape: torch.Size) -> list[list[Scores]]:
    """Rows of columns, rounded to float32, with shape [B, S] or [B] (the same for each stem), or None."""
    num_clips, num_stems = shape[:2]
    lists = {
        name: None if values is None else values.float().view(num_clips, -1).expand(num_clips, num_stems).tolist()
        for name, values in columns.items()
    }
    return [
        [
            {name: None if values is None else values[clip][stem] for name, values in lists.items()}
            for stem in range(num_stems)
        ]
        for clip in range(num_clips)
    ]


def _check_shapes(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    agree = stems_BST.ndim == 3 and mixtures_BT.shape == (stems_BST.shape[0], stems_BST.shape[2])
    if not agree or stems_BST.numel() == 0:
        raise ValueError(
            "mixtures and stems must have shapes [B, T] and [B, S, T] with at least 1 stem and 1 sample, "
            f"got {tuple(mixtures_BT.shape)} and {tuple(stems_BST.shape)}; give each clip a mixture of its length"
        )


def _check_finite(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    if torch.isfinite(stems_BST.sum() + mixtures_BT.sum()):  # a quick check that most batches pass
        return
    for signal, samples in (("the mixture of clip {}", mixtures_BT), ("stem {1} of clip {0}", stems_BST)):
        bad = (~torch.isfinite(peak(samples)[..., 0])).nonzero().tolist()  # the peak of a signal with NaN is NaN
        if bad:
            where = signal.format(*bad[0])
            raise ValueError(f"every sample must be finite, got NaN or infinity in {where}; record it as a failure")
