"""Exported tracks are read back by the programs they are for: same samples, labels, scores and counts."""

import glob
import io
import json
import os

import datasets
import numpy as np
import pytest
import soundfile
import webdataset

from engine.passes.shards import read_audio
from engine.selection.export.export import export_tracks
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks, select_tracks
from tests.conftest import RATE_HZ

pytest_plugins = ["tests.support.s3_server"]
STEP = 2.0**-23  # of 24 bits
LABELS = ("dog/bark", "../sneaky", "日本", "a loud one")
GAINS = (0.3, 2.0**-7, 0.9, 3.0)
SCORES = {"re_sdr_db": 21.5, "stem_level_db": -3.0, "remix_snr_db": float("inf")}
SHARD_MB = 0.012  # two tracks of 2000 samples


@pytest.fixture
def tracks(write_pass, tmp_path):
    """Seven tracks in the folder of an iteration; one label of a clip was rejected, and one stem is loud."""
    rng = np.random.default_rng(0)
    stems = [
        (f"clip{number}", label, np.float32(gain) * rng.uniform(-1, 1, 2000).astype(np.float32), SCORES)
        for number in range(2)
        for label, gain in zip(LABELS, GAINS, strict=True)
    ]
    stems[-1] = (*stems[-1][:3], SCORES | {"re_sdr_db": 1.0})
    folder = write_pass(stems)
    select_tracks(folder, tmp_path / "iterations" / "2" / "tracks", Thresholds(min_re_sdr_db=10.0))
    return tmp_path / "iterations" / "2" / "tracks"


def truth(tracks):
    """(clip, label) of every track, with its row and its samples."""
    index, stems = read_tracks(tracks)
    rows = index.to_pylist()
    return {(row["clip_id"], row["label"]): (row, read_audio(stems, row["shard"], [row["row"]])[0]) for row in rows}


def check(record, flac, tracks):
    """A record and its audio are those of the track that they name."""
    row, samples_T = truth(tracks)[record["clip_id"], record["label"]]
    decoded_T, rate_hz = soundfile.read(io.BytesIO(flac))
    assert rate_hz == record["sample_rate_hz"] == RATE_HZ and len(decoded_T) == record["num_samples"] == 2000
    assert np.abs(decoded_T * record["scale"] - samples_T).max() <= 0.5 * STEP * record["scale"]
    assert record["scale"] == (4.0 if record["label"] == "a loud one" else 1.0)
    assert record["labels"] == row["labels"] == list(LABELS)
    assert record["source"] == f"{record['clip_id']}.wav" and record["start_s"] is None
    assert record["scores"]["re_sdr_db"] == 21.5 and record["scores"]["stem_level_db"] == -3.0
    assert record["scores"]["remix_snr_db"] is None and record["scores"]["rival_leak_db"] is None
    assert record["teacher"] == "teacher" and record["iteration"] == 2
    thresholds = record["thresholds"]
    thresholds = json.loads(thresholds) if isinstance(thresholds, str) else thresholds
    assert thresholds["min_re_sdr_db"] == 10.0 and None not in thresholds.values()
    assert record["key"].replace("_", "").replace("-", "").isalnum() and record["key"].isascii()
    return record["clip_id"], record["label"]


def test_webdataset_reads_the_shards(tracks, tmp_path):
    manifest = export_tracks(tracks, tmp_path / "out", format="webdataset", shard_mb=SHARD_MB)
    files = sorted(glob.glob(f"{tmp_path}/out/*.tar"))
    assert len(files) == 4 and manifest["num_tracks"] == 7
    found = [
        check(json.loads(sample["json"]), sample["flac"], tracks)
        for sample in webdataset.WebDataset(files, shardshuffle=False)
    ]
    assert found == list(truth(tracks))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [(shard["url"], shard["filesize"]) for shard in index["shardlist"]] == [
        (os.path.basename(file), os.path.getsize(file)) for file in files
    ]
    assert [shard["nsamples"] for shard in index["shardlist"]] == [2, 2, 2, 1]


def test_datasets_reads_the_folder(tracks, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    export_tracks(tracks, tmp_path / "out", format="datasets", shard_mb=SHARD_MB)
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["audio"].sampling_rate == RATE_HZ and table.num_rows == 7
    rows = table.cast_column("audio", datasets.Audio(decode=False))
    assert [check(row, row["audio"]["bytes"], tracks) for row in rows] == list(truth(tracks))


def test_flac_files_have_a_line_each(tracks, tmp_path):
    manifest = export_tracks(tracks, tmp_path / "out", format="flac", shard_mb=SHARD_MB)
    records = [json.loads(line) for line in open(tmp_path / "out" / "tracks.jsonl")]
    found = [check(record, (tmp_path / "out" / record["file"]).read_bytes(), tracks) for record in records]
    assert found == list(truth(tracks))
    assert {str(path) for path in (tmp_path / "out").rglob("*.flac")} == {
        str(tmp_path / "out" / record["file"]) for record in records
    }
    assert manifest["num_by_label"] == {"../sneaky": 2, "a loud one": 1, "dog/bark": 2, "日本": 2}
    assert manifest["audio_h"] == pytest.approx(7 * 2000 / RATE_HZ / 3600)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["webdataset", "datasets", "flac"])
