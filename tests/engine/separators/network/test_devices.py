"""Separators on a GPU: the stems are those of the CPU, within the rounding of 32 or of 16 bits."""

import pytest
import torch

from benchmarks.speed.separators import SEPARATORS, difference_db, give_vectors
from engine.separators.audiosep.network import AudioSepConfig
from engine.separators.audiosep.separator import AudioSep


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("autocast", "max_db"), [(False, -60.0), (True, -40.0)])
@pytest.mark.parametrize("name", SEPARATORS)
def test_stems_on_a_gpu_are_those_of_the_cpu(name, autocast, max_db):
    torch.manual_seed(0)
    separator = SEPARATORS[name]()
    if not separator.labels:
        give_vectors(separator, ["rain", "siren"], 512)
    mix_MT = 0.1 * torch.randn(2, 3 * separator.sample_rate_hz)
    assert difference_db(separator, mix_MT, ["rain", "siren"], autocast=autocast) < max_db


def test_stems_of_equal_separators_differ_by_nothing():
    widths = {f"width_{i}": 4 for i in range(7)}
    separator = AudioSep(AudioSepConfig(query_features=8, **widths))
    give_vectors(separator, ["low", "high"], 8)
    mix_MT = 0.1 * torch.randn(2, 9000)
    assert difference_db(separator, mix_MT, ["low", "high"], device="cpu") <= -100.0
