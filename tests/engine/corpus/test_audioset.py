"""AudioSet as people have it: the segment alone or the video, under every name that downloaders give them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.audio.decoder import Decoder
from engine.corpus.clips import clip_id
from engine.corpus.read import read_corpus
from engine.passes.decode import cut_rows, decode_rows
from engine.schema import FailureRow

RATE_HZ = 4000
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Male speech, man speaking"\n1,/m/06mb1,Rain\n'
LABELS = ["Male speech, man speaking", "Rain"]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    one = Decoder(time_limit_s=30.0)
    yield one
    one.close()


def seconds(first: int, length_s: float) -> bytes:
    """Audio whose value tells the second of the video: 0.01 in second 0, 0.02 in second 1 and so on."""
    time = np.arange(round(length_s * RATE_HZ)) // RATE_HZ + first + 1
    file = io.BytesIO()
    soundfile.write(file, time / 100, RATE_HZ, format="WAV", subtype="FLOAT")
    return file.getvalue()


def outcome(
    folder: Path, decoder: Decoder, files: dict[str, bytes], start_s: float, end_s: float, ytid: str, clip_s: float = 10
) -> tuple[list[list[int]], list[FailureRow]]:
    """The seconds of the video in each clip, and the failures."""
    for name, data in files.items():
        (folder / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "audio" / name).write_bytes(data)
    (folder / "classes.csv").write_text(CLASSES)
    (folder / "list.csv").write_text(f'# YTID, s, e, l\n{ytid}, {start_s:.3f}, {end_s:.3f}, "/m/09x0r,/m/06mb1"\n')
    corpus = read_corpus(folder / "list.csv", class_map=folder / "classes.csv", audio_root=folder / "audio")
    assert all(row["labels"] == LABELS for row in corpus.clips.to_pylist())
    pieces, failed = cut_rows(corpus.clips.to_pylist(), root=corpus.root, clip_s=clip_s, min_clip_s=1, decoder=decoder)
    done, more = decode_rows(pieces, root=corpus.root, sample_rate_hz=RATE_HZ, clip_s=clip_s, decoder=decoder)
    starts = [clip.samples_T[RATE_HZ // 2 :: RATE_HZ] for clip in done]
    return [
        [round(100 * value) - 1 for value in one_T] for one_T in starts
    ], corpus.failures.to_pylist() + failed + more


NAMES = (
    "{id}_30.000.wav",
    "{id}_30000.wav",
    "{id}_30.wav",
    "Y{id}_30.wav",
    "Y{id}_30_40.wav",
    "{id}_30000_40000.wav",
    "Y{id}_30.000_40.000.wav",
    "{id}_000030.wav",
    "{id}_30-40.wav",
    "{id}-30-40.wav",
    "{id}_30s_40s.wav",
    "{id}_30000ms.wav",
    "part/{id}_30.0.wav",
    "{id}.wav",
    "Y{id}.wav",
)
IDS = (
    "aaaaaaaaaa5",
    "--aE2O5G5WE",
    "-0WhO_iPyUk",
    "Y_1_2345678",
    "Yabcdefghij",
    "bbbbbbbb_30",
    "ccccccc-_-_",
    "_234_678_30",
)


@pytest.mark.parametrize("ytid", IDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_segment_is_read_as_a_whole(tmp_path: Path, decoder: Decoder, name: str, ytid: str) -> None:
    clips, failures = outcome(tmp_path, decoder, {name.format(id=ytid): seconds(30, 10)}, 30, 40, ytid)
    assert (clips, failures) == ([list(range(30, 40))], [])


LENGTHS = {  # start, end, length of the file, first second that is right; None: said to be unclear
    "segment": (30, 40, 10.0, 0),
    "segment_with_padding": (5, 15, 10.03, 0),
    "segment_that_an_encoder_cut": (5, 15, 9.8, 0),
    "segment_at_the_end_of_a_video": (30, 40, 6.5, 0),
    "short_start": (1, 11, 10.0, 0),
    "video": (30, 40, 45.0, 30),
    "video_that_ends_with_the_segment": (5, 15, 15.0, 5),
    "video_that_ends_a_little_earlier": (30, 40, 39.8, 30),
    "video_of_short_start": (1, 11, 11.0, 1),
    "from_the_beginning": (0, 10, 10.0, 0),
    "video_from_the_beginning": (0, 10, 45.0, 0),
    "neither": (5, 15, 7.0, None),
    "longer_than_a_segment": (100, 110, 60.0, None),
    "both": (0.5, 10.5, 10.2, None),
}


@pytest.mark.parametrize("ytid", ["aaaaaaaaaa5", "Yabcdefghij"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_shows_whether_a_file_is_the_video_or_its_segment(
    tmp_path: Path, decoder: Decoder, name: str, ytid: str
) -> None:
    start_s, end_s, length_s, first = LENGTHS[name]
    clips, failures = outcome(tmp_path, decoder, {f"Y{ytid}.wav": seconds(0, length_s)}, start_s, end_s, ytid)
    if first is None:
        assert clips == [] and len(failures) == 1
        assert "cannot tell whether" in failures[0]["message"] and failures[0]["step"] == "decode"
    else:
        assert failures == [] and clips == [list(range(first, min(first + 10, round(length_s))))]


def test_a_segment_keeps_its_id_and_longer_ones_are_cut(tmp_path: Path, decoder: Decoder) -> None:
    ytid = "aaaaaaaaaa5"
    files = {f"{ytid}.wav": seconds(0, 10)}
    clips, failures = outcome(tmp_path, decoder, files, 30, 40, ytid, clip_s=5)
    assert (sorted(clips), failures) == ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [])
    corpus = read_corpus(tmp_path / "list.csv", class_map=tmp_path / "classes.csv", audio_root=tmp_path / "audio")
    rows = corpus.clips.to_pylist()
    (clip,), _ = cut_rows(rows, root=corpus.root, clip_s=10, min_clip_s=1, decoder=decoder)
    assert clip["clip_id"] == rows[0]["clip_id"] == clip_id(f"{ytid}.wav", LABELS, 30.0, 40.0)


def test_the_file_with_the_rows_times_is_chosen(tmp_path: Path, decoder: Decoder) -> None:
    ytid = "aaaaaaaaaa5"
    files = {
        f"{ytid}_3000.wav": seconds(3, 10),
        f"{ytid}_30_35.wav": seconds(50, 5),
        f"{ytid}_30_40.wav": seconds(30, 10),
        f"{ytid}.wav": seconds(0, 45),
        f"{ytid}x_30.wav": seconds(70, 10),
    }
    assert outcome(tmp_path, decoder, files, 30, 40, ytid) == ([list(range(30, 40))], [])
    assert outcome(tmp_path, decoder, {}, 3, 13, ytid) == ([list(range(3, 13))], [])
    assert outcome(tmp_path, decoder, {}, 20, 30, ytid) == ([list(range(20, 30))], []), "from the video"


def test_a_row_of_a_plain_manifest_is_never_taken_for_a_cut(tmp_path: Path, decoder: Decoder) -> None:
    (tmp_path / "a.wav").write_bytes(seconds(0, 10))
    (tmp_path / "m.csv").write_text("path,labels,start_s,end_s\na.wav,dog,5,15\n")
    corpus = read_corpus(tmp_path / "m.csv")
    (clip,), _ = cut_rows(corpus.clips.to_pylist(), root=corpus.root, clip_s=10, min_clip_s=1, decoder=decoder)
    assert (clip["start_s"], clip["end_s"]) == (5.0, 10.0)
