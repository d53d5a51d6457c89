"""The inputs of a run or search: what their names stand for is kept, and others of the same names are refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from engine.corpus.contents import claim_contents
from engine.passes.config import PassConfig
from engine.passes.records import claim_files
from engine.passes.tasks import Tasks
from engine.selection.thresholds import Thresholds
from engine.settings import plain
from engine.storage.files import write_json
from tests.support.signals import RATE_HZ, mixture, tiny_checkpoint, two_bands
from train.data.training_data import TrainingData
from train.evaluation.mixtures import ValidationConfig
from train.student import DistilConfig
from train.task import training_identity
from tune.config import RunConfig
from tune.inputs import claim_inputs, contents_only, resolve
from tune.run import run
from tune.steps.artifacts import Artifacts
from tune.steps.iteration import iterate
from tune.steps.work import Work

LISTS = ("clean", "validation", "training_validation")


def write_inputs(folder: Path, *, seed: int = 0) -> Path:
    """A corpus, lists of single-source clips and a separator; names and labels are the same for every seed."""
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", mixture(RATE_HZ, seed=100 * seed + number), RATE_HZ)
    (folder / "natural.csv").write_text("path,labels\n" + "".join(f"{n}.wav,low;high\n" for n in range(4)))
    for position, name in enumerate(LISTS):
        lines = ["path,label"]
        for label, samples_T in zip(("low", "high"), two_bands(RATE_HZ, seed=100 * seed + 10 + position), strict=True):
            soundfile.write(folder / f"{name}-{label}.wav", samples_T, RATE_HZ)
            lines.append(f"{name}-{label}.wav,{label}")
        (folder / f"{name}.csv").write_text("\n".join(lines))
    tiny_checkpoint(folder / "separator")
    return folder


def config(folder: Path, separator: Path | None = None, **settings: Any) -> RunConfig:
    return RunConfig(
        corpus=str(folder / "natural.csv"),
        clean=str(folder / "clean.csv"),
        separator=str((separator or folder) / "separator"),
        engine=PassConfig(clip_s=1.0),
        distil=DistilConfig(steps=1, patience=1),
        schedule=(Thresholds(min_re_sdr_db=0.0),),
        validation=ValidationConfig(clips=str(folder / "validation.csv")),
        training_validation=ValidationConfig(clips=str(folder / "training_validation.csv")),
        **settings,
    )


def moved(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out, copy_function=shutil.copyfile)
    return out


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "one")


def finished_run(out: Path, given: RunConfig) -> None:
    """A run whose last iteration is done, as far as a start looks at it."""
    run_inputs = resolve(given)
    pass_folder = out / "iterations" / "1"
    claim_files(pass_folder, run_inputs.corpus, min_labels=2)
    Tasks(pass_folder / "corpus").write(run_inputs.corpus, rows_per_task=2, min_labels=2)
    for number in (0, 1):
        write_json(out / "iterations" / str(number) / "iteration.json", {"iteration": number})


def test_a_finished_run_is_that_of_its_files_wherever_they_are(one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished_run(out, config(one))
    summary = run(config(one), out)
    assert [entry["iteration"] for entry in summary["iterations"]] == [0, 1]
    elsewhere = moved(one, tmp_path / "moved")
    assert run(config(elsewhere, separator=one), out) == summary
    assert yaml.safe_load((out / "config.yaml").read_text())["corpus"] == str(elsewhere / "natural.csv")
    other = write_inputs(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"clips of clean in .* got 2 of 2 files that were replaced, added or removed"):
        run(config(other, separator=one), out)
    for name in ("natural.csv", *(f"{number}.wav" for number in range(4))):
        shutil.copyfile(other / name, elsewhere / name)
    with pytest.raises(ValueError, match=r"files of the corpus of .*/1 must be .* got 4 of 4 files .*'0.wav'"):
        run(config(elsewhere, separator=one), out)
    assert run(config(one), out) == summary


@pytest.mark.parametrize("name", LISTS)
def test_a_replaced_clip_of_each_list_is_named(one: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    claim_inputs(resolve(config(one)), out, what="a run", is_begun=False)
    soundfile.write(one / f"{name}-low.wav", np.ones(RATE_HZ), RATE_HZ)
    with pytest.raises(ValueError, match=f"clips of {name} in .* got 1 of 2 files .* since: '{name}-low.wav'; restore"):
        claim_inputs(resolve(config(one)), out, what="a run", is_begun=True)


def test_another_corpus_or_other_labels_of_the_same_files_are_refused(one: Path, tmp_path: Path) -> None:
    for number, (name, old, new) in enumerate(
        (("natural.csv", "low;", "low;rain;"), ("clean.csv", "-low.wav,low", ""))
    ):
        out = tmp_path / str(number)
        claim_inputs(resolve(config(one)), out, what="a run", is_begun=False)
        text = (one / name).read_text()
        changed = (
            text.replace(old, new) if new else text.replace(",high", ",low").replace(f"{old}\n", f"{old[:-3]}high\n")
        )
        (one / name).write_text(changed)
        with pytest.raises(ValueError, match=f"got a run with another {'corpus' if number == 0 else 'clean'} "):
            claim_inputs(resolve(config(one)), out, what="a run", is_begun=True)
        (one / name).write_text(text)


def test_the_settings_of_a_run_without_the_names_of_its_inputs(one: Path, tmp_path: Path) -> None:
    first, other = (contents_only(plain(config(folder, separator=one))) for folder in (one, tmp_path / "elsewhere"))
    assert first == other and first["separator"] == str(one / "separator")
    more = plain(config(one, clean_folds=(1,)))
    assert contents_only(more) != first


@pytest.mark.parametrize("what", ["run", "search"])
def test_work_of_an_older_version_is_refused_in_words(one: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    (out / ("iterations" if what == "run" else "base")).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"got a {what} of an older version.*give another folder"):
        claim_inputs(resolve(config(one)), out, what=f"a {what}", is_begun=True)
    claim_inputs(resolve(config(one)), out, what=f"a {what}", is_begun=False)


def test_a_training_and_a_shared_artifact_are_those_of_the_contents_of_their_inputs(one: Path, tmp_path: Path) -> None:
    elsewhere, other = moved(one, tmp_path / "moved"), write_inputs(tmp_path / "other", seed=1)
    found: dict[str, list[object]] = {"training": [], "chosen": [], "validation": [], "pass": []}
    for number, folder in enumerate((one, elsewhere, other)):
        inputs = resolve(config(folder))
        data = TrainingData(clean=inputs.clean)
        assert inputs.validation is not None
        found["training"].append(training_identity(data=data, config=DistilConfig()))
        chosen = training_identity(
            data=TrainingData(clean=resolve(config(one)).clean),
            config=DistilConfig(patience=1),
            validation=inputs.training_validation,
        )
        found["chosen"].append(chosen)
        found["validation"].append(dict(inputs.validation.identity))
        record = tmp_path / f"{number}.parquet"
        contents = claim_contents(record, inputs.corpus.root, inputs.corpus.files(), what="files")
        found["pass"].append(Artifacts(out=tmp_path, shared=True).path_for("passes", 1, {"contents": contents}))
    for kind, (first, again, replaced) in found.items():
        assert first == again != replaced, kind


@pytest.mark.parametrize("shared", [True, False])
def test_the_folder_of_a_shared_pass_is_that_of_its_contents(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    class StoppedError(Exception):
        """Stops the iteration before its pass."""

    def run_pass(corpus: Any, folder: Path, **_: Any) -> None:
        raise StoppedError(folder.name)

    monkeypatch.setattr("tune.steps.iteration.run_pass", run_pass)
    inputs, artifacts = resolve(config(one)), Artifacts(out=tmp_path / "out", shared=shared)
    assert inputs.separator is not None
    work = Work(config=config(one), inputs=inputs, artifacts=artifacts, seed=inputs.separator)
    found = []
    for contents in ("one", "one", "other"):
        with pytest.raises(StoppedError) as stopped:
            iterate(replace(work, contents=contents), 1, Thresholds(), inputs.separator)
        found.append(str(stopped.value))
    assert found[0] == found[1] and (found[2] != found[0]) == shared
