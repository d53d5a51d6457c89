"""An estimate of every stem's SI-SDR from its scores, fitted to stems whose true SI-SDR is known; opens no audio.

It is a ridge regression on standardised scores: a few clips with known sources are enough to fit it. More flexible
models (additive hinges, small networks) fitted the calibration better and natural clips worse (benchmarks/log.md).

Verdicts of a listener are further evidence. They censor the SI-SDR: that of a good stem is above the listener's level,
that of a bad one below. The model is Tobit (Tobin 1958, Econometrica 26), fitted by expectation maximisation (Dempster,
Laird and Rubin 1977): a censored SI-SDR counts as its expectation under the current estimate and its error. The level
is that of greatest likelihood, because a listener has no scale in dB. The scale is thus that of the known stems; the
verdicts change which scores it follows.

Shape suffixes: N stems with a known SI-SDR, M stems with a verdict, F scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from engine.schema import ESTIMATES, SCORES, SCORES_VERSION
from engine.storage.documents import MAX_DESCRIPTION_BYTES
from engine.storage.files import check_record, read_json, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location

_FORMAT = SCORES_VERSION
_TAIL = 0.01  # scores are clipped at the quantiles 0.01 and 0.99 of the calibration, so that outliers have no leverage
_TRUTH_DB = (-10.0, 25.0)  # bounds of the true SI-SDR, for the same reason
_RIDGE = 10.0
_NUM_FOLDS = 5
_NUM_ERRORS = 5
_LEAST_ERROR_DB = 0.1  # a verdict is never more certain than that
_NUM_IMPUTATIONS = 10  # of the censored SI-SDRs: nothing changes after the sixth or so
_FILE = "estimator.json"
_SAME_LENGTH = [(name, "names") for name in ("lowest", "highest", "mean", "deviation", "weight")]
_SAME_LENGTH += [("error_db", "error_at_db")]


@dataclass(frozen=True, kw_only=True)
class SiSdrEstimator:
    """SI-SDR = bias + Σ weight (score - mean) / deviation; an undefined score counts as its mean."""

    names: tuple[str, ...]
    """Names of the scores."""
    lowest: tuple[float, ...]
    """Scores below this value count as this value, because the calibration had none."""
    highest: tuple[float, ...]
    """Scores above this value count as this value."""
    mean: tuple[float, ...]
    """Mean of each score over the calibration."""
    deviation: tuple[float, ...]
    """Standard deviation of each score over the calibration."""
    weight: tuple[float, ...]
    """Weight of each score in dB per standard deviation."""
    bias: float
    """Mean SI-SDR of the calibration, in dB."""
    error_at_db: tuple[float, ...]
    """Rising estimates at which the error is known."""
    error_db: tuple[float, ...]
    """Root mean square error at these estimates, on held-out stems."""
    about: dict[str, Any]
    """How the estimator was calibrated; for information only."""

    def estimate(self, scores: pa.Table) -> pa.Table:
        """Rows of ``schema.ESTIMATES`` for rows of ``schema.SCORES``; null if all its scores are undefined."""
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
        """Equal for estimators that give equal estimates."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "about"})


_Fields = TypedDict("_Fields", get_type_hints(SiSdrEstimator))  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class JudgedStems:
    """Stems with the verdict of a listener."""

    scores: pa.Table
    """Their scores, a row of ``schema.SCORES`` each."""
    is_good: Sequence[bool]
    """Verdict on each; must have both."""
    groups: Sequence[str]
    """Clip of each."""
    about: Mapping[str, str | int]
    """Origin and counts of the verdicts, for ``estimator.json``."""


_Fitted = tuple[np.ndarray, np.ndarray, np.ndarray, float]


class _Evidence(NamedTuple):
    """Scores of stems with the SI-SDR or the verdict on each."""

    values_NF: np.ndarray
    truth_N: np.ndarray
    judged_MF: np.ndarray
    is_good_M: np.ndarray


