"""The mask network of AudioSep: a residual U-Net over spectrograms whose every activation a query shifts.

Liu et al. 2023, "Separate Anything You Describe" (arXiv 2308.05037); the U-Net is that of Kong et al. 2021 (arXiv
2109.05418). Batch normalisation is stored as the scale and shift that it is in evaluation.

Shape legend: B batch, C channels, N frames, F bins, Q query features, M channels of the mask. Activations lie in memory
with their channels last, which halves the time of the convolutions on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu_, pad

from engine.settings import Count, config

_SLOPE = 0.01
_FRAMES = 32  # the encoders halve the number of frames five times, and the number of bins six times
_STRIDES = [(2, 2)] * 5 + [(1, 2)]  # of the encoders, in frames and bins
_STRIP, _MARGIN = 64, 2  # frames that a CPU processes at once, and how many before and after them they depend on
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

    def forward(self, hidden_BCNF: Tensor, query_BQ: Tensor) -> Tensor:
        """Activations ``[B, C, N, F]``, in new memory."""
        scale_C11 = self.scale_C[:, None, None].to(hidden_BCNF.dtype)
        shift_BC11 = self.shift(query_BQ)[..., None, None].to(hidden_BCNF.dtype)
        return leaky_relu_(torch.addcmul(shift_BC11, hidden_BCNF, scale_C11), _SLOPE)


class Pointwise(nn.Linear):
    """A convolution of one bin and frame: a matrix product, which torch's convolution does not make of it."""

    def forward(self, hidden_BCNF: Tensor) -> Tensor:
        """Maps channels ``[B, C, N, F]``."""
        return super().forward(hidden_BCNF.movedim(1, -1)).movedim(-1, 1)


class ResUNetBlock(nn.Module):
    """Two convolutions, each after a :class:`ShiftedNorm`, whose result is added to the input."""

    def __init__(self, inputs: int, outputs: int, query_features: int) -> None:
        super().__init__()
        self.norm1 = ShiftedNorm(inputs, query_features)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = ShiftedNorm(outputs, query_features)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = Pointwise(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, query_BQ: Tensor, hidden_BCNF: Tensor) -> Tensor:
        """Channels ``[B, C, N, F]``; a frame depends on two frames before it and two after it."""
        inner_BCNF: Tensor = self.conv1(self.norm1(hidden_BCNF, query_BQ))
        inner_BCNF = self.conv2(self.norm2(inner_BCNF, query_BQ))
        shortcut_BCNF: Tensor = self.shortcut(hidden_BCNF)
        return inner_BCNF.add_(shortcut_BCNF)


class ResUNetDecoder(nn.Module):
    """Refines the resolution, and adds channels that an encoder had at that resolution."""

    def __init__(self, inputs: int, outputs: int, query_features: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.norm = ShiftedNorm(inputs, query_features)
        self.up = nn.ConvTranspose2d(inputs, outputs, stride, stride, bias=False)
        self.block = ResUNetBlock(2 * outputs, outputs, query_features)

    def forward(self, query_BQ: Tensor, hidden_BCNF: Tensor, skip_BCNF: Tensor) -> Tensor:
        """Channels ``[B, C, N, F]`` of the resolution of ``skip_BCNF``, the channels of the encoder."""
        finer_BCNF = self.up(self.norm(hidden_BCNF, query_BQ))
        output_BCNF: Tensor = self.block(query_BQ, torch.cat([finer_BCNF, skip_BCNF], dim=1))
        return output_BCNF


class ResUNet(nn.Module):
    """Logits of a mask for each bin of a spectrogram but the last, from its magnitudes and a query."""

    def __init__(self, config: AudioSepConfig) -> None:
        super().__init__()
        widths, features = config.widths, config.query_features
        self.scale_F = nn.Parameter(torch.ones(config.num_fft // 2 + 1))
        self.shift_F = nn.Parameter(torch.zeros(config.num_fft // 2 + 1))
        self.inward = Pointwise(1, widths[0])
        self.encoders = nn.ModuleList(ResUNetBlock(*pair, features) for pair in itertools.pairwise(widths))
        self.bottom = ResUNetBlock(widths[-1], widths[-1], features)
        self.decoders = nn.ModuleList(
            ResUNetDecoder(*pair, features, stride)
            for pair, stride in zip(itertools.pairwise((widths[-1], *widths[:0:-1])), _STRIDES[::-1], strict=True)
        )
        self.outward = Pointwise(widths[1], _MASK)

    def forward(self, magnitude_BNF: Tensor, query_BQ: Tensor) -> Tensor:
        """Logits ``[B, M, N, F - 1]`` of magnitudes ``[B, N, F]``; zeros are appended to the scaled frames."""
        num_frames = magnitude_BNF.shape[1]
        features_BNF = torch.addcmul(self.shift_F, magnitude_BNF, self.scale_F)[..., :-1]
        features_BNF = pad(features_BNF, (0, 0, 0, -num_frames % _FRAMES))
        hidden_BCNF = self.inward(features_BNF[:, None])
        skips: list[Tensor] = []
        for encoder, stride in zip(self.encoders, _STRIDES, strict=True):
            skips.append(in_strips(encoder, query_BQ, hidden_BCNF))
            hidden_BCNF = avg_pool2d(skips[-1], stride)
        hidden_BCNF = in_strips(self.bottom, query_BQ, hidden_BCNF)
        *decoders, last = self.decoders
        for decoder in decoders:
            hidden_BCNF = in_strips(decoder, query_BQ, hidden_BCNF, skips.pop())
        logits_BMNF = in_strips(lambda *inputs: self.outward(last(*inputs)), query_BQ, hidden_BCNF, skips.pop())
        return logits_BMNF[:, :, :num_frames]


def in_strips(block: Callable[..., Tensor], query_BQ: Tensor, *inputs_BCNF: Tensor) -> Tensor:
    """The output of a block for inputs that the CPU processes strip by strip along the frames, for less memory.

    A strip has the frames that its own depend on, so the output is that for all frames at once.
    """
    num_frames = inputs_BCNF[-1].shape[2]
    strip = _STRIP if query_BQ.device.type == "cpu" else num_frames
    outputs_BCNF = torch.empty(0)
    for first in range(0, num_frames, strip):
        start, end = max(0, first - _MARGIN), min(num_frames, first + strip + _MARGIN)
        cuts = [one[:, :, start * one.shape[2] // num_frames : end * one.shape[2] // num_frames] for one in inputs_BCNF]
        part_BCNF = block(query_BQ, *cuts)[:, :, first - start : first - start + strip]
        if num_frames <= strip:
            return part_BCNF
        if not first:
            batch, channels, _, bins = part_BCNF.shape
            outputs_BCNF = part_BCNF.new_empty(batch, num_frames, bins, channels).movedim(-1, 1)
        outputs_BCNF[:, :, first : first + strip] = part_BCNF
    return outputs_BCNF
