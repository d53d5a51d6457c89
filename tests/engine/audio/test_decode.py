"""Decoding has known answers: tones, seeks, containers and bad files."""

import io
import os
import tracemalloc

import av
import numpy as np
import pytest
import soundfile as sf
import torch

from engine.audio.decode import decode, probe
from engine.audio.flac import decode_flac24, encode_flac24, flac24_steps
from engine.audio.levels import active_mask, active_rms
from engine.errors import AudioError
from tests.support.wav import write_wav

SNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
PYAV = {"m4a": "aac", "mp4": "aac", "webm": "libopus", "aac": "aac"}


def tone(freq_hz, duration_s, rate_hz, level=0.5):
    return (level * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)).astype("f4")


def chirp(duration_s, rate_hz):
    t = np.arange(round(duration_s * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * (300 * t + 200 * t * t))).astype("f4")


def snr_db(*, estimate, reference):
    error = np.sum((estimate.astype("f8") - reference) ** 2)
    return 10 * np.log10(np.sum(reference.astype("f8") ** 2) / max(error, 1e-30))


def write(path, samples, rate_hz):
    kind = path.suffix[1:]
    if kind in SNDFILE:
        fmt, subtype = SNDFILE[kind]
        with sf.SoundFile(path, "w", rate_hz, 1, format=fmt, subtype=subtype) as file:
            for i in range(0, len(samples), rate_hz):
                file.write(samples[i : i + rate_hz])
        return path
    # Without noise substitution, whose random generator differs after every seek.
    options = {"aac_pns": "0"} if PYAV[kind] == "aac" else {}
    with av.open(str(path), "w", format="adts" if kind == "aac" else None) as container:
        stream = container.add_stream(PYAV[kind], rate=rate_hz, layout="mono", options=options)
        for i in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, i : i + 1024].copy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate_hz, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000, 96000, 47999])
def test_a_tone_keeps_frequency_and_level(tmp_path, rate_hz):
    sf.write(tmp_path / "a.wav", tone(1000, 2, rate_hz), rate_hz, subtype="FLOAT")
    got = decode(tmp_path / "a.wav", sample_rate_hz=32000)
    assert len(got) == 64000 and got.dtype == np.float32
    middle = slice(3200, -3200)
    assert snr_db(estimate=got[middle], reference=tone(1000, 2, 32000)[middle]) > 90


def test_channels_are_averaged(tmp_path):
    left, right = tone(440, 1, 16000), tone(700, 1, 16000)
    sf.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert np.allclose(decode(tmp_path / "a.wav", sample_rate_hz=16000), (left + right) / 2, atol=1e-6)
    info = probe(tmp_path / "a.wav")
    assert (info.duration_s, info.sample_rate_hz, info.num_channels) == (1.0, 16000, 2)


@pytest.mark.parametrize("kind", [*SNDFILE, *PYAV])
def test_a_segment_equals_that_part_of_the_complete_decode(tmp_path, kind):
    rate_hz = 48000 if kind in ("opus", "webm") else 44100
    path = write(tmp_path / f"a.{kind}", chirp(12, rate_hz), rate_hz)
    whole = decode(path, sample_rate_hz=32000)
    assert probe(path).duration_s == pytest.approx(12, abs=0.06)
    assert abs(len(whole) - 12 * 32000) <= (2048 if kind == "aac" else 1)  # raw AAC states no padding
    if kind != "aac":
        assert snr_db(estimate=whole[: 11 * 32000], reference=chirp(12, 32000)[: 11 * 32000]) > 15
    for start_s, duration_s in ((0.2, 1.0), (3.2, 2.5), (7.7777, 3.0), (11.5, 0.4)):
        part = decode(path, sample_rate_hz=32000, start_s=start_s, duration_s=duration_s)
        assert len(part) == round(duration_s * 32000)
        begin = round(start_s * 32000)
        assert snr_db(estimate=part, reference=whole[begin : begin + len(part)]) > 100
    with path.open("rb") as file:
        assert np.array_equal(decode(file, sample_rate_hz=32000), whole)
        assert probe(file) == probe(path)


