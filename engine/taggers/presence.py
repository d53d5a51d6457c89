"""Probabilities that a label sounds in a clip, from what a tagger and a separator say of it; opens no audio.

Each is a logistic regression with an offset for every label, calibrated on mixtures whose labels are known
(:mod:`train.judges.presence`), from one of three kinds of evidence: the tags of the clip; in addition those of the
label's stem; or those of the residual of a clip from which the label was not separated.

Shape suffixes: N pairs of a clip and a label, F values of evidence, S stems of a clip, L labels of the tagger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from typing_extensions import TypedDict

from engine.schema import plain_label
from engine.storage.files import check_record, read_json, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location

CLIP, STEM, REST = "clip", "stem", "rest"
EVIDENCE: Mapping[str, tuple[str, ...]] = {
    CLIP: ("clip_tag_db",),
    STEM: ("clip_tag_db", "stem_tag_db", "margin_db", "stem_level_db", "active_fraction"),
    REST: ("clip_tag_db", "residual_tag_db"),
}
"""Values of each kind of evidence: the label's strongest tag in a window of the clip, the tag and the margin of its
stem, the level of its stem relative to the clip, the fraction of the time in which that is active, and the label's
strongest tag in a window of the residual."""
_FILE = "presence.json"
_FORMAT = 1
_LIMITS_DB = (-40.0, 40.0)  # lower tags and levels all mean that nothing is there
_STRENGTH = 1.0  # of the penalty on weights, relative to that on the data
_NUM_FOLDS = 5
_MIN_PAIRS = 50
_GRID = tuple(round(0.05 * number, 2) for number in range(1, 20))
_REMEDY = "calibrate again"


class LabelThreshold(TypedDict):
    """The threshold of a label, and what it did on held-out clips of the calibration."""

    probability: float
    """Lowest probability with which the label is accepted."""
    precision: float
    """Fraction of accepted clips in which the label sounds."""
    recall: float
    """Fraction of the clips in which it sounds that are accepted."""


@dataclass(frozen=True, kw_only=True)
class LogisticModel:
    """Log odds = bias + offset of the label + Σ weight (value - mean) / deviation; an unknown value is its mean."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float
    offsets: dict[str, float]
    """By label in plain spelling; 0 for others."""

    def probabilities(self, labels: Sequence[str], values_NF: np.ndarray) -> np.ndarray:
        """Probabilities ``[N]`` that the labels sound, for evidence ``[N, F]``; NaN is an unknown value."""
        offset_N = np.array([self.offsets.get(plain_label(label), 0.0) for label in labels])
        log_odds_N = self.bias + offset_N + self.contributions(values_NF).sum(axis=1)
        probability_N: np.ndarray = 1.0 / (1.0 + np.exp(-np.clip(log_odds_N, -50.0, 50.0)))
        return probability_N

    def contributions(self, values_NF: np.ndarray) -> np.ndarray:
        """The part ``[N, F]`` of each value in the log odds, relative to that of a mean value."""
        part_NF: np.ndarray = _scaled(values_NF, self.mean, self.deviation) * np.asarray(self.weight)
        return part_NF


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Calibrated probabilities of one tagger's labels."""

    tagger: str
    """Fingerprint of the tagger."""
    models: dict[str, LogisticModel]
    """By kind of evidence; one of clips is always there."""
    measured: dict[str, list[LabelThreshold]]
    """Precision and recall of the clips' probabilities at rising thresholds, on held-out clips of the calibration, by
    label in plain spelling."""
    about: dict[str, str | int | float | None] = field(default_factory=dict)
    """How it was calibrated; for information only."""

    def model(self, kind: str) -> LogisticModel:
        """The model of a kind of evidence; ``ValueError`` if it was not calibrated."""
        if kind not in self.models:
            raise ValueError(
                f"a presence model must be calibrated on stems to judge them, got one of clips alone ({_FILE}); "
                "calibrate it with a separator, as a run does"
            )
        return self.models[kind]

    def thresholds(self, precision: float) -> dict[str, LabelThreshold]:
        """The lowest threshold of each label, in plain spelling, whose precision is at least the given one.

        A label that never reaches it gets the threshold of its highest precision.
        """
        chosen = {}
        for label, measured in self.measured.items():
            reached = [one for one in measured if one["precision"] >= precision]
            chosen[label] = reached[0] if reached else max(measured, key=lambda one: one["precision"])
        return chosen

    @property
    def fingerprint(self) -> str:
        """Equal for models that give equal probabilities and thresholds."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "about"})


@dataclass(frozen=True, kw_only=True)
class StemEvidence:
    """Tags, levels and activity of the stems of a clip."""

    clip_tags_L: np.ndarray
    """Strongest tags of the clip's windows."""
    stem_tags_SL: np.ndarray
    """Tags of each stem as a whole."""
    stem_level_db_S: np.ndarray
    active_fraction_S: np.ndarray

    def values(self, stem: int, place: int) -> list[float]:
        """The values of ``EVIDENCE["stem"]`` of a stem for the label at a place among the tagger's."""
        tags_L = self.stem_tags_SL[stem]
        others_L = np.delete(tags_L, place)
        margin_db = tags_L[place] - others_L.max() if len(others_L) else np.nan
        measured = (self.stem_level_db_S[stem], self.active_fraction_S[stem])
        return [float(value) for value in (self.clip_tags_L[place], tags_L[place], margin_db, *measured)]


