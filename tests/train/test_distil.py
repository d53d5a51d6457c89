"""Distillation on real Ray Train workers and in this process: it learns, resumes, repeats and stops early."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cluster.session import connect
from engine.corpus.sources import read_sources
from engine.separators import NetworkConfig, load, read_description
from tests.support.remixes import batch_of
from train.data.batch import Batch
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.distil import distil
from train.evaluation.mixtures import ValidationConfig, resolve_validation
from train.progress import load_state, remove_damaged, save_state
from train.student import DistilConfig, Student
from train.task import TrainingTask, training_identity
from tune.demo import sounds as synth

_NETWORK = NetworkConfig(channels=32, num_blocks=3, num_bands=24, num_fft=256, hop_samples=128, sample_rate_hz=8000)
_CONFIG = DistilConfig(
    steps=12,
    mix=MixConfig(batch_size=4, segment_s=0.5),
    validate_every_steps=4,
    learning_rate=3e-3,
    num_workers=0,
    threads_per_worker=1,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return synth.write_corpus(folder, num_per_label={1: 2, 2: 2}, seed=0, duration_s=2.0)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


def _data(clips: Path, *folds: int) -> TrainingData:
    return TrainingData(clean=read_sources(clips, folds=folds or None))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder).state_dict()


@pytest.mark.slow
def test_training_in_process_learns_and_repeats_to_the_bit(ray_session: None, clips: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(_CONFIG, steps=120, validate_every_steps=40)
    validation = resolve_validation(ValidationConfig(clips=str(clips), folds=(1,), num_mixtures=8))
    entries = [
        distil(
            tmp_path / name,
            data=_data(clips, 1),
            config=config,
            network=_NETWORK,
            validation=validation,
        )
        for name in ("first", "second")
    ]
    curve = entries[0]["curve"]
    assert [point["step"] for point in curve] == [40, 80, 120]
    assert curve[-1]["si_sdri_db"] > 3.0  # an untrained network has -0.6
    assert entries[1]["curve"] == curve
    first, second = _weights(tmp_path / "first"), _weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    history = read_description(tmp_path / "first")["history"]
    assert [entry["steps"] for entry in history] == [120]


@pytest.mark.slow
def test_two_workers_train_together_and_the_history_names_the_teacher(
    ray_session: None, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clips.parent)
    clips, teacher = Path(clips.name), tmp_path / "teacher"  # workers run in other folders
    distil(teacher, data=_data(clips, 1), config=_CONFIG, network=_NETWORK)
    config = dataclasses.replace(_CONFIG, num_workers=2, steps=8)
    entry = distil(tmp_path / "student", data=_data(clips, 2), config=config, start=teacher)
    assert entry["steps"] == 8
    assert entry["start"] == read_description(teacher)["fingerprint"]
    assert len(read_description(tmp_path / "student")["history"]) == 2
    before, after = _weights(teacher), _weights(tmp_path / "student")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob(".student-training"))


@pytest.mark.slow
def test_a_finished_training_is_not_repeated_and_another_is_refused(
    ray_session: None, clips: Path, tmp_path: Path
) -> None:
    first = distil(tmp_path / "out", data=_data(clips, 1), config=_CONFIG, network=_NETWORK)
    assert distil(tmp_path / "out", data=_data(clips, 1), config=_CONFIG, network=_NETWORK) == first
    other = dataclasses.replace(_CONFIG, seed=1)
    with pytest.raises(ValueError, match="got a separator of another training"):
        distil(tmp_path / "out", data=_data(clips, 1), config=other, network=_NETWORK)
    shutil.copytree(clips.parent, tmp_path / "moved", copy_function=shutil.copyfile)
    moved = _data(tmp_path / "moved" / clips.name, 1)
    assert moved.clean is not None
    assert distil(tmp_path / "out", data=moved, config=_CONFIG, network=_NETWORK) == first
    shutil.copyfile(moved.clean.table["path"][0].as_py(), moved.clean.table["path"][1].as_py())
    replaced = _data(tmp_path / "moved" / clips.name, 1)
    with pytest.raises(ValueError, match=r"got 1 of \d+ files that were replaced, added or removed since: '"):
        distil(tmp_path / "out", data=replaced, config=_CONFIG, network=_NETWORK)


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings of nested mappings as ``--set`` takes them."""
    words: list[str] = []
    for name, value in config.items():
        more = _settings(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}={value}"]
        words += more
    return words


