"""The built-in separator: a query-conditioned band-split masking network.

Follows the band-split family (Luo & Yu 2023, arXiv 2209.15174): the spectrogram is cut into bands, wide where hearing
is coarse, and each band is projected to a few features by its own weights and back to a mask by its own weights.
Between the two, dilated convolutions over time (Luo & Mesgarani 2019, arXiv 1809.07454) mix all bands; on a CPU they
take a tenth of the time of band-wise recurrence. Every block is modulated by the query (FiLM, Perez et al. 2018, arXiv
1709.07871).

Shape legend: B queries, M mixtures, T samples, F bins, N frames, K bands, D features of a band, C channels, Q query
features. Stored weights of the merge have a first dimension of size one, M there: the magnitude mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.separators.network import transforms
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

    def split(self, power_BNF: Tensor, frames_BN1: Tensor | None) -> Tensor:
        """Band features ``[B, N, K * D]`` of powers ``[B, N, F]``: log energy of the bands, then their details."""
        energy_BNK = torch.log(power_BNF @ (self.inside_FK / self.inside_FK.sum(0)) + _FLOOR)
        weights_FKD = self.split_FKD * self.inside_FK[..., None]
        detail_BNC = torch.log(power_BNF + _FLOOR) @ weights_FKD.flatten(1)
        detail_BNKD = detail_BNC.view(*energy_BNK.shape, weights_FKD.shape[2])
        detail_BNKD = detail_BNKD - energy_BNK[..., None] * weights_FKD.sum(0)
        if frames_BN1 is None:
            mean_B = energy_BNK.mean((1, 2))
        else:
            count_B = frames_BN1.sum((1, 2)).clamp(min=1.0) * energy_BNK.shape[2]
            mean_B = (energy_BNK * frames_BN1).sum((1, 2)) / count_B
        return torch.cat([energy_BNK - mean_B[:, None, None], detail_BNKD.flatten(2)], dim=-1)

    def merge(self, features_BNC: Tensor) -> Tensor:
        """Mask logits ``[B, N, F]`` of band features ``[B, N, K * D]``, averaged where bands overlap."""
        inside_KF = self.inside_FK.T / self.inside_FK.sum(1)
        detail_KDF = self.merge_MKDF[0] * inside_KF[:, None]
        weights_DKF = torch.cat([inside_KF[None], detail_KDF.transpose(0, 1)])
        return nn.functional.linear(features_BNC, weights_DKF.flatten(0, 1).T, self.merge_bias_MF[0])


class Block(nn.Module):
    """Residual dilated convolution over frames, normalised over all frames and modulated by the query."""

    def __init__(self, channels: int, query_features: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Linear(3 * channels, channels)
        self.norm_C = nn.Parameter(torch.ones(channels))
        self.film = nn.Linear(query_features, 2 * channels)

    def forward(
        self, hidden_MNC: Tensor, query_BQ: Tensor, frames_MN1: Tensor | None = None, rows_B: Tensor | None = None
    ) -> Tensor:
        """Channels ``[B, N, C]`` for queries of mixtures ``rows_B``; the input is overwritten if no gradient is needed.

        Frames where ``frames_MN1`` is 0 are zero padding, so that padding a batch does not change its stems.
        """
        inner_MNC = self._convolve(hidden_MNC if frames_MN1 is None else hidden_MNC * frames_MN1)
        of_mixtures = (hidden_MNC, inner_MNC, *group_statistics(inner_MNC, frames_MN1))
        hidden_BNC, inner_BNC, mean_BC, deviation_BC = _of_rows(of_mixtures, rows_B)
        scale_BC, shift_BC = self.film(query_BQ).float().chunk(2, dim=-1)
        gain_BC = self.norm_C * (1.0 + scale_BC) / deviation_BC
        offset_B1C = (shift_BC - mean_BC * gain_BC)[:, None]
        if torch.is_grad_enabled():
            return hidden_BNC + nn.functional.gelu(torch.addcmul(offset_B1C, inner_BNC, gain_BC[:, None]))
        out_BNC = inner_BNC if inner_BNC.dtype == offset_B1C.dtype else None
        modulated_BNC = torch.addcmul(offset_B1C, inner_BNC, gain_BC[:, None], out=out_BNC)
        return hidden_BNC.add_(torch.ops.aten.gelu_(modulated_BNC))

    def _convolve(self, hidden_BNC: Tensor) -> Tensor:
        """A product for each of the three taps, added to its shifted place: faster than one of copied inputs."""
        device, shape = hidden_BNC.device.type, (len(hidden_BNC), -1, -1)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BNC.dtype
        hidden_BNC, bias_C = hidden_BNC.to(dtype), self.conv.bias.to(dtype)
        before_CC, here_CC, after_CC = self.conv.weight.to(dtype).chunk(3, dim=1)
        with torch.autocast(device, enabled=False):
            inner_BNC = nn.functional.linear(hidden_BNC, here_CC, bias_C)
            inner_BNC[:, self.dilation :].baddbmm_(hidden_BNC[:, : -self.dilation], before_CC.T.expand(shape))
            inner_BNC[:, : -self.dilation].baddbmm_(hidden_BNC[:, self.dilation :], after_CC.T.expand(shape))
        return inner_BNC


def group_statistics(hidden_BNC: Tensor, frames_BN1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[B, C]`` over each group of channels and the frames inside ``frames_BN1`` (Wu & He 2018)."""
    batch, num_frames, channels = hidden_BNC.shape
    size = channels // _GROUPS
    with torch.autocast(hidden_BNC.device.type, enabled=False):  # in 16 bits the variance is lost in rounding
        if hidden_BNC.dtype == torch.float32 or torch.is_grad_enabled():
            ones_B1N = hidden_BNC.new_ones(1, 1, num_frames, dtype=torch.float32).expand(batch, -1, -1)
            frames_B1N = ones_B1N if frames_BN1 is None else frames_BN1.transpose(1, 2)
            hidden_BNC = hidden_BNC.float()
            sums_BC, squares_BC = ((frames_B1N @ value)[:, 0] for value in (hidden_BNC, hidden_BNC.square()))
        else:  # the same without a copy in 32 bits
            inside_BNC = hidden_BNC if frames_BN1 is None else hidden_BNC * frames_BN1.to(hidden_BNC.dtype)
            sums_BC = inside_BNC.sum(1, dtype=torch.float32)
            squares_BC = torch.linalg.vector_norm(inside_BNC, dim=1, dtype=torch.float32).square()
        count = num_frames if frames_BN1 is None else frames_BN1.sum(1).clamp(min=1.0)
        mean_BG, square_BG = (total.view(-1, _GROUPS, size).sum(2) / (count * size) for total in (sums_BC, squares_BC))
        deviation_BG = ((square_BG - mean_BG.square()).clamp(min=0.0) + 1e-5).sqrt()
    return mean_BG.repeat_interleave(size, dim=1), deviation_BG.repeat_interleave(size, dim=1)


