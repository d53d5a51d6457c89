"""Every kind of bad file and manifest has a defined outcome: a known clip, or a failure with its reason."""

import io
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from engine.audio.decoder import Decoder
from engine.corpus.clips import clip_id
from engine.corpus.read import read_corpus
from engine.passes.decode import cut_rows, decode_rows

RATE_HZ = 8000
NUM_SAMPLES = 2 * RATE_HZ
SINE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(NUM_SAMPLES) / RATE_HZ)
MAX_RESIDENT_BYTES = 400 << 20  # of the child, also if a header promises more
pytestmark = pytest.mark.timeout(20)


def sine(freq_hz, rate_hz, duration_s=2.0, level=0.5):
    return level * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)


def coded(samples=SINE, rate_hz=RATE_HZ, kind="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def patched(data, at, field):
    return data[:at] + field + data[at + len(field) :]


def data_size(num_bytes, *, data=None):
    data = coded() if data is None else data
    return patched(data, data.index(b"data") + 4, struct.pack("<I", num_bytes))


def flac_total(total):
    """The 36 bits of STREAMINFO that count samples."""
    data = coded(kind="FLAC")
    return patched(data, 21, bytes([data[21] & 0xF0 | total >> 32]) + struct.pack(">I", total & 0xFFFFFFFF))


def w64(num_bytes):
    data = coded(kind="W64")
    return patched(data, data.index(b"data") + 16, struct.pack("<Q", num_bytes))


def rf64(num_bytes):
    data = coded(kind="RF64")
    return patched(data, data.index(b"ds64") + 8, struct.pack("<QQQ", num_bytes, num_bytes, num_bytes // 2))


def spoiled(value):
    samples = SINE.copy()
    samples[100] = value
    return coded(samples, subtype="FLOAT")


def within(reference, tolerance):
    def check(samples_T):
        assert np.max(np.abs(samples_T[: len(reference)] - reference)) <= tolerance

    return check


is_sine = within(SINE, 1e-4)


def like_sine(freq_hz, *, min_snr_db):
    """Apart from the edges, where a resampler lacks samples."""

    def check(samples_T):
        reference = sine(freq_hz, RATE_HZ)
        middle = slice(RATE_HZ // 4, -RATE_HZ // 4)
        error = samples_T[: len(reference)][middle] - reference[middle]
        assert 10 * np.log10(np.mean(reference[middle] ** 2) / np.mean(error**2)) > min_snr_db

    return check


def known_mu_law(samples_T):
    """Companding is exact to a sixteenth of the level's octave: 4 % of the sample, and a step near zero."""
    assert np.all(np.abs(samples_T - SINE) <= 0.04 * np.abs(SINE) + 2 / 8192)


@dataclass(frozen=True, kw_only=True)
class Case:
    content: bytes | Callable[[Path], None]
    """Bytes of the file, or a function that creates it."""
    reason: str | None = None
    """Pattern of the failure's message; None if the file can be decoded."""
    check: Callable[[np.ndarray], None] = is_sine
    num_samples: int = NUM_SAMPLES
    num_failures: int = 1
    error_class: str = "AudioError"


def fails(content, reason, error_class="AudioError", **changes):
    return Case(content=content, reason=reason, error_class=error_class, **changes)


SILENT = ("must have sound above -90 dBFS, got silence from 0 to 2 s", "SilentError")


def decodes(content, check=is_sine, **changes):
    return Case(content=content, check=check, **changes)


NOISE = np.random.default_rng(0).bytes(100_000)
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>" + b"<p>gone</p>" * 500
BASE = coded()


def cut(fraction):
    return BASE[: round(fraction * len(BASE))]


CASES = {
    "empty.wav": fails(b"", r"empty file \(0 bytes\)"),
    "four_bytes.wav": fails(b"RIFF", "cannot decode it with libsndfile or FFmpeg"),
    "half_a_header.wav": fails(BASE[:20], "cannot decode it with libsndfile or FFmpeg"),
    "header_only.wav": fails(BASE[:44], "cannot decode any of its samples"),
    "no_samples.wav": fails(coded(SINE[:0]), "cannot decode any of its samples"),
    **{
        f"cut_{tenths}.wav": fails(
            cut(tenths / 10), f"damaged: {(len(cut(tenths / 10)) - 44) // 2 / RATE_HZ:.3f} of 2.0"
        )
        for tenths in range(1, 10)
    },
    "cut_96_percent.wav": decodes(cut(0.96), within(SINE[:15359], 1e-4), num_samples=15359),
    "cut.aiff": fails(coded(kind="AIFF")[: len(BASE) // 2], r"damaged: 0\.99\d of 2\.000 s"),
    "cut.flac": fails(coded(np.tile(SINE, 5), kind="FLAC")[:25000], r"damaged: [3-5]\.\d+ of 10\.000 s can be decoded"),
    "cut.mp3": fails(
        coded(np.tile(SINE, 5), kind="MP3", subtype="MPEG_LAYER_III")[:5000], r"promises 10\.000 s in 5000"
    ),
    "riff_size_lies.wav": decodes(patched(BASE, 4, b"\xff\xff\xff\xff")),
    "riff_size_zero.wav": decodes(patched(BASE, 4, bytes(4))),
    "into_a_pipe.wav": decodes(data_size(0xFFFFFFFF)),
    "into_another_pipe.wav": decodes(data_size(0x7FFFFFFF)),
    "claims_2_gigabytes.wav": fails(data_size(2_000_000_000), r"promises 125000\.000 s in 32044 bytes"),
    "claims_20_seconds.wav": fails(data_size(20 * 16000), r"damaged: 2\.000 of 10\.000 s", num_failures=2),
    "claims_nothing.wav": decodes(data_size(0)),
    "claims_terabytes.w64": decodes(w64(2**40)),
    "claims_exabytes.w64": decodes(w64(2**62)),
    "claims_terabytes.rf64": decodes(rf64(2**40)),
    "claims_exabytes.rf64": decodes(rf64(2**63)),
    "claims_2_hours.flac": fails(flac_total(7200 * RATE_HZ), r"promises 7200\.000 s in \d+ bytes"),
    "claims_99_days.flac": fails(flac_total(2**36 - 1), r"promises 8589934\.592 s"),
    "claims_nothing.flac": decodes(flac_total(0)),
    "no_channels.wav": fails(patched(BASE, 22, bytes(2)), "cannot decode any of its audio"),
    "65535_channels.wav": fails(patched(BASE, 22, b"\xff\xff"), "cannot decode any of its audio"),
    "rate_0.wav": fails(patched(BASE, 24, bytes(4)), "cannot decode it with libsndfile or FFmpeg"),
    "rate_2_GHz.wav": fails(patched(BASE, 24, struct.pack("<I", 2_000_000_000)), "rate must be 100 to 1000000 Hz"),
    "rate_4_GHz.wav": fails(patched(BASE, 24, b"\xff\xff\xff\xff"), "cannot decode it with libsndfile or FFmpeg"),
    "64_channels.wav": decodes(
        coded(np.stack([SINE * (channel + 1) / 64 for channel in range(64)], 1), subtype="FLOAT"),
        within(SINE * 65 / 128, 1e-6),
    ),
    "1_kHz.wav": decodes(coded(sine(100, 1000), 1000, subtype="FLOAT"), like_sine(100, min_snr_db=80)),
    "768_kHz.wav": decodes(coded(sine(440, 768_000), 768_000, subtype="FLOAT"), like_sine(440, min_snr_db=80)),
    "nan.wav": fails(spoiled(np.nan), "NaN or infinite"),
    "infinity.wav": fails(spoiled(-np.inf), "NaN or infinite"),
    "beyond_float32.wav": fails(coded(np.full(RATE_HZ, 1e300), subtype="DOUBLE"), "NaN or infinite"),
    "1e30.wav": fails(coded(SINE * 2e30, subtype="FLOAT"), r"must be below 2\*\*40 \(full scale is 1\), got 1e\+30"),
    "int_as_float.wav": decodes(coded(SINE * 32768, subtype="FLOAT"), within(SINE * 32768, 0.01)),
    "dc.wav": fails(coded(np.full(NUM_SAMPLES, 0.25), subtype="FLOAT"), *SILENT),
    "dc_44k.wav": fails(coded(np.full(88200, 0.25), 44100, subtype="FLOAT"), *SILENT),
    "zeros.wav": fails(coded(0 * SINE), *SILENT),
    "stereo_zeros.flac": fails(coded(np.zeros((NUM_SAMPLES, 2)), kind="FLAC"), *SILENT),
    "last_bit.wav": fails(coded(SINE * 2.0**-15), *SILENT),
    "quiet_24_bit.wav": decodes(coded(SINE * 2.0**-12, subtype="PCM_24"), within(SINE * 2.0**-12, 2**-22)),
    "antiphase.wav": decodes(coded(np.stack([SINE, -SINE], 1)), within(SINE, 1e-4)),
    "0.4_s.wav": fails(coded(SINE[:3200]), "at least min_clip_s=0.5 s, got 0.4 s", error_class="TooShortError"),
    "clipped.wav": decodes(coded(np.clip(8 * SINE, -1, 1)), within(np.clip(8 * SINE, -1, 1), 2 / 32768)),
    "8_bit.wav": decodes(coded(subtype="PCM_U8"), within(SINE, 2 / 256)),
    "24_bit.wav": decodes(coded(subtype="PCM_24"), within(SINE, 2**-22)),
    "32_bit.wav": decodes(coded(subtype="PCM_32"), within(SINE, 2**-23)),
    "float64.wav": decodes(coded(subtype="DOUBLE"), within(SINE, 2**-24)),
    "mu_law.wav": decodes(coded(subtype="ULAW"), known_mu_law),
    "a_law.wav": decodes(coded(subtype="ALAW"), known_mu_law),
    "ima_adpcm.wav": decodes(coded(subtype="IMA_ADPCM"), like_sine(440, min_snr_db=20), num_samples=32 * 505),
    "ms_adpcm.wav": decodes(coded(subtype="MS_ADPCM"), like_sine(440, min_snr_db=20)),
    "gsm.wav": decodes(coded(subtype="GSM610"), like_sine(440, min_snr_db=8)),
    "g721.wav": decodes(coded(subtype="G721_32"), like_sine(440, min_snr_db=10), num_samples=16080),
    "text.wav": fails(b"this is no audio, only words\n" * 99, "begins like a text, such as a web page"),
    "html.mp3": fails(HTML, "begins like a text"),
    "json.flac": fails(json.dumps({"error": "quota"}).encode(), "begins like a text"),
    "noise.wav": fails(NOISE, "cannot decode it with libsndfile or FFmpeg"),
    "noise.mp3": fails(NOISE, "cannot decode any of its audio|cannot decode it with libsndfile or FFmpeg"),
    "zero_bytes.wav": fails(bytes(200_000), "cannot decode it with libsndfile or FFmpeg"),
    "directory.wav": fails(lambda path: path.mkdir(), "must be a regular file, got a directory"),
    "fifo.wav": fails(os.mkfifo, "pipe, socket or device"),
    "dangling.wav": fails(lambda path: path.symlink_to("/nowhere/a.wav"), "cannot open it.*No such file"),
    "loop.wav": fails(lambda path: path.symlink_to(path), "cannot open it.*symbolic links"),
    "device.wav": fails(lambda path: path.symlink_to("/dev/zero"), "pipe, socket or device"),
    "missing.wav": fails(lambda path: None, "cannot open it.*No such file"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad") / "root"
    (root / "x").mkdir(parents=True)
    for name, case in CASES.items():
        if callable(case.content):
            case.content(root / "x" / name)
        else:
            (root / "x" / name).write_bytes(case.content)
    return root


@pytest.fixture(scope="module")
def decoder():
    one = Decoder(time_limit_s=15.0)
    yield one
    one.close()


def row_of(path, **times):
    labels = ["dog", "rain"]
    start_s, end_s = times.get("start_s"), times.get("end_s")
    identity = clip_id(path, labels, start_s, end_s)
    return {"clip_id": identity, "path": path, "labels": labels, "start_s": start_s, "end_s": end_s}


def outcome(rows, root, decoder, clip_s=10.0):
    pieces, failures = cut_rows(rows, root=str(root), clip_s=clip_s, min_clip_s=0.5, decoder=decoder)
    clips, more = decode_rows(pieces, root=str(root), sample_rate_hz=RATE_HZ, clip_s=clip_s, decoder=decoder)
    assert len(clips) + len(more) == len(pieces)
    return clips, failures + more


def resident_bytes(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_its_outcome(folder, decoder, name):
    case = CASES[name]
    clips, failures = outcome([row_of(f"x/{name}")], folder, decoder)
    if case.reason is None:
        assert failures == []
        (clip,) = clips
        assert clip.samples_T.dtype == np.float32 and len(clip.samples_T) == case.num_samples
        case.check(clip.samples_T)
    else:
        assert clips == [] and len(failures) == case.num_failures
        row = failures[0]
        assert re.search(case.reason, row["message"]), row["message"]
        assert name in row["message"] and len(row["message"]) < 600
        expected = (case.error_class, "decode", f"x/{name}", 2, 1)
        assert tuple(row[key] for key in ("error_class", "step", "path", "num_queries", "attempts")) == expected
    assert resident_bytes(decoder.pid) < MAX_RESIDENT_BYTES


@pytest.mark.timeout(120)
def test_in_one_corpus_clips_and_failures_add_up(folder, decoder):
    corpus = read_corpus(folder)
    found = corpus.clips["path"].to_pylist()
    on_disk = set(CASES) - {"directory.wav", "missing.wav"} - {name for name in CASES if name.endswith("rf64")}
    assert sorted(found) == sorted(f"x/{name}" for name in on_disk) and corpus.num_failures == 0
    rows = corpus.clips.to_pylist()
    clips, failures = outcome(rows, folder, decoder)
    good = {clip.row["path"] for clip in clips}
    assert good == {f"x/{name}" for name in on_disk if CASES[name].reason is None}
    assert {row["path"] for row in failures} == set(found) - good
    assert len(clips) + len({row["path"] for row in failures}) == len(rows)
    again, _ = outcome(rows, folder, decoder)
    for one, other in zip(clips, again, strict=True):
        assert np.array_equal(one.samples_T, other.samples_T)


SEGMENTS = {
    "after_the_end": ({"start_s": 5.0}, "end of 'x/float64.wav' at 2.0 s, got 5.0"),
    "at_the_end": ({"start_s": 2.0}, "end of 'x/float64.wav' at 2.0 s"),
    "far_after_the_end": ({"start_s": 1e300, "end_s": 1e301}, "at 2.0 s, got 1e+300"),
    "shorter_than_a_sample": ({"start_s": 0.0, "end_s": 1e-9}, "at least min_clip_s=0.5 s, got 1e-09 s"),
    "shorter_than_the_shortest_clip": ({"start_s": 0.5, "end_s": 0.9}, "at least min_clip_s=0.5 s, got 0.4 s"),
    "as_long_as_the_shortest_clip": ({"start_s": 1.5}, None),
    "end_after_the_end": ({"start_s": 1.0, "end_s": 1e300}, None),
    "the_last_samples": ({"start_s": 1.999}, "at least min_clip_s=0.5 s, got 0.001 s"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_has_its_outcome(folder, decoder, name):
    times, reason = SEGMENTS[name]
    clips, failures = outcome([row_of("x/float64.wav", **times)], folder, decoder)
    if reason is None:
        within(SINE[round(times["start_s"] * RATE_HZ) :], 2**-24)(clips[0].samples_T)
        assert len(clips[0].samples_T) == NUM_SAMPLES - round(times["start_s"] * RATE_HZ) and failures == []
    else:
        assert clips == [] and [reason in row["message"] for row in failures] == [True]


def test_a_long_flac_without_a_length_is_read_to_its_end(tmp_path, decoder):
    """A program that writes into a pipe cannot fill in the number of samples."""
    data = coded(np.tile(SINE, 30), kind="FLAC")
    (tmp_path / "a.flac").write_bytes(patched(data, 21, bytes([data[21] & 0xF0]) + bytes(4)))
    clips, failures = outcome([row_of("a.flac")], tmp_path, decoder)
    assert failures == [] and [len(clip.samples_T) for clip in clips] == [10 * RATE_HZ] * 6
    for clip in clips:
        within(np.tile(SINE, 5), 1e-4)(clip.samples_T)


def test_a_cut_off_flac_gives_the_clips_before_the_damage(tmp_path, decoder):
    data = coded(np.random.default_rng(1).uniform(-0.5, 0.5, 60 * RATE_HZ), kind="FLAC")
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    clips, failures = outcome([row_of("a.flac")], tmp_path, decoder, clip_s=5.0)
    starts_s = [clip.row["start_s"] for clip in clips]
    assert starts_s == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert [row["error_class"] for row in failures] == ["AudioError"] * 7
    assert all("damaged" in row["message"] for row in failures)


def test_a_quiet_flac_of_an_hour_is_not_taken_for_damaged(tmp_path, decoder):
    """It has fewer bits per second than any speech codec, but its header is right."""
    with sf.SoundFile(tmp_path / "quiet.flac", "w", RATE_HZ, 1) as file:
        for _ in range(60):
            file.write(np.zeros(60 * RATE_HZ, np.float32))
    pieces, failures = cut_rows(
        [row_of("quiet.flac")], root=str(tmp_path), clip_s=600.0, min_clip_s=0.5, decoder=decoder
    )
    assert len(pieces) == 6 and failures == []


NAMES = {
    "spaces": b"a  b c.wav",
    "quotes": b'it\'s "this" one.wav',
    "newline": b"new\nline\tand tab.wav",
    "200_characters": b"x" * 196 + b".wav",
    "emoji": "👩‍🚀 é ß 漢字.wav".encode(),
    "percent": b"100%25?a=b&c#d.wav",
    "dash": b"--help.wav",
    "comma_semicolon": b"a,b;c.wav",
}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_in_a_folder_is_decoded(tmp_path, decoder, name):
    folder = os.path.join(os.fsencode(tmp_path), b"dog")
    os.mkdir(folder)
    with open(os.path.join(folder, NAMES[name]), "wb") as file:
        file.write(BASE)
    corpus = read_corpus(tmp_path)
    assert corpus.clips["path"].to_pylist() == ["dog/" + NAMES[name].decode()]
    clips, failures = outcome(corpus.clips.to_pylist(), corpus.root, decoder)
    assert failures == []
    within(SINE, 1e-4)(clips[0].samples_T)


def test_names_that_are_not_utf8_are_failures(tmp_path):
    """A table's strings are UTF-8: such a name cannot be written down so that it is found again."""
    folder = os.fsencode(tmp_path)
    for label, name in ((b"dog", b"\xff\xfe.wav"), (b"\xff", b"a.wav"), (b"dog", b"good.wav")):
        os.makedirs(os.path.join(folder, label), exist_ok=True)
        with open(os.path.join(folder, label, name), "wb") as file:
            file.write(BASE)
    corpus = read_corpus(tmp_path)
    assert corpus.clips["path"].to_pylist() == ["dog/good.wav"]
    rows = corpus.failures.to_pylist()
    assert sorted(row["path"] for row in rows) == ["?/a.wav", "dog/??.wav"]
    assert all("must be UTF-8" in row["message"] and row["step"] == "manifest" for row in rows)


def test_links_are_followed_and_loops_are_not(tmp_path, decoder):
    """What lies behind a link was put there by who owns the folder, other than a path in a manifest that climbs."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside / "dog", root / "cat"):
        folder.mkdir(parents=True)
        (folder / "a.wav").write_bytes(BASE)
    (root / "dog").symlink_to(outside / "dog")
    (root / "cat" / "b.wav").symlink_to(outside / "dog" / "a.wav")
    (root / "cat" / "up").symlink_to("..")
    (outside / "dog" / "back").symlink_to(root / "dog")
    corpus = read_corpus(root)
    assert corpus.clips["path"].to_pylist() == ["cat/a.wav", "cat/b.wav", "dog/a.wav"]
    clips, failures = outcome(corpus.clips.to_pylist(), corpus.root, decoder)
    assert len(clips) == 3 and failures == []
