"""A run on two Ray nodes that is interrupted at random moments ends as an undisturbed one; ``make chaos`` does more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import chaos, chaos_victims


def test_points_are_seeded_and_take_all_steps_and_victims_in_turn() -> None:
    drawn = chaos.draw_points(60, seed=3)
    assert drawn == chaos.draw_points(60, seed=3) != chaos.draw_points(60, seed=4)
    points = [point for episode in drawn for point in episode]
    assert {(point.step, point.victim) for point in points} == {
        (step, victim) for step in chaos.STEPS for victim in chaos.VICTIMS[step]
    }


def test_listings_lose_their_newest_entries_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", Path.glob)  # put back afterwards
    names = [f"shard-{number}.done.json" for number in range(5)]
    for number, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(number, number))
    sign = tmp_path / "sign"
    chaos_victims.lose_listings(sign)
    assert len(list(tmp_path.glob("*.done.json"))) == 5
    sign.touch()
    assert [path.name for path in tmp_path.glob("*.done.json")] == names[:3]
    assert len(list(tmp_path.glob("*.done.json"))) == 5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_interrupted_run_ends_with_the_data_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: chaos.Undisturbed
) -> None:
    (episode,) = chaos.run_chaos(6, seed=1, work=tmp_path, undisturbed=undisturbed)
    assert len(episode.hit) >= 3
    assert episode.differences == []
