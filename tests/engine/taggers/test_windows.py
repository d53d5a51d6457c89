"""Tags of windows against signals whose content is known second by second."""

import math

import numpy as np
import pytest
import torch

from engine.taggers.windows import tag_windows

RATE_HZ = 8000


class TwoTones:
    """Knows a low and a high tone by the sign of what a difference filter leaves."""

    sample_rate_hz = RATE_HZ
    labels = ("low", "high")
    fingerprint = "0" * 16

    def __init__(self):
        self.calls = []

    def tag(self, audio_BT, *, lengths=None):
        assert torch.isfinite(audio_BT).all()
        self.calls.append(tuple(audio_BT.shape))
        spectrum_BF = torch.fft.rfft(audio_BT, n=RATE_HZ).abs().square()
        parts_BL = torch.stack([spectrum_BF[:, :1000].sum(1), spectrum_BF[:, 1000:].sum(1)], 1)
        total_B1 = parts_BL.sum(1, keepdim=True)
        even = torch.full_like(parts_BL, 0.5)
        return 10 * torch.log10(torch.where(total_B1 > 0, parts_BL / total_B1.clamp(min=1e-30), even) + 1e-6)


def tone(hz, duration_s, *, level=0.5, rate_hz=RATE_HZ):
    return level * torch.sin(2 * math.pi * hz * torch.arange(round(duration_s * rate_hz)) / rate_hz)


def test_windows_of_a_second_start_every_half_second_and_the_last_ends_with_the_signal():
    (tags,) = tag_windows(TwoTones(), [tone(200, 2.7)], sample_rate_hz=RATE_HZ)
    assert tags.start_s_W == pytest.approx([0.0, 0.5, 1.0, 1.5, 1.7])
    assert tags.end_s_W == pytest.approx([1.0, 1.5, 2.0, 2.5, 2.7])
    assert tags.tags_WL.shape == (5, 2) and tags.tags_WL.dtype == np.float32


@pytest.mark.parametrize(("duration_s", "num_windows"), [(0.3, 1), (1.0, 1), (1.0001, 2), (1.5, 2), (10.0, 19)])
def test_a_signal_has_as_many_windows_as_it_needs(duration_s, num_windows):
    (tags,) = tag_windows(TwoTones(), [tone(200, duration_s)], sample_rate_hz=RATE_HZ)
    assert len(tags.tags_WL) == len(tags.is_active_W) == num_windows
    assert tags.end_s_W[-1] == pytest.approx(duration_s, abs=1e-3)


def test_tags_say_which_label_sounds_when_and_the_strongest_is_over_the_active_windows():
    signal = torch.cat([tone(200, 2), tone(3000, 2, level=0.02), torch.zeros(2 * RATE_HZ)])  # 28 dB below
    (tags,) = tag_windows(TwoTones(), [signal], sample_rate_hz=RATE_HZ)
    assert tags.tags_WL[0] == pytest.approx([0.0, -60.0], abs=0.1)
    assert tags.tags_WL[5] == pytest.approx([-60.0, 0.0], abs=1.0)  # from 2.5 s
    assert tags.is_active_W.tolist() == [True] * 4 + [False] * 7
    assert tags.strongest()[0] == pytest.approx(0.0, abs=0.1)
    assert tags.strongest()[1] < -20.0  # the high tone is loud in no active window


def test_a_silent_signal_has_equal_tags_and_all_windows_are_active():
    (tags,) = tag_windows(TwoTones(), [torch.zeros(2 * RATE_HZ)], sample_rate_hz=RATE_HZ)
    assert tags.is_active_W.all()
    assert tags.strongest() == pytest.approx([-3.01, -3.01], abs=0.01)


def test_signals_are_tagged_as_if_each_was_alone_at_the_rate_of_the_tagger_and_in_batches():
    signals = [tone(hz, duration_s, rate_hz=16000) for hz, duration_s in ((200, 2), (3000, 0.4), (3000, 3.3), (200, 2))]
    tagger = TwoTones()
    together = tag_windows(tagger, signals, sample_rate_hz=16000, batch_s=4.0)
    assert all(num_rows <= 4 and num_samples <= RATE_HZ for num_rows, num_samples in tagger.calls)
    for signal, tags in zip(signals, together, strict=True):
        (alone,) = tag_windows(TwoTones(), [signal], sample_rate_hz=16000)
        np.testing.assert_allclose(tags.tags_WL, alone.tags_WL, atol=1e-3)
        assert tags.start_s_W.tolist() == alone.start_s_W.tolist()
    assert [int(tags.tags_WL[0].argmax()) for tags in together] == [0, 1, 1, 0]
    assert tag_windows(tagger, [], sample_rate_hz=16000) == []


@pytest.mark.parametrize("signal", [torch.zeros(0), torch.zeros(2, 100)])
def test_a_signal_without_samples_or_of_another_shape_is_refused(signal):
    with pytest.raises(ValueError, match=r"must have shape \[T\] with samples, got .* for signal 0; leave it out"):
        tag_windows(TwoTones(), [signal], sample_rate_hz=RATE_HZ)
