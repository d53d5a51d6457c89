"""Training of students that read text: what encoder they may have, and what their workers get."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.corpus.sources import read_sources
from engine.separators import NetworkConfig, QuerySeparator, find_encoder, make_embedder, read_description, save
from tests.support.models.clap import write_tiny_clap
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.evaluation.mixtures import ValidationConfig, resolve_validation
from train.student import DistilConfig
from train.task import check_task, make_task, task_identity, training_identity, with_embeddings
from tune.demo import sounds as synth

WIDTH = 16
NETWORK = NetworkConfig(channels=16, num_blocks=2, num_bands=16, num_fft=256, hop_samples=128)
CONFIG = DistilConfig(steps=3, mix=MixConfig(batch_size=4, segment_s=0.25))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return synth.write_corpus(tmp_path_factory.mktemp("clips"), num_per_label={1: 1, 2: 1}, seed=0, duration_s=1.0)


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "clap"
    write_tiny_clap(folder, embedding_width=WIDTH)
    return folder


@pytest.fixture(scope="module")
def separators(clap, tmp_path_factory):
    """A closed separator, and one that reads text."""
    folder = tmp_path_factory.mktemp("separators")
    save(QuerySeparator(NETWORK, ["dog"]), folder / "closed")
    reading = QuerySeparator(dataclasses.replace(NETWORK, text_features=WIDTH), [])
    reading.embedder = make_embedder(find_encoder(clap))
    reading.grow([synth.LABELS[0]])
    save(reading, folder / "text", about={"queries": find_encoder(clap)})
    return folder


def task_of(clips, **more):
    return make_task(data=TrainingData(clean=read_sources(clips, folds=[1])), config=CONFIG, **more)


def test_workers_get_the_embeddings_of_all_labels_and_open_no_encoder(clips, clap, tmp_path, monkeypatch):
    held_out = dataclasses.replace(
        resolve_validation(ValidationConfig(clips=str(clips), folds=(2,), num_mixtures=1)),
    )
    task = task_of(clips, network=NETWORK, text_encoder=clap, validation=held_out)
    labels = check_task(task)
    ready = with_embeddings(task, labels, tmp_path / "queries")
    assert set(ready.embeddings.labels) == set(synth.LABELS) and ready.network.text_features == WIDTH
    monkeypatch.setattr("engine.separators.clap.open_clap", None)
    again = with_embeddings(task, labels, tmp_path / "queries")
    assert torch.equal(again.embeddings.vectors_LE, ready.embeddings.vectors_LE)
    mixer = ready.mixer()
    student = ready.student(mixer.labels, device=torch.device("cpu"))
    before = student.separator.queries.project.weight.clone()
    losses = [float(student.learn(student.separator, mixer.batch(step))) for step in range(2)]
    assert np.isfinite(losses).all() and not torch.equal(student.separator.queries.project.weight, before)
    student.average.separate(torch.ones(1, 400), [held_out.sources.labels[0]])
    assert student.result().queries.labels == tuple(mixer.labels)


def test_a_student_keeps_the_encoder_of_its_teacher(clips, clap, separators, tmp_path):
    task = task_of(clips, start=separators / "text")
    assert task.queries == find_encoder(clap) == task_of(clips, start=separators / "text", text_encoder=clap).queries
    ready = with_embeddings(task, check_task(task), tmp_path)
    student = ready.student(ready.mixer().labels, device=torch.device("cpu"))
    assert student.separator.queries.labels[0] == synth.LABELS[0]
    assert set(student.separator.queries.labels) == set(synth.LABELS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text_encoder": "closed"}, "text_encoder must be a CLAP or a separator that reads text, got .*closed"),
        (
            {"start": "closed", "text_encoder": "text"},
            "text_encoder must be the encoder that .*closed was trained with",
        ),
        ({"start": "text", "text_encoder": "closed"}, "text_encoder must be the encoder that .*text was trained with"),
        ({"text_encoder": "nothing"}, "there is no separator in .*nothing"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(clips, separators, more, message):
    with pytest.raises(ValueError, match=message):
        task_of(clips, **{name: separators / folder for name, folder in more.items()})


def test_the_width_of_text_comes_from_the_encoder(clips, clap, tmp_path):
    with pytest.raises(ValueError, match=r"text_encoder must be set for network\.text_features=512, got null"):
        task_of(clips, network=dataclasses.replace(NETWORK, text_features=512))
    task = task_of(clips, network=dataclasses.replace(NETWORK, text_features=512), text_encoder=clap)
    with pytest.raises(ValueError, match=r"network.text_features must be 16, the width of the encoder, got 512"):
        with_embeddings(task, ["dog"], tmp_path)


def test_another_encoder_is_another_training(clips, clap, separators, tmp_path):
    def identity(**more):
        return training_identity(data=TrainingData(clean=read_sources(clips)), config=CONFIG, network=NETWORK, **more)

    write_tiny_clap(tmp_path / "other", embedding_width=WIDTH, seed=8)
    reading = identity(text_encoder=clap)
    assert reading == identity(text_encoder=separators / "text")  # the same encoder, by way of a separator
    assert len({identity(), reading, identity(text_encoder=tmp_path / "other")}) == 3
    task = task_of(clips, start=separators / "text")
    assert task_identity(task) == task_identity(task_of(clips, start=separators / "text", text_encoder=clap))
    assert read_description(separators / "text")["queries"]["template"] == "The sound of {label}"
