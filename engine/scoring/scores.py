"""Stems → score columns: one row of `schema.SCORES` for every stem, whatever its worth.

Shape suffixes: B clips, S stems of a clip, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.schema import SCORES
from engine.scoring import metrics, spectra
from engine.scoring.energies import peak

Scores = dict[str, float | None]
_SAMPLES_AT_ONCE = 2**18  # of stems, on a CPU: what one step leaves is still in cache for the next


def score_clip(*, mixture_T: Tensor, stems_ST: Tensor, sample_rate_hz: int) -> list[Scores]:
    """Scores of one clip, one dict per stem: `score_batch` of this clip alone."""
    (rows,) = score_batch(mixtures_BT=mixture_T[None], stems_BST=stems_ST[None], sample_rate_hz=sample_rate_hz)
    return rows


@torch.no_grad()
def score_batch(*, mixtures_BT: Tensor, stems_BST: Tensor, sample_rate_hz: int) -> list[list[Scores]]:
    """Scores of clips of one length: per clip, one dict per stem with exactly the names in `schema.SCORES`.

    Values are those of the float32 columns, so a threshold decides the same before and after a write. A clip
    with one stem has no coherence and nothing contested: None. What takes a separator
    or a tagger is None too. Raises ValueError where the shapes do not agree or are empty, or where a mixture or stem
    has a sample that is not finite, naming the first.
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
    columns: dict[str, Tensor | None] = {
        "re_sdr_db": re_sdr_db,
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
    return _rows(dict.fromkeys(SCORES.names) | columns, num_stems=stems_BST.shape[1])


def _rows(columns: dict[str, Tensor | None], *, num_stems: int) -> list[list[Scores]]:
    """Columns of shape [B] (repeated on each stem), [B, S] or None, turned into dicts."""
    lists = {name: _as_float32_lists(values, num_stems) for name, values in columns.items()}
    num_clips = max(len(values) for values in lists.values() if values is not None)
    return [
        [
            {name: None if values is None else values[clip][stem] for name, values in lists.items()}
            for stem in range(num_stems)
        ]
        for clip in range(num_clips)
    ]


def _as_float32_lists(values: Tensor | None, num_stems: int) -> list[list[float]] | None:
    if values is None:
        return None
    values_BS = values if values.ndim == 2 else values[:, None].expand(-1, num_stems)
    rows: list[list[float]] = values_BS.to(torch.float32).tolist()
    return rows


def _check_shapes(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    agree = stems_BST.ndim == 3 and mixtures_BT.shape == (stems_BST.shape[0], stems_BST.shape[2])
    if not agree or stems_BST.numel() == 0:
        raise ValueError(
            "each clip needs one mixture and at least one stem, all of one length of at least 1 sample: "
            f"pass [B, T] and [B, S, T], got {tuple(mixtures_BT.shape)} and {tuple(stems_BST.shape)}"
        )


def _check_finite(mixtures_BT: Tensor, stems_BST: Tensor) -> None:
    if torch.isfinite(stems_BST.sum() + mixtures_BT.sum()):  # at a fraction of the time
        return
    bad_BS = ~torch.isfinite(peak(stems_BST)[..., 0])  # NaN outranks every magnitude
    bad_B = ~torch.isfinite(peak(mixtures_BT)[..., 0])
    if bad_B.any():
        culprit = f"the mixture of clip {int(bad_B.nonzero()[0])}"
    elif bad_BS.any():
        clip, stem = bad_BS.nonzero()[0].tolist()
        culprit = f"stem {stem} of clip {clip}"
    else:
        return
    raise ValueError(f"every sample must be finite, but {culprit} has NaN or infinity; record it as a failure")
