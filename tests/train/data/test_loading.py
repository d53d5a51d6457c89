"""Loading on several threads: the order of the results, a decoder for each thread, and an end after an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from engine.audio.decoder import shared_decoder
from engine.audio.loading import Loader
from engine.corpus.sources import read_sources
from tests.support.remixes import RATE_HZ, Write, config, pool, raw, tones
from train.data.items import clean_items
from train.data.pools import Pool
from train.data.training_data import TrainingData, make_mixer


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_every_thread_has_a_decoder_until_the_end(threads: None) -> None:
    loader = Loader()
    decoders = loader.map(lambda number: (number, shared_decoder()), range(64))
    assert [number for number, _ in decoders] == list(range(64))
    assert 1 <= len({decoder for _, decoder in decoders} - {shared_decoder()}) <= 2
    loader.close()
    assert loader.map(lambda number: shared_decoder(), range(4)) == [shared_decoder()] * 4


def test_threads_load_the_same_sounds_and_leave_no_process(threads: None, write_sources: Write) -> None:
    clean = read_sources(write_sources(tones()))
    wanted = pool(clean_items(clean, sample_rate_hz=RATE_HZ), config())
    wanted.loader._max_threads = 1
    wanted.prepare(0)
    children = set(psutil.Process().children())
    made = make_mixer(TrainingData(clean=clean), config(augment=True), seed=0, sample_rate_hz=RATE_HZ)
    made.batch(3)
    assert _samples(made.pools["clean"]) == _samples(wanted)
    assert set(psutil.Process().children()) <= children
    torch.set_num_threads(1)
    again = make_mixer(TrainingData(clean=clean), config(augment=True), seed=0, sample_rate_hz=RATE_HZ)
    assert raw(again.batch(3)) == raw(made.batch(3))  # drawn now: on some machines threads change the last bits


def _samples(loaded: Pool) -> dict[str, list[tuple[str, bytes]]]:
    """Sounds of a pool in order, by label."""
    return {
        label: [
            (Path(one.item.clip).stem, one.samples_N[one.first : one.first + one.num_samples].numpy().tobytes())
            for one in sounds
        ]
        for label, sounds in loaded.by_label.items()
    }


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_first_error_ends_all(threads: None, num_threads: int) -> None:
    loader, done = Loader(), []
    loader._max_threads = num_threads

    def job(number: int) -> None:
        done.append(number)
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        loader.map(job, range(5000))
    assert len(done) < 5000
    loader.close()


def test_a_sound_that_is_longer_than_it_says_finds_room(write_sources: Write) -> None:
    items = clean_items(read_sources(write_sources(tones(("bell", "dog"), 2))), sample_rate_hz=RATE_HZ)
    wanted, grown = pool(items, config()), pool([dataclasses.replace(item, duration_s=0.1) for item in items], config())
    for each in (wanted, grown):
        each.prepare(0)
    assert _samples(wanted) == _samples(grown)
    assert np.isfinite(grown.by_label["bell"][0].samples_N.numpy()).all()
