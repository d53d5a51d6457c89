"""The decoder of CLAPSep: from the maps of HTSAT and a query to a mask of the mixture's spectrogram.

Tensors have the names of the original's ``decoder_model``.

Shape legend: B batch, N frames, F bins, Q query features, H rows and W columns of a map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.separators.clap.htsat import NUM_STAGES, HtsatConfig, SwinBlock, side_of_stage, unfold_picture
from engine.settings import Count, config

SAMPLE_RATE_HZ, NUM_FFT, HOP_SAMPLES = 32_000, 1024, 320
"""Rate and spectrogram of the mixture; its frames are as far apart as those of HTSAT."""
_NUM_BINS = NUM_FFT // 2 + 1
_PATCH, _NUM_BANDS, _MASK_HEADS = 4, 64, 8


@config
class ClapSepConfig(HtsatConfig):
    """Shape of CLAPSep; the defaults are those of the original."""

    query_features: Annotated[Count, Field(multiple_of=2, le=1 << 14)] = 1024
    """Length of a query's vector: an embedding of what is wanted, and one of what is not."""
    mask_channels: Annotated[Count, Field(multiple_of=_MASK_HEADS, le=1 << 14)] = 640
    """Width of the transformer that makes the mask."""
    mask_depth: Annotated[Count, Field(le=100)] = 3
    """Layers of that transformer."""
    mask_hidden: Annotated[Count, Field(le=1 << 16)] = 2560
    """Width of the hidden layer in each of them."""


class _Film(nn.Module):
    """A scale and a shift of each channel, which follow from the query (Perez et al. 2018, arXiv 1709.07871)."""

    def __init__(self, query_features: int, channels: int) -> None:
        super().__init__()
        self.beta, self.gamma = (nn.Linear(query_features, channels) for _ in range(2))

    def forward(self, map_BHWC: Tensor, query_BQ: Tensor) -> Tensor:
        query_B11Q = query_BQ[:, None, None]
        changed: Tensor = self.gamma(query_B11Q) * map_BHWC + self.beta(query_B11Q)
        return changed


class _Skip(nn.Module):
    """Adds a map of the encoder, modulated by the query, to the decoder's."""

    def __init__(self, query_features: int, channels: int) -> None:
        super().__init__()
        self.feature_proj = nn.Linear(channels, channels)
        self.skip_conv = _Film(query_features, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, encoded_BHWC: Tensor, query_BQ: Tensor, map_BHWC: Tensor | None = None) -> Tensor:
        modulated = self.skip_conv(self.feature_proj(encoded_BHWC), query_BQ)
        joined: Tensor = self.norm(modulated if map_BHWC is None else modulated + map_BHWC)
        return joined


class _Expanding(nn.Module):
    """Each position becomes four neighbours of half the width: the inverse of HTSAT's merging, in the same order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(channels // 2)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        num, height, width, channels = map_BHWC.shape
        fours = self.expand(map_BHWC).view(num, height, width, 2, 2, channels // 2)  # columns first, then rows
        expanded: Tensor = self.norm(fours.permute(0, 1, 4, 2, 3, 5).reshape(num, 2 * height, 2 * width, -1))
        return expanded


class _Stage(nn.Module):
    def __init__(self, channels: int, heads: int, *, side: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else _Expanding(2 * channels)  # the original's name
        self.blocks = nn.Sequential(SwinBlock(channels, heads, side=side, shifted=False))

    def forward(self, map_BHWC: Tensor) -> Tensor:
        decoded: Tensor = self.blocks(self.downsample(map_BHWC))
        return decoded


class _Picture(nn.Module):
    """A picture of one channel from the decoder's last map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.ConvTranspose2d(channels, 1, _PATCH, stride=_PATCH)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        picture_B1HW: Tensor = self.proj(self.norm(map_BHWC).permute(0, 3, 1, 2))
        return picture_B1HW[:, 0]


class MaskDecoder(nn.Module):
    """Makes the mask of a query from HTSAT's maps and the magnitudes of the mixture."""

    def __init__(self, config: ClapSepConfig) -> None:
        super().__init__()
        stages = range(NUM_STAGES - 1, -1, -1)  # the deepest first
        self.film = _Skip(config.query_features, config.features)
        self.layers = nn.ModuleList(
            _Stage(config.channels << i, config.heads << i, side=side_of_stage(i), first=i == NUM_STAGES - 1)
            for i in stages
        )
        self.skip = nn.ModuleList(_Skip(config.query_features, config.channels << i) for i in stages)
        self.inverse_patch_embed = _Picture(config.channels)
        self.spec_norm = nn.BatchNorm2d(_NUM_BINS)
        wide = config.mask_channels
        layer = nn.TransformerEncoderLayer(wide, _MASK_HEADS, config.mask_hidden, dropout=0.0, batch_first=True)
        self.mask_net = nn.Sequential(
            nn.Linear(_NUM_BINS + _NUM_BANDS, wide),
            nn.LayerNorm(wide),
            nn.TransformerEncoder(layer, config.mask_depth, enable_nested_tensor=False),
            nn.Linear(wide, _NUM_BINS),
        )

    def forward(
        self, maps: Sequence[Tensor], magnitude_BNF: Tensor, query_BQ: Tensor, num_frames_B: Tensor | None = None
    ) -> Tensor:
        """Mask ``[B, N, F]`` from 0 to 1; ``maps`` are those of :meth:`~engine.separators.clap.htsat.Htsat.maps`.

        Frames from ``num_frames_B`` on are padding and change nothing; by default there is none.
        """
        *encoded, last_BHWC = maps
        map_BHWC = self.film(last_BHWC, query_BQ)
        for stage, skip, skipped_BHWC in zip(self.layers, self.skip, reversed(encoded), strict=True):
            map_BHWC = skip(skipped_BHWC, query_BQ, stage(map_BHWC))
        num_frames = magnitude_BNF.shape[1]
        bands_BNM = unfold_picture(self.inverse_patch_embed(map_BHWC))[:, :num_frames]
        normed_BNF = self.spec_norm(magnitude_BNF.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        inward, norm, transformer, outward = self.mask_net
        hidden_BNC = norm(inward(torch.cat([normed_BNF, bands_BNM.to(normed_BNF.dtype)], dim=-1)))
        is_padding_BN = None
        if num_frames_B is not None:
            is_padding_BN = torch.arange(num_frames, device=num_frames_B.device) >= num_frames_B[:, None]
        hidden_BNC = transformer(hidden_BNC, src_key_padding_mask=is_padding_BN)
        mask_BNF: Tensor = outward(hidden_BNC).float().sigmoid()
        return mask_BNF
