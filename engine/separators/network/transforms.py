"""The short-time Fourier transform and its inverse; unlike torch's, they do not wait for a GPU.

Shape legend: B batch, T samples, N frames, K samples of a frame, F bins.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stft(signal_BT: Tensor, window_K: Tensor, hop_samples: int) -> Tensor:
    """Spectra ``[B, N, F]`` of the frames that lie inside the signals: pad the signals to centre frames at the ends."""
    spectrum_BNF: Tensor = torch.fft.rfft(signal_BT.unfold(-1, len(window_K), hop_samples) * window_K)
    return spectrum_BNF


def istft(spectrum_BNF: Tensor, window_K: Tensor, hop_samples: int, *, length: int) -> Tensor:
    """Signals ``[B, T]`` of ``length`` samples; the first sample is in the middle of the first frame."""
    frames_BNK = torch.fft.irfft(spectrum_BNF, len(window_K))
    frames_BNK = frames_BNK * window_K if torch.is_grad_enabled() else frames_BNK.mul_(window_K)
    weights_1NK = window_K.square().expand(1, frames_BNK.shape[1], -1)
    inside = slice(len(window_K) // 2, len(window_K) // 2 + length)
    sum_BT, weight_1T = (_added(frames, hop_samples)[:, inside] for frames in (frames_BNK, weights_1NK))
    return sum_BT / weight_1T


def power(spectrum_BNF: Tensor) -> Tensor:
    """Squares of magnitudes."""
    real_BNF, imaginary_BNF = spectrum_BNF.real, spectrum_BNF.imag
    return torch.addcmul(real_BNF.square(), imaginary_BNF, imaginary_BNF)


def masked(spectrum_BNF: Tensor, mask_BNF: Tensor) -> Tensor:
    """A spectrum times real factors; it is overwritten if no gradient is needed."""
    parts_BNF2 = torch.view_as_real(spectrum_BNF)
    if torch.is_grad_enabled():
        return torch.view_as_complex(parts_BNF2 * mask_BNF[..., None])
    parts_BNF2.mul_(mask_BNF[..., None])
    return spectrum_BNF


def _added(frames_BNK: Tensor, hop_samples: int) -> Tensor:
    """Sums ``[B, T]`` of frames where they overlap, a part of all frames at a time."""
    num, num_frames, size = frames_BNK.shape
    sum_BNK = frames_BNK.new_zeros(num, num_frames - (-size // hop_samples) - 1, hop_samples)
    for place, first in enumerate(range(0, size, hop_samples)):
        part_BNK = frames_BNK[..., first : first + hop_samples]
        sum_BNK[:, place : place + num_frames, : part_BNK.shape[-1]] += part_BNK
    return sum_BNK.flatten(1)
