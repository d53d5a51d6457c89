"""Self-Remixing: stems of two natural clips change places, and the targets stay the clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.separators import QuerySeparator
from engine.storage.paths import location
from tests.support.remixes import CLIPS, LABELS, RATE_HZ, config, contents, mixer
from tests.support.signals import TINY
from train.data.config import MixConfig
from train.data.items import Item
from train.data.strategies.self_remix import self_remixed
from train.progress import load_state, save_state
from train.student import DistilConfig, Student


class Perfect(torch.nn.Module):
    """Separates tones by their pitch, and remembers the rivals of its queries."""

    sample_rate_hz = RATE_HZ

    def __init__(self, labels: list[str]) -> None:
        super().__init__()
        self.labels, self.calls = labels, list[tuple[torch.Tensor, torch.Tensor]]()

    def forward(self, mix_BT: torch.Tensor, index_B: torch.Tensor, rivals_BL: torch.Tensor) -> torch.Tensor:
        self.calls.append((index_B, rivals_BL))
        spectrum_BF = torch.fft.rfft(mix_BT)
        hz_F = torch.fft.rfftfreq(mix_BT.shape[1], 1.0 / RATE_HZ)
        first_hz_B = torch.tensor([400 + 600 * LABELS.index(self.labels[i]) for i in index_B.tolist()])
        inside_BF = (hz_F >= first_hz_B[:, None] - 20) & (hz_F < first_hz_B[:, None] + 580)
        return torch.fft.irfft(spectrum_BF * inside_BF, mix_BT.shape[1])


def natural_batch(clean: list[Item], recordings: dict[str, list[Item]], **settings: object):
    natural = [one for one in recordings["natural"] if one.clip != "trio"]
    made = mixer(clean, config(batch_size=8, self_remix={"fraction": 0.5}, **settings), natural=natural)
    return made, made.batch(1)


def test_the_stems_of_two_clips_change_places_and_add_up_to_them(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made, batch = natural_batch(clean, recordings, silence_rate=0.0)
    assert batch.pairs and all(batch.is_complete_G[batch.group_B[row]] for pair in batch.pairs for row in pair[0])
    perfect = Perfect(made.labels)
    remixed = self_remixed(batch, perfect)
    assert torch.equal(remixed.target_GT, batch.target_GT)
    for first, second in batch.pairs:
        clips = [set(contents(batch.target_GT[batch.group_B[rows[0]]])) for rows in (first, second)]
        assert all(any(set(sounds) == clip for sounds in CLIPS.values()) for clip in clips)
        for row in (*first, *second):
            mates = set(contents(remixed.mix_BT[row]))
            assert len(mates & clips[0]) == len(mates & clips[1]) == 1
            own = made.labels[batch.index_B[row]]
            rivals = {label for label, one in zip(made.labels, remixed.rivals[row], strict=True) if one}
            assert rivals == {label for label, _ in mates} - {own} and own in {label for label, _ in mates}
    others = [row for row in range(len(batch.mix_BT)) if not any(row in rows for pair in batch.pairs for rows in pair)]
    assert others and torch.equal(remixed.mix_BT[others], batch.mix_BT[others])
    assert torch.equal(remixed.rivals[others], batch.rivals[others])
    again = perfect(remixed.mix_BT, remixed.index_B, remixed.rivals)
    summed_GT, _ = remixed.regroup(again)
    groups = sorted({int(batch.group_B[row]) for pair in batch.pairs for rows in pair for row in rows})
    inside = (groups, slice(100, -100))  # the windows of the shares end there
    torch.testing.assert_close(summed_GT[inside], batch.target_GT[inside], atol=0.01, rtol=0.0)
    index_B, rivals_BL = perfect.calls[0]  # the first separation, of the clips
    assert (rivals_BL.sum(1) == 1).all() and not rivals_BL[torch.arange(len(index_B)), index_B].any()


def test_a_silent_target_in_place_of_two_clips_is_left_alone(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    _, batch = natural_batch(clean, recordings, silence_rate=1.0)
    assert not batch.pairs and self_remixed(batch, Perfect([])) is batch


def test_queries_in_text_get_the_embeddings_of_their_remix(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made, batch = natural_batch(clean, recordings, silence_rate=0.0)
    vectors_LE = torch.eye(len(made.labels))
    in_text = replace(batch, query_BE=vectors_LE[batch.index_B], rivals=torch.ones(len(batch.index_B), len(vectors_LE)))
    assert torch.equal(
        self_remixed(in_text, _ByEmbedding(made.labels)).rivals[list(batch.pairs[0][0])],
        self_remixed(batch, Perfect(made.labels)).rivals[list(batch.pairs[0][0])],
    )


class _ByEmbedding(Perfect):
    def forward(self, mix_BT: torch.Tensor, query_BE: torch.Tensor, rivals_BE: torch.Tensor) -> torch.Tensor:
        return super().forward(mix_BT, query_BE.argmax(1), rivals_BE)


def test_a_student_learns_from_natural_clips_alone(clean: list[Item], recordings: dict[str, list[Item]]) -> None:
    """The loss of clips alone falls: no target of it comes from a stem."""
    natural = [one for one in recordings["natural"] if one.clip != "trio"]
    mix = config(batch_size=2, self_remix={"fraction": 1.0}, silence_rate=0.0)
    made = mixer(clean, mix, natural=natural)
    settings = DistilConfig(steps=40, mix=mix, warmup_steps=0)
    student = Student(settings, made.labels, start=None, network=TINY, device=torch.device("cpu"))
    assert isinstance(student.separator, QuerySeparator)
    losses_db = [float(student.learn(student.separator, made.batch(step))) for step in range(40)]
    assert np.isfinite(losses_db).all() and np.mean(losses_db[-10:]) < np.mean(losses_db[:10]) - 1.0
    assert student.separator.uses_unwanted


def test_a_training_that_resumes_ends_with_the_same_weights(
    clean: list[Item], recordings: dict[str, list[Item]], tmp_path: Path
) -> None:
    """Its targets come from the moving average, which is in the state."""
    natural = [one for one in recordings["natural"] if one.clip != "trio"]
    mix = config(batch_size=2, self_remix={"fraction": 0.5}, silence_rate=0.0)
    made, settings = mixer(clean, mix, natural=natural), DistilConfig(steps=12, mix=mix, warmup_steps=0)
    weights = []
    for stops in ([], [5]):
        torch.manual_seed(0)
        student = Student(settings, made.labels, start=None, network=TINY, device=torch.device("cpu"))
        for step in range(12):
            student.learn(student.separator, made.batch(step))
            if step in stops:
                save_state(location(tmp_path), student.state(), step=step)
                student = Student(settings, made.labels, start=None, network=TINY, device=torch.device("cpu"))
                state = load_state(location(tmp_path))
                assert state is not None
                student.restore(state)
        weights.append(student.result().state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_training_whose_queries_name_no_rivals_names_none_here_either(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made, batch = natural_batch(clean, recordings, silence_rate=0.0, rivals_rate=0.0)
    perfect = Perfect(made.labels)
    assert batch.pairs and not self_remixed(batch, perfect).rivals.any()
    assert not perfect.calls[0][1].any()


@pytest.mark.parametrize("name", ["mixit", "consistency"])
def test_what_needs_one_mixture_for_all_queries_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"one of {name} and self_remix must be null, got both; set .*self_remix=null"
    ):
        MixConfig(**{name: {}}, self_remix={"fraction": 0.3})


def test_more_natural_clips_than_there_are_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"self_remix\.fraction must be at most 1 together"):
        MixConfig(clip_fraction=0.8, self_remix={"fraction": 0.3})
