"""The built-in separator: a query-conditioned band-split masking network.

Follows the band-split family (Luo & Yu 2023, arXiv 2209.15174): the spectrogram is cut into bands, wide where hearing
is coarse, and each band is projected to a few features by its own weights and back to a mask by its own weights.
Between the two, dilated convolutions over time (Luo & Mesgarani 2019, arXiv 1809.07454) mix all bands; on a CPU they
take a tenth of the time of band-wise recurrence. Every block is modulated by the query (FiLM, Perez et al. 2018, arXiv
1709.07871).

Shape legend: B batch, T samples, F bins, N frames, K bands, D features of a band, C channels, Q query features, M masks
(one: a magnitude mask; the dimension is kept because stored weights have it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.settings import NEWER, Count, CountOrZero, config

_GROUPS = 8
_FLOOR = 1e-4  # added to the power of a bin, in a mixture of unit power


@config
class NetworkConfig:
    """Architecture of the built-in network; ``channels`` and ``num_blocks`` set its size."""

    sample_rate_hz: Annotated[Count, Field(le=1_000_000)] = 16000
    """Rate of the audio that the network separates."""
    num_fft: Annotated[Count, Field(le=1 << 16)] = 1024
    """Window of the short-time Fourier transform, in samples."""
    hop_samples: Count = 256
    """Step between frames, in samples; it must divide ``num_fft`` at least twice."""
    num_bands: Annotated[Count, Field(le=1 << 12)] = 80
    """Number of overlapping mel-spaced bands."""
    band_features: Annotated[Count, Field(le=1 << 10)] = 2
    """Features per band after the split."""
    channels: Annotated[Count, Field(multiple_of=_GROUPS, le=1 << 14)] = 256
    """Width of the convolutions."""
    num_blocks: Annotated[Count, Field(le=1000)] = 10
    """Number of dilated convolutions; the dilation doubles from one to the next and starts again at 1 after five."""
    query_features: Annotated[Count, Field(le=1 << 14)] = 64
    """Length of a query's vector."""
    text_features: Annotated[CountOrZero, Field(le=1 << 14), NEWER] = 0
    """Width of the embeddings of text that queries are; 0: queries are labels of a closed vocabulary. A training with
    ``text_encoder`` sets it."""

    def __post_init__(self) -> None:
        if self.num_fft % self.hop_samples or self.num_fft < 2 * self.hop_samples:
            raise ValueError(
                f"hop_samples must divide num_fft {self.num_fft} at least twice, got {self.hop_samples}; "
                f"choose one such as {max(1, self.num_fft // 4)}"
            )


def band_edges(config: NetworkConfig) -> list[tuple[int, int]]:
    """First bin and end bin of each overlapping mel band; together they cover every bin.

    torchaudio has filters, from which these edges, which fill the gaps between narrow bands, cannot be read.
    """
    num_bins = config.num_fft // 2 + 1
    mel = 2595.0 * math.log10(1.0 + config.sample_rate_hz / 2 / 700.0)
    points_hz = [
        700.0 * (10.0 ** (mel * i / (config.num_bands + 1) / 2595.0) - 1.0) for i in range(config.num_bands + 2)
    ]
    bins = [hz * config.num_fft / config.sample_rate_hz for hz in points_hz]
    edges, covered = [], 0
    for low, high in zip(bins[:-2], bins[2:], strict=True):
        first = min(math.floor(low), covered)
        end = min(max(math.ceil(high), first + 1, covered), num_bins)
        edges.append((first, end))
        covered = max(covered, end)
    edges[-1] = (edges[-1][0], num_bins)
    return edges


def _drawn(*shape: int, scale: Callable[[], Tensor | float]) -> nn.Parameter:
    """Normal draws times ``scale``; not on ``meta``, where arithmetic says nothing and loads torch's compiler."""
    drawn = torch.randn(*shape)
    return nn.Parameter(drawn if drawn.is_meta else drawn * scale())


