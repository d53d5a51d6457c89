"""CLAPSep as a separator: queries of wanted and unwanted sounds, and mixtures of any length.

Shape legend: B queries, M mixtures, S and R some of both, T samples, N frames, F bins, Q query
features, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from engine.separators.base import NetworkSeparator, small_tensor
from engine.separators.clap import htsat
from engine.separators.clapsep.network import HOP_SAMPLES, NUM_FFT, SAMPLE_RATE_HZ, ClapSepConfig, MaskDecoder
from engine.separators.network import transforms
from engine.separators.queries import Query

_MOST_ROWS = (16, 64)  # of one call of the network on a CPU and on a GPU, which needs 0.1 GB for each


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
        most = _MOST_ROWS[self.device.type == "cuda"]
        for some in (places[first : first + most] for first in range(0, len(places), most)):
            number = {row: i for i, row in enumerate(dict.fromkeys(rows[place] for place in some))}
            mix_ST, index_R = _chosen(mix_MT, list(number)), small_tensor(some, self.device)
            query_RQ, rows_R = query_BQ.index_select(0, index_R), [number[rows[place]] for place in some]
            stems_BT.index_copy_(0, index_R, self(mix_ST, query_RQ, [lengths[row] for row in number], rows_R))
        return stems_BT

    def separate_unpadded(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """See :meth:`NetworkSeparator.separate_unpadded`."""
        stems_BT: Tensor = self(mix_BT, query_BQ, [mix_BT.shape[1]] * len(mix_BT), list(range(len(mix_BT))))
        return stems_BT

    def forward(self, mix_MT: Tensor, query_BQ: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Stems ``[B, T]`` of mixtures of less than 10.24 s; each stem is that of its mixture alone.

        Spectra are computed in float32 whatever the rest is computed in.
        """
        most, device = max(lengths), mix_MT.device
        mix_MNF = torch.zeros(len(mix_MT), _num_frames(most), NUM_FFT // 2 + 1, dtype=torch.complex64, device=device)
        power_MNF = mix_MT.new_zeros(len(mix_MT), htsat.NUM_FRAMES, htsat.NUM_BINS)
        with torch.autocast(device.type, enabled=False):
            for length, some in _by_length(lengths):
                part_ST = _reflectable(_chosen(mix_MT, some)[:, :length].float())
                mix_MNF = _with_rows(mix_MNF, some, _spectrum(part_ST))
                power_MNF = _with_rows(power_MNF, some, _encoder_power(part_ST))
        num_frames = [_num_frames(lengths[row]) for row in rows]
        num_frames_B = small_tensor(num_frames, device) if min(num_frames) < mix_MNF.shape[1] else None
        maps = [_chosen(map_MHWC, rows) for map_MHWC in self.audio_branch.maps(power_MNF)]
        magnitude_BNF = _chosen(transforms.power(mix_MNF).sqrt(), rows)
        mask_BNF = self.decoder_model(maps, magnitude_BNF, query_BQ, num_frames_B)
        with torch.autocast(device.type, enabled=False):
            stem_BNF = _chosen(mix_MNF, rows) * mask_BNF
            stems_BT = mix_MT.new_zeros(len(rows), mix_MT.shape[1])
            for length, some in _by_length([lengths[row] for row in rows]):
                stems_BT = _with_rows(stems_BT, some, _wave(_chosen(stem_BNF, some), length))
        return stems_BT


def _by_length(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Positions of each length."""
    return [(length, [i for i, one in enumerate(lengths) if one == length]) for length in dict.fromkeys(lengths)]


def _chosen(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, without a copy of all."""
    is_all = list(rows) == list(range(len(values)))
    return values if is_all else values.index_select(0, small_tensor(rows, values.device))


def _with_rows(values: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    """The values with other ones at the beginning of some rows."""
    if list(rows) == list(range(len(values))) and part.shape[1] >= values.shape[1]:
        return part
    values[:, : part.shape[1]].index_copy_(0, small_tensor(rows, values.device), part)
    return values


def _num_frames(num_samples: int) -> int:
    """Frames of a mixture's spectrum."""
    return 1 + max(NUM_FFT // 2 + 1, num_samples) // HOP_SAMPLES


def _reflectable(mix_MT: Tensor) -> Tensor:
    """Mixtures with zeros after them, if they are shorter than what the spectrogram reflects at its edges."""
    return nn.functional.pad(mix_MT, (0, max(0, NUM_FFT // 2 + 1 - mix_MT.shape[1])))


def _spectrum(mix_MT: Tensor) -> Tensor:
    """Spectra ``[M, N, F]`` of mixtures of one length."""
    padded_MT = nn.functional.pad(mix_MT, (NUM_FFT // 2, NUM_FFT // 2), mode="reflect")
    return transforms.stft(padded_MT, torch.hann_window(NUM_FFT, device=mix_MT.device), HOP_SAMPLES)


def _wave(stem_BNF: Tensor, num_samples: int) -> Tensor:
    window_F, num_frames = torch.hann_window(NUM_FFT, device=stem_BNF.device), _num_frames(num_samples)
    if num_frames < stem_BNF.shape[1]:  # ONNX has no name for a slice of complex numbers that is all of them
        stem_BNF = stem_BNF[:, :num_frames]
    return transforms.istft(stem_BNF, window_F, HOP_SAMPLES, length=num_samples)


def _encoder_power(mix_MT: Tensor) -> Tensor:
    """Powers ``[M, N, F]`` of 1,024 frames that the encoder gets: of the mixtures at its rate, then silence."""
    power_MNF = htsat.power_spectrum(resample(mix_MT, SAMPLE_RATE_HZ, htsat.SAMPLE_RATE_HZ))
    return nn.functional.pad(power_MNF, (0, 0, 0, max(0, htsat.NUM_FRAMES - power_MNF.shape[1])))
