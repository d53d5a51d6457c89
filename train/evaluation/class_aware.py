"""Class-aware, permutation-invariant SDR improvement (CAPI-SDRi): DCASE 2026's task 4 ranks systems by it.

Defined in "Class-aware permutation-invariant signal-to-distortion ratio for semantic segmentation of sound scene with
same-class sources" (arXiv 2601.22504) and by the task (arXiv 2604.00776, github.com/nttcslab/dcase2026_task4_baseline).
In words: of each label that is in a mixture or among the estimates, estimates are matched to sources so that the sum of
the SDR (plain SNR) of the matched pairs is highest. A matched source counts with its SDR minus that of the mixture, a
source without an estimate (false negative) and an estimate without a source (false positive) count with 0 dB. The
mixture's figure is the mean of these values over all its labels, the system's the mean over mixtures.

DCASE's systems name what they find. A separator with queries answers with one stem per label, so what counts as an
estimate is decided here by its level, and of two sources of one label one is always missed.

Shape legend: E estimates, N estimates and the mixture, P sources, T samples.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from engine.scoring.metrics import level_db, snr_db
from train.evaluation.figures import LabelMatch

ESTIMATE_LEVEL_DB = -30.0
"""A stem of a lower level, relative to the mixture, is no estimate: the separator says that the sound is absent."""


def match_sources(
    label: str, *, estimate_ET: Tensor, reference_PT: Tensor, mix_T: Tensor, sum_sdri_db: float | None = None
) -> LabelMatch:
    """Match the stems of one label to its sources; without sources, each stem that is an estimate is false.

    ``sum_sdri_db`` is kept if the label has several sources.
    """
    is_estimate_E = level_db(signal=estimate_ET, reference=mix_T.expand_as(estimate_ET)) >= ESTIMATE_LEVEL_DB
    found_ET, num_sources = estimate_ET[is_estimate_E], len(reference_PT)
    sdri_db: list[float] = []
    if num_sources:
        signals_NPT = torch.cat([found_ET, mix_T[None]])[:, None].expand(-1, num_sources, -1)
        sdr_NP = snr_db(estimate=signals_NPT, reference=reference_PT.expand_as(signals_NPT)).cpu()
        rows, columns = linear_sum_assignment(sdr_NP[:-1].numpy(), maximize=True)
        sdri_db = (sdr_NP[rows, columns] - sdr_NP[-1, columns]).tolist()
    return LabelMatch(
        label=label,
        sdri_db=tuple(sdri_db),
        num_missed=num_sources - len(sdri_db),
        num_false=len(found_ET) - len(sdri_db),
        sum_sdri_db=sum_sdri_db if num_sources > 1 else None,
    )