class BandSplit(nn.Module):
    """Maps bins to band features and back: each band has its energy or gain, and learned details.

    Weights are dense matrices that are zero outside each band's bins: on every device this is faster than gathering.
    """

    inside_FK: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        num_bins, num_bands, detail = config.num_fft // 2 + 1, config.num_bands, config.band_features - 1
        inside_FK = torch.zeros(num_bins, num_bands)
        for band, (first, end) in enumerate(band_edges(config)):
            inside_FK[first:end, band] = 1.0
        self.register_buffer("inside_FK", inside_FK, persistent=False)
        self.split_FKD = _drawn(num_bins, num_bands, detail, scale=lambda: inside_FK.sum(0)[:, None] ** -0.5)
        self.merge_MKDF = _drawn(1, num_bands, detail, num_bins, scale=lambda: 0.1)
        self.merge_bias_MF = nn.Parameter(torch.zeros(1, num_bins))

    def split(self, power_BNF: Tensor, frames_BN1: Tensor) -> Tensor:
        """Band features ``[B, N, K * D]`` of powers ``[B, N, F]``: log energy of the bands, then their details."""
        energy_BNK = torch.log(power_BNF @ (self.inside_FK / self.inside_FK.sum(0)) + _FLOOR)
        weights_FKD = self.split_FKD * self.inside_FK[..., None]
        detail_BNKD = torch.einsum("bnf,fkd->bnkd", torch.log(power_BNF + _FLOOR), weights_FKD)
        detail_BNKD = detail_BNKD - energy_BNK[..., None] * weights_FKD.sum(0)
        count_B = frames_BN1.sum((1, 2)).clamp(min=1.0) * energy_BNK.shape[2]
        mean_B = (energy_BNK * frames_BN1).sum((1, 2)) / count_B
        return torch.cat([energy_BNK - mean_B[:, None, None], detail_BNKD.flatten(2)], dim=-1)

    def merge(self, features_BNC: Tensor) -> Tensor:
        """Mask logits ``[M, B, N, F]`` of band features ``[B, N, M * K * D]``, averaged where bands overlap."""
        inside_KF = self.inside_FK.T / self.inside_FK.sum(1)
        detail_MKDF = self.merge_MKDF * inside_KF[:, None]
        weights_MKDF = torch.cat(
            [inside_KF.expand(len(detail_MKDF), 1, *inside_KF.shape), detail_MKDF.transpose(1, 2)], 1
        )
        features_BNMC = features_BNC.view(*features_BNC.shape[:2], len(detail_MKDF), -1)
        logits_MBNF = torch.einsum("bnmc,mcf->mbnf", features_BNMC, weights_MKDF.flatten(1, 2))
        return logits_MBNF + self.merge_bias_MF[:, None, None, :]


