"""A folder of recordings without labels on a real Ray: every clip is labelled, without label or failed, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile

import tune.steps.label_corpus
from cluster.session import connect
from engine.corpus.read import read_corpus
from engine.passes.records import done_names
from engine.storage.files import read_json
from engine.taggers import find_tagger
from tests.support.signals import RATE_HZ, band_noise, read_failures
from tune.steps.label_corpus import label_corpus

if TYPE_CHECKING:
    from tests.support.s3_server import S3, Proxy  # pytest imports it itself, as a plug-in

pytest_plugins = ["tests.support.s3_server"]
pytestmark = pytest.mark.slow

SETTINGS = {"rows_per_task": 3, "shard_s": 4.0, "clip_s": 2.0, "num_gpus_per_actor": 0.0}
BANDS_HZ = {"low": (50.0, 900.0), "high": (2200.0, 3500.0)}
TAGGER = """
import numpy as np
import torch


class Bands:
    sample_rate_hz = 8000
    labels = ("low", "high", "other")
    fingerprint = "00000000000000ba"

    def tag(self, audio_BT, *, lengths=None):
        power_BF = torch.fft.rfft(audio_BT.float(), n=8000).abs().square()
        parts_B3 = torch.stack([power_BF[:, a:b].sum(1) for a, b in ((0, 1500), (1500, 3600), (3600, 4001))], 1)
        total_B1 = parts_B3.sum(1, keepdim=True)
        fraction_B3 = torch.where(total_B1 > 0, parts_B3 / total_B1.clamp(min=1e-12), torch.tensor(1 / 3))
        return 10 * torch.log10(fraction_B3 + 1e-4)


def make(device):
    return Bands()
"""


def sound(label: str, duration_s: float, seed: int) -> np.ndarray:
    low_hz, high_hz = BANDS_HZ[label]
    return 0.1 * band_noise(round(duration_s * RATE_HZ), low_hz=low_hz, high_hz=high_hz, seed=seed)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: recordings without labels, single-source clips, and a tagger of the user's own."""
    out = tmp_path_factory.mktemp("unlabelled")
    (out / "recordings").mkdir()
    for number in range(16):
        parts = [sound("low", 2.0, number), sound("high", 2.0, number)]
        signal_T = sum(parts) if number % 4 == 0 else parts[number % 2]
        soundfile.write(out / "recordings" / f"{number:02d}.wav", signal_T, RATE_HZ)
    long_T = np.concatenate([sound("low", 3.0, 90), sound("high", 1.5, 91)])
    soundfile.write(out / "recordings" / "long.wav", long_T, RATE_HZ)
    soundfile.write(out / "recordings" / "silent.wav", np.zeros(RATE_HZ), RATE_HZ)
    (out / "recordings" / "broken.wav").write_bytes(b"RIFF, but no more")
    lines = ["path,label"]
    for label in BANDS_HZ:
        for number in range(3):
            soundfile.write(out / f"{label}{number}.wav", sound(label, 1.5, 50 + number), RATE_HZ)
            lines.append(f"{label}{number}.wav,{label}")
    (out / "clips.csv").write_text("\n".join(lines) + "\n")
    (out / "own_bands.py").write_text(TAGGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        yield out


@pytest.fixture(scope="module", autouse=True)
def session(folder: Path, s3_proxy: Proxy) -> Iterator[None]:
    from tests.support.s3_server import environment

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_proxy).items():
            patch.setenv(name, value)
        with connect(num_cpus=2, num_gpus=1):  # a GPU that does not exist
            yield


def labelled(out: Path | str, source: Path | str = "recordings", **more: Any) -> Any:
    given: dict[str, Any] = {"known": "clips.csv", "config": SETTINGS} | more
    return label_corpus(source, out, tagger="own_bands:make", **given)


@pytest.fixture(scope="module")
def first(folder: Path, session: None) -> Any:
    return labelled(folder / "labelled.parquet")


def command(out: Path) -> list[str]:
    given = ["--tagger", "own_bands:make", "--known", "clips.csv", "-o", str(out), "--json"]
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "clearsep", "label", "recordings", *given, *settings]


def files(tags: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tags / "stems").glob("*.parquet"))}


def test_every_clip_is_labelled_without_label_or_failed(folder: Path, first: Any) -> None:
    rows = pq.read_table(folder / "labelled.parquet").to_pylist()
    failures = {row["path"]: row["error_class"] for row in read_failures(folder / "labelled.tags").to_pylist()}
    assert failures.keys() == {"silent.wav", "broken.wav"} and failures["silent.wav"] == "SilentError"
    assert first["num_clips"] == 16 + 2 + 2  # long.wav is two clips
    assert first["num_clips"] == first["num_labelled"] + first["num_unlabelled"] + first["num_failed"]
    assert len(rows) == first["num_labelled"] + first["num_unlabelled"]
    labels = {(row["path"], row["start_s"]): row["labels"] for row in rows}
    assert labels["recordings/01.wav", None] == ["high"] and labels["recordings/02.wav", None] == ["low"]
    assert sorted(labels["recordings/04.wav", None]) == ["high", "low"]
    assert labels["recordings/long.wav", 0.0] == ["low"]
    assert [row["label"] for row in first["labels"]] == ["low", "high"]
    assert all(row["recall"] > 0.9 and row["precision"] >= 0.8 for row in first["labels"])
    assert read_corpus(folder / "labelled.parquet", needs_labels=False).num_failures == 0