@pytest.mark.parametrize("kind", SNDFILE)
@pytest.mark.parametrize("duration_s", [3.3, 65])
def test_reading_in_blocks_equals_one_read(tmp_path, kind, duration_s):
    path = write(tmp_path / f"a.{kind}", np.resize(chirp(5, 16000), round(duration_s * 16000)), 16000)
    reference, rate_hz = sf.read(path, dtype="float32")
    samples_T = decode(path, sample_rate_hz=rate_hz)
    assert abs(len(samples_T) - len(reference)) <= (256 if kind == "ogg" else 0)  # FFmpeg ends Vorbis with a block
    length = min(len(samples_T), len(reference))
    min_snr_db = 60 if kind == "opus" else 100  # libsndfile decodes Opus at 16 kHz, FFmpeg at 48 kHz
    assert snr_db(estimate=samples_T[:length], reference=reference[:length]) > min_snr_db


def test_a_segment_in_the_last_page_of_a_long_ogg(tmp_path):
    path = write(tmp_path / "a.ogg", np.tile(chirp(6, 8000), 16), 8000)
    whole = decode(path, sample_rate_hz=8000)
    for start_s in (70.0, 94.0, 95.5):
        part = decode(path, sample_rate_hz=8000, start_s=start_s)
        assert len(part) == len(whole) - round(start_s * 8000)
        assert snr_db(estimate=part, reference=whole[-len(part) :]) > 100


def test_a_segment_at_an_awkward_rate_stays_on_the_grid(tmp_path):
    sf.write(tmp_path / "a.wav", chirp(5, 47999), 47999, subtype="FLOAT")
    whole = decode(tmp_path / "a.wav", sample_rate_hz=32000)
    part = decode(tmp_path / "a.wav", sample_rate_hz=32000, start_s=2.34567, duration_s=1)
    assert snr_db(estimate=part, reference=whole[round(2.34567 * 32000) :][:32000]) > 100


def test_a_segment_is_limited_by_the_end(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, 2, 16000), 16000)
    assert len(decode(tmp_path / "a.wav", sample_rate_hz=16000, start_s=1.5, duration_s=10)) == 8000


def test_a_segment_of_a_long_file_takes_memory_for_the_segment_only(tmp_path):
    with sf.SoundFile(tmp_path / "long.wav", "w", 8000, 1) as file:
        for _ in range(30):
            file.write(tone(440, 60, 8000))
    tracemalloc.start()
    part = decode(tmp_path / "long.wav", sample_rate_hz=8000, start_s=1500, duration_s=10)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(part) == 80000 and peak_bytes < 2_000_000  # the complete file is 57.6 MB
    with pytest.raises(AudioError, match=r"must end by 600\.0 s"):
        decode(tmp_path / "long.wav", sample_rate_hz=8000)


def test_a_wav_with_a_wrong_length_is_decoded_to_its_end(tmp_path):
    sf.write(tmp_path / "a.wav", tone(440, 1, 8000), 8000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = (2**32 - 1).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert len(decode(tmp_path / "a.wav", sample_rate_hz=8000)) == 8000


@pytest.mark.parametrize(("kept", "is_enough"), [(0.98, True), (0.5, False)])
def test_a_truncated_file_is_accepted_from_95_percent(tmp_path, kept, is_enough):
    rng = np.random.default_rng(0)
    sf.write(tmp_path / "a.flac", rng.uniform(-0.5, 0.5, 441000).astype("f4"), 44100)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: int(kept * len(data))])
    if is_enough:
        assert 9.5 * 16000 <= len(decode(tmp_path / "a.flac", sample_rate_hz=16000)) <= 9.81 * 16000
    else:
        with pytest.raises(AudioError, match="damaged"):
            decode(tmp_path / "a.flac", sample_rate_hz=16000)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.wav", None, "cannot open it"),
        ("nul\0.wav", None, "cannot open it"),
        ("empty.wav", b"", r"empty file \(0 bytes\)"),
        ("text.wav", b"this is no audio at all, only words" * 50, "cannot decode it with libsndfile or FFmpeg"),
        ("name.raw", b"\1\2" * 500, "cannot decode it with libsndfile or FFmpeg"),
        ("list.m4a", PLAYLIST.encode(), "cannot decode it with libsndfile or FFmpeg"),
    ],
)
def test_a_file_without_audio_is_refused_with_the_reason(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for use in (probe, lambda path: decode(path, sample_rate_hz=8000)):
        with pytest.raises(AudioError, match=reason):
            use(str(tmp_path / name))


@pytest.mark.timeout(10)
def test_directories_and_pipes_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match="pipe"):
        decode(tmp_path / "pipe.wav", sample_rate_hz=8000)
    with pytest.raises(AudioError, match="directory"):
        probe(tmp_path)


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        ({"start_s": 3.0}, "must be before the end at 1.000 s"),
        ({"start_s": 1.0}, "must be before the end at 1.000 s"),
        ({"start_s": 5.0, "duration_s": 1.0}, "must be before the end at 1.000 s"),
        ({"start_s": -1.0}, "must be finite and at least 0"),
        ({"start_s": float("nan")}, "must be finite and at least 0"),
        ({"start_s": 0.5, "duration_s": -0.1}, "must end after its start"),
        ({"duration_s": 601.0}, "must last at most 600.0 s, got 601.0 s"),
    ],
)
@pytest.mark.parametrize("kind", ["wav", "m4a"])
def test_bad_segments_are_refused_with_the_reason(tmp_path, kind, segment, reason):
    path = write(tmp_path / f"a.{kind}", tone(440, 1, 16000), 16000)
    with pytest.raises(AudioError, match=reason):
        decode(path, sample_rate_hz=16000, **segment)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, value):
    samples = tone(440, 1, 8000)
    samples[4000] = value
    sf.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        decode(tmp_path / "a.wav", sample_rate_hz=8000)


