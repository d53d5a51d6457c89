"""Loading many sounds on threads: in order, with errors in their places, each thread with a decoder of its own."""

import threading

import pytest
import torch

from engine.audio.decoder import shared_decoder
from engine.audio.loading import loaded
from engine.errors import AudioError
from tests.support.signals import RATE_HZ, tone
from tests.support.wav import write_wav


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)


def test_sounds_come_in_order_and_errors_in_their_places(two_threads, tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, 0.1), sample_rate_hz=RATE_HZ)
    used = {}

    def load(number):
        decoder = used.setdefault(threading.get_ident(), shared_decoder())
        assert shared_decoder() is decoder
        name = "absent.wav" if number == 70 else "a.wav"
        return len(decoder.decode(str(tmp_path / name), sample_rate_hz=1000 + number))

    results = list(loaded([lambda number=number: load(number) for number in range(100)]))
    assert isinstance(results.pop(70), AudioError)
    assert results == pytest.approx([100 + number / 10 for number in range(100) if number != 70], abs=1)
    assert len(set(used.values())) == 2 and shared_decoder() not in used.values()


def test_few_are_loaded_ahead_and_other_errors_end_it(two_threads):
    begun = []
    results = loaded([lambda number=number: begun.append(number) or 1 // (number - 90) for number in range(200)])
    assert next(results) == -1
    assert len(begun) <= 6
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert len(begun) < 100