def test_an_interrupted_export_resumes_with_the_same_bytes(format, tracks, tmp_path, monkeypatch):
    export_tracks(tracks, tmp_path / "once", format=format, shard_mb=SHARD_MB)
    with monkeypatch.context() as patch:
        calls = iter(range(3))
        patch.setattr("engine.selection.export.records.encode_flac24", lambda *a, **k: [][next(calls)])
        with pytest.raises(IndexError):
            export_tracks(tracks, tmp_path / "out", format=format, shard_mb=SHARD_MB)
    assert not (tmp_path / "out" / "manifest.json").exists()
    export_tracks(tracks, tmp_path / "out", format=format, shard_mb=SHARD_MB)
    made = contents(tmp_path / "out")
    assert {**made, ".export.lock": b""} == {**contents(tmp_path / "once"), ".export.lock": b""}
    with monkeypatch.context() as patch:  # nothing is written again
        patch.delattr("engine.selection.export.records.encode_flac24")
        export_tracks(tracks, tmp_path / "out", format=format, shard_mb=SHARD_MB)
    damaged = next(
        path for path in sorted((tmp_path / "out").rglob("*")) if path.suffix in (".tar", ".parquet", ".flac")
    )
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    export_tracks(tracks, tmp_path / "out", format=format, shard_mb=SHARD_MB)
    assert {**contents(tmp_path / "out"), ".export.lock": b""} == {**made, ".export.lock": b""}


def test_an_export_goes_to_s3(tracks, tmp_path, s3):
    export_tracks(tracks, tmp_path / "out", format="webdataset")
    export_tracks(tracks, f"{s3.root}/shared", format="webdataset")
    export_tracks(tracks, f"{s3.root}/shared", format="webdataset")
    for name, data in contents(tmp_path / "out").items():
        assert name == ".export.lock" or s3.get(f"shared/{name}") == data
    export_tracks(tracks, f"{s3.root}/files", format="flac")
    line = json.loads(s3.get("files/tracks.jsonl").splitlines()[0])
    check(line, s3.get(f"files/{line['file']}"), tracks)


def test_folders_of_the_machine_are_left_out():
    from engine.selection.export.records import _source

    sources = ("a/b.wav", "../b.wav", "/home/me/b.wav", "C:\\me\\b.wav", "s3://bucket/b.wav")
    assert [_source(path) for path in sources] == ["a/b.wav", "../b.wav", "b.wav", "b.wav", "s3://bucket/b.wav"]


def test_bad_input(tracks, tmp_path, write_checkpoint, cli):
    def error(*words):
        return cli("export", *words).error()

    out = tmp_path / "out"
    assert "the format of exported tracks must be a known one" in _error(export_tracks, tracks, out, format="zip")
    assert "must be webdataset, datasets, flac, hub or onnx, got 'zip'" in error(tracks, "--format", "zip", "-o", out)
    assert "no finished selection" in error(write_checkpoint(["a"]), "--format", "flac", "-o", out)
    assert "shard_mb must be above 0" in error(tracks, "--format", "flac", "-o", out, "--shard-mb", "0")
    assert not out.exists()
    assert "must be a new folder" in error(tracks, "--format", "flac", "-o", tracks)
    export_tracks(tracks, out, format="flac")
    assert "must hold an export with these settings, got an export with another export" in error(
        tracks, "--format", "datasets", "-o", out
    )
    select_tracks(tmp_path / "pass", tmp_path / "others", Thresholds())
    assert "another selection" in error(tmp_path / "others", "--format", "flac", "-o", out)
    select_tracks(tmp_path / "pass", tmp_path / "none", Thresholds(min_re_sdr_db=90.0))
    assert "must have tracks, got none" in error(tmp_path / "none", "--format", "flac", "-o", tmp_path / "empty")
    shard = next((tmp_path / "pass" / "stems").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-20])
    outcome = cli("export", tracks, "--format", "flac", "-o", tmp_path / "again")
    assert outcome.code == 1 and "its bytes are not those that were recorded" in outcome.err


def _error(call, *words, **more):
    with pytest.raises(ValueError) as caught:
        call(*words, **more)
    return str(caught.value)


def test_the_command_prints_the_manifest(tracks, tmp_path, cli):
    document = cli("export", tracks, "--format", "webdataset", "-o", tmp_path / "out", "--json").document()
    assert document["num_tracks"] == 7 and document == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "7" in cli("export", tracks, "--format", "webdataset", "-o", tmp_path / "out").out
