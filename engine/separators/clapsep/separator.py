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

_MOST_ROWS = 16  # of one call of the network, which needs 0.1 GB for each


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
        size = self.config.query_features // 2
        query_BQ = torch.zeros(len(queries), 2 * size)
        for query_Q, query in zip(query_BQ, queries, strict=True):
            wanted_E, unwanted_E = self.embedder.wanted(query), self.embedder.unwanted(query)
            if len(wanted_E) != size:
                raise ValueError(
                    f"embeddings for CLAPSep must have {size} features, got {len(wanted_E)}; use the CLAP of its file"
                )
            query_Q[:size] = wanted_E
            if unwanted_E is not None:
                query_Q[size:] = unwanted_E
        return nn.functional.normalize(query_BQ, dim=-1).to(self.device)

    def separate_chunk(self, mix_MT: Tensor, query_BQ: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """See :meth:`NetworkSeparator.separate_chunk`; short mixtures need the memory of 10.24 s, so few at a time."""
        stems_BT = mix_MT.new_zeros(len(rows), mix_MT.shape[1])
        places = [place for place, row in enumerate(rows) if lengths[row]]
        for first in range(0, len(places), _MOST_ROWS):
            some = places[first : first + _MOST_ROWS]
            mixtures = [mix_MT[rows[place], : lengths[rows[place]]] for place in some]
            for place, stem_T in zip(some, self(mixtures, query_BQ[some]), strict=True):
                stems_BT[place, : len(stem_T)] = stem_T
        return stems_BT

    def separate_unpadded(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """See :meth:`NetworkSeparator.separate_unpadded`."""
        return torch.stack(self(list(mix_BT), query_BQ))

    def forward(self, mixtures: Sequence[Tensor], query_BQ: Tensor) -> list[Tensor]:
        """Stems ``[T]`` of mixtures ``[T]`` of less than 10.24 s; each stem is that of its mixture alone.

        Spectra are computed in float32 whatever the rest is computed in.
        """
        distinct, places = _without_repeats(mixtures)
        with torch.autocast(query_BQ.device.type, enabled=False):
            spectra = [_spectrum(mix_T.float()) for mix_T in distinct]
            power_BNF = torch.stack([_encoder_power(mix_T.float()) for mix_T in distinct])
        magnitude_BNF = nn.utils.rnn.pad_sequence([mix_FN.abs().T for mix_FN in spectra], batch_first=True)
        num_frames = [spectra[place].shape[1] for place in places]
        num_frames_B = torch.tensor(num_frames, device=query_BQ.device) if len(set(num_frames)) > 1 else None
        maps = [map_BHWC[places] for map_BHWC in self.audio_branch.maps(power_BNF)]
        mask_BNF = self.decoder_model(maps, magnitude_BNF[places], query_BQ, num_frames_B)
        masked = [
            spectra[place] * mask_NF.T[:, : spectra[place].shape[1]]
            for place, mask_NF in zip(places, mask_BNF, strict=True)
        ]
        with torch.autocast(query_BQ.device.type, enabled=False):
            return [_wave(stem_FN, len(mix_T)) for stem_FN, mix_T in zip(masked, mixtures, strict=True)]


def _without_repeats(mixtures: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Mixtures that differ from the one before, and the place of each mixture among them.

    The labels of a clip follow one another, so that its sound is encoded once for all of them.
    """
    distinct, places = [mixtures[0]], [0]
    for mix_T in mixtures[1:]:
        if not torch.equal(mix_T, distinct[-1]):
            distinct.append(mix_T)
        places.append(len(distinct) - 1)
    return distinct, places


def _reflectable(mix_T: Tensor) -> Tensor:
    """A mixture with zeros after it, if it is shorter than what the spectrogram reflects at its edges."""
    return nn.functional.pad(mix_T, (0, max(0, NUM_FFT // 2 + 1 - len(mix_T))))


def _spectrum(mix_T: Tensor) -> Tensor:
    """Spectrum ``[F, N]`` of a mixture."""
    window_F = torch.hann_window(NUM_FFT, device=mix_T.device)
    mix_T = _reflectable(mix_T)
    return torch.stft(mix_T, NUM_FFT, HOP_SAMPLES, window=window_F, pad_mode="reflect", return_complex=True)


def _wave(stem_FN: Tensor, num_samples: int) -> Tensor:
    window_F = torch.hann_window(NUM_FFT, device=stem_FN.device)
    stem_T = torch.istft(stem_FN, NUM_FFT, HOP_SAMPLES, window=window_F, length=max(num_samples, NUM_FFT // 2 + 1))
    return stem_T[:num_samples]


def _encoder_power(mix_T: Tensor) -> Tensor:
    """Powers ``[N, F]`` of 1,024 frames that the encoder gets: of the mixture at its rate, then silence."""
    resampled_T = resample(_reflectable(mix_T), SAMPLE_RATE_HZ, htsat.SAMPLE_RATE_HZ)
    (power_NF,) = htsat.power_spectrum(resampled_T[None])
    return nn.functional.pad(power_NF, (0, 0, 0, max(0, htsat.NUM_FRAMES - len(power_NF))))
