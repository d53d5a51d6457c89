"""Work for a GPU is done in a Ray task that has one; here Ray has a GPU that does not exist."""

import os

import joblib
import pytest
import torch

import tune.steps.iteration
from cluster.gpu import call_on_gpu
from cluster.session import connect
from engine.selection.thresholds import Thresholds
from engine.separators import find_separator
from engine.taggers import load_tagger
from tests.support.signals import tiny_checkpoint, two_bands
from tests.support.wav import write_wav
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from tune.config import RunConfig
from tune.inputs import resolve
from tune.steps.artifacts import Artifacts
from tune.steps.iteration import validate
from tune.steps.judges import prepare_judges
from tune.steps.work import Work

RATE_HZ = 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with single-source clips, a corpus and a seed."""
    folder = tmp_path_factory.mktemp("gpu")
    lines = ["path,label"]
    for number in range(4):
        for label, samples_T in zip(("low", "high"), two_bands(RATE_HZ // 2, seed=number), strict=True):
            write_wav(folder / f"{label}{number}.wav", samples_T, sample_rate_hz=RATE_HZ)
            lines.append(f"{label}{number}.wav,{label}")
    (folder / "clips.csv").write_text("\n".join(lines))
    (folder / "natural.csv").write_text("path,labels\na.wav,low;high\n")
    tiny_checkpoint(folder / "seed")
    return folder


@pytest.fixture(scope="module")
def work(folder):
    config = RunConfig(
        corpus=str(folder / "natural.csv"),
        clean=str(folder / "clips.csv"),
        separator=str(folder / "seed"),
        schedule=(Thresholds(min_estimated_si_sdr_db=5.0, min_tagger_margin_db=0.0),),
        validation=ValidationConfig(clips=str(folder / "clips.csv"), num_mixtures=6),
        calibration=CalibrationConfig(num_mixtures=40),
        tagger_training=TaggerConfig(steps=2, batch_size=2, segment_s=0.3, channels=16),
    )
    seed = find_separator(folder / "seed")
    return Work(config=config, inputs=resolve(config), artifacts=Artifacts(out=folder / "here"), seed=seed)


@pytest.fixture(scope="module")
def stand_in_gpu():
    torch.set_num_threads(1)
    with connect(num_cpus=2, num_gpus=1):
        yield


def process_of(name):
    """This process, and whether it has reserved a GPU."""
    if name is None:
        raise ValueError("a name must be given, got none; give one")
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def validated(work, folder):
    return validate(work, 0, work.seed, folder, work.inputs.validation)


def test_without_a_gpu_the_work_is_done_here():
    assert call_on_gpu(process_of, name="a")[0] == os.getpid()
    with pytest.raises(ValueError, match="got none; give one"):
        call_on_gpu(process_of, None)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this process has a GPU")
def test_a_task_of_the_cluster_gives_the_same_figures_and_judges(work, folder, monkeypatch, request):
    torch.set_num_threads(joblib.cpu_count())  # as in the task: float sums depend on it
    figures, judges = validated(work, folder), prepare_judges(work.config, work.inputs, work.seed, folder / "here")
    request.getfixturevalue("stand_in_gpu")
    import ray

    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))  # workers have no tests
    pid, gpus = call_on_gpu(process_of, name="a")
    assert pid != os.getpid() and gpus == "0"
    with pytest.raises(ValueError, match=r"^a name must be given, got none; give one$") as caught:
        call_on_gpu(process_of, None)
    assert type(caught.value) is ValueError
    monkeypatch.setattr(tune.steps.iteration, "evaluate", None)  # of this process
    assert validated(work, folder) == figures
    there = prepare_judges(work.config, work.inputs, work.seed, folder / "there")
    assert there.estimator.fingerprint == judges.estimator.fingerprint
    taggers = [load_tagger(folder / name / "tagger").fingerprint for name in ("here", "there")]
    assert taggers[0] == taggers[1]