def fit_estimator(
    scores: pa.Table,
    truth_db: Sequence[float],
    *,
    groups: Sequence[int],
    about: dict[str, Any],
    judged: JudgedStems | None = None,
) -> SiSdrEstimator:
    """Fit an estimator to stems whose true SI-SDR is known, one row each, and to verdicts on others.

    The error is measured by five-fold cross-validation; stems with the same value of ``groups`` are in one fold. Scores
    that are undefined for all stems are left out. Raises ``ValueError`` for fewer than 50 stems or a constant truth.
    """
    truth_N = np.clip(np.asarray(truth_db, np.float64), *_TRUTH_DB)
    if len(truth_N) < 50 or np.ptp(truth_N) < 1.0:
        raise ValueError(
            f"a calibration must have at least 50 stems with a true SI-SDR that varies by 1 dB, got {len(truth_N)} "
            f"that vary by {np.ptp(truth_N) if len(truth_N) else 0.0:.1f} dB; give more single-source clips"
        )
    names = [name for name in SCORES.names if scores[name].null_count < len(scores)]
    values_NF = _features(scores, names)
    lowest_F, highest_F = np.nanquantile(values_NF, (_TAIL, 1.0 - _TAIL), axis=0)
    known = _Evidence(np.clip(values_NF, lowest_F, highest_F), truth_N, values_NF[:0], np.zeros(0, bool))
    fold_N, no_folds = _folds(groups), np.zeros(0, int)
    held_out_N, _ = _held_out(known, fold_N, no_folds, 0.0)
    fitted, error = _fit(known.values_NF, truth_N), max(_LEAST_ERROR_DB, _root_mean_square(held_out_N - truth_N))
    if judged is not None:
        evidence = known._replace(
            judged_MF=np.clip(_features(judged.scores, names), lowest_F, highest_F),
            is_good_M=np.asarray(judged.is_good, bool),
        )
        held_out_N, held_out_M = _held_out(evidence, fold_N, _folds(judged.groups), error)
        before_M = _predict(evidence.judged_MF, *fitted)
        fitted, level_db = _fit_censored(evidence, error)
        agreement = {"auc_before": _auc(before_M, evidence.is_good_M), "auc": _auc(held_out_M, evidence.is_good_M)}
        about = about | {"verdicts": {**judged.about, "level_db": level_db, **agreement}}
    mean_F, deviation_F, weight_F, bias = fitted
    error_at_db, error_db = _errors(held_out_N, truth_N)
    return SiSdrEstimator(
        names=tuple(names),
        lowest=tuple(lowest_F.tolist()),
        highest=tuple(highest_F.tolist()),
        mean=tuple(mean_F.tolist()),
        deviation=tuple(deviation_F.tolist()),
        weight=tuple(weight_F.tolist()),
        bias=bias,
        error_at_db=error_at_db,
        error_db=error_db,
        about=about | {"num_stems": len(truth_N), "rmse_db": _root_mean_square(held_out_N - truth_N)},
    )


