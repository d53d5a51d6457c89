"""Single-source clips: parts of every label, and the fingerprint of a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.corpus.sources import SourceClips, read_sources

Write = Callable[..., Path]


def sources(counts: dict[str, int]) -> SourceClips:
    """Clips by label, out of order."""
    rows = [{"path": f"{label}/{i:02d}.wav", "label": label} for label, count in counts.items() for i in range(count)]
    order = np.random.default_rng(0).permutation(len(rows))
    return SourceClips(table=pa.Table.from_pylist([rows[i] for i in order]), root="")


def paths(clips: SourceClips) -> list[str]:
    return clips.table["path"].to_pylist()


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_each_clip_is_in_one_part_and_labels_are_divided_evenly(num_parts: int) -> None:
    clips = sources({"dog": 7, "rain": 12, "bell": 1})
    parts = [clips.part(number, num_parts) for number in range(num_parts)]
    everything = [path for part in parts for path in paths(part)]
    assert len(everything) == len(clips) and set(everything) == set(paths(clips))
    for label, count in {"dog": 7, "rain": 12, "bell": 1}.items():
        sizes = [part.labels.count(label) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
    for number, part in enumerate(parts):
        rest = paths(clips.without(number, num_parts))
        assert rest == [path for path in paths(clips) if path not in paths(part)], "in the order of the list"


def test_clips_with_similar_names_stay_together() -> None:
    first = sources({"dog": 8}).part(0, 2)
    assert sorted(paths(first)) == [f"dog/{i:02d}.wav" for i in range(4)]


def test_parts_do_not_depend_on_the_order_of_the_list() -> None:
    clips = sources({"dog": 7, "rain": 5})
    reordered = SourceClips(table=clips.table.take(pa.array(range(len(clips) - 1, -1, -1))), root="")
    for number in range(3):
        assert set(paths(clips.part(number, 3))) == set(paths(reordered.part(number, 3)))


def test_halves_of_a_list_have_every_clip_of_the_chosen_folds(write_sources: Write) -> None:
    noise_T = np.random.default_rng(0).normal(0.0, 0.1, 100)
    path = write_sources([(f"{label}{i}", label, i % 2, noise_T) for label in "ab" for i in range(8)])
    clips = read_sources(path)
    halves = [set(paths(clips.without(number, 2))) for number in (0, 1)]
    assert len(clips) == 16 and [len(half) for half in halves] == [8, 8]
    assert halves[0] | halves[1] == set(paths(clips))
    fold = read_sources(path, folds=[1]).without(0, 2)
    assert sorted(Path(path).stem for path in paths(fold)) == ["a5", "a7", "b5", "b7"], "parts of the chosen folds"
