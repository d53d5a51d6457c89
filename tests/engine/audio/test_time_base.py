"""Every read of a file has the samples that the complete decode has there, whatever the container's time stamps say.

Shape legend: ``T`` samples.
"""

import io
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile as sf

from engine.audio.decode import decode, probe
from engine.audio.recordings import Recordings

NUM_SECONDS = 9
STARTS_S = (0.0, 0.2, 3.2, 5.7777, 8.0)


def ladder(num_seconds=NUM_SECONDS, rate_hz=44100, first=0):
    """Second ``k`` is a sine of ``300 + 100 k`` Hz."""
    t = np.arange(rate_hz) / rate_hz
    fade = np.clip(np.minimum(t, 1 - t) / 0.005, 0, 1)
    tones = [0.4 * fade * np.sin(2 * np.pi * (300 + 100 * k) * t) for k in range(first, first + num_seconds)]
    return np.concatenate(tones).astype("f4")


def heard(samples_T, rate_hz):
    """The number of each second, from its middle."""
    found = []
    for begin in range(0, len(samples_T) - 9 * rate_hz // 10, rate_hz):
        part_T = samples_T[begin + rate_hz // 10 : begin + 9 * rate_hz // 10]
        power = np.abs(np.fft.rfft(part_T * np.hanning(len(part_T)))) ** 2
        found.append(round((np.argmax(power) * rate_hz / len(part_T) - 300) / 100))
    return found


@dataclass(frozen=True)
class Kind:
    container: str
    codec: str
    rate_hz: int = 44100
    options: dict = field(default_factory=dict)
    start_s: float = 0.0
    """First time stamp."""
    gap_s: float = 0.0
    """Time that is missing after four seconds."""
    layout: str = "mono"
    bit_rate: int = 96000


def muxed(kind, samples_T):
    buffer = io.BytesIO()
    if kind.codec == "vorbis":
        return remuxed(kind, samples_T)
    with av.open(buffer, "w", format=kind.container, options=kind.options) as container:
        stream = container.add_stream(kind.codec, rate=kind.rate_hz, layout=kind.layout)
        stream.codec_context.time_base = Fraction(1, kind.rate_hz)
        stream.codec_context.bit_rate = kind.bit_rate
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, kind.layout, kind.rate_hz)
        for begin in range(0, len(samples_T), size):
            part_T = samples_T[None, begin : begin + size].copy()
            frame = av.AudioFrame.from_ndarray(part_T, format="fltp", layout="mono")
            shift_s = kind.start_s + (kind.gap_s if begin >= 4 * kind.rate_hz else 0.0)
            frame.sample_rate, frame.time_base = kind.rate_hz, Fraction(1, kind.rate_hz)
            frame.pts = begin + round(shift_s * kind.rate_hz)
            for converted in resampler.resample(frame):
                container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def remuxed(kind, samples_T):
    """Vorbis of libsndfile in another container, or with other time stamps."""
    vorbis, buffer = io.BytesIO(coded(samples_T, kind.rate_hz, "OGG", "VORBIS")), io.BytesIO()
    with av.open(vorbis) as source, av.open(buffer, "w", format=kind.container) as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = packet.pts + round(kind.start_s / packet.time_base)
                container.mux(packet)
    return buffer.getvalue()


def coded(samples_T, rate_hz, kind, subtype=None):
    buffer = io.BytesIO()
    with sf.SoundFile(buffer, "w", rate_hz, 1, format=kind, subtype=subtype) as file:
        for begin in range(0, len(samples_T), rate_hz):  # libsndfile's Vorbis fails at long blocks
            file.write(samples_T[begin : begin + rate_hz])
    return buffer.getvalue()


LATE, GAP = {"start_s": 100.0}, {"gap_s": 2.0}
OPUS = {"codec": "libopus", "rate_hz": 48000}
KINDS = {
    "mp3": Kind("mp3", "libmp3lame"),
    "mp3_without_length": Kind("mp3", "libmp3lame", options={"write_xing": "0"}),
    "mp3_stereo": Kind("mp3", "libmp3lame", layout="stereo"),
    "mp2": Kind("mp2", "mp2"),
    "aac": Kind("adts", "aac"),
    "ac3": Kind("ac3", "ac3"),
    "eac3": Kind("eac3", "eac3"),
    "flac": Kind("flac", "flac"),
    "m4a": Kind("ipod", "aac"),
    "m4a_alac": Kind("ipod", "alac"),
    "m4a_gap": Kind("ipod", "aac", **GAP),
    "mp4_late": Kind("mp4", "aac", **LATE),
    "mp4_fragmented": Kind("mp4", "aac", options={"movflags": "frag_keyframe+empty_moov"}),
    "mov_mp3": Kind("mov", "libmp3lame"),
    "webm": Kind("webm", **OPUS),
    "webm_live": Kind("webm", **OPUS, options={"live": "1"}),
    "webm_late": Kind("webm", **OPUS, **LATE),
    "webm_gap": Kind("webm", **OPUS, **GAP),
    "webm_vorbis": Kind("webm", "vorbis"),
    "mkv_aac": Kind("matroska", "aac"),
    "mkv_mp3": Kind("matroska", "libmp3lame"),
    "mkv_flac_late": Kind("matroska", "flac", **LATE),
    "mkv_pcm": Kind("matroska", "pcm_s16le"),
    "mkv_ac3_gap": Kind("matroska", "ac3", **GAP),
    "ogg": Kind("ogg", "vorbis"),
    "ogg_flac": Kind("ogg", "flac"),
    "ogg_late": Kind("ogg", "vorbis", **LATE),
    "opus": Kind("ogg", **OPUS),
    "opus_late": Kind("ogg", **OPUS, **LATE),
    "wma": Kind("asf", "wmav2"),
    "wma_late": Kind("asf", "wmav2", **LATE),
    "flv_mp3": Kind("flv", "libmp3lame"),
    "flv_aac_late": Kind("flv", "aac", **LATE),
    "mpegts_aac": Kind("mpegts", "aac"),
    "mpegts_mp2_late": Kind("mpegts", "mp2", **LATE),
    "mpegts_ac3_gap": Kind("mpegts", "ac3", **GAP),
    "mpeg_mp2": Kind("mpeg", "mp2"),
    "avi_mp3": Kind("avi", "libmp3lame"),
    "avi_pcm": Kind("avi", "pcm_s16le"),
    "avi_ac3": Kind("avi", "ac3"),
    "avi_late": Kind("avi", "libmp3lame", **LATE),
    "avi_gap": Kind("avi", "libmp3lame", **GAP),
    "opus_gap": Kind("ogg", **OPUS, **GAP),
    "wma_gap": Kind("asf", "wmav2", **GAP),
    "flv_aac_gap": Kind("flv", "aac", **GAP),
    "wavpack": Kind("wv", "wavpack"),
    "wav_adpcm": Kind("wav", "adpcm_ms"),
    "wav_mp3": Kind("wav", "libmp3lame"),
    "caf_alac": Kind("caf", "alac"),
    "caf": Kind("caf", "pcm_s16be"),
    "w64": Kind("w64", "pcm_s24le"),
    "aiff": Kind("aiff", "pcm_s16be"),
    "au": Kind("au", "pcm_s16be"),
    "rf64": Kind("wav", "pcm_f32le", options={"rf64": "always"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_segment_is_that_part_of_the_complete_decode_to_the_sample(tmp_path, name):
    kind, path = KINDS[name], tmp_path / name
    path.write_bytes(muxed(kind, ladder(rate_hz=kind.rate_hz)))
    whole_T = decode(path, sample_rate_hz=kind.rate_hz)
    assert heard(whole_T, kind.rate_hz) == list(range(NUM_SECONDS))
    assert len(whole_T) == pytest.approx(NUM_SECONDS * kind.rate_hz, abs=4096)
    info = probe(path)
    assert round(info.duration_s * kind.rate_hz) == len(whole_T) and info.sample_rate_hz == kind.rate_hz
    kept = Recordings(max_kept=kind.rate_hz)
    for start_s in (*STARTS_S, *reversed(STARTS_S)):
        begin, end = round(start_s * kind.rate_hz), round((start_s + 0.9) * kind.rate_hz)
        for recordings in (None, kept):
            part_T = decode(path, sample_rate_hz=kind.rate_hz, start_s=start_s, duration_s=0.9, recordings=recordings)
            assert np.array_equal(part_T, whole_T[begin:end][: len(part_T)]) and abs(len(part_T) - (end - begin)) <= 1
    assert probe(path, recordings=kept) == info


@pytest.fixture
def num_opened(monkeypatch):
    """A list that grows whenever FFmpeg opens a file."""
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    return opened


@pytest.mark.parametrize(("max_kept_s", "times"), [(30, 1), (2, 2)])
def test_the_length_and_the_segments_of_a_file_in_order_take_one_decode_or_two(tmp_path, num_opened, max_kept_s, times):
    path, recordings = tmp_path / "a.aac", Recordings(max_kept=max_kept_s * 44100)
    path.write_bytes(muxed(KINDS["aac"], ladder(12)))
    num_opened.clear()
    for _ in range(2):
        assert probe(path, recordings=recordings).duration_s == pytest.approx(12, abs=0.1)
    for start_s in range(0, 12, 2):
        segment = {"start_s": float(start_s), "duration_s": 2.0}
        samples_T = decode(path, sample_rate_hz=32000, recordings=recordings, **segment)
        assert heard(samples_T, 32000) == [start_s, start_s + 1]
    assert len(num_opened) == times


def test_a_file_that_was_replaced_is_another_recording(tmp_path):
    path, recordings = tmp_path / "a.mp3", Recordings(max_kept=1 << 20)
    for first in (0, 4):
        (tmp_path / "new").write_bytes(muxed(KINDS["mp3"], ladder(4, first=first)))
        (tmp_path / "new").replace(path)
        assert heard(decode(path, sample_rate_hz=44100, recordings=recordings), 44100) == list(range(first, first + 4))


def test_recordings_keep_no_more_samples_than_they_may(tmp_path):
    recordings = Recordings(max_kept=10 * 44100)
    for number in range(8):
        (tmp_path / f"{number}.flac").write_bytes(muxed(KINDS["flac"], ladder(4)))
        decode(tmp_path / f"{number}.flac", sample_rate_hz=44100, recordings=recordings)
        assert sum(one.num_kept for one in recordings._kept.values()) <= 10 * 44100


def test_the_files_of_a_task_are_decoded_once_for_their_length_and_their_samples(tmp_path):
    decoded_s, paths = [], [tmp_path / f"{number}.flac" for number in range(70)]
    for path in paths:
        sf.write(path, ladder(1, 8000), 8000)
    recordings = Recordings(max_kept=1 << 25, on_decoded=decoded_s.append)
    for path in paths:
        probe(path, recordings=recordings)
    for path in paths:
        decode(path, sample_rate_hz=8000, duration_s=1.0, recordings=recordings)
    assert sum(decoded_s) == len(paths)