def _folds(groups: Sequence[int] | Sequence[str]) -> np.ndarray:
    folds: np.ndarray = np.unique(np.asarray(groups), return_inverse=True)[1] % _NUM_FOLDS
    return folds


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _held_out(
    evidence: _Evidence, fold_N: np.ndarray, fold_M: np.ndarray, error: float
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates ``[N]`` and ``[M]`` of all stems, each by a fit without its fold."""
    values_NF, truth_N, judged_MF, is_good_M = evidence
    held_out_N, held_out_M = np.zeros(len(truth_N)), np.zeros(len(is_good_M))
    for fold in np.unique([*fold_N, *fold_M]):
        in_N, in_M = fold_N == fold, fold_M == fold
        others = _Evidence(values_NF[~in_N], truth_N[~in_N], judged_MF[~in_M], is_good_M[~in_M])
        fitted, _ = _fit_censored(others, error)
        held_out_N[in_N], held_out_M[in_M] = _predict(values_NF[in_N], *fitted), _predict(judged_MF[in_M], *fitted)
    return held_out_N, held_out_M


def _fit_censored(evidence: _Evidence, error: float) -> tuple[_Fitted, float]:
    """Fit to truths and verdicts, and the level of the listener in dB; NaN without verdicts of both kinds."""
    from scipy.optimize import brentq

    values_NF, truth_N, judged_MF, is_good_M = evidence
    fitted, level_db = _fit(values_NF, truth_N), float("nan")
    if is_good_M.all() or not is_good_M.any():  # they set no level
        return fitted, level_db
    all_values = np.concatenate([values_NF, judged_MF])
    for _ in range(_NUM_IMPUTATIONS):
        estimate_M = _predict(judged_MF, *fitted)
        low, high = estimate_M.min() - 10.0 * error, estimate_M.max() + 10.0 * error
        # The likelihood of the verdicts is greatest where they leave the mean of the estimates as it is.
        level_db = float(brentq(_mean_surprise, low, high, args=(estimate_M, is_good_M, error)))
        imputed_M = np.clip(estimate_M + _surprise(estimate_M - level_db, is_good_M, error), *_TRUTH_DB)
        fitted = _fit(all_values, np.concatenate([truth_N, imputed_M]))
    return fitted, level_db


def _mean_surprise(level_db: float, estimate_M: np.ndarray, is_good_M: np.ndarray, error: float) -> float:
    return float(_surprise(estimate_M - level_db, is_good_M, error).mean())


def _surprise(above_M: np.ndarray, is_good_M: np.ndarray, error: float) -> np.ndarray:
    """Expectation ``[M]`` of SI-SDR minus estimate, given the verdicts and how far estimates are above the level."""
    from scipy.special import log_ndtr

    sign_M = np.where(is_good_M, 1.0, -1.0)
    scaled_M = sign_M * above_M / error
    found: np.ndarray = sign_M * error * np.exp(-(scaled_M**2 + np.log(2.0 * np.pi)) / 2.0 - log_ndtr(scaled_M))
    return found


def _auc(estimate_M: np.ndarray, is_good_M: np.ndarray) -> float:
    """Probability that a good stem has the higher estimate than a bad one (area under the ROC curve)."""
    difference = np.subtract.outer(estimate_M[is_good_M], estimate_M[~is_good_M])
    return float(np.mean((np.sign(difference) + 1.0) / 2.0))


def _fit(values_NF: np.ndarray, truth_N: np.ndarray) -> _Fitted:
    """Mean, deviation and weight [F] of each score, and the bias."""
    from sklearn.linear_model import Ridge  # takes a second to import

    mean_F = np.nanmean(values_NF, axis=0)
    deviation_F = np.maximum(np.nanstd(values_NF, axis=0), 1e-6)
    bias = float(truth_N.mean())
    ridge = Ridge(alpha=_RIDGE, fit_intercept=False)
    ridge.fit(np.nan_to_num((values_NF - mean_F) / deviation_F), truth_N - bias)
    return mean_F, deviation_F, ridge.coef_, bias


def _predict(
    values_NF: np.ndarray, mean_F: np.ndarray, deviation_F: np.ndarray, weight_F: np.ndarray, bias: float
) -> np.ndarray:
    predicted_N: np.ndarray = bias + np.nan_to_num((values_NF - mean_F) / deviation_F) @ weight_F
    return predicted_N


def _errors(estimate_N: np.ndarray, truth_N: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean estimate and root mean square error in parts of the estimates' range that have equally many stems."""
    parts = np.array_split(np.argsort(estimate_N), _NUM_ERRORS)
    at_db = tuple(float(estimate_N[rows].mean()) for rows in parts)
    return at_db, tuple(_root_mean_square(estimate_N[rows] - truth_N[rows]) for rows in parts)


def _features(scores: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Scores ``[N, F]``; undefined ones are NaN."""
    columns = [scores[name].to_numpy().astype(np.float64) for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((len(scores), 0))


def save_estimator(estimator: SiSdrEstimator, folder: Name) -> None:
    """Write ``estimator.json`` into a folder."""
    description = {"format": _FORMAT, **asdict(estimator), "fingerprint": estimator.fingerprint}
    write_json(location(folder) / _FILE, description)


def load_estimator(folder: Name) -> SiSdrEstimator:
    """The estimator in a folder; ``ValueError`` if there is none, or if it is damaged or of another version."""
    path = location(folder) / _FILE
    if not path.is_file():
        raise ValueError(f"there is no {_FILE} in {folder}; give RUN/estimator, or make one with `clearsep calibrate`")
    remedy = "calibrate again"
    stored = read_json(path, most_bytes=MAX_DESCRIPTION_BYTES, remedy=remedy)
    if not isinstance(stored, dict) or stored.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT}, got another version; calibrate again")
    recorded = stored.pop("fingerprint", None)
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in stored.items()}
    if surplus := sorted(set(values) - set(SiSdrEstimator.__dataclass_fields__)):
        raise ValueError(f"{path} must have no {surplus[0]}, got it; {remedy}")
    estimator = SiSdrEstimator(**check_record(values, _Fields, path, remedy=remedy))  # type: ignore[call-arg]
    if unknown := sorted(set(estimator.names) - set(SCORES.names)):
        raise ValueError(f"{path} must have names of scores alone, got {unknown[0]!r}; {remedy}")
    for name, of in _SAME_LENGTH:
        found, wanted = len(getattr(estimator, name)), len(getattr(estimator, of))
        if found != wanted or not wanted:
            raise ValueError(
                f"{name} of {path} must have a number for each of its {wanted} {of}, got {found}; {remedy}"
            )
    if min(estimator.deviation) <= 0.0:
        raise ValueError(f"deviation of {path} must be above 0, got {min(estimator.deviation)}; {remedy}")
    if estimator.fingerprint != recorded:
        raise ValueError(
            f"{path} must have the fingerprint of its values, got another (it was edited); calibrate again"
        )
    return estimator
