"""An estimate of every stem's SI-SDR from its scores, calibrated where the truth is known; opens no audio.

A ridge regression on standardised scores: few clips with a known truth suffice for it, and what it says is the sum of
what each score says. More flexible ones (additive hinges, small networks) fitted the calibration better and natural
clips worse (benchmarks/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.schema import ESTIMATES, SCORES, SCORES_VERSION
from engine.storage.files import read_json, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location

_FORMAT = SCORES_VERSION
_TAIL = 0.01  # of the calibration: beyond what is left of it a score says nothing more, lest a fit be stretched
_TRUTH_DB = (-10.0, 25.0)  # the same for the truth
_RIDGE = 10.0  # stems that pull every weight to zero
_NUM_ERRORS = 5
_FILE = "quality.json"


@dataclass(frozen=True, kw_only=True)
class SiSdrEstimator:
    """A calibrated estimator: SI-SDR = bias + Σ weight (score - mean) / deviation, undefined scores at their mean."""

    names: tuple[str, ...]
    """The scores it looks at."""
    lowest: tuple[float, ...]
    """Scores below this count as this: the calibration has not seen them."""
    highest: tuple[float, ...]
    """Likewise above."""
    mean: tuple[float, ...]
    """Of each score over the calibration."""
    deviation: tuple[float, ...]
    """Likewise."""
    weight: tuple[float, ...]
    """dB for each standard deviation of a score."""
    bias: float
    """Mean SI-SDR of the calibration, in dB."""
    error_at_db: tuple[float, ...]
    """Estimates at which the error is known, rising."""
    error_db: tuple[float, ...]
    """Root mean square error there, out of sample."""
    about: dict[str, Any]
    """How it was calibrated, for whoever asks."""

    def estimate(self, scores: pa.Table) -> pa.Table:
        """Rows of ``schema.ESTIMATES`` for rows of ``schema.SCORES``; null where all that it looks at is undefined."""
        values_NF = np.clip(_features(scores, self.names), self.lowest, self.highest)
        known_NF = np.isfinite(values_NF)
        scaled_NF = np.where(known_NF, (values_NF - self.mean) / np.asarray(self.deviation), 0.0)
        estimate_N = self.bias + scaled_NF @ np.asarray(self.weight)
        error_N = np.interp(estimate_N, self.error_at_db, self.error_db)
        undefined_N = ~known_NF.any(axis=1)
        return pa.table(
            [pa.array(column.astype(np.float32), mask=undefined_N) for column in (estimate_N, error_N)],
            schema=ESTIMATES,
        )

    @property
    def fingerprint(self) -> str:
        """Stands for everything that decides an estimate."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "about"})


def calibrate(
    scores: pa.Table, truth_db: Sequence[float], *, groups: Sequence[int], about: dict[str, Any]
) -> SiSdrEstimator:
    """Fit an estimator to stems whose true SI-SDR is known, a row each.

    Stems of a ``groups`` value are held out together when the error is measured (five parts). Scores that are undefined
    throughout are left out. Raises ``ValueError`` for fewer than 50 stems or a truth that does not vary.
    """
    truth_N = np.clip(np.asarray(truth_db, np.float64), *_TRUTH_DB)
    if len(truth_N) < 50 or np.ptp(truth_N) < 1.0:
        raise ValueError(
            f"{len(truth_N)} stems of one clip or another that are alike or too few: nothing to calibrate with; "
            "give more single-source clips"
        )
    names = [name for name in SCORES.names if scores[name].null_count < len(scores)]
    values_NF = _features(scores, names)
    lowest_F, highest_F = np.nanquantile(values_NF, (_TAIL, 1.0 - _TAIL), axis=0)
    values_NF = np.clip(values_NF, lowest_F, highest_F)
    part_N = np.unique(np.asarray(groups), return_inverse=True)[1] % 5
    held_out_N = np.zeros(len(truth_N))
    for part in np.unique(part_N):
        inside = part_N == part
        held_out_N[inside] = _predict(values_NF[inside], *_fit(values_NF[~inside], truth_N[~inside]))
    mean_F, deviation_F, weight_F, bias = _fit(values_NF, truth_N)
    error_at_db, error_db = _errors(held_out_N, truth_N)
    fitted = (lowest_F, highest_F, mean_F, deviation_F, weight_F)
    lowest, highest, mean, deviation, weight = (tuple(float(value) for value in values) for values in fitted)
    return SiSdrEstimator(
        names=tuple(names),
        lowest=lowest,
        highest=highest,
        mean=mean,
        deviation=deviation,
        weight=weight,
        bias=bias,
        error_at_db=error_at_db,
        error_db=error_db,
        about=about | {"num_stems": len(truth_N), "rmse_db": float(np.sqrt(np.mean((held_out_N - truth_N) ** 2)))},
    )


_Fit = tuple[np.ndarray, np.ndarray, np.ndarray, float]


def _fit(values_NF: np.ndarray, truth_N: np.ndarray) -> _Fit:
    mean_F = np.nanmean(values_NF, axis=0)
    deviation_F = np.maximum(np.nanstd(values_NF, axis=0), 1e-6)
    scaled_NF = np.nan_to_num((values_NF - mean_F) / deviation_F)
    bias = float(truth_N.mean())
    normal_FF = scaled_NF.T @ scaled_NF + _RIDGE * np.eye(len(mean_F))
    return mean_F, deviation_F, np.linalg.solve(normal_FF, scaled_NF.T @ (truth_N - bias)), bias


def _predict(
    values_NF: np.ndarray, mean_F: np.ndarray, deviation_F: np.ndarray, weight_F: np.ndarray, bias: float
) -> np.ndarray:
    predicted_N: np.ndarray = bias + np.nan_to_num((values_NF - mean_F) / deviation_F) @ weight_F
    return predicted_N


def _errors(estimate_N: np.ndarray, truth_N: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Root mean square error in parts of the estimate's range that hold as many stems each."""
    order = np.array_split(np.argsort(estimate_N), _NUM_ERRORS)
    at_db = tuple(float(estimate_N[rows].mean()) for rows in order)
    return at_db, tuple(float(np.sqrt(np.mean((estimate_N[rows] - truth_N[rows]) ** 2))) for rows in order)


def _features(scores: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Scores ``[N, F]``, undefined ones as NaN."""
    columns = [scores[name].to_numpy().astype(np.float64) for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((len(scores), 0))


def save_estimator(quality: SiSdrEstimator, folder: Name) -> None:
    """Write ``quality.json`` into a folder."""
    write_json(location(folder) / _FILE, {"format": _FORMAT, **asdict(quality), "fingerprint": quality.fingerprint})


def load_estimator(folder: Name) -> SiSdrEstimator:
    """The estimator in a folder; ``ValueError`` if there is none, or one that is damaged or of another version."""
    path = location(folder) / _FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {_FILE}; a run keeps it in RUN/quality, `clearsep calibrate` makes one")
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}; calibrate again with this version")
    told = stored.pop("fingerprint", None)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    if set(values) != set(SiSdrEstimator.__dataclass_fields__) or not set(values["names"]) <= set(SCORES.names):
        raise ValueError(f"{path} has not the fields of an estimator; calibrate again with this version")
    quality = SiSdrEstimator(**values)
    if quality.fingerprint != told:
        raise ValueError(f"{path} was changed since it was written; calibrate again")
    return quality
