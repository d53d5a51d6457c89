"""From lists and selections to a mixer, in this process and without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.corpus.sources import read_sources
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks, select_tracks
from engine.storage.fingerprints import read_sealed, write_sealed
from tests.conftest import TINY
from tests.support.remixes import KINDS, LABELS, RATE_HZ, SCORES, Natural, Write, config, kept_tracks, raw, tone, tones
from train.data.config import MixConfig
from train.data.training_data import TrainingData, make_mixer
from train.student import DistilConfig, Student
from train.task import data_record

EVERYTHING = {
    **{"clip_fraction": 0.3, "silence_rate": 0.3, "absent_labels": {"fraction": 0.5}},
    **{"natural_targets": {"fraction": 0.2}, "label_balance": {"balance": 0.5}},
    **{"estimate_weights": {"use": "loss"}, "consistency": {"weight": 0.1}},
}


def num_items(data: TrainingData, mix: MixConfig) -> dict[str, int]:
    """Items by pool, without the pools that are empty."""
    made = make_mixer(data, mix, seed=0, sample_rate_hz=RATE_HZ)
    return {kind: len(pool.items) for kind, pool in made.pools.items() if pool.items}


def test_only_what_the_mix_uses_is_loaded(natural: Natural, write_sources: Write) -> None:
    data = TrainingData(clean=read_sources(write_sources(tones())), tracks=str(natural.tracks))
    num_tracks = len(kept_tracks())
    plain = {"clean": 24, "tracks": num_tracks}
    assert num_items(data, config()) == plain
    assert num_items(data, config(absent_labels={"fraction": 1.0})) == plain  # silence_rate is 0
    assert num_items(data, config(natural_targets={"fraction": 0.1})) == plain | {"natural": 3}
    assert num_items(data, config(mixit={"fraction": 0.1})) == plain | {"natural": 3}
    assert num_items(data, config(clip_fraction=0.1)) == plain | {"pairs": num_tracks}
    assert num_items(data, config(**EVERYTHING)) == plain | {"natural": 3, "pairs": num_tracks, "absent": 4}
    assert KINDS.keys() >= {clip for clip, _ in kept_tracks()}


def test_a_part_of_the_clean_clips_can_be_left_out(write_sources: Write) -> None:
    clean = read_sources(write_sources(tones()))
    mixers = (
        make_mixer(TrainingData(clean=clips), config(), seed=0, sample_rate_hz=RATE_HZ)
        for clips in (clean, *(clean.without(part, 2) for part in (0, 1)))
    )
    parts = [{item.clip for item in made.pools["clean"].items} for made in mixers]
    assert [len(part) for part in parts] == [24, 12, 12]
    assert parts[1] | parts[2] == parts[0]


@pytest.fixture
def owls(write_pass: Write, tmp_path: Path) -> TrainingData:
    """Tracks of a bell and a dog, from clips whose labels also name an absent owl."""
    stems = [
        (f"clip{i}", label, tone(440 + 100 * i), SCORES | {"stem_level_db": -30.0 if label == "owl" else -3.0})
        for i in range(2)
        for label in (LABELS[i], "owl")
    ]
    select_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    return TrainingData(tracks=str(tmp_path / "tracks"))


def test_a_label_of_which_only_the_absence_is_known_is_left_out(owls: TrainingData) -> None:
    """A separator that got the label would learn that it never sounds; one that has the label learns from it."""
    mix = config(silence_rate=1.0, absent_labels={"fraction": 1.0})
    made = make_mixer(owls, mix, seed=0, sample_rate_hz=RATE_HZ)
    assert made.labels == LABELS[:2]
    assert made.pools["absent"].items == []


def test_a_teacher_that_knows_a_label_learns_from_its_absence(owls: TrainingData, write_checkpoint: Write) -> None:
    mix = config(silence_rate=1.0, absent_labels={"fraction": 1.0})
    start = str(write_checkpoint(["The sound of Owl"]))
    made = make_mixer(owls, mix, seed=0, sample_rate_hz=RATE_HZ, start=start)
    assert made.labels == ("The sound of Owl", *LABELS[:2])
    batch = made.batch(0)
    assert set(batch.index_B.tolist()) == {0}
    assert not batch.target_GT.any()
    assert all("The sound of Owl" in item.labels_present for item in made.pools["absent"].items)


@pytest.mark.parametrize("assignment", ["labels", "best"])
def test_a_student_learns_in_this_process_with_every_ablation(
    natural: Natural, write_sources: Write, assignment: str
) -> None:
    mix = config(**EVERYTHING, mixit={"fraction": 0.3, "assignment": assignment}, batch_size=8)
    data = TrainingData(clean=read_sources(write_sources(tones())), tracks=str(natural.tracks))
    made = make_mixer(data, mix, seed=0, sample_rate_hz=RATE_HZ)
    again = make_mixer(data, mix, seed=0, sample_rate_hz=RATE_HZ)
    device, settings = torch.device("cpu"), DistilConfig(steps=30, mix=mix, learning_rate=1e-2, warmup_steps=1)
    student = Student(settings, made.labels, start=None, network=TINY, device=device)
    losses_db = [float(student.learn(student.separator, made.batch(step))) for step in range(30)]
    assert sum(losses_db[-8:]) < sum(losses_db[:8])
    assert raw(again.batch(29)) == raw(made.batch(29))


def test_a_training_without_ray_does_not_load_it() -> None:
    code = (
        "import sys, train.data.training_data, train.student, train.evaluation.evaluate; sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_student_keeps_the_licences_of_the_weights_that_made_its_tracks(natural: Natural) -> None:
    data = TrainingData(tracks=str(natural.tracks))
    assert data_record(data)["teacher_terms"] == []  # of a pass of an older version
    path = read_tracks(natural.tracks)[1] / "manifest.json"
    before = path.read_bytes()
    write_sealed(path, {**read_sealed(path, dict), "separator_terms": ["CLAPSep: none stated"]})
    assert data_record(data)["teacher_terms"] == ["CLAPSep: none stated"]
    path.write_bytes(before)
