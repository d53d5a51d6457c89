"""A separator of one's own: each label is a band of frequencies. Any class with these three members will do."""

from collections.abc import Sequence

import torch
from torch import Tensor

BANDS_HZ = {
    "engine": (0.0, 250.0),
    "footsteps": (100.0, 800.0),
    "dog_bark": (300.0, 1500.0),
    "siren": (500.0, 1800.0),
    "bell": (800.0, 4000.0),
    "rain": (1000.0, 8000.0),
    "clock_tick": (1500.0, 8000.0),
    "bird_chirp": (2000.0, 8000.0),
}


class BandSeparator:
    """Keeps the band of the query's label."""

    sample_rate_hz = 16000
    labels = tuple(BANDS_HZ)

    def __init__(self, device: str) -> None:
        self.device = device

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """Stems ``[B, T]`` of mixtures ``[B, T]``, one query a row."""
        spectra_BF = torch.fft.rfft(mix_BT.to(self.device))
        hz_F = torch.fft.rfftfreq(mix_BT.shape[1], 1.0 / self.sample_rate_hz, device=self.device)
        edges = [BANDS_HZ[query.removeprefix("The sound of ").replace(" ", "_")] for query in queries]
        mask_BF = torch.stack([(hz_F >= low) & (hz_F < high) for low, high in edges])
        stems_BT: Tensor = torch.fft.irfft(spectra_BF * mask_BF, mix_BT.shape[1])
        return stems_BT


def open_separator(device: str) -> BandSeparator:
    """The factory: ``examples.band_separator:open_separator`` in any command or setting that takes a separator."""
    return BandSeparator(device)
