"""The mask network of AudioSep: a residual U-Net over spectrograms whose every activation a query shifts.

Liu et al. 2023, "Separate Anything You Describe" (arXiv 2308.05037); the U-Net is that of Kong et al. 2021 (arXiv
2109.05418). Batch normalisation is stored as the scale and shift that it is in evaluation.

Shape legend: B batch, C channels, N frames, F bins, Q query features, M channels of the mask. Activations lie in memory
with their channels last, which halves the time of the convolutions on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu_, pad

from engine.settings import Count, config

_SLOPE = 0.01
_FRAMES = 32  # the encoders halve the number of frames five times, and the number of bins six times
_MASK = 3  # logits of each bin: magnitude, and both parts of a turn of the phase
Width = Annotated[Count, Field(le=1 << 13)]


@config
class AudioSepConfig:
    """Architecture of an AudioSep network; the values of the published checkpoint are the defaults."""

    sample_rate_hz: Annotated[Count, Field(le=1_000_000)] = 32000
    """Rate of the audio that the network separates."""
    num_fft: Annotated[Count, Field(multiple_of=128, le=1 << 16)] = 2048
    """Window of the short-time Fourier transform, in samples."""
    hop_samples: Count = 320
    """Step between frames, in samples; at most half of ``num_fft``."""
    query_features: Annotated[Count, Field(le=1 << 14)] = 512
    """Length of a query's vector."""
    width_0: Width = 32
    """Channels before the first encoder."""
    width_1: Width = 32
    """Channels of the first encoder and of the last decoder."""
    width_2: Width = 64
    """Channels of the second encoder and of the decoder at its resolution."""
    width_3: Width = 128
    """Channels of the third encoder and of the decoder at its resolution."""
    width_4: Width = 256
    """Channels of the fourth encoder and of the decoder at its resolution."""
    width_5: Width = 384
    """Channels of the fifth encoder and of the decoder at its resolution."""
    width_6: Width = 384
    """Channels of the sixth encoder, of the block after it and of the first decoder."""

    def __post_init__(self) -> None:
        if self.hop_samples > self.num_fft // 2:
            raise ValueError(
                f"hop_samples must be at most half of num_fft {self.num_fft}, got {self.hop_samples}; "
                f"choose one such as {self.num_fft * 5 // 32}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before and after each encoder."""
        return (self.width_0, self.width_1, self.width_2, self.width_3, self.width_4, self.width_5, self.width_6)


class ShiftedNorm(nn.Module):
    """Scales each channel and shifts it by the query, then cuts negative values to a hundredth."""

    def __init__(self, channels: int, query_features: int) -> None:
        super().__init__()
        self.scale_C = nn.Parameter(torch.ones(channels))
        self.shift = nn.Linear(query_features, channels)

    def forward(self, hidden_BCNF: Tensor, query_BQ: Tensor, out_BCNF: Tensor | None = None) -> Tensor:
        """``out_BCNF`` is memory for the result, perhaps that of ``hidden_BCNF``; by default it is new."""
        scale_C11 = self.scale_C[:, None, None].to(hidden_BCNF.dtype)
        shift_BC11 = self.shift(query_BQ)[..., None, None].to(hidden_BCNF.dtype)
        return leaky_relu_(torch.addcmul(shift_BC11, hidden_BCNF, scale_C11, out=out_BCNF), _SLOPE)


class ResUNetBlock(nn.Module):
    """Two convolutions, each after a :class:`ShiftedNorm`, whose result is added to the input."""

    def __init__(self, inputs: int, outputs: int, query_features: int) -> None:
        super().__init__()
        self.norm1 = ShiftedNorm(inputs, query_features)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = ShiftedNorm(outputs, query_features)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, hidden_BCNF: Tensor, query_BQ: Tensor) -> Tensor:
        """The input's memory is used for the result, or for values on the way to it."""
        if self.shortcut is None:
            sum_BCNF, inner_BCNF = hidden_BCNF, self.norm1(hidden_BCNF, query_BQ)
        else:
            sum_BCNF = self.shortcut(hidden_BCNF)
            inner_BCNF = self.norm1(hidden_BCNF, query_BQ, hidden_BCNF)
        inner_BCNF = self.conv1(inner_BCNF)
        return sum_BCNF.add_(self.conv2(self.norm2(inner_BCNF, query_BQ, inner_BCNF)))


class ResUNetDecoder(nn.Module):
    """Doubles the resolution, and adds channels that an encoder had at this resolution."""

    def __init__(self, inputs: int, outputs: int, query_features: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.norm = ShiftedNorm(inputs, query_features)
        self.up = nn.ConvTranspose2d(inputs, outputs, stride, stride, bias=False)
        self.block = ResUNetBlock(2 * outputs, outputs, query_features)

    def forward(self, hidden_BCNF: Tensor, query_BQ: Tensor, take_skip: Callable[[], Tensor]) -> Tensor:
        """``take_skip`` gives away the encoder's channels, so that their memory is free when they are copied."""
        finer_BCNF = self.up(self.norm(hidden_BCNF, query_BQ, hidden_BCNF))
        del hidden_BCNF
        both = [finer_BCNF, take_skip()]
        del finer_BCNF
        return self.block(_joined(both), query_BQ)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts side by side as channels; the list is emptied."""
    joined_BCNF = torch.cat(parts, dim=1)
    parts.clear()
    return joined_BCNF


class ResUNet(nn.Module):
    """Logits of a mask for each bin of a spectrogram but the last, from its magnitudes and a query."""

    def __init__(self, config: AudioSepConfig) -> None:
        super().__init__()
        widths, features = config.widths, config.query_features
        strides = [(2, 2)] * 5 + [(1, 2)]
        self.scale_F = nn.Parameter(torch.ones(config.num_fft // 2 + 1))
        self.shift_F = nn.Parameter(torch.zeros(config.num_fft // 2 + 1))
        self.inward = nn.Conv2d(1, widths[0], 1)
        self.encoders = nn.ModuleList(
            ResUNetBlock(inputs, outputs, features) for inputs, outputs in zip(widths, widths[1:], strict=False)
        )
        self.bottom = ResUNetBlock(widths[6], widths[6], features)
        self.decoders = nn.ModuleList(
            ResUNetDecoder(widths[min(level + 1, 6)], widths[level], features, strides[level - 1])
            for level in range(6, 0, -1)
        )
        self.outward = nn.Conv2d(widths[1], _MASK, 1)
        self._strides = strides

    def forward(self, magnitude_BNF: Tensor, query_BQ: Tensor) -> Tensor:
        """Logits ``[B, M, N, F - 1]`` of magnitudes ``[B, N, F]``; frames are padded with zeros after they are scaled."""
        num_frames = magnitude_BNF.shape[1]
        features_BNF = torch.addcmul(self.shift_F, magnitude_BNF, self.scale_F)[..., :-1]
        features_BNF = pad(features_BNF, (0, 0, 0, -num_frames % _FRAMES))
        hidden_BCNF = self.inward(features_BNF[:, None]).contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for encoder, stride in zip(self.encoders, self._strides, strict=True):
            skips.append(encoder(hidden_BCNF, query_BQ))
            hidden_BCNF = avg_pool2d(skips[-1], stride)
        hidden_BCNF = self.bottom(hidden_BCNF, query_BQ)
        for decoder in self.decoders:
            hidden_BCNF = decoder(hidden_BCNF, query_BQ, skips.pop)
        logits_BMNF: Tensor = self.outward(hidden_BCNF)
        return logits_BMNF[:, :, :num_frames]
