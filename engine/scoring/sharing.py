"""Division of a mixture among its stems, where these are all that sounds in it.

Shape legend: S stems of a clip, T samples, F bins, N frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW_S = 0.064


def share_mixture(*, mixture_T: Tensor, stems_ST: Tensor, sample_rate_hz: int) -> Tensor:
    """Divide a clip among its stems, each point of the spectrogram in proportion to their magnitudes; ``[S, T]``.

    The labels of a natural clip name what sounds in it, so its stems compete: sound that two stems contain is split,
    and sound that none contains goes to the loudest stem at that point. The result has the mixture's phase and adds up
    to the mixture, so remix scores of it would be meaningless; they are taken of the stems before. The mask is that of
    Liutkus & Badeau 2015 (their alpha of 1), from estimated magnitudes.
    """
    size = 2 ** round(torch.log2(torch.tensor(_WINDOW_S * sample_rate_hz)).item())
    window = torch.hann_window(size, device=mixture_T.device)
    spectra = torch.stft(
        torch.cat([mixture_T[None], stems_ST]), size, size // 4, window=window, pad_mode="constant", return_complex=True
    )
    magnitudes_SFN = spectra[1:].abs()
    total_FN = magnitudes_SFN.sum(0)
    even = torch.full_like(total_FN, 1.0 / len(stems_ST))
    fractions_SFN = torch.where(total_FN > 0.0, magnitudes_SFN / total_FN.clamp(min=1e-12), even)
    return torch.istft(spectra[0] * fractions_SFN, size, size // 4, window=window, length=len(mixture_T))