class Block(nn.Module):
    """Residual dilated convolution over frames, normalised over all frames and modulated by the query."""

    def __init__(self, channels: int, query_features: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Linear(3 * channels, channels)
        self.norm_C = nn.Parameter(torch.ones(channels))
        self.film = nn.Linear(query_features, 2 * channels)

    def forward(self, hidden_BNC: Tensor, query_BQ: Tensor, frames_BN1: Tensor) -> Tensor:
        """Frames where ``frames_BN1`` is 0 are zero padding, so that padding a batch does not change its stems."""
        padded = nn.functional.pad(hidden_BNC * frames_BN1, (0, 0, self.dilation, self.dilation))
        num = hidden_BNC.shape[1]
        taps = torch.cat([padded[:, i * self.dilation : i * self.dilation + num] for i in range(3)], dim=-1)
        inner_BNC = self.conv(taps).float()
        mean_BC, deviation_BC = group_statistics(inner_BNC, frames_BN1)
        scale_BC, shift_BC = self.film(query_BQ).float().chunk(2, dim=-1)
        gain_BC = self.norm_C * (1.0 + scale_BC) / deviation_BC
        offset_BC = shift_BC - mean_BC * gain_BC
        return hidden_BNC + nn.functional.gelu(torch.addcmul(offset_BC[:, None], inner_BNC, gain_BC[:, None]))


def group_statistics(hidden_BNC: Tensor, frames_BN1: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[B, C]`` over each group of channels and the frames inside ``frames_BN1`` (Wu & He 2018)."""
    size = hidden_BNC.shape[-1] // _GROUPS
    count_B1 = frames_BN1.sum((1, 2)).clamp(min=1.0)[:, None] * size
    frames_B1N = frames_BN1.transpose(1, 2).float()
    with torch.autocast(hidden_BNC.device.type, enabled=False):  # in 16 bits the variance is lost in rounding
        sums_BC, squares_BC = ((frames_B1N @ value)[:, 0] for value in (hidden_BNC, hidden_BNC.square()))
    mean_BG, square_BG = (total.view(-1, _GROUPS, size).sum(2) / count_B1 for total in (sums_BC, squares_BC))
    deviation_BG = ((square_BG - mean_BG.square()).clamp(min=0.0) + 1e-5).sqrt()
    return mean_BG.repeat_interleave(size, dim=1), deviation_BG.repeat_interleave(size, dim=1)


class MaskNetwork(nn.Module):
    """Separates the source that a query vector names, by a mask on the mixture's spectrogram."""

    window_F: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.bands = BandSplit(config)
        split_features = config.num_bands * config.band_features
        self.inward = nn.Linear(split_features, config.channels)
        self.blocks = nn.ModuleList(
            Block(config.channels, config.query_features, 2 ** (i % 5)) for i in range(config.num_blocks)
        )
        self.outward = nn.Linear(config.channels, split_features)
        with torch.device("cpu"):  # see _drawn
            self.register_buffer("window_F", torch.hann_window(config.num_fft), persistent=False)

    def forward(self, mix_BT: Tensor, query_BQ: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Stems ``[B, T]`` of mixtures that are padded with zeros after ``lengths_B`` samples.

        The mixture is scaled to unit power and the stem is scaled back, so a gain of the mixture is a gain of the stem.
        """
        num_samples, hop, size = mix_BT.shape[-1], self.config.hop_samples, self.config.num_fft
        if lengths_B is None:
            lengths_B = torch.full((len(mix_BT),), num_samples, device=mix_BT.device)
        level_B1 = (mix_BT.square().sum(1) / lengths_B.clamp(min=1)).sqrt().clamp(min=1e-8)[:, None]
        padded_BT = nn.functional.pad(mix_BT / level_B1, (0, size))
        mix_BFN = torch.stft(padded_BT, size, hop, window=self.window_F, pad_mode="constant", return_complex=True)
        frames = torch.arange(mix_BFN.shape[-1], device=mix_BT.device)
        frames_BN1 = (frames <= (lengths_B[:, None] + size) // hop)[..., None].to(mix_BT.dtype)
        mask_BFN = self.mask(mix_BFN.abs().transpose(1, 2), query_BQ, frames_BN1)
        stems_BT = torch.istft(mix_BFN * mask_BFN, size, hop, window=self.window_F, length=num_samples)
        inside_BT = torch.arange(num_samples, device=mix_BT.device) < lengths_B[:, None]
        return stems_BT * level_B1 * inside_BT

    def mask(self, magnitude_BNF: Tensor, query_BQ: Tensor, frames_BN1: Tensor) -> Tensor:
        """Mask ``[B, F, N]`` from 0 to 1; the stem keeps the mixture's phase."""
        with torch.autocast(magnitude_BNF.device.type, enabled=False):
            features_BNC = self.bands.split(magnitude_BNF.square(), frames_BN1)
        hidden_BNC = self.inward(features_BNC)
        for block in self.blocks:
            hidden_BNC = block(hidden_BNC, query_BQ, frames_BN1)
        logits_MBNF = self.bands.merge(self.outward(hidden_BNC))
        return logits_MBNF[0].sigmoid().transpose(1, 2)
