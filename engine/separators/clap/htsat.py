"""HTSAT, the audio encoder of LAION's CLAP: a Swin transformer over a log-mel spectrogram that is folded to a square.

Chen et al. 2022 (arXiv 2202.00874), Liu et al. 2021 (arXiv 2103.14030). Tensors have the names of the original's
``audio_branch``; tables and filters that follow from the config are in no file.

Shape legend: B batch, T samples at 48 kHz, N frames, F bins, M mel bands, H rows and W columns of a map, C channels,
P windows of a map, K positions of a window, A attention heads, D features of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from engine.settings import Count, config

SAMPLE_RATE_HZ, HOP_SAMPLES, NUM_FRAMES = 48_000, 480, 1024
"""Rate of the audio, step between frames, and the number of frames that the network looks at, 10.24 s."""
_NUM_FFT, _NUM_BANDS, _LOW_HZ, _HIGH_HZ = 1024, 64, 50.0, 14_000.0
NUM_BINS = _NUM_FFT // 2 + 1
_FOLDS, _PATCH, _WINDOW = 4, 4, 8  # parts of the picture, one under the other; side of a patch; side of a window
NUM_STAGES = 4
_UNUSED_PARTS = ("spectrogram_extractor.", "logmel_extractor.", "tscam_conv.", "head.")

_Depth = Annotated[Count, Field(le=100)]


@config
class HtsatConfig:
    """Shape of HTSAT; the defaults are those of ``HTSAT-base``."""

    channels: Annotated[Count, Field(le=1 << 12)] = 128
    """Width of the first stage; each stage is twice as wide as the one before."""
    heads: Annotated[Count, Field(le=1 << 8)] = 4
    """Attention heads of the first stage; each stage has twice as many as the one before."""
    depth_1: _Depth = 2
    """Blocks of the first stage."""
    depth_2: _Depth = 2
    """Blocks of the second stage."""
    depth_3: _Depth = 12
    """Blocks of the third stage."""
    depth_4: _Depth = 2
    """Blocks of the fourth stage."""

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"heads must divide channels {self.channels}, got {self.heads}; choose such as 4")

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return (self.depth_1, self.depth_2, self.depth_3, self.depth_4)

    @property
    def features(self) -> int:
        """Width of the last stage, and of the embedding."""
        return self.channels << (NUM_STAGES - 1)


def htsat_fields(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Fields of :class:`HtsatConfig` from the tensors of an audio branch, without prefix; ``ValueError`` if they lack.

    Only what decides the fields is read: other tensors may be missing or misshapen.
    """
    first, last = "patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"
    if missing := [name for name in (first, last) if name not in tensors or tensors[name].ndim < 2]:
        raise ValueError(f"a CLAP audio encoder must be HTSAT, got none with {missing[0]}; give CLAP's HTSAT-base")
    found = [re.match(r"layers\.(\d)\.blocks\.(\d{1,3})\.", name) for name in tensors]
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    depths = {f"depth_{i + 1}": max(1, sum(stage == i for stage, _ in blocks)) for i in range(NUM_STAGES)}
    return {"channels": tensors[first].shape[0], "heads": tensors[last].shape[1], **depths}


def is_unused(name: str) -> bool:
    """A tensor of an original audio branch is a table or part of a classifier; ``name`` is without prefix."""
    return name.startswith(_UNUSED_PARTS) or name.endswith((".relative_position_index", ".attn_mask"))


