"""The draws of a step: mixtures and targets as sums of crops, and the small tensors that describe a batch of them.

Drawing opens no audio; ``render.py`` turns what was drawn into samples, all crops of a batch at once.

Shape legend: C crops, K knots of a colouring, Q signals that have a next crop, B queries, G groups of queries that
share a target, N samples of all sounds of a pool, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

SPEEDS = ((1, 1), (4, 5), (9, 10), (10, 9), (5, 4))
"""Speeds of crops: samples of the sound for samples of the crop."""

NUM_KNOTS = 8
"""Knots of a colouring, evenly from 0 Hz to half the sample rate."""


def crop_width(num_samples: int, speed: int) -> int:
    """Samples of a sound that a crop of ``num_samples`` needs."""
    up, down = SPEEDS[speed]
    return -(-num_samples * up // down) + 1


@dataclass(frozen=True, eq=False, slots=True)
class Crop:
    """A part of one signal of a sound, and how it is to be changed."""

    samples_N: Tensor
    """All sounds of its pool, one after another."""
    first: int
    """Number of its first sample among them."""
    num_samples: int
    """Samples to read; if the speed needs more, zeros follow."""
    speed: int
    """Number of the speed."""
    knots_db: np.ndarray | None
    """Colouring ``[K]``; None: none."""
    rms: float
    """Level to bring it to, relative to full scale."""
    level_of: Crop | None = None
    """The crop whose level is brought there, which changes this one by as much; None: itself."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Queries whose stems should add up to one signal."""

    labels: tuple[str, ...]
    """One query each."""
    crops: tuple[Crop, ...]
    """The signal is their sum; without any it is silence."""
    minus: tuple[Crop, ...] = ()
    """Crops that are taken from that sum."""
    weight: float = 1.0
    """Weight in the loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingMixture:
    """A mixture and its targets."""

    crops: tuple[Crop, ...]
    """The mixture is their sum."""
    labels_present: frozenset[str]
    """Every label that may sound in the mixture."""
    targets: tuple[Target, ...]
    """What the student learns from it."""
    sounding: frozenset[str] = frozenset()
    """Labels of its sounds, which its queries name as rivals; empty: they name none."""
    is_complete: bool = False
    """True if the targets add up to the mixture."""


@dataclass(frozen=True, kw_only=True)
class CropGroup:
    """Crops that are read from one tensor and have one speed."""

    samples_N: Tensor
    """The tensor."""
    speed: int
    """Number of the speed."""
    num_crops: int
    """They follow those of the part before."""
    width: int
    """Samples of the tensor that each needs."""
    is_short: bool
    """True if zeros follow the samples of some."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The next crop of every signal that has one more; no signal occurs twice."""

    signal_Q: Tensor
    """Number of the signal: mixtures, then targets."""
    crop_Q: Tensor
    """Number of the crop."""
    sign: float
    """1: added; -1: subtracted."""


@dataclass(frozen=True, kw_only=True)
class DrawnBatch:
    """A batch before it is rendered."""

    parts: tuple[CropGroup, ...]
    terms: tuple[Terms, ...]
    first_C: Tensor
    num_C: Tensor
    """Samples to read of each crop."""
    knots_db_CK: Tensor | None
    rms_C: Tensor
    level_C: Tensor
    """Number of the crop whose level counts."""
    num_mixtures: int
    index_B: Tensor
    group_B: Tensor
    weight_G: Tensor
    mixture_G: Tensor
    is_complete_G: Tensor
    rivals: Tensor
    pairs: tuple[tuple[Sequence[int], Sequence[int]], ...] = ()
    query_BE: Tensor | None = None

    def to(self, device: torch.device) -> DrawnBatch:
        """The same on a card, sent without waiting; sounds that stay in CPU memory send only their crops."""
        if device.type == "cpu":
            return self
        first_C, parts, row = self.first_C.clone(), [], 0
        for part in self.parts:
            rows, samples_N = slice(row, row := row + part.num_crops), part.samples_N
            if samples_N.device.type == "cpu":
                samples_N = _sent(_packed(part, first_C[rows], self.num_C[rows]), device)
                first_C[rows] = self.num_C[rows].cumsum(0) - self.num_C[rows]
            parts.append(replace(part, samples_N=samples_N))
        terms = tuple(_on(some, device) for some in self.terms)
        return replace(_on(replace(self, first_C=first_C), device), parts=tuple(parts), terms=terms)


_Record = TypeVar("_Record", Terms, DrawnBatch)


def _on(record: _Record, device: torch.device) -> _Record:
    """The same with its own tensors on a card."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    sent: Any = {name: _sent(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(record, **sent)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True)


def _packed(part: CropGroup, first_C: Tensor, num_C: Tensor) -> Tensor:
    """The samples of a part's crops, one crop after another, with as many zeros at the end as a crop may need."""
    spans = zip(first_C.tolist(), num_C.tolist(), strict=True)
    return torch.cat([*(part.samples_N[first : first + num] for first, num in spans), torch.zeros(part.width)])


