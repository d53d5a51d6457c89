"""Paths of lists: what they mean, in which spelling, and that they stay inside the root of their list."""

from __future__ import annotations

import io
import json
import os
import pickle
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.audio.decoder import Decoder
from engine.corpus.read import read_corpus
from engine.corpus.roots import Root, resolve
from engine.corpus.sources import read_sources
from engine.corpus.table import Corpus
from engine.passes.decode import cut_rows, decode_rows
from engine.schema import FailureRow
from engine.storage.s3_client import client
from tests.support.s3_server import S3

pytest_plugins = ["tests.support.s3_server"]

RATE_HZ = 8000
SECRET = "root:$6$notforyou:19000:0:99999:7:::"
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def sound() -> bytes:
    """A second of audio."""
    file = io.BytesIO()
    soundfile.write(file, np.tile(np.float32([0.1, -0.1]), RATE_HZ // 2), RATE_HZ, format="WAV")
    return file.getvalue()


def put(path: Path, data: bytes | str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((data or sound()) if isinstance(data, bytes) else data.encode() if data else sound())
    return path


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    one = Decoder(time_limit_s=15.0)
    yield one
    one.close()


def outcome(corpus: Corpus, decoder: Decoder) -> tuple[list[str], list[FailureRow]]:
    """Paths of a corpus that become clips of a second, and all failures, as a pass would have them."""
    root = pickle.loads(pickle.dumps(corpus.root))  # as a worker gets it
    pieces, failed = cut_rows(corpus.clips.to_pylist(), root=root, clip_s=10, min_clip_s=0.5, decoder=decoder)
    clips, more = decode_rows(pieces, root=root, sample_rate_hz=RATE_HZ, clip_s=10, decoder=decoder)
    assert all(len(clip.samples_T) == RATE_HZ for clip in clips)
    return [clip.row["path"] for clip in clips], corpus.failures.to_pylist() + failed + more


def manifest(folder: Path, *paths: str) -> Path:
    return put(folder / "m.jsonl", "\n".join(json.dumps({"path": path, "labels": ["dog"]}) for path in paths))


OUTSIDE = {
    "absolute": "{other}/a.wav",
    "climbing": "../other/a.wav",
    "climbing_inside": "x/../../other/a.wav",
    "windows": "x\\..\\..\\other\\a.wav",
    "another_folder_that_begins_alike": "{root}-2/a.wav",
    "a_link": "link.wav",
    "behind_a_linked_folder": "folder/a.wav",
    "absolute_by_a_link": "{root}/link.wav",
    "above_a_linked_folder": "folder/../other/a.wav",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_stays_inside_its_root_unless_told_otherwise(tmp_path: Path, decoder: Decoder, name: str) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root, other, tmp_path / "root-2"):
        put(folder / "a.wav")
    (root / "x").mkdir()
    (root / "link.wav").symlink_to(other / "a.wav")
    (root / "folder").symlink_to(other)
    path = OUTSIDE[name].format(root=root, other=other)
    listed = manifest(root, path, "a.wav", f"{root}/a.wav")
    good, failures = outcome(read_corpus(listed), decoder)
    assert sorted(good) == sorted(["a.wav", f"{root}/a.wav"])
    (row,) = failures
    assert row["path"] == path and "must stay below the root" in row["message"]
    assert "--allow-outside" in row["message"] and "--audio-root" in row["message"]
    with pytest.raises(ValueError, match="must stay below the root"):
        read_sources(put(root / "clips.csv", f"path,label\n{path},dog\n"))
    good, failures = outcome(read_corpus(listed, allow_outside=True), decoder)
    assert len(good) == 3 and failures == []
    assert len(read_sources(root / "clips.csv", allow_outside=True)) == 1
    good, failures = outcome(read_corpus(listed, audio_root="/"), decoder)
    assert f"{root}/a.wav" in good, "a way for lists of absolute paths"


def test_a_root_that_is_itself_a_link_is_the_root(tmp_path: Path, decoder: Decoder) -> None:
    put(tmp_path / "real" / "a.wav")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    paths = ("a.wav", f"{tmp_path}/root/a.wav", f"{tmp_path}/real/a.wav")
    good, failures = outcome(read_corpus(manifest(tmp_path / "root", *paths)), decoder)
    assert sorted(good) == sorted(paths) and failures == []


@pytest.mark.parametrize("name", ["s3://bucket/a.wav", "s3://b"])
def test_a_local_manifest_names_no_bucket(tmp_path: Path, name: str) -> None:
    corpus = read_corpus(manifest(tmp_path, name))
    assert corpus.num_clips == 0 and "--allow-outside" in corpus.failures["message"].to_pylist()[0]
    assert read_corpus(manifest(tmp_path, name), allow_outside=True).num_clips == 1


def test_nothing_of_a_file_that_is_no_audio_is_in_a_message(tmp_path: Path, decoder: Decoder) -> None:
    put(tmp_path / "shadow", SECRET)
    put(tmp_path / "root" / "page.wav", SECRET)
    paths = ("../shadow", f"{tmp_path}/shadow", "page.wav")
    for allow_outside in (False, True):
        listed = manifest(tmp_path / "root", *paths)
        good, failures = outcome(read_corpus(listed, allow_outside=allow_outside), decoder)
        assert good == [] and len(failures) == 3
        assert not any("notforyou" in row["message"] for row in failures)
    corpus = read_corpus(put(tmp_path / "m.jsonl", json.dumps(SECRET) + f"\n{SECRET}\n"))
    assert corpus.num_failures == 2 and "notforyou" not in str(corpus.failures["message"].to_pylist())


NAMES = {  # how the manifest writes a name, and how the disk has it
    "decomposed_on_disk": (f"d{NFC}/{NFC}.wav", f"d{NFD}/{NFD}.wav"),
    "composed_on_disk": (f"d{NFD}/{NFD}.wav", f"d{NFC}/{NFC}.wav"),
    "mixed": (f"d{NFC}/{NFC}.wav", f"d{NFD}/{NFC}.wav"),
    "mixed_in_one_name": (f"{NFC}{NFD}.wav", f"{NFC}{NFC}.wav"),
    "as_written": (f"{NFC}{NFD}.wav", f"{NFC}{NFD}.wav"),
    "windows": ("dog\\a.wav", "dog/a.wav"),
    "a_backslash": ("dog\\a.wav", "dog\\a.wav"),
    "a_newline": ("a\nb.wav", "a\nb.wav"),
    "spaces_around": (" a.wav", " a.wav"),
    "spaces_that_are_no_part": (" a.wav ", "a.wav"),
    "percent": ("100%25.wav", "100%25.wav"),
    "like_an_address": ("http://x/a.wav", "http:/x/a.wav"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_finds_its_file_in_another_spelling(tmp_path: Path, decoder: Decoder, name: str) -> None:
    listed, on_disk = NAMES[name]
    put(tmp_path / on_disk)
    good, failures = outcome(read_corpus(manifest(tmp_path, listed)), decoder)
    assert (good, failures) == ([listed], [])
    list_ = put(tmp_path / "clips.jsonl", json.dumps({"path": listed, "label": "dog"}))
    (path,) = read_sources(list_).table["path"].to_pylist()
    assert Path(path).read_bytes() == (tmp_path / on_disk).read_bytes()


def test_the_file_with_the_name_as_written_comes_first(tmp_path: Path) -> None:
    for name in (f"{NFC}.wav", f"{NFD}.wav", "a\\b.wav", "a/b.wav"):
        put(tmp_path / name)
        assert resolve(Root(str(tmp_path)), name) == f"{tmp_path}/{name}"
    assert resolve(str(tmp_path), "x\\y.wav") == f"{tmp_path}/x/y.wav"


def test_lists_and_folders_are_found_in_the_other_form_too(tmp_path: Path, decoder: Decoder) -> None:
    put(tmp_path / f"d{NFD}" / "a.wav")
    manifest(tmp_path / f"d{NFD}", "a.wav").rename(tmp_path / f"d{NFD}" / f"{NFD}.jsonl")
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "labels": ["dog"], "label": "dog"}))
    for corpus in (
        read_corpus(tmp_path / f"d{NFC}" / f"{NFC}.jsonl"),
        read_corpus(tmp_path / "m.jsonl", audio_root=tmp_path / f"d{NFC}"),
    ):
        assert outcome(corpus, decoder) == (["a.wav"], [])
    (path,) = read_sources(tmp_path / "m.jsonl", audio_root=tmp_path / f"d{NFC}").table["path"].to_pylist()
    assert Path(path).is_file()


def test_the_fingerprint_of_a_list_does_not_depend_on_the_form_on_disk(tmp_path: Path) -> None:
    fingerprints = set()
    for number, name in enumerate((NFC, NFD)):
        put(tmp_path / str(number) / f"{name}.wav")
        fingerprints.add(
            read_sources(put(tmp_path / str(number) / "c.csv", f"path,label\n{NFC}.wav,dog\n")).fingerprint
        )
    assert len(fingerprints) == 1


@pytest.mark.parametrize("name", [b"a\\b.wav", b"a\nb.wav", b" a.wav", b"a%2F.wav", b"x\\..\\..\\y.wav", b"\xff.wav"])
def test_any_name_in_a_folder_is_a_clip_or_a_failure_with_its_reason(
    tmp_path: Path, decoder: Decoder, name: bytes
) -> None:
    (tmp_path / "dog").mkdir()
    with open(os.path.join(os.fsencode(tmp_path), b"dog", name), "wb") as file:
        file.write(sound())
    good, failures = outcome(read_corpus(tmp_path), decoder)
    if name == b"\xff.wav":
        assert good == [] and "must be UTF-8" in failures[0]["message"]
    else:
        assert (good, failures) == ([f"dog/{os.fsdecode(name)}"], [])


@pytest.fixture
def far(s3: S3) -> Iterator[Decoder]:
    """A decoder that starts with the server's address."""
    one = Decoder(time_limit_s=15.0)
    yield one
    one.close()


KEYS = {
    "c/dog//double.wav": ("dog//double.wav", "dog"),
    "c//cat/first.wav": ("/cat/first.wav", "cat"),
    "c/dog/a\\b.wav": ("dog/a\\b.wav", "dog"),
    "c/./dog/dot.wav": ("./dog/dot.wav", "dog"),
    "c/dog/../up.wav": ("dog/../up.wav", "dog"),
    "c/../cow/out.wav": ("../cow/out.wav", "cow"),
    "c/dog/100%25 é.wav": ("dog/100%25 é.wav", "dog"),
    "c/dog/ s .wav": ("dog/ s .wav", "dog"),
}


def test_keys_are_the_keys_as_listed(s3: S3, far: Decoder) -> None:
    for key in KEYS:
        client().put_object(Bucket=s3.bucket, Key=key, Body=sound())
    corpus = read_corpus(f"{s3.root}/c")
    found = {row["path"]: row["labels"] for row in corpus.clips.to_pylist()}
    assert found == {path: [label] for path, label in KEYS.values()}
    good, failures = outcome(corpus, far)
    assert sorted(good) == sorted(found) and failures == []
    addresses = [f"{s3.root}/{key}" for key in KEYS]
    lines = [json.dumps({"path": address, "labels": ["dog"]}) for address in addresses]
    client().put_object(Bucket=s3.bucket, Key="c/m.jsonl", Body="\n".join(lines).encode())
    good, failures = outcome(read_corpus(f"{s3.root}/c/m.jsonl"), far)
    assert sorted(good) == sorted(addresses) and failures == []


def test_a_key_is_found_in_another_spelling(s3: S3, far: Decoder) -> None:
    paths = {f"d/{NFC}.wav": f"d/{NFD}.wav", f"{NFD}.wav": f"{NFC}.wav", "dog\\a.wav": "dog/a.wav"}
    for key in paths.values():
        client().put_object(Bucket=s3.bucket, Key=f"p/{key}", Body=sound())
    lines = [json.dumps({"path": path, "labels": ["dog"]}) for path in [*paths, f"gone{NFC}.wav"]]
    client().put_object(Bucket=s3.bucket, Key="p/m.jsonl", Body="\n".join(lines).encode())
    good, failures = outcome(read_corpus(f"{s3.root}/p/m.jsonl"), far)
    assert sorted(good) == sorted(paths)
    (row,) = failures
    assert row["path"] == f"gone{NFC}.wav"


def test_a_manifest_in_a_bucket_stays_below_its_prefix(s3: S3, far: Decoder) -> None:
    for key in ("p/a.wav", "q/a.wav", "p-2/a.wav"):
        client().put_object(Bucket=s3.bucket, Key=key, Body=sound())
    inside = ["a.wav", f"{s3.root}/p/a.wav"]
    outside = [f"{s3.root}/q/a.wav", f"{s3.root}/p-2/a.wav"]
    never = ["/etc/passwd", "../q/a.wav", "s3://another-bucket/a.wav"]
    lines = [json.dumps({"path": path, "labels": ["dog"]}) for path in inside + outside + never]
    client().put_object(Bucket=s3.bucket, Key="p/m.jsonl", Body="\n".join(lines).encode())
    corpus = read_corpus(f"{s3.root}/p/m.jsonl")
    assert corpus.failures["path"].to_pylist() == outside + never
    assert all("--allow-outside" in message for message in corpus.failures["message"].to_pylist())
    good, _ = outcome(corpus, far)
    assert sorted(good) == sorted(inside)
    good, _ = outcome(read_corpus(f"{s3.root}/p/m.jsonl", allow_outside=True), far)
    assert sorted(good) == sorted(inside + outside)
    assert read_corpus(f"{s3.root}/p/m.jsonl", audio_root=s3.root).num_failures == 3