def mel_filters() -> Tensor:
    """Slaney's mel filters ``[F, M]``, triangles of equal area, computed in float64."""

    def mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + float(np.log(hz / 1000)) * 27 / float(np.log(6.4))

    mels = np.linspace(mel(_LOW_HZ), mel(_HIGH_HZ), _NUM_BANDS + 2)
    edges_hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins_hz = np.arange(_NUM_FFT // 2 + 1)[:, None] * SAMPLE_RATE_HZ / _NUM_FFT
    rising = (bins_hz - edges_hz[:-2]) / np.diff(edges_hz)[:-1]
    falling = (edges_hz[2:] - bins_hz) / np.diff(edges_hz)[1:]
    filters = np.minimum(rising, falling).clip(min=0) * 2 / (edges_hz[2:] - edges_hz[:-2])
    return torch.from_numpy(filters.astype(np.float32))


def power_spectrum(wave_BT: Tensor) -> Tensor:
    """Power ``[B, N, F]`` of sound at 48 kHz; frame n is centred on sample 480 n, and edges are reflected."""
    window_F = torch.hann_window(_NUM_FFT, device=wave_BT.device)
    spectrum_BFN = torch.stft(wave_BT, _NUM_FFT, HOP_SAMPLES, window=window_F, pad_mode="reflect", return_complex=True)
    return torch.view_as_real(spectrum_BFN).square().sum(-1).transpose(1, 2)


class WindowAttention(nn.Module):
    """Attention inside each window, with a bias for each pair of relative positions."""

    index_KK: Tensor

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 2, heads))
        rows_K, columns_K = np.divmod(np.arange(_WINDOW * _WINDOW), _WINDOW)
        away = [one[:, None] - one[None] + _WINDOW - 1 for one in (rows_K, columns_K)]
        self.register_buffer("index_KK", torch.from_numpy(away[0] * (2 * _WINDOW - 1) + away[1]), persistent=False)

    def forward(self, windows_BPKC: Tensor, mask_PKK: Tensor | None) -> Tensor:
        """The positions mixed within each window; ``mask_PKK`` is added to the logits."""
        num, windows, size, channels = windows_BPKC.shape
        bias_AKK = self.relative_position_bias_table[self.index_KK].permute(2, 0, 1)[None]
        if mask_PKK is not None:
            bias_AKK = (bias_AKK + mask_PKK[:, None]).repeat(num, 1, 1, 1)
        query, key, value = self.qkv(windows_BPKC).view(num * windows, size, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias_AKK.to(query.dtype))
        attended: Tensor = self.proj(mixed.transpose(1, 2).reshape(num, windows, size, channels))
        return attended


class _Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        changed: Tensor = self.fc2(nn.functional.gelu(self.fc1(map_BHWC)))
        return changed


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window in every second block, and a network of each position."""

    mask_PKK: Tensor | None

    def __init__(self, channels: int, heads: int, *, side: int, shifted: bool) -> None:
        super().__init__()
        self.shift = _WINDOW // 2 if shifted and side > _WINDOW else 0
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = WindowAttention(channels, heads), _Mlp(channels)
        self.register_buffer("mask_PKK", _shift_mask(side) if self.shift else None, persistent=False)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """The map after the block."""
        rolled = self.norm1(map_BHWC).roll((-self.shift, -self.shift), (1, 2))
        num, height, width, channels = rolled.shape
        tiles = rolled.view(num, height // _WINDOW, _WINDOW, width // _WINDOW, _WINDOW, channels).transpose(2, 3)
        attended_BPKC = self.attn(tiles.reshape(num, -1, _WINDOW * _WINDOW, channels), self.mask_PKK)
        tiles = attended_BPKC.view(tiles.shape).transpose(2, 3).reshape(rolled.shape)
        map_BHWC = map_BHWC + tiles.roll((self.shift, self.shift), (1, 2))
        changed: Tensor = map_BHWC + self.mlp(self.norm2(map_BHWC))
        return changed


def _shift_mask(side: int) -> Tensor:
    """``[P, K, K]``: 0 for positions of a shifted window that are neighbours on the map, -100 for others."""
    band = np.digitize(np.arange(side), [side - _WINDOW, side - _WINDOW // 2])
    region = (3 * band[:, None] + band).reshape(side // _WINDOW, _WINDOW, side // _WINDOW, _WINDOW)
    region_PK = region.transpose(0, 2, 1, 3).reshape(-1, _WINDOW * _WINDOW)
    return torch.from_numpy(np.where(region_PK[:, :, None] == region_PK[:, None], 0.0, -100.0).astype(np.float32))


class _Merging(nn.Module):
    """Four neighbours become one position of twice the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        num, height, width, channels = map_BHWC.shape
        fours = map_BHWC.view(num, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.reduction(self.norm(fours.flatten(3)))
        return merged


class SwinStage(nn.Module):
    """Blocks of one width; all stages but the last end with half the rows and columns, and twice the width."""

    def __init__(self, channels: int, heads: int, *, side: int, depth: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(channels, heads, side=side, shifted=bool(i % 2)) for i in range(depth)))
        self.downsample = nn.Identity() if last else _Merging(channels)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """The map after the stage."""
        reduced: Tensor = self.downsample(self.blocks(map_BHWC))
        return reduced