def collate(mixtures: Sequence[TrainingMixture], positions: Mapping[str, int], *, num_samples: int) -> DrawnBatch:
    """The batch of some mixtures of a length, for a separator with these positions of its labels."""
    groups = [(number, target) for number, mixture in enumerate(mixtures) for target in mixture.targets]
    added = [mixture.crops for mixture in mixtures] + [target.crops for _, target in groups]
    subtracted = [()] * len(mixtures) + [target.minus for _, target in groups]
    crops = _in_parts(crop for signal in (*added, *subtracted) for crop in signal)
    numbers = {crop: number for number, crop in enumerate(crops)}
    weight_G = np.array([target.weight for _, target in groups])
    return DrawnBatch(
        parts=tuple(_parts(crops, num_samples)),
        terms=(*_terms(added, numbers, 1.0), *_terms(subtracted, numbers, -1.0)),
        first_C=torch.tensor([crop.first for crop in crops]),
        num_C=torch.tensor([crop.num_samples for crop in crops]),
        knots_db_CK=_stacked([crop.knots_db for crop in crops if crop.knots_db is not None]),
        rms_C=torch.tensor([crop.rms for crop in crops]),
        level_C=torch.tensor([numbers[crop.level_of or crop] for crop in crops]),
        num_mixtures=len(mixtures),
        index_B=torch.tensor([positions[label] for _, target in groups for label in target.labels]),
        group_B=torch.tensor([group for group, (_, target) in enumerate(groups) for _ in target.labels]),
        weight_G=torch.from_numpy(weight_G / weight_G.mean()).float(),
        mixture_G=torch.tensor([number for number, _ in groups]),
        is_complete_G=torch.tensor([mixtures[number].is_complete for number, _ in groups]),
        rivals=_rivals([(mixtures[number].sounding, target.labels) for number, target in groups], positions),
        pairs=tuple(_pairs(mixtures)),
    )


def _pairs(mixtures: Iterable[TrainingMixture]) -> Iterable[tuple[range, range]]:
    """The queries of each mixture that is complete with two targets."""
    row = 0
    for mixture in mixtures:
        ends = [row, *(row := row + len(target.labels) for target in mixture.targets)]
        if mixture.is_complete and len(ends) == 3 and all(target.weight > 0.0 for target in mixture.targets):
            yield range(ends[0], ends[1]), range(ends[1], ends[2])


def _rivals(groups: Iterable[tuple[frozenset[str], tuple[str, ...]]], positions: Mapping[str, int]) -> Tensor:
    """Ones ``[B, L]`` at the labels of the sounds of each query's mixture that are not its own."""
    rows = [sounding - {label} for sounding, labels in groups for label in labels]
    rivals_BL = torch.zeros(len(rows), len(positions))
    for rivals_L, rivals in zip(rivals_BL, rows, strict=True):
        rivals_L[[positions[label] for label in rivals if label in positions]] = 1.0
    return rivals_BL


def _in_parts(crops: Iterable[Crop]) -> list[Crop]:
    """All crops of some signals once, with those whose level counts, in the order of their parts."""
    found: dict[Crop, None] = {}
    for crop in crops:
        found[crop] = None
        if crop.level_of is not None:
            found[crop.level_of] = None
    tensors: dict[int, int] = {}  # in the order of their first crop: addresses are others in another process
    return sorted(found, key=lambda crop: (crop.speed, tensors.setdefault(id(crop.samples_N), len(tensors))))


def _parts(crops: Sequence[Crop], num_samples: int) -> Iterable[CropGroup]:
    for (speed, _), some in groupby(crops, key=lambda crop: (crop.speed, id(crop.samples_N))):
        part, width = list(some), crop_width(num_samples, speed)
        yield CropGroup(
            samples_N=part[0].samples_N,
            speed=speed,
            num_crops=len(part),
            width=width,
            is_short=any(crop.num_samples < width for crop in part),
        )


def _terms(signals: Sequence[Sequence[Crop]], numbers: Mapping[Crop, int], sign: float) -> Iterable[Terms]:
    """The first crops of all signals that have one, then the second ones, and so on."""
    for nth in zip_longest(*signals):
        pairs = [(signal, numbers[crop]) for signal, crop in enumerate(nth) if crop is not None]
        signal_Q, crop_Q = torch.tensor(pairs).T.contiguous()
        yield Terms(signal_Q=signal_Q, crop_Q=crop_Q, sign=sign)


def _stacked(knots_db: Sequence[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(knots_db).astype(np.float32)) if knots_db else None
