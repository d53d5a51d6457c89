"""Length and content of a file are those that it holds, whatever its header says; or it is refused with the reason."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf

from engine.audio.decode import decode, probe
from engine.errors import AudioError
from tests.engine.audio.test_time_base import KINDS, coded, heard, ladder, muxed

RATE_HZ = 8000
ID3_WITH_PICTURE = b"ID3\x04\0\0\0\0\x7f\x7f" + b"APIC" + bytes(127 * 128 + 127 - 4)


def part(kind, first, num_seconds=4, **changes):
    kind = replace(KINDS[kind], **changes)
    return muxed(kind, ladder(num_seconds, kind.rate_hz, first))


@pytest.mark.parametrize(
    "kind", ["mp3", "mp3_without_length", "mp2", "aac", "ac3", "flac", "ogg", "opus", "ogg_flac", "mpegts_aac", "webm"]
)
def test_files_that_were_joined_are_read_to_the_end(tmp_path, kind):
    (tmp_path / "a").write_bytes(part(kind, 0) + part(kind, 4, 5))
    rate_hz = KINDS[kind].rate_hz
    samples_T = decode(tmp_path / "a", sample_rate_hz=rate_hz)
    assert heard(samples_T, rate_hz) == list(range(9))
    assert round(probe(tmp_path / "a").duration_s * rate_hz) == len(samples_T)
    part_T = decode(tmp_path / "a", sample_rate_hz=rate_hz, start_s=6, duration_s=1)
    assert np.array_equal(part_T, samples_T[6 * rate_hz : 7 * rate_hz])


@pytest.mark.parametrize("change", [{"rate_hz": 48000}, {"layout": "stereo"}])
@pytest.mark.parametrize("kind", ["mp3", "aac", "ac3", "flac", "ogg_flac", "mpegts_aac", "opus"])
def test_another_rate_or_number_of_channels_in_the_middle_is_a_reason_of_its_own(tmp_path, kind, change):
    change = {"layout": "stereo"} if kind == "opus" else change  # Opus has one rate
    (tmp_path / "a").write_bytes(part(kind, 0) + part(kind, 4, **change))
    for use in (probe, lambda path: decode(path, sample_rate_hz=16000, start_s=5, duration_s=1)):
        with pytest.raises(AudioError, match="rate and number of channels must stay the same, got"):
            use(tmp_path / "a")


@pytest.mark.parametrize("kind", ["mp3", "mp3_without_length"])
@pytest.mark.parametrize("rates", [(320000, 32000), (32000, 320000)])
def test_an_mp3_is_read_to_its_end_whatever_its_first_frames_suggest(tmp_path, kind, rates):
    first, second = (part(kind, 4 * i, bit_rate=rate) for i, rate in enumerate(rates))
    (tmp_path / "a.mp3").write_bytes(ID3_WITH_PICTURE + first + ID3_WITH_PICTURE + second)
    assert heard(decode(tmp_path / "a.mp3", sample_rate_hz=16000), 16000) == list(range(8))
    assert probe(tmp_path / "a.mp3").duration_s == pytest.approx(8, abs=0.1)


def test_an_mp3_with_the_header_of_a_shorter_file_is_read_to_its_end(tmp_path):
    data = part("mp3", 0, 9)
    at = data.index(b"Xing") if b"Xing" in data else data.index(b"Info")
    (tmp_path / "a.mp3").write_bytes(data[: at + 8] + struct.pack(">II", 30, 5000) + data[at + 16 :])
    assert heard(decode(tmp_path / "a.mp3", sample_rate_hz=16000), 16000) == list(range(9))
    (tmp_path / "a.mp3").write_bytes(data[: at + 8] + struct.pack(">II", 3000, 10**6) + data[at + 16 :])
    with pytest.raises(AudioError, match=r"damaged: 9\.\d+ of 78\.\d+ s can be decoded"):
        decode(tmp_path / "a.mp3", sample_rate_hz=16000)


def with_hole(data, fraction):
    begin, size = len(data) // 2, max(300, int(fraction * len(data)))
    return data[:begin] + bytes(size) + data[begin + size :]


STATES_NO_LENGTH = ["mp3_without_length", "aac", "ac3", "webm_live", "mpegts_aac"]


@pytest.mark.parametrize("kind", STATES_NO_LENGTH)
def test_a_damaged_frame_does_not_end_a_file_that_states_no_length(tmp_path, kind):
    (tmp_path / "a").write_bytes(with_hole(part(kind, 0, 9), 0.004))
    samples_T = decode(tmp_path / "a", sample_rate_hz=16000)
    assert len(samples_T) > 0.95 * 9 * 16000 and heard(samples_T, 16000)[-1] >= 7
    assert probe(tmp_path / "a").duration_s == pytest.approx(len(samples_T) / 16000, abs=0.01)


@pytest.mark.parametrize("kind", [*STATES_NO_LENGTH, "mp3", "m4a", "flac", "opus", "ogg", "wma", "flv_mp3", "webm"])
def test_a_file_with_much_damage_in_the_middle_is_refused(tmp_path, kind):
    (tmp_path / "a").write_bytes(with_hole(part(kind, 0, 9), 0.2))
    with pytest.raises(AudioError, match=r"it is damaged: .* decoded"):
        decode(tmp_path / "a", sample_rate_hz=16000)


SAMPLES = ladder(3, RATE_HZ)
WAV = coded(SAMPLES, RATE_HZ, "WAV", "PCM_16")
LIST = b"LIST" + struct.pack("<I", 4000) + bytes(4000)


def with_length(kind, subtype, num_bytes, rest=b""):
    """A file whose header states ``num_bytes`` of samples."""
    data = coded(SAMPLES, RATE_HZ, kind, subtype)
    name, layout, offset = {
        "WAV": (b"data", "<I", 4),
        "AIFF": (b"SSND", ">I", 4),
        "W64": (b"data", "<Q", 16),
        "RF64": (b"ds64", "<Q", 16),
        "CAF": (b"data", ">q", 4),
        "AU": (b".snd", ">I", 8),
    }[kind]
    at = data.index(name) + offset
    return data[:at] + struct.pack(layout, num_bytes) + data[at + struct.calcsize(layout) :] + rest


@pytest.mark.parametrize("num_bytes", [0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_a_wav_that_does_not_know_its_length_is_read_to_its_end(tmp_path, num_bytes, subtype):
    (tmp_path / "a.wav").write_bytes(with_length("WAV", subtype, num_bytes))
    reference, _ = sf.read(io.BytesIO(coded(SAMPLES, RATE_HZ, "WAV", subtype)), dtype="float32")
    assert np.array_equal(decode(tmp_path / "a.wav", sample_rate_hz=RATE_HZ), reference)


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [
        ("AIFF", 0),
        ("AIFF", 0xFFFFFFFF),
        ("AU", 0),
        ("AU", 0xFFFFFFFF),
        ("CAF", -1),
        ("RF64", 0),
        ("RF64", 2**63),
        ("W64", 0),
        ("W64", 2**62),
    ],
)
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_other_formats_that_do_not_know_their_length_are_read_to_their_end(tmp_path, kind, subtype, num_bytes):
    (tmp_path / "a").write_bytes(with_length(kind, subtype, num_bytes))
    reference, _ = sf.read(io.BytesIO(coded(SAMPLES, RATE_HZ, kind, subtype)), dtype="float32")
    assert np.array_equal(decode(tmp_path / "a", sample_rate_hz=RATE_HZ), reference)


@pytest.mark.parametrize("rest", [b"", LIST, LIST + LIST, b"TAG" + bytes(125), LIST[:-2]])
def test_chunks_and_tags_after_the_samples_are_no_samples(tmp_path, rest):
    (tmp_path / "a.wav").write_bytes(WAV + rest)
    assert len(decode(tmp_path / "a.wav", sample_rate_hz=RATE_HZ)) == len(SAMPLES)


def test_a_wav_whose_header_states_the_first_part_is_refused(tmp_path):
    data = with_length("WAV", "PCM_16", 2 * RATE_HZ)
    (tmp_path / "a.wav").write_bytes(data + bytes(200_000))
    with pytest.raises(AudioError, match="states 16000 bytes of samples, and 232000 bytes of something else follow"):
        probe(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(WAV + WAV[36:])
    with pytest.raises(AudioError, match="must have its samples in one chunk, got several"):
        probe(tmp_path / "a.wav")


def sparse(path, head, first, last, total, rest=b""):
    with path.open("wb") as file:
        file.write(head + first)
        file.seek(len(head) + total - len(last))
        file.write(last + rest)


TOTAL = 2**32 + 2**28
LARGE = {
    "wrapped.wav": ("WAV", TOTAL % 2**32, b""),
    "wrapped_with_a_list.wav": ("WAV", TOTAL % 2**32, LIST),
    "saturated.wav": ("WAV", 0xFFFFFFFF, b""),
    "saturated_at_2_gib.wav": ("WAV", 0x7FFFFFFF, b""),
    "zero.wav": ("WAV", 0, b""),
    "right.w64": ("W64", TOTAL + 24, b""),
    "zero.rf64": ("RF64", 0, b""),
    "right.rf64": ("RF64", TOTAL, LIST),
    "wrapped.aiff": ("AIFF", (TOTAL + 8) % 2**32, b""),
    "unknown.au": ("AU", 0xFFFFFFFF, b""),
    "right.caf": ("CAF", TOTAL + 4, b""),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_file_over_4_gib_is_read_to_its_end(tmp_path, name):
    """The files are sparse: they take no space."""
    kind, num_bytes, rest = LARGE[name]
    order = ">i2" if kind in ("AIFF", "AU", "CAF") else "<i2"
    small = with_length(kind, "PCM_16", num_bytes)
    first, last = ((ladder(3, RATE_HZ, k) * 32767).astype(order).tobytes() for k in (0, 10))
    sparse(tmp_path / name, small[: -2 * len(SAMPLES)], first, last, TOTAL, rest)
    true_s = TOTAL / 2 / RATE_HZ
    assert probe(tmp_path / name).duration_s == true_s
    for start_s, seconds in ((0.0, [0, 1, 2]), (true_s - 3, [10, 11, 12])):
        samples_T = decode(tmp_path / name, sample_rate_hz=RATE_HZ, start_s=start_s, duration_s=3)
        assert heard(samples_T, RATE_HZ) == seconds