def test_a_wav_without_samples_is_refused(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(0, "f4"), 8000)
    with pytest.raises(AudioError, match="cannot decode any of its samples"):
        decode(tmp_path / "a.wav", sample_rate_hz=8000)


@pytest.mark.parametrize(("peak", "exponent"), [(7.3, 3), (1e-4, -13), (1.0, 1), (0.99, 0), (1e-12, -24)])
@pytest.mark.parametrize("rate_hz", [8000, 32000, 47999, 655350])
def test_flac24_is_within_half_a_step_and_idempotent(peak, exponent, rate_hz):
    samples = np.random.default_rng(1).uniform(-peak, peak, 3001).astype("f4")
    samples[7] = -peak
    data, got = encode_flac24(samples, sample_rate_hz=rate_hz)
    decoded = decode_flac24(data, got)
    assert got == exponent and decoded.dtype == np.float32
    assert np.max(np.abs(decoded - samples.astype("f8"))) <= 2.0 ** (got - 24)
    assert sf.info(io.BytesIO(data)).samplerate == rate_hz
    assert np.array_equal(flac24_steps(torch.from_numpy(samples)).rounded.numpy(), decoded)
    again, exponent_again = encode_flac24(decoded, sample_rate_hz=rate_hz)
    assert np.array_equal(decode_flac24(again, exponent_again), decoded)


def test_flac24_at_its_edges():
    just_below = np.array([-(1 - 2.0**-24), 2.0**-23, 0], "f4")
    decoded = decode_flac24(*encode_flac24(just_below, sample_rate_hz=8000))
    assert np.array_equal(decode_flac24(*encode_flac24(decoded, sample_rate_hz=8000)), decoded)
    assert decode_flac24(*encode_flac24(np.zeros(0, "f4"), sample_rate_hz=8000)).shape == (0,)
    data, exponent = encode_flac24(np.zeros(5, "f4"), sample_rate_hz=8000)
    assert exponent == 0 and not decode_flac24(data, exponent).any()
    for bad, rate_hz in (([np.nan], 8000), ([2.0**41], 8000), ([0.5], 700000)):
        with pytest.raises(ValueError, match="must be"):
            encode_flac24(np.array(bad, "f4"), sample_rate_hz=rate_hz)


def test_activity_ignores_silence():
    samples = np.concatenate([tone(440, 1, 8000), np.zeros(8000, "f4"), tone(440, 0.05, 8000)])
    mask = active_mask(samples, sample_rate_hz=8000)
    assert mask.tolist() == [True] * 10 + [False] * 10 + [True]
    assert 20 * np.log10(active_rms(samples, sample_rate_hz=8000)) == pytest.approx(-9.03, abs=0.05)
    assert not active_mask(np.zeros(900, "f4"), sample_rate_hz=8000).any()
    assert active_rms(np.zeros(900, "f4"), sample_rate_hz=8000) == 0.0
    assert active_rms(np.zeros(0, "f4"), sample_rate_hz=8000) == 0.0


def test_a_float_wav_above_full_scale_is_decoded_exactly(tmp_path):
    samples = tone(440, 0.1, 16000, level=7.3)
    write_wav(tmp_path / "a.wav", samples, sample_rate_hz=16000)
    assert np.array_equal(decode(tmp_path / "a.wav", sample_rate_hz=16000), samples)
