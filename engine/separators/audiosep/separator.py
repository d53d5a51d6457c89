"""AudioSep as a separator: its transform, its mask, and rows of different lengths.

Shape legend: B batch, M mixtures, T samples, N frames, F bins, Q query features, S mixtures of one length and R queries
of them, M also the channels of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.separators.audiosep.network import AudioSepConfig, ResUNet
from engine.separators.base import NetworkSeparator, small_tensor
from engine.separators.network import transforms
from engine.separators.queries import Query

_QUIETEST, _LOUDEST = 1e-5, 1e10  # magnitudes that the network gets; the latter keeps its sums finite


class AudioSep(NetworkSeparator):
    """AudioSep, which separates any sound that text describes."""

    architecture = "audiosep"
    chunk_s, overlap_s = 10.2, 1.24
    """A clip of 10 s is one piece. Chunks begin every 28 times 32 frames, because the network halves time five times:
    chunks of random weights then agree with one piece at 57 dB, and at 27 dB if they begin off this grid."""
    window_T: Tensor

    def __init__(self, config: AudioSepConfig, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.network = ResUNet(config)
        with torch.device("cpu"):  # on ``meta`` a window has no values
            self.register_buffer("window_T", torch.hann_window(config.num_fft), persistent=False)

    @property
    def sample_rate_hz(self) -> int:  # type: ignore[override]
        return int(self.config.sample_rate_hz)

    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """See :meth:`NetworkSeparator.encode`; sounds that a query excludes do not change its vector."""
        if self.embedder is None:
            raise ValueError(
                "an AudioSep separator must have a text encoder, got none; convert its checkpoint with its text branch"
            )
        vectors = [self.embedder.wanted(query) for query in queries]
        query_BQ = torch.stack(vectors) if vectors else torch.zeros(0, self.config.query_features)
        if query_BQ.shape[1] != self.config.query_features:
            raise ValueError(
                f"embeddings of queries must have {self.config.query_features} features, got {query_BQ.shape[1]}; "
                "give the separator the encoder of its own checkpoint"
            )
        return query_BQ.to(self.device, torch.float32)

    def separate_chunk(self, mix_MT: Tensor, query_BQ: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """See :meth:`NetworkSeparator.separate_chunk`; rows of one length are separated together, without padding."""
        stems_BT = mix_MT.new_zeros(len(rows), mix_MT.shape[1])
        for length in {lengths[row] for row in rows} - {0}:
            places = [place for place, row in enumerate(rows) if lengths[row] == length]
            most = self._most_rows(length)
            for some in (places[first : first + most] for first in range(0, len(places), most)):
                number = {row: i for i, row in enumerate(dict.fromkeys(rows[place] for place in some))}
                of_mixtures, of_queries, of_rows = (
                    small_tensor(one, self.device)
                    for one in (list(number), some, [number[rows[place]] for place in some])
                )
                mix_ST = mix_MT.index_select(0, of_mixtures)[:, :length]
                stems_RT = self._separate(mix_ST, query_BQ.index_select(0, of_queries), of_rows)
                stems_BT[:, :length].index_copy_(0, of_queries, stems_RT)
        return stems_BT

    def separate_unpadded(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """See :meth:`NetworkSeparator.separate_unpadded`."""
        return self._separate(mix_BT, query_BQ)

    def _most_rows(self, length: int) -> int:
        """Rows in one call of the network: on a CPU more than a chunk takes memory and saves no time."""
        return max(1, round(self.chunk_s * self.sample_rate_hz) // length) if self.device.type == "cpu" else 1 << 20

    def _separate(self, mix_ST: Tensor, query_RQ: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Stems ``[R, T]`` of mixtures without padding; those too short for a frame are extended by silence."""
        size, hop, length = self.config.num_fft, self.config.hop_samples, mix_ST.shape[1]
        mix_ST = pad(mix_ST, (0, max(0, size // 2 + 1 - length)))
        with torch.autocast(mix_ST.device.type, enabled=False):
            mix_SNF = transforms.stft(pad(mix_ST, (size // 2, size // 2), mode="reflect"), self.window_T, hop)
            magnitude_SNF = transforms.power(mix_SNF).sqrt().clamp(_QUIETEST, _LOUDEST)
        mix_RNF, magnitude_RNF = (one if rows_R is None else one[rows_R] for one in (mix_SNF, magnitude_SNF))
        logits_RMNF = self.network(magnitude_RNF, query_RQ)
        with torch.autocast(mix_ST.device.type, enabled=False):
            stem_RNF = mix_RNF * complex_mask(logits_RMNF.float())
            return transforms.istft(stem_RNF, self.window_T, hop, length=mix_ST.shape[1])[:, :length]


def complex_mask(logits_RMNF: Tensor) -> Tensor:
    """A factor ``[R, N, F]`` for each bin: a magnitude from 0 to 1, and a turn of the phase; the last bin is silent."""
    magnitude_RNF = logits_RMNF[:, 0].sigmoid()
    real_RNF, imaginary_RNF = logits_RMNF[:, 1].tanh(), logits_RMNF[:, 2].tanh()
    gain_RNF = magnitude_RNF / torch.hypot(real_RNF, imaginary_RNF).clamp(min=1e-10)
    return torch.complex(pad(real_RNF * gain_RNF, (0, 1)), pad(imaginary_RNF * gain_RNF, (0, 1)))
