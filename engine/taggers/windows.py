"""Tags of short windows of a signal: which labels sound when.

Shape legend: N windows of a batch, S signals, T samples, W windows of a signal, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from engine.separators.batching import FIRST_S, pack
from engine.taggers.base import Tagger, tags_of

WINDOW_S, HOP_S = 1.0, 0.5
"""Length of a window and the time from the start of one to the next."""
_ACTIVE_DB = 20.0  # a window is active if its level is at most this far below that of the loudest


@dataclass(frozen=True, kw_only=True)
class WindowTags:
    """Tags of the windows of a signal, in the order of time."""

    tags_WL: NDArray[np.float32]
    """Tags in dB, for the labels of the tagger."""
    start_s_W: NDArray[np.float64]
    """Start of each window, from the start of the signal."""
    end_s_W: NDArray[np.float64]
    is_active_W: NDArray[np.bool_]
    """True for windows with a level within 20 dB of the loudest window's; for all of a silent signal."""

    def strongest(self) -> NDArray[np.float32]:
        """The highest tag of each label over the active windows, ``[L]``."""
        highest: NDArray[np.float32] = self.tags_WL[self.is_active_W].max(0)
        return highest


def tag_windows(
    tagger: Tagger, signals: Sequence[Tensor], *, sample_rate_hz: int, batch_s: float = FIRST_S
) -> list[WindowTags]:
    """Tags of every window of signals ``[T]``; ``batch_s`` is the most audio in one call of the tagger, in seconds.

    Windows of 1 s start every 0.5 s; the last ends with the signal, and a shorter signal is one window. Raises
    ``ValueError`` for a signal without samples, and for samples and tags that are not finite.
    """
    for number, signal_T in enumerate(signals):
        if signal_T.ndim != 1 or not len(signal_T):
            raise ValueError(
                f"a signal to tag must have shape [T] with samples, got {tuple(signal_T.shape)} for signal {number}; "
                "leave it out"
            )
    found: dict[int, WindowTags] = {}
    for positions in pack([len(one) for one in signals], batch_samples=max(1, int(batch_s * sample_rate_hz))):
        by_length = groupby((signals[position] for position in positions), key=len)
        cuts = [_cut(torch.stack([*group]), sample_rate_hz, tagger.sample_rate_hz) for _, group in by_length]
        rows = [row_T for windows_SWT, _ in cuts for row_T in windows_SWT.flatten(0, 1)]
        num_in_call = max(1, int(batch_s / WINDOW_S))
        tags_NL = np.concatenate(
            [tags_of(tagger, rows[i : i + num_in_call]).numpy() for i in range(0, len(rows), num_in_call)]
        )
        timed = [(start_s_W, windows_WT) for windows_SWT, start_s_W in cuts for windows_WT in windows_SWT]
        ends = np.cumsum([len(start_s_W) for start_s_W, _ in timed])[:-1]
        for position, (start_s_W, windows_WT), tags_WL in zip(positions, timed, np.split(tags_NL, ends), strict=True):
            found[position] = WindowTags(
                tags_WL=tags_WL,
                start_s_W=start_s_W,
                end_s_W=start_s_W + windows_WT.shape[1] / tagger.sample_rate_hz,
                is_active_W=_is_active(windows_WT),
            )
    return [found[position] for position in range(len(signals))]


def _cut(signals_ST: Tensor, sample_rate_hz: int, rate_hz: int) -> tuple[Tensor, NDArray[np.float64]]:
    """The windows ``[S, W, T]`` of signals of one length, at another rate, and their starts in seconds."""
    audio_ST = torchaudio.functional.resample(signals_ST.float(), sample_rate_hz, rate_hz)
    length, hop = min(audio_ST.shape[1], int(WINDOW_S * rate_hz)), int(HOP_S * rate_hz)
    last = audio_ST.shape[1] - length
    starts = [min(number * hop, last) for number in range(1 + math.ceil(last / hop))]
    windows_SWT = torch.stack([audio_ST[:, start : start + length] for start in starts], dim=1)
    return windows_SWT, np.array(starts) / rate_hz


def _is_active(windows_WT: Tensor) -> NDArray[np.bool_]:
    energy_W = windows_WT.double().square().mean(1).cpu().numpy()
    is_active_W: NDArray[np.bool_] = energy_W >= 10.0 ** (-_ACTIVE_DB / 10.0) * energy_W.max()
    return is_active_W
