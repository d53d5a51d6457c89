"""The short-time Fourier transform as convolutions, because ONNX has no inverse of it.

Shape legend: B batch, T samples, F bins, N frames, K samples of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.separators.network import transforms


@contextmanager
def real_transforms() -> Iterator[None]:
    """Let the transforms and their inverse be convolutions while the block runs, and ``hypot`` a square root."""
    replaced: dict[tuple[Any, str], Callable[..., Tensor]] = {
        (transforms, "stft"): _stft,
        (transforms, "istft"): _istft,
        (torch, "stft"): _torch_stft,
        (torch, "hypot"): _hypot,
    }
    before = {(module, name): getattr(module, name) for module, name in replaced}
    _replace(replaced)
    try:
        yield
    finally:
        _replace(before)


def _replace(functions: Mapping[tuple[Any, str], Callable[..., Tensor]]) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)


def _hypot(input: Tensor, other: Tensor) -> Tensor:
    """See ``torch.hypot``, which ONNX does not have."""
    return (input.square() + other.square()).sqrt()


def _waves(num_fft: int, *, inverse: bool) -> Tensor:
    """Cosines, then negative sines, ``[2 F, 1, K]``; for the inverse they are weighted by how often a bin counts."""
    angles_FK = np.outer(np.arange(num_fft // 2 + 1), np.arange(num_fft)) % num_fft * (2 * np.pi / num_fft)
    weights_F = np.full(num_fft // 2 + 1, 2.0 / num_fft)
    weights_F[[0, -1]] = 1.0 / num_fft
    scale_F1 = weights_F[:, None] if inverse else 1.0
    waves = np.concatenate([np.cos(angles_FK) * scale_F1, -np.sin(angles_FK) * scale_F1])
    return torch.from_numpy(waves[:, None].astype(np.float32))


def _stft(signal_BT: Tensor, window_K: Tensor, hop_samples: int) -> Tensor:
    """See ``transforms.stft``."""
    waves = _waves(len(window_K), inverse=False) * window_K
    parts_BFN = functional.conv1d(signal_BT[:, None], waves, stride=hop_samples)
    return torch.complex(*parts_BFN.mT.chunk(2, dim=-1))


def _torch_stft(
    input: Tensor,
    n_fft: int,
    hop_length: int,
    *,
    window: Tensor,
    pad_mode: str = "reflect",
    return_complex: bool,
) -> Tensor:
    """See ``torch.stft``."""
    assert len(window) == n_fft and return_complex
    padded_BT = functional.pad(input.reshape(1, -1, input.shape[-1]), (n_fft // 2, n_fft // 2), mode=pad_mode)[0]
    spectrum_BFN = _stft(padded_BT, window, hop_length).mT
    return spectrum_BFN[0] if input.ndim == 1 else spectrum_BFN


def _istft(spectrum_BNF: Tensor, window_K: Tensor, hop_samples: int, *, length: int) -> Tensor:
    """See ``transforms.istft``."""
    parts_BFN = torch.cat(torch.view_as_real(spectrum_BNF).unbind(-1), dim=-1).mT
    waves = _waves(len(window_K), inverse=True) * window_K
    sum_B1T = functional.conv_transpose1d(parts_BFN, waves, stride=hop_samples)
    weight_1T = functional.conv_transpose1d(
        torch.ones_like(parts_BFN[:1, :1]), window_K.square()[None, None], stride=hop_samples
    )
    first = len(window_K) // 2
    return (sum_B1T / weight_1T.clamp(min=1e-11))[:, 0, first : first + length]