def test_another_precision_opens_no_audio_and_calibrates_nothing(
    folder: Path, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "labelled.tags" / "stems").iterdir()}
    monkeypatch.setattr(tune.steps.label_corpus, "calibrate_presence", None)
    monkeypatch.setattr("engine.passes.run._stream", None)
    again = labelled(folder / "labelled.parquet", precision=0.95)
    assert again["precision"] == 0.95 and again["num_clips"] == first["num_clips"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "labelled.tags" / "stems").iterdir()} == before
    kept = labelled(folder / "labelled.parquet", known=None, presence=folder / "labelled.tags" / "presence")
    assert kept == first


def test_a_killed_command_resumes_to_the_same_bytes(folder: Path, first: Any, tmp_path: Path) -> None:
    """kill -9 of the process group, Ray included, when the first shard is done."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    killed = tmp_path / "killed.tags"
    process = subprocess.Popen(command(tmp_path / "killed.parquet"), start_new_session=True, env=environment)
    while not done_names(killed) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert done_names(killed) and not (tmp_path / "killed.parquet").exists()
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    subprocess.run(
        command(tmp_path / "killed.parquet"), check=True, stdout=subprocess.DEVNULL, env=os.environ | address
    )
    assert files(killed) == files(folder / "labelled.tags")
    assert read_failures(killed).equals(read_failures(folder / "labelled.tags"))
    rows, undisturbed = (
        pq.read_table(path / name).to_pylist()
        for path, name in ((tmp_path, "killed.parquet"), (folder, "labelled.parquet"))
    )
    assert [row["tags"] for row in rows] == [row["tags"] for row in undisturbed]


def test_actors_with_a_gpu_make_the_same_bytes(folder: Path, first: Any, tmp_path: Path) -> None:
    labelled(tmp_path / "gpu.parquet", config=SETTINGS | {"num_gpus_per_actor": 1.0})
    assert files(tmp_path / "gpu.tags") == files(folder / "labelled.tags")


def test_failed_clips_are_tried_again_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    soundfile.write(recordings / "a.wav", sound("low", 2.0, 1), RATE_HZ)
    (recordings / "b.wav").write_bytes(b"RIFF, but no more")
    assert labelled(tmp_path / "out.parquet", recordings)["num_failed"] == 1
    before = files(tmp_path / "out.tags")
    soundfile.write(recordings / "b.wav", sound("high", 2.0, 1), RATE_HZ)
    again = labelled(tmp_path / "out.parquet", recordings, retry_failed=True)
    assert (again["num_clips"], again["num_labelled"], again["num_failed"]) == (2, 2, 0)
    assert before.items() < files(tmp_path / "out.tags").items()


def test_a_corpus_in_s3_and_a_result_there(folder: Path, s3: S3, tmp_path: Path) -> None:
    for name in ("01.wav", "02.wav", "silent.wav"):
        s3.put(f"recordings/{name}", (folder / "recordings" / name).read_bytes())
    summary = labelled(f"{s3.root}/labelled.parquet", f"{s3.root}/recordings")
    assert (summary["num_clips"], summary["num_labelled"], summary["num_failed"]) == (3, 2, 1)
    corpus = read_corpus(f"{s3.root}/labelled.parquet")
    assert {row["path"]: row["labels"] for row in corpus.clips.to_pylist()} == {
        "recordings/01.wav": ["high"],
        "recordings/02.wav": ["low"],
    }


def test_inputs_that_do_not_fit_are_refused(folder: Path, first: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there must be clips whose labels are known or a presence model, got none"):
        labelled(tmp_path / "a.parquet", known=None)
    with pytest.raises(ValueError, match="got both; give --known CLIPS"):
        labelled(tmp_path / "a.parquet", presence=folder / "labelled.tags" / "presence")
    (folder / "whales.csv").write_text("path,label\nlow0.wav,whale\n")
    with pytest.raises(ValueError, match=r"a tagger must know the labels of the clips, got .* none of 'whale'"):
        labelled(tmp_path / "a.parquet", known="whales.csv")
    with pytest.raises(ValueError, match=r"precision must be above 0 and at most 1, got 80"):
        labelled(tmp_path / "a.parquet", presence=folder / "labelled.tags" / "presence", known=None, precision=80.0)
    assert not (tmp_path / "a.tags" / "stems").exists()
    with pytest.raises(ValueError, match=r"must hold a pass that tags with these settings, got .* another settings"):
        labelled(folder / "labelled.parquet", config=SETTINGS | {"clip_s": 1.0})
    assert find_tagger("own_bands:make").sample_rate_hz == RATE_HZ


def test_the_command_prints_what_it_did_and_inspect_shows_it(folder: Path, first: Any) -> None:
    address = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(command(folder / "labelled.parquet"), capture_output=True, text=True, check=True, env=address)
    assert done.stdout.startswith("{") and '"num_failed": 2' in done.stdout
    for path, wanted in (("labelled.parquet", "clips without label"), ("labelled.tags", "clips tagged")):
        shown = [sys.executable, "-m", "clearsep", "inspect", path]
        assert wanted in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert read_json(folder / "labelled.tags" / "summary.json")["num_tagged"] == 18
