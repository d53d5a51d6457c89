"""Pools: which sounds are in memory at a step."""

from __future__ import annotations

import numpy as np
import pytest

from engine.corpus.sources import read_sources
from tests.support.remixes import RATE_HZ, Write, config, contents, mixer, mixtures, pool, sounds, tone, tones
from train.data.items import Item, clean_items


def test_a_pool_that_fits_loads_everything_on_every_rank(clean: list[Item]) -> None:
    loaded = [pool(clean, config(pool_s=24.0), rank=rank, num_ranks=2) for rank in (0, 1)]
    for each in loaded:
        each.prepare(0)
        assert len(sounds(each)) == 24
    loaded[0].prepare(10_000)
    assert len(sounds(loaded[0])) == 24


def test_short_clean_clips_count_with_their_own_length(write_sources: Write) -> None:
    """24 s of audio fit into 30 s of memory, however long clips are allowed to be."""
    items = clean_items(read_sources(write_sources(tones())), sample_rate_hz=RATE_HZ)
    loaded = pool(items, config(pool_s=30.0))
    loaded.prepare(0)
    assert len(sounds(loaded)) == 24


def test_a_rotating_pool_stays_within_its_size_and_loads_every_clip(clean: list[Item]) -> None:
    loaded = pool(clean, config(pool_s=5.0, refresh_steps=10))
    seen = []
    for step in range(0, 50, 5):
        loaded.prepare(step)
        assert len(sounds(loaded)) <= 5
        seen.append(frozenset(sounds(loaded)))
    assert seen[0::2] == seen[1::2]  # steps 0 and 5 are of one turn
    assert len(set(seen)) == 5
    assert frozenset.union(*seen) == {name for name, *_ in tones()}


def test_ranks_of_a_rotating_pool_divide_the_clips_without_overlap(clean: list[Item]) -> None:
    seen: list[set[str]] = []
    for rank in range(3):
        loaded = pool(clean, config(pool_s=4.0, refresh_steps=1), rank=rank, num_ranks=3)
        seen.append(set())
        for step in range(4):
            loaded.prepare(step)
            seen[-1] |= sounds(loaded)
    assert [len(each) for each in seen] == [8, 8, 8]
    assert len(set.union(*seen)) == 24


def test_going_back_a_turn_loads_the_same_sounds(clean: list[Item]) -> None:
    loaded = pool(clean, config(pool_s=5.0, refresh_steps=10))
    loaded.prepare(0)
    first = sounds(loaded)
    loaded.prepare(10)
    loaded.prepare(0)
    assert sounds(loaded) == first


def test_unreadable_clips_are_counted_and_skipped(write_sources: Write) -> None:
    path = write_sources([*tones(("bell", "dog"), 2), ("lost", "dog", 1, tone(440)), ("torn", "bell", 1, tone(440))])
    (path.parent / "lost.wav").unlink()
    (path.parent / "torn.wav").write_bytes(b"not audio")
    made = mixer(clean_items(read_sources(path), sample_rate_hz=RATE_HZ), config())
    made.batch(0)
    assert len(made.pools["clean"].unusable) == made.num_unusable == 2
    assert sounds(made.pools["clean"]) == {"bell-0", "bell-1", "dog-0", "dog-1"}


def test_silent_clips_are_not_drawn(write_sources: Write) -> None:
    path = write_sources([*tones(("bell", "dog"), 1), ("void", "dog", 1, np.zeros(8000))])
    rows = mixtures(mixer(clean_items(read_sources(path), sample_rate_hz=RATE_HZ), config(batch_size=32)), 1)
    assert all(set(contents(mix_T)) == {("bell", 0), ("dog", 0)} for mix_T, *_ in rows)


@pytest.mark.parametrize("labels", [("bell",), ()])
def test_fewer_than_two_labels_are_an_error(write_sources: Write, labels: tuple[str, ...]) -> None:
    """Clips of a second label are listed, but none of them can be read."""
    path = write_sources([*tones(labels, 2), ("torn", "siren", 1, tone(440))])
    (path.parent / "torn.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"two labels or more, got \[{', '.join(map(repr, labels))}\]"):
        mixer(clean_items(read_sources(path), sample_rate_hz=RATE_HZ), config()).batch(0)
