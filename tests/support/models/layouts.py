"""Small checkpoints of random weights, with the tensors of the files that other projects released."""

from __future__ import annotations

import math

import torch
from torch import Tensor

AUDIOSEP_WIDTHS = (3, 3, 4, 5, 6, 7, 7)
AUDIOSEP_FEATURES = 16


def audiosep_tensors(*, num_fft: int = 128, prefix: str = "ss_model.", seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of an AudioSep checkpoint but those of its text encoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def uniform(*shape: int, middle: float = 0.0, spread: float = 0.1) -> Tensor:
        return middle + spread * (2.0 * torch.rand(*shape, generator=generator) - 1.0)

    def matrix(name: str, *shape: int, inputs: int, bias: int = 0) -> None:
        tensors[f"{name}.weight"] = torch.randn(*shape, generator=generator) * math.sqrt(1.5 / inputs)
        if bias:
            tensors[f"{name}.bias"] = uniform(bias)

    def norm(name: str, channels: int, *, mean: float = 0.0, variance: float = 1.0) -> None:
        tensors[f"base.{name}.weight"] = uniform(channels, middle=1.0, spread=0.25)
        tensors[f"base.{name}.bias"] = uniform(channels)
        tensors[f"base.{name}.running_mean"] = uniform(channels, middle=mean)
        tensors[f"base.{name}.running_var"] = uniform(channels, middle=variance, spread=variance / 2)
        tensors[f"base.{name}.num_batches_tracked"] = torch.tensor(1)
        if not name.endswith("bn0"):
            film = "film." + name.replace(".", "->").replace("bn", "beta")
            matrix(film, channels, AUDIOSEP_FEATURES, inputs=1, bias=channels)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.bn1", inputs)
        norm(f"{name}.bn2", outputs)
        matrix(f"base.{name}.conv1", outputs, inputs, 3, 3, inputs=9 * inputs)
        matrix(f"base.{name}.conv2", outputs, outputs, 3, 3, inputs=9 * outputs)
        if inputs != outputs:
            matrix(f"base.{name}.shortcut", outputs, inputs, 1, 1, inputs=inputs, bias=outputs)

    for kernel, shape in (("stft", (num_fft // 2 + 1, 1, num_fft)), ("istft", (num_fft, num_fft, 1))):
        for part in ("real", "imag"):
            tensors[f"base.{kernel}.conv_{part}.weight"] = torch.zeros(shape)
    tensors["base.istft.ola_window"] = torch.zeros(num_fft)
    norm("bn0", num_fft // 2 + 1, mean=0.5)
    widths = AUDIOSEP_WIDTHS
    matrix("base.pre_conv", widths[0], 1, 1, 1, inputs=1, bias=widths[0])
    for level in range(1, 7):
        block(f"encoder_block{level}.conv_block1", widths[level - 1], widths[level])
    block("conv_block7a.conv_block1", widths[6], widths[6])
    for number, level in enumerate(range(6, 0, -1), 1):
        inputs, outputs = widths[min(level + 1, 6)], widths[level]
        matrix(f"base.decoder_block{number}.conv1", inputs, outputs, 1 if number == 1 else 2, 2, inputs=inputs)
        norm(f"decoder_block{number}.bn1", inputs)
        norm(f"decoder_block{number}.bn2", inputs)
        block(f"decoder_block{number}.conv_block2", 2 * outputs, outputs)
    matrix("base.after_conv", 3, widths[1], 1, 1, inputs=widths[1], bias=3)
    return {prefix + name: tensor for name, tensor in tensors.items()}