@dataclass(kw_only=True)
class Pairs:
    """Pairs of a clip and a label with their evidence and the truth."""

    labels: list[str] = field(default_factory=list)
    values: list[Sequence[float]] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    """Number of the clip: pairs of a clip are held out together."""

    def add(self, clip: int, label: str, values: Sequence[float], *, present: bool) -> None:
        """Add a pair."""
        self.labels.append(label)
        self.values.append(values)
        self.present.append(present)
        self.clips.append(clip)


def fit_presence(pairs: Mapping[str, Pairs], *, tagger: str, about: Mapping[str, str | int | float | None]) -> Presence:
    """Fit the models to pairs whose truth is known, by kind of evidence.

    Raises ``ValueError`` for fewer than 50 pairs of a kind, and if all labels sound or none does.
    """
    models = {kind: _fit(EVIDENCE[kind], some) for kind, some in pairs.items()}
    return Presence(tagger=tagger, models=models, measured=_measured(pairs[CLIP]), about=dict(about))


def _scaled(values_NF: np.ndarray, mean: Sequence[float], deviation: Sequence[float]) -> np.ndarray:
    clipped_NF = np.clip(np.asarray(values_NF, np.float64), *_LIMITS_DB)
    scaled_NF: np.ndarray = np.nan_to_num((clipped_NF - np.asarray(mean)) / np.asarray(deviation))
    return scaled_NF


def _fit(names: tuple[str, ...], pairs: Pairs) -> LogisticModel:
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    present_N = np.array(pairs.present, bool)
    if len(present_N) < _MIN_PAIRS or present_N.all() or not present_N.any():
        raise ValueError(
            f"a calibration must have at least {_MIN_PAIRS} pairs of a clip and a label, some of which sound, got "
            f"{len(present_N)}, of which {int(present_N.sum())} sound; give more clips whose labels are known"
        )
    values_NF = np.clip(np.array(pairs.values, np.float64).reshape(len(present_N), len(names)), *_LIMITS_DB)
    mean_F, deviation_F = np.nanmean(values_NF, axis=0), np.maximum(np.nanstd(values_NF, axis=0), 1e-3)
    known = sorted(set(map(plain_label, pairs.labels)))
    position_N = np.searchsorted(known, [plain_label(label) for label in pairs.labels])
    matrix = np.concatenate([_scaled(values_NF, mean_F, deviation_F), np.eye(len(known))[position_N]], axis=1)
    fitted = LogisticRegression(C=1.0 / _STRENGTH, max_iter=1000).fit(matrix, present_N)
    weight_F, offsets = fitted.coef_[0][: len(names)], fitted.coef_[0][len(names) :]
    return LogisticModel(
        names=names,
        mean=tuple(mean_F.tolist()),
        deviation=tuple(deviation_F.tolist()),
        weight=tuple(weight_F.tolist()),
        bias=float(fitted.intercept_[0]),
        offsets=dict(zip(known, offsets.tolist(), strict=True)),
    )