class _PatchEmbedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, channels, _PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, picture_BHW: Tensor) -> Tensor:
        map_BHWC: Tensor = self.norm(self.proj(picture_BHW[:, None]).permute(0, 2, 3, 1))
        return map_BHWC


class Htsat(nn.Module):
    """The audio encoder: maps of four stages, and an embedding of :attr:`HtsatConfig.features` numbers."""

    mel_FM: Tensor

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mel_FM", mel_filters(), persistent=False)
        self.bn0 = nn.BatchNorm2d(_NUM_BANDS)
        self.patch_embed = _PatchEmbedding(config.channels)
        self.layers = nn.ModuleList(
            SwinStage(
                config.channels << i,
                config.heads << i,
                side=side_of_stage(i),
                depth=depth,
                last=i == NUM_STAGES - 1,
            )
            for i, depth in enumerate(config.depths)
        )
        self.norm = nn.LayerNorm(config.features)

    def picture(self, power_BNF: Tensor) -> Tensor:
        """The square ``[B, H, W]`` of powers of at most 1,024 frames: four parts of 256 frames, one under the other.

        Fewer frames are stretched to 1,024. Add frames of zeros for a sound that must keep its speed.
        """
        if power_BNF.shape[1] > NUM_FRAMES:
            raise ValueError(
                f"audio of one call must have at most {NUM_FRAMES} frames, got {power_BNF.shape[1]}; cut it into chunks"
            )
        with torch.autocast(power_BNF.device.type, enabled=False):
            level_BNM = 10.0 * (power_BNF.float() @ self.mel_FM).clamp(min=1e-10).log10()
            level_B1NM = self.bn0(level_BNM.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)
            if level_B1NM.shape[2] < NUM_FRAMES:
                size = (NUM_FRAMES, _NUM_BANDS)
                level_B1NM = nn.functional.interpolate(level_B1NM, size, mode="bicubic", align_corners=True)
        parts: Tensor = level_B1NM.view(-1, _FOLDS, NUM_FRAMES // _FOLDS, _NUM_BANDS)
        return parts.transpose(2, 3).reshape(len(parts), _FOLDS * _NUM_BANDS, -1)

    def maps(self, power_BNF: Tensor) -> list[Tensor]:
        """Maps ``[B, H, W, C]``: the patch embedding's output, and that of each stage."""
        maps = [self.patch_embed(self.picture(power_BNF))]
        for stage in self.layers:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, power_BNF: Tensor) -> Tensor:
        """Embedding ``[B, C]``, before CLAP's projection: the mean over the last map."""
        embedding_BC: Tensor = self.norm(self.maps(power_BNF)[-1]).mean(dim=(1, 2))
        return embedding_BC


def side_of_stage(stage: int) -> int:
    """Rows, and columns, of the maps in a stage."""
    return (_FOLDS * _NUM_BANDS // _PATCH) >> stage


def unfold_picture(picture_BHW: Tensor) -> Tensor:
    """The frames ``[B, N, M]`` of a picture: the inverse of what :meth:`Htsat.picture` folds."""
    parts = picture_BHW.view(-1, _FOLDS, _NUM_BANDS, NUM_FRAMES // _FOLDS)
    return parts.transpose(2, 3).reshape(len(parts), NUM_FRAMES, _NUM_BANDS)
