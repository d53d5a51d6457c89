"""The built-in tagger: which share of a signal's energy each label has, frame by frame.

A small convolutional network over mel bands, after those of sound event detection (Kong et al. 2020, arXiv
1912.10211). What it predicts is not whether a label is present but how the energy of a frame divides among the labels;
a signal's shares are those of its frames weighted by their energy, so that any mixture with known sources teaches it.

Shape legend: B rows, T samples, N spectral frames, K mel bands, M tagged frames (four spectral ones each), C channels,
L labels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from engine.schema import plain_label
from engine.storage.fingerprints import fingerprint
from engine.taggers.base import checked

FRAMES_PER_TAG = 4

ARCHITECTURE = "energy_share_cnn"
_FLOOR = 1e-6  # of the level, below which a band's power does not count
_LEAST_SHARE = 1e-8
_LOW_HZ = 40.0


@dataclass(frozen=True, kw_only=True)
class TagNetworkConfig:
    """Architecture of the built-in tagger."""

    sample_rate_hz: int = 16000
    """Rate of the audio it takes."""
    num_fft: int = 1024
    """Window of the short-time Fourier transform, in samples; the step between frames is half of it."""
    num_bands: int = 64
    """Mel bands, from 40 Hz to half the rate; a multiple of 8."""
    channels: int = 128
    """Width of the layers over time; a multiple of 8."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 8 or value % (1 if name == "sample_rate_hz" else 8):
                raise ValueError(
                    f"{name} is {value!r}; give a whole number of 8 or more, a multiple of 8 but for rates"
                )

    @property
    def hop_samples(self) -> int:
        """Step between spectral frames."""
        return self.num_fft // 2


def mel_filters(config: TagNetworkConfig) -> Tensor:
    """Triangles ``[F, K]`` over the bins of the transform; between the outer centres they add up to one.

    So the powers of all bands add up to the energy of a frame (Parseval), but for what lies at the very edges.
    """
    low, high = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (_LOW_HZ, config.sample_rate_hz / 2))
    points = torch.linspace(low, high, config.num_bands + 2, dtype=torch.float64)
    points_hz = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bins_hz = torch.arange(config.num_fft // 2 + 1, dtype=torch.float64) * config.sample_rate_hz / config.num_fft
    rising = (bins_hz[:, None] - points_hz[:-2]) / (points_hz[1:-1] - points_hz[:-2])
    falling = (points_hz[2:] - bins_hz[:, None]) / (points_hz[2:] - points_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()


class ShareNetwork(nn.Module):
    """Mel powers to the logarithm of each label's share of each tagged frame."""

    window_F: Tensor
    mel_FK: Tensor

    def __init__(self, config: TagNetworkConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        wide = config.channels
        self.register_buffer("window_F", torch.hann_window(config.num_fft), persistent=False)
        self.register_buffer("mel_FK", mel_filters(config), persistent=False)
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
        """Mel powers ``[B, N, K]`` of frames centred on every ``hop_samples`` (the config's) from the first sample."""
        hop = hop_samples or self.config.hop_samples
        spectra_BFN = torch.stft(
            audio_BT, self.config.num_fft, hop, window=self.window_F, pad_mode="constant", return_complex=True
        )
        power_BNF = torch.view_as_real(spectra_BFN).square().sum(-1).transpose(1, 2)
        return power_BNF @ self.mel_FK

    def forward(self, power_BNK: Tensor, num_frames_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log shares ``[B, M, L]`` of tagged frames, and their energies ``[B, M]``, 0 where there is no sound.

        Frames from ``num_frames_B`` on are padding and change nothing. A gain cancels: powers are taken relative to
        the energy of a frame in the mean over energy, which silence around a sound does not change.
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
        return self._log_shares(picture_BNK, energy_BM, inside_BN), energy_BM

    def _log_shares(self, picture_BNK: Tensor, energy_BM: Tensor, inside_BN: Tensor) -> Tensor:
        """Every layer's output is zeroed outside, where the next layer would see zero padding in a shorter batch."""
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
    """The built-in :class:`~engine.taggers.base.Tagger`; a tag is a label's share of the energy in dB."""

    def __init__(self, config: TagNetworkConfig, labels: Sequence[str]) -> None:
        super().__init__()
        if len(labels) < 2 or len({plain_label(label) for label in labels}) != len(labels):
            raise ValueError(f"a tagger tells two or more different labels apart, not {list(labels)}; give it more")
        self.labels = tuple(labels)
        self.network = ShareNetwork(config, len(labels))

    @property
    def config(self) -> TagNetworkConfig:
        """Its architecture."""
        return self.network.config

    @property
    def sample_rate_hz(self) -> int:
        """See the protocol."""
        return self.config.sample_rate_hz

    @property
    def fingerprint(self) -> str:
        """See the protocol; of architecture, labels and weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return fingerprint([ARCHITECTURE, asdict(self.config), self.labels, digest.hexdigest()])

    @torch.inference_mode()
    def tag(self, audio_BT: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """See the protocol; the tagger must be in ``eval`` mode, as :func:`load_tagger` gives it."""
        audio_BT = checked(audio_BT, lengths).to(self.network.window_F.device)
        if not audio_BT.numel():
            return audio_BT.new_full((len(audio_BT), len(self.labels)), -10.0 * math.log10(len(self.labels)))
        lengths_B = torch.tensor(lengths or [audio_BT.shape[1]] * len(audio_BT), device=audio_BT.device)
        log_share_BML, energy_BM = self.network(self.network.powers(audio_BT), 1 + lengths_B // self.config.hop_samples)
        total_B1 = energy_BM.sum(1, keepdim=True)
        share_BL = torch.einsum("bml,bm->bl", log_share_BML.exp(), energy_BM / total_B1.clamp(min=1e-30))
        share_BL = torch.where(total_B1 > 0.0, share_BL, 1.0 / len(self.labels))
        return 10.0 * torch.log10(share_BL + _LEAST_SHARE)
