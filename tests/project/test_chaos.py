"""A run on two Ray nodes that is interrupted at random moments ends as an undisturbed one; ``make chaos`` does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import chaos


def test_points_are_seeded_and_take_all_steps_and_victims_in_turn() -> None:
    drawn = chaos.draw_points(60, seed=3)
    assert drawn == chaos.draw_points(60, seed=3) != chaos.draw_points(60, seed=4)
    points = [point for episode in drawn for point in episode]
    assert {(point.step, point.victim) for point in points} == {
        (step, victim) for step in chaos.STEPS for victim in chaos.VICTIMS[step]
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_interrupted_run_ends_with_the_data_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: chaos.Undisturbed
) -> None:
    (episode,) = chaos.run_chaos(8, seed=1, work=tmp_path, undisturbed=undisturbed)
    assert len(episode.hit) >= 4
    assert episode.differences == []