def _of_rows(of_mixtures: Sequence[Tensor], rows_B: Tensor | None) -> list[Tensor]:
    return [one if rows_B is None else one.index_select(0, rows_B) for one in of_mixtures]


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

    def forward(
        self, mix_MT: Tensor, query_BQ: Tensor, lengths_M: Tensor | None = None, rows_B: Tensor | None = None
    ) -> Tensor:
        """Stems ``[B, T]`` for queries of mixtures ``rows_B``, by default one each.

        Mixtures are padded with zeros after ``lengths_M`` samples. A mixture is scaled to unit power and the stem is
        scaled back, so a gain of the mixture is a gain of the stem.
        """
        num_samples, hop, size = mix_MT.shape[-1], self.config.hop_samples, self.config.num_fft
        lengths_M1 = None if lengths_M is None else lengths_M[:, None]
        power_M1 = mix_MT.square().sum(1, keepdim=True)
        power_M1 = power_M1 / (num_samples if lengths_M1 is None else lengths_M1.clamp(min=1))
        level_M1 = power_M1.sqrt().clamp(min=1e-8)
        padded_MT = nn.functional.pad(mix_MT / level_M1, (size // 2, size + size // 2))
        mix_MNF, frames_MN1 = transforms.stft(padded_MT, self.window_F, hop), None
        if lengths_M1 is not None:
            frames = torch.arange(mix_MNF.shape[1], device=mix_MT.device)
            frames_MN1 = (frames <= (lengths_M1 + size) // hop)[..., None].to(mix_MT.dtype)
        mask_BNF = self.mask(transforms.power(mix_MNF), query_BQ, frames_MN1, rows_B)
        mix_BNF, level_B1 = _of_rows((mix_MNF, level_M1), rows_B)
        stems_BT = transforms.istft(transforms.masked(mix_BNF, mask_BNF), self.window_F, hop, length=num_samples)
        if lengths_M1 is not None:
            inside_MT = torch.arange(num_samples, device=mix_MT.device) < lengths_M1
            (level_B1,) = _of_rows([level_M1 * inside_MT], rows_B)
        return stems_BT * level_B1

    def mask(
        self,
        power_MNF: Tensor,
        query_BQ: Tensor,
        frames_MN1: Tensor | None = None,
        rows_B: Tensor | None = None,
    ) -> Tensor:
        """Mask ``[B, N, F]`` from 0 to 1; the stem keeps the mixture's phase."""
        with torch.autocast(power_MNF.device.type, enabled=False):
            features_MNC = self.bands.split(power_MNF, frames_MN1)
        hidden_BNC = self.inward(features_MNC)
        for block in self.blocks:
            hidden_BNC = block(hidden_BNC, query_BQ, frames_MN1, rows_B)
            if rows_B is not None:
                frames_MN1, rows_B = (None if frames_MN1 is None else frames_MN1[rows_B]), None
        logits_BNF: Tensor = self.bands.merge(self.outward(hidden_BNC))
        return logits_BNF.sigmoid()
