"""The loop from each kind of teacher that users have, in random weights: pass, filter, student, evaluation, again."""

import dataclasses
import json

import pytest

from cluster.session import connect
from engine.corpus.sources import read_sources
from engine.passes.speed.plan import plan_pass
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks
from engine.separators import NetworkConfig, find_separator, load, read_description
from engine.separators.convert.convert import convert
from tests.support.models.originals import EMBEDDING, write_audiosep, write_clap, write_clapsep, write_tokenizer
from train.api import evaluate
from train.data.config import MixConfig
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural
from tune.inputs import resolve
from tune.run import run

HELD_OUT = synth.LABELS[0]
RATE_HZ = 8000  # of the students; the teachers have 32,000 Hz


@pytest.fixture(scope="module")
def ray_session():
    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A CLAP that has nothing to do with the teachers."""
    folder = tmp_path_factory.mktemp("clap")
    convert(write_clap(folder / "clap.pt", audio=False), folder / "clap", tokenizer=write_tokenizer(folder))
    return folder / "clap"


@pytest.fixture(scope="module")
def config(encoder, tmp_path_factory):
    """A run over natural clips of all labels but one; that one is in the validation alone."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = synth.write_corpus(folder, num_per_label={1: 1, 2: 2, 3: 1}, seed=0, duration_s=1.2)
    known = folder / "known.csv"
    known.write_text("\n".join(line for line in clips.read_text().splitlines() if HELD_OUT not in line) + "\n")
    natural = write_natural(
        read_sources(known, folds=[2]), folder, num_clips=[(2, 4), (3, 1)], sample_rate_hz=32000, seed=0
    )
    return RunConfig(
        corpus=str(natural),
        clean=str(known),
        clean_folds=(1,),
        text_encoder=str(encoder),
        network=NetworkConfig(
            channels=16, num_blocks=2, num_bands=16, num_fft=256, hop_samples=128, sample_rate_hz=RATE_HZ
        ),
        distil=DistilConfig(steps=4, mix=MixConfig(batch_size=4, segment_s=0.5), num_workers=0),
        schedule=(Thresholds(), Thresholds()),
        validation=ValidationConfig(clips=str(clips), folds=(3,), num_mixtures=3),
    )


def audiosep(folder):
    convert(write_audiosep(folder / "audiosep.ckpt"), folder / "teacher", tokenizer=write_tokenizer(folder / "words"))
    return folder / "teacher"


def clapsep(folder):
    checkpoint = write_clapsep(folder / "clapsep.ckpt", folder / "clap.pt")
    convert(checkpoint, folder / "teacher", clap=folder / "clap.pt", tokenizer=write_tokenizer(folder / "words"))
    return folder / "teacher"


@pytest.mark.slow
@pytest.mark.parametrize("make", [audiosep, clapsep])
def test_a_teacher_of_another_kind_and_rate_teaches_a_student_that_reads_text(ray_session, config, make, tmp_path):
    teacher = make(tmp_path)
    config = dataclasses.replace(config, separator=str(teacher))
    seed, *students = run(config, tmp_path / "run")["iterations"]
    assert seed["separator"] == str(teacher) and seed["validation"]["num_stems"] == 6
    assert [student["num_kept"] for student in students] == [4 * 2 + 3] * 2
    folders = [tmp_path / "run" / "iterations" / str(number) for number in (1, 2)]
    for folder in folders:
        index, _ = read_tracks(folder / "tracks")
        assert set(index["sample_rate_hz"].to_pylist()) == {RATE_HZ}
    first, second = (read_description(folder / "separator") for folder in folders)
    assert first["network"]["text_features"] == EMBEDDING and HELD_OUT not in first["labels"]
    assert [entry["start"] for entry in second["history"]] == [None, first["fingerprint"]]
    assert json.loads((folders[1] / "stems" / "pass.json").read_text())["separator"] == first["fingerprint"]
    figures = evaluate(folders[1] / "separator", config.validation.clips, num_mixtures=3)
    assert HELD_OUT in figures["by_label"] and HELD_OUT in seed["validation"]["by_label"]
    assert run(config, tmp_path / "run")["iterations"] == [seed, *students]


@pytest.mark.parametrize("make", [audiosep, clapsep])
def test_a_pass_of_such_a_teacher_can_be_planned(config, make, tmp_path):
    inputs = resolve(dataclasses.replace(config, separator=str(make(tmp_path))))
    plan = plan_pass(inputs.corpus, separator=inputs.separator, config=config.engine, num_rows=2)
    assert plan["num_failed"] == 0 and plan["sample_rows"] == 2


def test_settings_that_do_not_fit_the_separator_are_refused(config, encoder, tmp_path):
    teacher = str(audiosep(tmp_path))
    open_vocabulary = dataclasses.replace(config, separator=teacher)
    resolve(open_vocabulary)
    wrong = [
        (
            {"text_encoder": None},
            r"^validation\.clips must have labels that the run's separators know, got \['" + HELD_OUT,
        ),
        ({"engine": dataclasses.replace(config.engine, stem_rate_hz=4000)}, r"engine\.stem_rate_hz must be 8000, the"),
        (
            {"network": dataclasses.replace(config.network, text_features=9), "text_encoder": None},
            "text_encoder must be set",
        ),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            resolve(dataclasses.replace(open_vocabulary, **changes))
    from tests.support.signals import tiny_checkpoint

    closed = tiny_checkpoint(tmp_path / "closed", list(synth.LABELS))
    with pytest.raises(ValueError, match="text_encoder must be null for a separator that is trained further, got"):
        resolve(dataclasses.replace(config, separator=str(closed)))
    resolve(dataclasses.replace(config, separator=None))
    assert find_separator(teacher).reads_text and not find_separator(teacher).is_trainable
    with pytest.raises(ValueError, match="must be the built-in network, got audiosep"):
        load(teacher)
