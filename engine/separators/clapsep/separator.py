"""CLAPSep as a separator: queries of wanted and unwanted sounds, and mixtures of any length.

Shape legend: B batch, T samples, N frames, F bins, Q query features, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from engine.separators.base import NetworkSeparator
from engine.separators.clap import htsat
from engine.separators.clapsep.network import HOP_SAMPLES, NUM_FFT, SAMPLE_RATE_HZ, ClapSepConfig, MaskDecoder
from engine.separators.queries import Query


class ClapSep(NetworkSeparator):
    """The :class:`~engine.separators.base.Separator` of Ma et al. 2024 (CLAPSep, arXiv 2402.17455)."""

    architecture = "clapsep"
    config: ClapSepConfig
    chunk_s = 10.0  # the encoder looks at 10.24 s
    uses_unwanted = True
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, config: ClapSepConfig, labels: Sequence[str] = ()) -> None:
        """``labels`` is empty: a query is words or a sound."""
        assert not labels
        super().__init__()
        self.config = config
        self.audio_branch = htsat.Htsat(config)
        self.decoder_model = MaskDecoder(config)

    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """Vectors ``[B, Q]`` of length 1: an embedding of the wanted sounds, then one of the unwanted, or zeros."""
        if self.embedder is None:
            raise ValueError(
                "a query of CLAPSep must have an encoder, got a separator without one; convert its file with the CLAP "
                "that it belongs to"
            )
        query_BQ = torch.zeros(len(queries), self.config.query_features)
        size = self.config.query_features // 2
        for query_Q, query in zip(query_BQ, queries, strict=True):
            for side_E, vector_E in zip(
                query_Q.split(size), (self.embedder.wanted(query), self.embedder.unwanted(query)), strict=True
            ):
                if vector_E is not None and len(vector_E) != size:
                    raise ValueError(
                        f"embeddings for CLAPSep must have {size} features, got {len(vector_E)}; take its own CLAP"
                    )
                if vector_E is not None:
                    side_E.copy_(vector_E)
        return nn.functional.normalize(query_BQ, dim=-1).to(self.device)

    def separate_chunk(self, mix_BT: Tensor, query_BQ: Tensor, lengths_B: Tensor) -> Tensor:
        """See :meth:`NetworkSeparator.separate_chunk`; mixtures of one length share a call of the network."""
        stems_BT = torch.zeros_like(mix_BT)
        for length in filter(None, lengths_B.unique().tolist()):
            rows_B = lengths_B == length
            stems_BT[rows_B, :length] = self(mix_BT[rows_B, :length], query_BQ[rows_B])
        return stems_BT

    def forward(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """Stems ``[B, T]`` of mixtures of less than 10.24 s; spectra stay in float32 whatever the rest computes in."""
        num_samples = mix_BT.shape[1]
        window_F = torch.hann_window(NUM_FFT, device=mix_BT.device)
        with torch.autocast(mix_BT.device.type, enabled=False):
            mix_BT = nn.functional.pad(mix_BT.float(), (0, max(0, NUM_FFT // 2 + 1 - num_samples)))  # to reflect it
            mix_BFN = torch.stft(mix_BT, NUM_FFT, HOP_SAMPLES, window=window_F, pad_mode="reflect", return_complex=True)
            power_BNF = htsat.power_spectrum(resample(mix_BT, SAMPLE_RATE_HZ, htsat.SAMPLE_RATE_HZ))
            silence = max(0, htsat.NUM_FRAMES - power_BNF.shape[1])
            power_BNF = nn.functional.pad(power_BNF, (0, 0, 0, silence))
        maps = self.audio_branch.maps(power_BNF)
        mask_BNF = self.decoder_model(maps, mix_BFN.abs().transpose(1, 2), query_BQ)
        with torch.autocast(mix_BT.device.type, enabled=False):
            stems_BFN = mix_BFN * mask_BNF.transpose(1, 2)
            stems_BT = torch.istft(stems_BFN, NUM_FFT, HOP_SAMPLES, window=window_F, length=mix_BT.shape[1])
        return stems_BT[:, :num_samples]
