"""All channels of a recording in blocks, and files that are written in blocks."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from engine.audio import decoder as decoder_module
from engine.audio.decoder import Decoder
from engine.audio.headers import find_samples
from engine.audio.writer import WavWriter, open_writer
from engine.errors import AudioError

RATE_HZ = 8000
SIGNAL_TC = (0.1 * np.random.default_rng(0).standard_normal((5 * RATE_HZ, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def decoder():
    one = Decoder()
    yield one
    one.close()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_blocks_of_all_channels_join_to_the_recording(tmp_path, decoder, monkeypatch, suffix):
    monkeypatch.setattr(decoder_module, "_BLOCK_VALUES", 10_001)
    path = str(tmp_path / f"a.{suffix}")
    sf.write(path, SIGNAL_TC, RATE_HZ)
    blocks = list(decoder.channels(path))
    assert len(blocks) == 8 and {block.sample_rate_hz for block in blocks} == {RATE_HZ}
    joined_TC, wanted_TC = np.concatenate([block.samples_TC for block in blocks]), sf.read(path, dtype="float32")[0]
    assert np.abs(joined_TC - wanted_TC).max() < 1e-4
    mono_T = np.concatenate([block.mono_T for block in blocks])
    assert np.array_equal(mono_T, decoder.decode(path, sample_rate_hz=RATE_HZ))


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_opposite_channels_are_mixed_as_in_a_pass(tmp_path, decoder, suffix):
    path = str(tmp_path / f"a.{suffix}")
    sf.write(path, np.stack([np.zeros(3 * RATE_HZ), SIGNAL_TC[: 3 * RATE_HZ, 0]], 1).repeat([1, 1], 1), RATE_HZ)
    assert next(iter(decoder.channels(path))).mono_channels == (0, 1)
    sf.write(path, SIGNAL_TC[:, :1] * [[1, -1]], RATE_HZ)
    (block,) = decoder.channels(path)
    assert block.mono_channels == (0,) and block.samples_TC.shape == SIGNAL_TC.shape


def test_a_file_that_was_cut_off_is_an_error_at_its_end(tmp_path, decoder):
    sf.write(tmp_path / "a.wav", SIGNAL_TC, RATE_HZ)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="it is damaged"):
        list(decoder.channels(str(tmp_path / "a.wav")))


def test_silence_is_read_once(tmp_path, decoder):
    """A recording without sound has nothing to decide by; each block must not read all of it again."""
    sf.write(tmp_path / "a.wav", np.zeros((900 * RATE_HZ, 2), np.int16), RATE_HZ)
    assert sum(len(block.samples_TC) for block in decoder.channels(str(tmp_path / "a.wav"))) == 900 * RATE_HZ


@pytest.mark.parametrize(("kind", "num_samples"), [("wav", 0), ("wav", 1), ("wav", 5001), ("flac", 1), ("flac", 5001)])
def test_files_written_in_blocks_are_read_back(tmp_path, kind, num_samples):
    path = tmp_path / "a.tmp"
    writer = open_writer(path, kind, sample_rate_hz=44_100, num_channels=2, comment="made of: é")
    for first in range(0, num_samples, 1000):
        writer.write(SIGNAL_TC[first : min(first + 1000, num_samples)])
    writer.close()
    assert "made of: é".encode() in path.read_bytes()[:4096]
    samples_TC, rate_hz = sf.read(path, dtype="float32")
    assert rate_hz == 44_100 and np.abs(samples_TC - SIGNAL_TC[:num_samples]).max(initial=0) < 1e-6
    if kind == "wav":
        with open(path, "rb") as file:
            assert find_samples(file).num_bytes == 8 * num_samples


class Long(io.BytesIO):
    """Takes samples without keeping them."""

    def write(self, data):
        return super().write(data) if len(data) < 1000 else len(data)


def test_a_wav_of_more_than_4_gib_is_rf64():
    file = Long()
    writer = WavWriter(file, sample_rate_hz=RATE_HZ, num_channels=2, comment="x")
    block_TC = np.zeros((1 << 24, 2), np.float32)
    for _ in range(33):
        writer.write(block_TC)
    file.close = lambda: None
    writer.close()
    header, num_bytes = file.getvalue(), 33 * (1 << 27)
    name, riff_bytes, data_bytes, num_samples = struct.unpack("<12x4s4xQQQ", header[:44])
    assert (header[:4], header[4:12], name) == (b"RF64", b"\xff\xff\xff\xffWAVE", b"ds64")
    assert (data_bytes, num_samples) == (num_bytes, num_bytes // 8)
    assert riff_bytes == len(header) - 8 + num_bytes
    assert header[-8:] == b"data\xff\xff\xff\xff"


def test_a_long_wav_is_read_by_libsndfile_and_by_us(tmp_path):
    """A sparse file takes no room."""
    path = tmp_path / "long.wav"
    file = open(path, "wb")
    writer = WavWriter(file, sample_rate_hz=RATE_HZ, num_channels=2)
    header = file.tell()
    writer._num_samples = 5 << 27
    file.truncate(header + 8 * writer._num_samples)
    writer.close()
    assert sf.info(path).frames == 5 << 27
    assert Path(path).stat().st_size > 4 << 30
    with open(path, "rb") as reopened:
        assert find_samples(reopened).num_bytes == 8 * (5 << 27)
