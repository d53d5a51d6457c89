"""Channels become mono without losing the sound, the same way in every read; a file's default audio track is read."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile as sf

from engine.audio.channels import Downmix
from engine.audio.decode import decode
from engine.audio.levels import is_silent
from engine.errors import AudioError

RATE_HZ = 16000
KINDS = ("wav", "flac", "ogg", "mp3", "m4a", "webm")


def tone(freq_hz, duration_s=4.0, level=0.3):
    return (level * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype("f4")


A_T, B_T = tone(440), tone(1000)
NOISE_T = np.random.default_rng(0).normal(0, 0.1, len(A_T)).astype("f4")
ZERO_T = np.zeros_like(A_T)


def write(path, channels, *, layout="stereo"):
    samples_TC = np.stack(channels, 1)
    if path.suffix not in (".m4a", ".webm"):
        sf.write(path, samples_TC, RATE_HZ, **({"subtype": "FLOAT"} if path.suffix == ".wav" else {}))
        return path
    with av.open(str(path), "w", format="ipod" if path.suffix == ".m4a" else "webm") as container:
        codec = "aac" if path.suffix == ".m4a" else "libopus"
        encode(container, container.add_stream(codec, rate=RATE_HZ, layout=layout), samples_TC)
    return path


def encode(container, stream, samples_TC):
    size = 1024 if stream.codec.name == "aac" else 320
    is_planar = stream.codec.name == "aac"
    for i in range(0, len(samples_TC) - size + 1, size):
        block = samples_TC[i : i + size]
        data = np.ascontiguousarray(block.T if is_planar else block.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(data, format="fltp" if is_planar else "flt", layout=stream.layout)
        frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, i, Fraction(1, RATE_HZ)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def level_db(samples_T):
    return 10 * np.log10(np.mean(np.square(samples_T, dtype="f8")) + 1e-30)


CASES = {
    "antiphase": ([A_T, -A_T], A_T),
    "antiphase with an offset": ([A_T + 0.2, 0.2 - A_T], A_T + 0.2),
    "antiphase, one side louder": ([0.8 * A_T, -A_T], -A_T),
    "antiphase under independent noise": ([A_T + 0.01 * NOISE_T, -A_T], A_T + 0.01 * NOISE_T),
    "antiphase in the second half": ([A_T, np.where(np.arange(len(A_T)) < len(A_T) // 2, A_T, -A_T)], A_T),
    "antiphase, quiet": ([0.001 * A_T, -0.001 * A_T], 0.001 * A_T),
    "antiphase after silence": (
        [np.concatenate([ZERO_T, A_T]), np.concatenate([ZERO_T, -A_T])],
        np.concatenate([ZERO_T, A_T]),
    ),
    "in phase": ([A_T, A_T], A_T),
    "independent": ([A_T, B_T], (A_T + B_T) / 2),
    "one dead channel": ([A_T, ZERO_T], A_T / 2),
    "one channel with an offset alone": ([A_T, ZERO_T + 0.3], (A_T + 0.3) / 2),
    "a little antiphase": ([A_T, -0.5 * A_T], A_T / 4),
    "antiphase for a moment": ([A_T, np.where(np.arange(len(A_T)) < 800, -A_T, A_T)], None),
    "silence": ([ZERO_T, ZERO_T], ZERO_T),
    "three, two of them antiphase": ([A_T, -A_T, ZERO_T], A_T),
    "one sound of two antiphase": ([A_T + B_T, B_T - A_T], A_T + B_T),
    "one sound of two antiphase, quieter": ([0.4 * A_T + B_T, B_T - 0.4 * A_T], 0.4 * A_T + B_T),
    "one sound of two antiphase, in noise": ([A_T + NOISE_T, NOISE_T - A_T], NOISE_T - A_T),
    "three, two of them antiphase and one that sounds": ([A_T, -A_T, 0.5 * B_T], A_T),
    "independent noise": ([NOISE_T, NOISE_T[::-1]], (NOISE_T + NOISE_T[::-1]) / 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_is_taken_unless_it_cancels(tmp_path, case):
    channels, expected_T = CASES[case]
    found_T = decode(write(tmp_path / "a.wav", channels), sample_rate_hz=RATE_HZ)
    expected_T = np.mean(channels, axis=0) if expected_T is None else expected_T
    np.testing.assert_allclose(found_T, expected_T, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["antiphase", "antiphase in the second half", "in phase", "independent"])
def test_a_sought_read_has_the_samples_of_the_complete_decode_in_every_format(tmp_path, kind, case):
    path = write(tmp_path / f"a.{kind}", CASES[case][0])
    complete_T = decode(path, sample_rate_hz=RATE_HZ)
    assert level_db(complete_T) == pytest.approx(level_db(CASES[case][1]), abs=0.6)
    for start_s in (0.0, 1.0, 2.5):
        part_T = decode(path, sample_rate_hz=RATE_HZ, start_s=start_s, duration_s=1.0)
        first = round(start_s * RATE_HZ)
        assert level_db(part_T - complete_T[first : first + RATE_HZ]) < level_db(part_T) - 20


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_clips_of_one_file_agree_although_only_its_beginning_cancels(tmp_path, kind):
    sign_T = np.where(np.arange(len(A_T)) < RATE_HZ, -1.0, 1.0)
    path = write(tmp_path / f"a.{kind}", [A_T, sign_T * A_T + 0.5 * B_T])
    complete_T = decode(path, sample_rate_hz=RATE_HZ)
    assert level_db(complete_T[RATE_HZ:] - (A_T + 0.5 * B_T)[RATE_HZ:]) < -60, "the louder channel, not the mean"
    last_T = decode(path, sample_rate_hz=RATE_HZ, start_s=3.0, duration_s=1.0)
    assert np.array_equal(last_T, complete_T[3 * RATE_HZ :])


SURROUND = [A_T, -A_T, ZERO_T, tone(60, level=0.9), ZERO_T, ZERO_T]


@pytest.mark.parametrize("kind", ["wav", "flac", "m4a"])
@pytest.mark.parametrize(
    ("channels", "expected_T"),
    [(SURROUND, A_T), ([A_T, A_T, A_T, tone(60, level=0.9), A_T, A_T], A_T)],
    ids=["antiphase", "in phase"],
)
def test_the_channel_for_low_frequency_effects_is_left_out(tmp_path, kind, channels, expected_T):
    path = tmp_path / f"a.{kind}"
    if kind == "wav":
        sf.write(path, np.stack(channels, 1), RATE_HZ, format="WAVEX", subtype="FLOAT")
    else:
        write(path, channels, layout="5.1")
    found_T = decode(path, sample_rate_hz=RATE_HZ)[: len(A_T)]
    assert level_db(found_T) == pytest.approx(level_db(expected_T), abs=0.5)
    spectrum_F = np.abs(np.fft.rfft(found_T * np.hanning(len(found_T))))
    assert spectrum_F[round(60 * len(found_T) / RATE_HZ)] < 0.01 * spectrum_F.max()


@pytest.mark.parametrize("size", [160, 1024, 8192, 10**6])
def test_the_choice_does_not_depend_on_where_a_read_starts(size):
    samples_TC = np.stack(CASES["antiphase after silence"][0], 1)
    blocks = [samples_TC[i : i + size] for i in range(0, len(samples_TC), size)]
    at_once, before = (Downmix(rate_hz=RATE_HZ, num_channels=2) for _ in range(2))
    complete_T = np.concatenate(list(at_once.mixed(blocks)))
    before.decide(blocks)
    assert np.array_equal(np.concatenate(list(before.mixed(blocks))), complete_T)
    np.testing.assert_array_equal(complete_T, samples_TC[:, 0])


def test_a_decision_takes_one_minute_of_sound_and_no_more():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.stack([A_T, A_T], 1)

    Downmix(rate_hz=RATE_HZ, num_channels=2).decide(endless())
    assert 14 <= len(taken) <= 17


def test_of_many_channels_less_is_held_in_memory(monkeypatch):
    monkeypatch.setattr("engine.audio.channels._MOST_VALUES", 2**20)
    block_TC = np.random.default_rng(0).normal(0, 0.1, (8192, 16)).astype("f4")
    taken = []
    Downmix(rate_hz=48000, num_channels=16).decide(taken.append(1) or block_TC for _ in range(100))
    assert len(taken) == 8


def test_an_error_does_not_cost_the_samples_before_it():
    def damaged():
        yield np.stack([A_T, -A_T], 1)
        raise AudioError("why")

    blocks = Downmix(rate_hz=RATE_HZ, num_channels=2).mixed(damaged())
    np.testing.assert_array_equal(next(blocks), A_T)
    with pytest.raises(AudioError, match="why"):
        next(blocks)


def test_a_block_with_another_number_of_channels_is_mixed_by_its_mean():
    downmix = Downmix(rate_hz=RATE_HZ, num_channels=2)
    blocks = [np.stack([A_T, -A_T], 1), np.stack([A_T] * 6, 1), A_T[:, None]]
    for block_T in downmix.mixed(blocks):
        np.testing.assert_allclose(block_T, A_T, atol=1e-6)


@pytest.mark.parametrize(("default", "expected_T"), [(0, A_T), (1, B_T), (None, A_T)])
@pytest.mark.parametrize("start_s", [0.0, 2.0])
def test_the_default_audio_track_is_read(tmp_path, default, expected_T, start_s):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", format="matroska", options={"default_mode": "passthrough"}) as container:
        streams = [container.add_stream("pcm_f32le", rate=RATE_HZ, layout="mono") for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if number == default else 0
        for stream, samples_T in zip(streams, (A_T, B_T), strict=True):
            encode(container, stream, samples_T[:, None])
    found_T = decode(path, sample_rate_hz=RATE_HZ, start_s=start_s, duration_s=1.0)
    first = round(start_s * RATE_HZ)
    np.testing.assert_allclose(found_T, expected_T[first : first + RATE_HZ], atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
@pytest.mark.parametrize(
    ("samples_T", "expected"),
    [
        (ZERO_T, True),
        (ZERO_T + 0.5, True),
        (np.sign(NOISE_T) * 2.0**-16, True),
        (tone(440, level=2e-5) + 0.25, True),
        (A_T, False),
        (tone(440, level=1e-3) + 0.25, False),
        (np.where(np.arange(len(A_T)) == 30000, 0.01, 0.0), False),
        (np.concatenate([ZERO_T, tone(440, 0.05, 1e-3)]), False),
    ],
    ids=["zeros", "offset", "last bit", "far below it", "sound", "quiet", "a click", "sound at the end"],
)
def test_silence_is_no_sound_in_any_window(tmp_path, samples_T, expected, rate_hz):
    sf.write(tmp_path / "a.wav", samples_T, RATE_HZ, subtype="FLOAT")
    found_T = decode(tmp_path / "a.wav", sample_rate_hz=rate_hz)
    assert is_silent(found_T, sample_rate_hz=rate_hz) == expected
    assert is_silent(np.zeros(0, "f4"), sample_rate_hz=rate_hz)
