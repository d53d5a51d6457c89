"""Embeddings of queries in training: noise and interpolation of known size, the same for the same step."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.separators import Embeddings
from engine.settings import deciding
from tests.support.remixes import LABELS, config, mixer, raw
from train.data.config import MixConfig
from train.data.query_variation import QueryVariation

EYE = np.eye(len(LABELS), 16, dtype=np.float32)


def query_of(clean, step=0, **variation):
    made = mixer(clean, config(batch_size=64, silence_rate=0.0, query_variation=QueryVariation(**variation)))
    made.vectors_LE = EYE
    batch = made.batch(step)
    return batch, batch.query


def test_without_variation_a_query_is_the_embedding_of_its_label(clean):
    batch, query_BE = query_of(clean, noise=0.0, interpolation=0.0)
    assert torch.equal(query_BE, torch.from_numpy(EYE)[batch.index_B])


def test_interpolation_adds_at_most_its_weight_of_one_absent_label(clean):
    batch, query_BE = query_of(clean, noise=0.0, interpolation=0.4)
    own_B = query_BE[torch.arange(64), batch.index_B]
    others_BE = query_BE.clone()
    others_BE[torch.arange(64), batch.index_B] = 0.0
    assert ((others_BE > 0).sum(1) == 1).all()
    ratio_B = others_BE.max(1).values / own_B
    assert 0.5 < ratio_B.max() < 0.4 / 0.6 and ratio_B.min() < 0.05
    for row, other in enumerate(others_BE.argmax(1).tolist()):  # its tone is not in the mixture
        spectrum = np.abs(np.fft.rfft(batch.mix_BT[row].numpy()))
        hz = np.fft.rfftfreq(batch.mix_BT.shape[1], 1 / 8000)[spectrum.argmax()]
        assert LABELS[other] != LABELS[min(len(LABELS) - 1, max(0, round((hz - 460) / 600)))]


def test_noise_has_its_length_and_queries_have_length_one(clean):
    batch, query_BE = query_of(clean, noise=0.5, interpolation=0.0)
    torch.testing.assert_close(query_BE.norm(dim=1), torch.ones(64))
    cosine_B = query_BE[torch.arange(64), batch.index_B]
    assert cosine_B.mean() == pytest.approx((1 + 0.25) ** -0.5, abs=0.05)


def test_a_step_has_the_same_queries_again_and_the_mixtures_of_a_closed_vocabulary(clean):
    first, again = (query_of(clean, 3, noise=0.5, interpolation=0.5)[1] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, query_of(clean, 4, noise=0.5, interpolation=0.5)[1])
    closed = mixer(clean, config(batch_size=64, silence_rate=0.0)).batch(3)
    assert raw(closed) == raw(query_of(clean, 3, noise=0.5, interpolation=0.5)[0])
    assert torch.equal(closed.query, closed.index_B)


def test_only_another_variation_is_another_training():
    assert "query_variation" not in deciding(MixConfig())
    assert deciding(dataclasses.replace(MixConfig(), query_variation=QueryVariation(noise=0.1)))["query_variation"]


def test_embeddings_by_label():
    embeddings = Embeddings(labels=("dog bark", "rain"), vectors_LE=torch.eye(2), encoder="x")
    assert embeddings.of(["rain", "dog_bark"]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