@pytest.mark.slow
def test_a_training_whose_power_was_cut_resumes_from_its_last_good_state_and_ends_as_if_undisturbed(
    ray_session: None, clips: Path, tmp_path: Path
) -> None:
    """kill -9 of all processes; what they wrote last is empty, as after a power cut; the same command does the rest."""
    training = {"steps": 360, "validate_every_steps": 60, "threads_per_worker": 1, "learning_rate": 3e-3}
    mix = {"batch_size": 4, "segment_s": 0.5}
    settings = _settings({"network": dataclasses.asdict(_NETWORK), "distil": training | {"mix": mix}})
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "clearsep", "distil", "-o", str(out), "--from", "scratch"]
    command += ["--clean", str(clips), "--folds", "1", *words]
    process = subprocess.Popen(command, start_new_session=True)
    states: list[Path] = []
    while process.poll() is None and len(states) < 2:
        states = sorted(tmp_path.glob(".cut-training/*/state-*.pt"))
        time.sleep(0.01)
    assert process.poll() is None, "the training was over before it could be killed"
    everything = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in everything:
        one.kill()
    process.wait()
    psutil.wait_procs(everything[:-1], timeout=30)
    *_, good, last = sorted(tmp_path.glob(".cut-training/*/state-*.pt"))
    for path in [last, *tmp_path.glob(".cut-training/ray-*/*.json")]:
        path.write_bytes(b"")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"{last} is damaged" in again.stderr
    assert f"resumed_after_step {int(good.name.split('-')[1])}" in again.stderr
    config = dataclasses.replace(_CONFIG, **training, mix=MixConfig(**mix), num_workers=0)
    whole = distil(tmp_path / "whole", data=_data(clips, 1), config=config, network=_NETWORK)
    assert [point["step"] for point in whole["curve"]] == list(range(60, 361, 60))
    assert read_description(out)["history"][-1]["curve"] == whole["curve"]
    ended, wanted = _weights(out), _weights(tmp_path / "whole")
    assert all(torch.equal(ended[name], wanted[name]) for name in wanted)


def test_a_state_is_on_the_disk_before_a_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    save_state(tmp_path, {"step": 1}, step=1)
    (state,) = tmp_path.iterdir()
    assert flushed >= {state.stat().st_ino, tmp_path.stat().st_ino}


