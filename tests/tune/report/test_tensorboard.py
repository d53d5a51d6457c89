"""Event files for TensorBoard, read back with the protocol buffers of their format."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tensorboardX.proto.event_pb2 import Event

from engine.passes.shards import read_columns
from engine.storage.files import read_json
from tests.support.command import Cli
from tests.tune.report.conftest import DURATION_S, LIMITS, RATE_HZ
from tune.report.collect import collect_run
from tune.report.sample import draw

CURVE = [{"step": 10.0, "loss_db": 3.0}, {"step": 20.0, "loss_db": 2.0, "sdri_db": 4.5, "si_sdri_db": 3.5}]
Values = dict[tuple[str, int], Any]


def values(folder: Path) -> Values:
    """Every value of the one event file in a folder, by tag and step."""
    (file,) = folder.glob("events.out.tfevents.*")
    found: Values = {}
    for event in events(file.read_bytes()):
        for value in event.summary.value:
            key = value.tag, event.step
            kind = value.WhichOneof("value")
            assert key not in found or kind != found[key].WhichOneof("value")
            found[(f"{value.tag}:{kind}" if kind != "simple_value" else value.tag), event.step] = value
    return found


def events(data: bytes) -> Iterator[Event]:
    """TFRecords: length, its checksum, event, its checksum."""
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield Event.FromString(data[position + 12 : position + 12 + length])
        position += 16 + length


@pytest.fixture
def found(run_folder: Path, write_checkpoint: Callable[..., Path], cli: Cli, tmp_path: Path) -> Path:
    write_checkpoint(["bell"], folder="run/iterations/1/separator", history=[{"curve": CURVE, "wall_s": 9.0}])
    out = tmp_path / "events"
    words = ["report", run_folder, "--max-mb", "0", "--tensorboard", out, "--json"]
    assert cli(*words).document() == {"report": str(run_folder / "report.html"), "tensorboard": str(out)}
    assert cli(*words).code == 0, "the files of the first call are replaced"
    return out


def test_figures_are_those_of_the_run(found: Path, run_folder: Path) -> None:
    assert {path.name for path in found.iterdir()} == {"training-1", "iterations"}
    training = {key: value.simple_value for key, value in values(found / "training-1").items()}
    assert training == {
        ("training/loss_db", 10): 3.0,
        ("training/loss_db", 20): 2.0,
        ("training/sdri_db", 20): 4.5,
        ("training/si_sdri_db", 20): 3.5,
    }
    scalars = {
        key: one.simple_value for key, one in values(found / "iterations").items() if one.HasField("simple_value")
    }
    assert [scalars["iteration/sdri_db", number] for number in range(3)] == [4.0, 5.0, 6.0]
    assert [scalars["iteration/si_sdri_db", number] for number in range(3)] == [3.0, 4.0, 5.0]
    for number, _ in enumerate(LIMITS, 1):
        record = read_json(run_folder / "summary.json")["iterations"][number]
        assert scalars["iteration/num_failed", number] == 2
        expected = record["num_kept"] / record["num_stems"]
        assert scalars["iteration/kept_fraction", number] == pytest.approx(expected)
        (shard,) = (run_folder / "iterations" / str(number) / "stems").glob("*.parquet")
        levels_db = read_columns(shard, ["stem_level_db"])["stem_level_db"].to_numpy()
        assert scalars["mean_of_all_stems/stem_level_db", number] == pytest.approx(levels_db.mean(), abs=1e-4)
    assert ("iteration/kept_fraction", 0) not in scalars and ("mean_of_all_stems/rival_leak_db", 1) not in scalars


def test_the_sample_has_sounds_and_spectrograms_at_every_iteration(found: Path, run_folder: Path) -> None:
    """Each stem is a tone; its spectrogram is brightest in the tone's row."""
    some = values(found / "iterations")
    sounds = {key: value.audio for key, value in some.items() if value.HasField("audio")}
    num_clips = len(draw(collect_run(run_folder).passes[-1], most=8))
    images = {key: value.image for key, value in some.items() if value.HasField("image")}
    assert len(sounds) == len(images) == num_clips * 3 * 2 >= 24, "clips, signals, iterations"
    assert all(len(tag) < 160 and tag.isascii() for tag, _ in some), "names of others are cut and made plain"
    for (tag, step), audio in sounds.items():
        samples_T, rate_hz = soundfile.read(io.BytesIO(audio.encoded_audio_string))
        assert (rate_hz, len(samples_T), step in (1, 2)) == (RATE_HZ, round(DURATION_S * RATE_HZ), True)
        picture_FN = grey(images[tag.replace(":audio", ":image"), step].encoded_image_string)
        if "mixture" not in tag:
            tone_hz = np.argmax(np.abs(np.fft.rfft(samples_T))) / DURATION_S
            row = picture_FN[::-1].mean(axis=1).argmax()
            assert row * RATE_HZ / 512 == pytest.approx(tone_hz, abs=RATE_HZ / 512)
        else:
            assert np.abs(samples_T).max() == pytest.approx(0.9, abs=0.01)


def grey(png: bytes) -> np.ndarray:
    """The pixels of a grey PNG without filters."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack_from(">II", png, 16)
    (length,) = struct.unpack_from(">I", png, 33)
    pixels = np.frombuffer(zlib.decompress(png[41 : 41 + length]), np.uint8).reshape(height, width + 1)
    assert not pixels[:, 0].any()
    return pixels[:, 1:]


def test_a_pass_alone_has_event_files_and_a_search_has_those_of_ray(run_folder: Path, cli: Cli, tmp_path: Path) -> None:
    words = ["report", run_folder / "iterations" / "1", "-o", tmp_path / "page.html", "--tensorboard", tmp_path / "out"]
    assert "tensorboard" in cli(*words).out
    assert ("mean_of_all_stems/re_sdr_db", 0) in values(tmp_path / "out" / "iterations")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "trials.parquet").touch()
    search = cli("report", tmp_path / "search", "--tensorboard", tmp_path / "out").error()
    assert "must be for a run or a pass" in search and "search/tune" in search
    words = ["report", run_folder, "--tensorboard", "s3://bucket/out"]
    assert "--tensorboard must be a local folder, got s3://bucket/out" in cli(*words).error()