def _measured(pairs: Pairs) -> dict[str, list[LabelThreshold]]:
    """Precision and recall by label of probabilities that were fitted to other clips."""
    present_N = np.array(pairs.present, bool)
    fold_N = np.unique(pairs.clips, return_inverse=True)[1] % _NUM_FOLDS
    probability_N = np.zeros(len(present_N))
    for fold in range(_NUM_FOLDS):
        inside = [_taken(pairs, np.flatnonzero(part)) for part in (fold_N == fold, fold_N != fold)]
        if inside[0].labels:
            model = _fit(EVIDENCE[CLIP], inside[1])
            probability_N[fold_N == fold] = model.probabilities(inside[0].labels, np.array(inside[0].values))
    plain = np.array([plain_label(label) for label in pairs.labels])
    rows = {label: plain == label for label in sorted(set(plain.tolist()))}
    return {
        label: [_at(probability_N[of_label], present_N[of_label], at) for at in _GRID]
        for label, of_label in rows.items()
    }


def _taken(pairs: Pairs, rows: np.ndarray) -> Pairs:
    columns = {name: [getattr(pairs, name)[row] for row in rows] for name in ("labels", "values", "present", "clips")}
    return Pairs(**columns)


def _at(probability_N: np.ndarray, present_N: np.ndarray, threshold: float) -> LabelThreshold:
    """Precision and recall of a threshold; the precision of nothing accepted is 0."""
    accepted_N = probability_N >= threshold
    num_right = int((accepted_N & present_N).sum())
    return {
        "probability": threshold,
        "precision": num_right / max(1, int(accepted_N.sum())),
        "recall": num_right / max(1, int(present_N.sum())),
    }


class _LogisticRecord(TypedDict):
    names: list[str]
    mean: list[float]
    deviation: list[float]
    weight: list[float]
    bias: float
    offsets: dict[str, float]


class _PresenceRecord(TypedDict):
    format: int
    tagger: str
    models: dict[str, _LogisticRecord]
    measured: dict[str, list[LabelThreshold]]
    about: dict[str, str | int | float | None]
    fingerprint: str


def save_presence(presence: Presence, folder: Name) -> None:
    """Write ``presence.json`` into a folder."""
    write_json(location(folder) / _FILE, {"format": _FORMAT, **asdict(presence), "fingerprint": presence.fingerprint})


def load_presence(folder: Name) -> Presence:
    """The model in a folder; ``ValueError`` if there is none, or if it is damaged or of another version."""
    path = location(folder) / _FILE
    if not path.is_file():
        raise ValueError(f"there is no {_FILE} in {folder}; give RUN/presence, or clips whose labels are known")
    record = check_record(read_json(path, remedy=_REMEDY), _PresenceRecord, path, remedy=_REMEDY)
    if record["format"] != _FORMAT or CLIP not in record["models"] or not set(record["models"]) <= set(EVIDENCE):
        raise ValueError(f"{path} must have format {_FORMAT} and a model of clips, got another; {_REMEDY}")
    models = {kind: _model(one, EVIDENCE[kind], path) for kind, one in record["models"].items()}
    presence = Presence(tagger=record["tagger"], models=models, measured=record["measured"], about=record["about"])
    if presence.fingerprint != record["fingerprint"]:
        raise ValueError(f"{path} must have the fingerprint of its values, got another (it was edited); {_REMEDY}")
    return presence


def _model(record: _LogisticRecord, names: tuple[str, ...], path: object) -> LogisticModel:
    columns = {name: tuple(record[name]) for name in ("mean", "deviation", "weight")}
    sizes = {len(column) for column in columns.values()}
    if tuple(record["names"]) != names or sizes != {len(names)}:
        raise ValueError(f"a model of {path} must have numbers for {list(names)}, got others; {_REMEDY}")
    return LogisticModel(
        names=names,
        bias=record["bias"],
        offsets=record["offsets"],
        **columns,
    )