@pytest.mark.parametrize(("num_damaged", "step"), [(0, 30), (1, 20), (2, None)])
def test_the_newest_state_that_is_not_damaged_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_damaged: int, step: int | None
) -> None:
    for number in (10, 20, 30):
        save_state(tmp_path, {"step": number}, step=number)
    newest_first = sorted(tmp_path.iterdir(), reverse=True)
    assert len(newest_first) == 2
    for path, data in list(zip(newest_first, (b"", newest_first[1].read_bytes() + b"x"), strict=True))[:num_damaged]:
        path.write_bytes(data)
    assert load_state(tmp_path) == (None if step is None else {"step": step})
    remove_damaged(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 - num_damaged
    assert caplog.text.count("is damaged; the training resumes from the state before it") == num_damaged


def test_too_few_labels_fail_before_anything_starts(tmp_path: Path, clips: Path) -> None:
    lines = [line for line in clips.read_text().splitlines() if "path" in line or "rain" in line]
    (clips.parent / "rain.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="two labels"):
        distil(tmp_path / "out", data=_data(clips.parent / "rain.csv"), config=_CONFIG)
    with pytest.raises(ValueError, match="training data must have clean clips or tracks, got neither"):
        TrainingData()


def test_labels_are_spelled_as_the_separator_spells_them(
    write_sources: Callable[..., Path], write_checkpoint: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    clips = write_sources([(name, name, 1, rng.standard_normal(8000)) for name in ("dog_bark", "Rain", "bell")])
    task = TrainingTask(
        config=_CONFIG,
        data=_data(clips),
        network=_NETWORK,
        start=str(write_checkpoint(["dog bark", "rain"])),
        validation=None,
    )
    mixer = task.mixer()
    assert mixer.labels == ("dog bark", "rain", "bell")
    assert {int(index) for step in range(8) for index in mixer.batch(step).index_B} == {0, 1, 2}


def test_a_training_of_other_clips_is_another_training_and_one_of_moved_clips_is_not(
    write_sources: Callable[..., Path], tmp_path: Path
) -> None:
    noise_T = np.random.default_rng(0).standard_normal(8000)
    first = write_sources([(name, name, 1, noise_T) for name in ("dog", "rain")], folder="first")
    moved = write_sources([(name, name, 1, noise_T) for name in ("dog", "rain")], folder="moved")
    other = write_sources([(name, name, 1, noise_T) for name in ("dog", "bell")], folder="other")

    def identity(clips: Path, **changes: Any) -> str:
        validation = resolve_validation(ValidationConfig(clips=str(clips), num_mixtures=5))
        config = dataclasses.replace(_CONFIG, **changes)
        return training_identity(data=_data(clips), config=config, network=_NETWORK, validation=validation)

    assert identity(first) == identity(moved) == identity(first, threads_per_worker=2)
    assert len({identity(first), identity(other), identity(first, patience=2), identity(first, seed=1)}) == 4


def test_settings_that_cannot_work_are_refused_before_anything_starts(tmp_path: Path, clips: Path) -> None:
    config = dataclasses.replace(_CONFIG, patience=2)
    with pytest.raises(ValueError, match="patience must have a validation to choose by, got none"):
        distil(tmp_path / "out", data=_data(clips, 1), config=config, network=_NETWORK)
    with pytest.raises(ValueError, match=r"nowhere.*no finished selection"):
        distil(tmp_path / "out", data=TrainingData(tracks=str(tmp_path / "nowhere")), config=_CONFIG)
    assert not list(tmp_path.iterdir())


def _student(config: DistilConfig) -> Student:
    return Student(config, ["rain", "bell"], start=None, network=_NETWORK, device=torch.device("cpu"))


def test_a_restored_student_continues_like_an_undisturbed_one(tmp_path: Path) -> None:
    def batch(step: int) -> Batch:
        """A mixture with one query and one with two, whose stems should add up."""
        generator = torch.Generator().manual_seed(step)
        mix_GT = torch.randn(2, 4000, generator=generator)
        return batch_of(mix_GT, 0.5 * mix_GT, [0, 1, 1])

    whole, first = _student(_CONFIG), _student(_CONFIG)
    for step in range(6):
        whole.learn(whole.separator, batch(step))
        if step < 3:
            first.learn(first.separator, batch(step))
    torch.save(first.state(), tmp_path / "student.pt")
    second = _student(dataclasses.replace(_CONFIG, seed=9))
    second.restore(torch.load(tmp_path / "student.pt", weights_only=True))
    for step in range(3, 6):
        second.learn(second.separator, batch(step))
    ended, wanted = second.average.state_dict(), whole.average.state_dict()
    assert all(torch.equal(ended[name], wanted[name]) for name in wanted)


class _Split(torch.nn.Module):
    """Returns stems of noise that add up to the target of their group, and has a weight without effect."""

    def __init__(self, batch: Batch, seed: int) -> None:
        super().__init__()
        noise_BT = torch.randn(batch.mix_BT.shape, generator=torch.Generator().manual_seed(seed))
        left_GT = batch.target_GT - batch.regroup(noise_BT)[0]
        noise_BT += left_GT[batch.group_B] / batch.group_B.bincount()[batch.group_B, None]
        self.stems_BT, self.weight = noise_BT, torch.nn.Parameter(torch.ones(1))

    def forward(self, mix_BT: torch.Tensor, index_B: torch.Tensor, rivals_BL: torch.Tensor) -> torch.Tensor:
        assert len(mix_BT) == len(index_B) == len(rivals_BL) == len(self.stems_BT)
        return self.stems_BT + 0.0 * self.weight


def test_the_loss_of_a_student_is_of_the_sum_of_the_stems_of_a_group() -> None:
    """The loss is -30 dB for any division of the target among two queries, if the target is the mixture."""
    mix_GT = torch.randn(2, 4000)
    batch = batch_of(mix_GT, mix_GT, [0, 1, 1])
    student = _student(_CONFIG)
    losses_db = [float(student.learn(_Split(batch, seed), batch)) for seed in range(3)]
    assert losses_db == pytest.approx([-30.0] * 3, abs=0.01)
    assert student.step == 3


def test_patience_stops_early_and_returns_the_best() -> None:
    student = _student(dataclasses.replace(_CONFIG, steps=1000, patience=2))
    best = None
    for sdri_db in (1.0, 3.0, 2.0, 2.9):
        assert not student.finished
        student.average.queries.vectors_LQ.data += 1.0
        if sdri_db == 3.0:
            best = student.average.queries.vectors_LQ.clone()
        student.note(0.0, {"sdri_db": sdri_db, "si_sdri_db": 0.0})
    assert student.finished
    assert best is not None
    assert torch.equal(student.result().queries.vectors_LQ, best)
