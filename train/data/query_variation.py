"""Embeddings of queries that vary while a student learns, so that it also answers embeddings that it has not seen.

A student sees as many embeddings as its training has labels, but is queried with any words afterwards. Noise makes it
answer a neighbourhood of each (CapDec, arXiv 2211.00575; for separation Saijo et al., arXiv 2409.13152); interpolation
makes it answer what lies between two labels, by the sound that is in the mixture (as CLAPSep, arXiv 2402.17455, does
between the embeddings of a text and of a sound).

Shape legend: B queries, L labels, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.settings import Fraction, NonNegative, config
from train.data.drawn import DrawnBatch, TrainingMixture


@config
class QueryVariation:
    """Variation of the embeddings of queries; only for students that read text."""

    noise: NonNegative = 0.0
    """Length of the Gaussian noise on an embedding, which has length 1; the sum is brought back to length 1. With word
    vectors 0.5 lost 0.2 dB on labels of the training and on others; it was not measured with a CLAP."""
    interpolation: Fraction = 0.5
    """Largest weight of another label, which is not in the mixture, in an embedding; it is drawn evenly from 0 on. With
    word vectors it gained 0.7 dB SI-SDR on labels that the student was not trained on and cost 0.2 dB on others."""


def varied_queries(
    batch: DrawnBatch,
    mixtures: Sequence[TrainingMixture],
    positions: Mapping[str, int],
    vectors_LE: np.ndarray,
    config: QueryVariation,
    rng: np.random.Generator,
) -> Tensor:
    """Embeddings ``[B, E]`` of a batch's queries, of length 1, with noise and with some of an absent label."""
    query_BE = vectors_LE[batch.index_B.numpy()]
    other_BE = query_BE.copy()
    rows = zip(batch.index_B.tolist(), batch.mixture_G[batch.group_B].tolist(), strict=True)
    for row, (own, number) in enumerate(rows):
        present = {own, *(positions[label] for label in mixtures[number].labels_present if label in positions)}
        if len(present) < len(positions):
            other_BE[row] = vectors_LE[_absent(int(rng.integers(len(positions) - len(present))), present)]
    weight_B1 = rng.uniform(0.0, config.interpolation, (len(query_BE), 1))
    noise_BE = rng.normal(0.0, config.noise / query_BE.shape[1] ** 0.5, query_BE.shape)
    varied_BE = _unit((1.0 - weight_B1) * query_BE + weight_B1 * other_BE) + noise_BE
    return torch.from_numpy(_unit(varied_BE).astype(np.float32))


def _absent(number: int, present: set[int]) -> int:
    """One of the positions that are not present, counted among them from 0."""
    for position in sorted(present):
        number += position <= number
    return number


def _unit(vectors_BE: np.ndarray) -> np.ndarray:
    unit_BE: np.ndarray = vectors_BE / np.maximum(np.linalg.norm(vectors_BE, axis=1, keepdims=True), 1e-12)
    return unit_BE
