"""The built-in tagger: the fraction of a signal's energy that each label has, frame by frame.

A small convolutional network over mel bands, like those of sound event detection (Kong et al. 2020, arXiv 1912.10211).
It predicts how the energy of a frame divides among the labels, not which labels are present. The fractions of a signal
are the mean over its frames weighted by their energy, so any mixture of known sources can train it.

Shape legend: B rows, T samples, F bins, N spectral frames, K mel bands, M tagged frames (four spectral ones each),
C channels, L labels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.schema import plain_label
from engine.separators.base import small_tensor
from engine.settings import Count, config
from engine.storage.fingerprints import fingerprint
from engine.taggers.base import normalized

FRAMES_PER_TAG = 4
"""Spectral frames in a tagged frame."""
ARCHITECTURE = "energy_share_cnn"
"""Name of this network in ``tagger.json``."""
_FLOOR = 1e-6  # added to the power of a band, relative to the level of the signal
_MIN_FRACTION = 1e-8  # -80 dB
_LOW_HZ = 40.0  # lower edge of the first band

_MultipleOf8 = Annotated[Count, Field(multiple_of=8)]


@config
class TagNetworkConfig:
    """Architecture of the built-in tagger."""

    sample_rate_hz: Annotated[Count, Field(ge=100, le=1_000_000)] = 16000
    """Rate of the audio that the tagger takes."""
    num_fft: Annotated[_MultipleOf8, Field(le=1 << 16)] = 1024
    """Window of the short-time Fourier transform, in samples; the step between frames is half of it."""
    num_bands: Annotated[_MultipleOf8, Field(le=1 << 12)] = 64
    """Mel bands, from 40 Hz to half the rate."""
    channels: Annotated[_MultipleOf8, Field(le=1 << 14)] = 128
    """Width of the layers over time."""

    @property
    def hop_samples(self) -> int:
        """Step between spectral frames, in samples."""
        return self.num_fft // 2


def mel_filters(config: TagNetworkConfig) -> Tensor:
    """Mel filters ``[F, K]``: triangles over the bins of the transform that add up to 1 between the outer centres.

    Therefore the powers of all bands add up to the energy of a frame, except at the edges (Parseval). Not by
    ``torchaudio.functional.melscale_fbanks``, which computes in float32: its filters differ by 1e-5, and so would tags.
    """
    low, high = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (_LOW_HZ, config.sample_rate_hz / 2))
    points = torch.linspace(low, high, config.num_bands + 2, dtype=torch.float64)
    points_hz = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bins_hz = torch.arange(config.num_fft // 2 + 1, dtype=torch.float64) * config.sample_rate_hz / config.num_fft
    rising = (bins_hz[:, None] - points_hz[:-2]) / (points_hz[1:-1] - points_hz[:-2])
    falling = (points_hz[2:] - bins_hz[:, None]) / (points_hz[2:] - points_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()


class ShareNetwork(nn.Module):
    """Maps mel powers to the logarithm of each label's fraction of each tagged frame's energy."""

    window_F: Tensor
    mel_FK: Tensor

    def __init__(self, config: TagNetworkConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        wide = config.channels
        mel_FK = torch.empty(config.num_fft // 2 + 1, config.num_bands)
        with torch.device("cpu"):  # arithmetic on ``meta`` says nothing and loads torch's compiler
            self.register_buffer("window_F", torch.hann_window(config.num_fft), persistent=False)
            self.register_buffer("mel_FK", mel_FK if mel_FK.is_meta else mel_filters(config), persistent=False)
        sizes = [(1, wide // 8, (2, 2)), (wide // 8, wide // 4, (2, 2)), (wide // 4, wide // 2, (2, 1))]
        self.picture = nn.ModuleList(nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False) for i, o, s in sizes)
        self.picture_norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.inward = nn.Conv1d(wide // 2 * (config.num_bands // 8), wide, 1)
        self.over_time = nn.ModuleList(nn.Conv1d(wide, wide, 3, padding=d, dilation=d) for d in (1, 2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(wide) for _ in range(3))
        self.context = nn.Linear(wide, wide)
        self.dropout = nn.Dropout(0.2)
        self.outward = nn.Conv1d(wide, num_labels, 1)

    def powers(self, audio_BT: Tensor, *, hop_samples: int | None = None) -> Tensor:
        """Mel powers ``[B, N, K]`` of frames centred on every ``hop_samples`` (default: the config's) from sample 0."""
        hop = hop_samples or self.config.hop_samples
        spectra_BFN = torch.stft(
            audio_BT, self.config.num_fft, hop, window=self.window_F, pad_mode="constant", return_complex=True
        )
        power_BNF = torch.view_as_real(spectra_BFN).square().sum(-1).transpose(1, 2)
        return power_BNF @ self.mel_FK

    def forward(self, power_BNK: Tensor, num_frames_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log fractions ``[B, M, L]`` of tagged frames, and their energies ``[B, M]``, 0 for silence.

        Frames from ``num_frames_B`` on are padding and change nothing. A gain cancels: powers are divided by the mean
        energy of a frame, weighted by energy, which does not change with the silence around a sound.
        """
        num = power_BNK.shape[1]
        if num_frames_B is None:
            num_frames_B = torch.full((len(power_BNK),), num, device=power_BNK.device)
        power_BNK = nn.functional.pad(power_BNK, (0, 0, 0, -num % FRAMES_PER_TAG))
        inside_BN = torch.arange(power_BNK.shape[1], device=power_BNK.device) < num_frames_B[:, None]
        power_BNK = power_BNK * inside_BN[..., None]
        energy_BN = power_BNK.sum(2)
        level_B = energy_BN.square().sum(1) / energy_BN.sum(1).clamp(min=1e-30)
        relative_BNK = power_BNK * (self.config.num_bands / level_B.clamp(min=1e-30))[:, None, None]
        picture_BNK = (torch.log(relative_BNK + _FLOOR) + 5.0) / 4.0 * inside_BN[..., None]
        energy_BM = energy_BN.view(len(energy_BN), -1, FRAMES_PER_TAG).sum(2)
        return self._log_fractions(picture_BNK, energy_BM, inside_BN), energy_BM

    def _log_fractions(self, picture_BNK: Tensor, energy_BM: Tensor, inside_BN: Tensor) -> Tensor:
        """Outputs of every layer are set to zero outside, as the zero padding of a shorter batch would be."""
        picture, inside = picture_BNK.transpose(1, 2)[:, None], inside_BN.float()
        for conv, norm in zip(self.picture, self.picture_norms, strict=True):
            inside = inside[:, :: conv.stride[1]]  # type: ignore[index]
            picture = nn.functional.relu(norm(conv(picture))) * inside[:, None, None]
        inside_B1M = inside[:, None]
        hidden_BCM = self.norms[0](self.inward(self.dropout(picture.flatten(1, 2))))
        hidden_BCM = nn.functional.relu(hidden_BCM) * inside_B1M
        weight_BM1 = (energy_BM / energy_BM.sum(1, keepdim=True).clamp(min=1e-30))[..., None]
        hidden_BCM = hidden_BCM + self.context((hidden_BCM @ weight_BM1)[..., 0])[..., None] * inside_B1M
        for conv, norm in zip(self.over_time, self.norms[1:], strict=True):
            hidden_BCM = hidden_BCM + nn.functional.relu(norm(conv(hidden_BCM))) * inside_B1M
        logits_BLM: Tensor = self.outward(self.dropout(hidden_BCM))
        return logits_BLM.transpose(1, 2).log_softmax(2)


class ShareTagger(nn.Module):
    """The built-in :class:`~engine.taggers.base.Tagger`; a tag is a label's fraction of the energy in dB."""

    def __init__(self, config: TagNetworkConfig, labels: Sequence[str]) -> None:
        super().__init__()
        if len(labels) < 2 or len({plain_label(label) for label in labels}) != len(labels):
            raise ValueError(f"a tagger must have two or more different labels, got {list(labels)}; give it more")
        self.labels = tuple(labels)
        self.network = ShareNetwork(config, len(labels))

    @property
    def config(self) -> TagNetworkConfig:
        """Architecture of the network."""
        return self.network.config

    @property
    def sample_rate_hz(self) -> int:
        """See the protocol."""
        return self.config.sample_rate_hz

    @property
    def fingerprint(self) -> str:
        """See the protocol; a hash of architecture, labels and weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return fingerprint([ARCHITECTURE, asdict(self.config), self.labels, digest.hexdigest()])

    @torch.inference_mode()
    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; the tagger must be in ``eval`` mode, as :func:`load_tagger` gives it."""
        audio_BT = normalized(audio_BT, lengths).to(self.network.window_F.device)
        if not audio_BT.numel():
            return audio_BT.new_full((len(audio_BT), len(self.labels)), -10.0 * math.log10(len(self.labels)))
        lengths_B = small_tensor(lengths or [audio_BT.shape[1]] * len(audio_BT), audio_BT.device)
        log_fraction_BML, energy_BM = self.network(
            self.network.powers(audio_BT), 1 + lengths_B // self.config.hop_samples
        )
        total_B1 = energy_BM.sum(1, keepdim=True)
        fraction_BL = torch.einsum("bml,bm->bl", log_fraction_BML.exp(), energy_BM / total_B1.clamp(min=1e-30))
        fraction_BL = torch.where(total_B1 > 0.0, fraction_BL, 1.0 / len(self.labels))
        return 10.0 * torch.log10(fraction_BL + _MIN_FRACTION)
