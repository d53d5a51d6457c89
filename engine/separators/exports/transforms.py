"""The short-time Fourier transform as convolutions, because ONNX has no inverse of it.

Shape legend: B batch, T samples, F bins, N frames, K samples of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def real_transforms() -> Iterator[None]:
    """Let torch's transform and its inverse be convolutions while the block runs, and ``hypot`` a square root."""
    replaced: dict[str, Callable[..., Tensor]] = {"stft": _stft, "istft": _istft, "hypot": _hypot}
    before = {name: getattr(torch, name) for name in replaced}
    _replace(replaced)
    try:
        yield
    finally:
        _replace(before)


def _replace(functions: Mapping[str, Callable[..., Tensor]]) -> None:
    for name, function in functions.items():
        setattr(torch, name, function)


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


def _stft(
    input: Tensor,
    n_fft: int,
    hop_length: int,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    *,
    return_complex: bool,
) -> Tensor:
    """See ``torch.stft``."""
    assert window is not None and len(window) == n_fft and center and return_complex and win_length in (None, n_fft)
    padded_B1T = functional.pad(input.reshape(-1, 1, input.shape[-1]), (n_fft // 2, n_fft // 2), mode=pad_mode)
    parts_BFN = functional.conv1d(padded_B1T, _waves(n_fft, inverse=False) * window, stride=hop_length)
    return torch.complex(*(parts_BFN[0] if input.ndim == 1 else parts_BFN).chunk(2, dim=-2))


def _istft(
    input: Tensor,
    n_fft: int,
    hop_length: int,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    *,
    length: int,
) -> Tensor:
    """See ``torch.istft``."""
    assert window is not None and len(window) == n_fft and center and win_length in (None, n_fft)
    parts_BFN = torch.cat(torch.view_as_real(input).unbind(-1), dim=-2)
    parts_BFN = parts_BFN[None] if input.ndim == 2 else parts_BFN
    sum_B1T = functional.conv_transpose1d(parts_BFN, _waves(n_fft, inverse=True) * window, stride=hop_length)
    weight_1T = functional.conv_transpose1d(
        torch.ones_like(parts_BFN[:1, :1]), window.square()[None, None], stride=hop_length
    )
    first = n_fft // 2
    stems_BT: Tensor = (sum_B1T / weight_1T.clamp(min=1e-11))[:, 0, first : first + length]
    return stems_BT[0] if input.ndim == 2 else stems_BT
