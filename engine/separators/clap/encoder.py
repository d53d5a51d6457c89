"""The networks of CLAP: RoBERTa for text and HTSAT for audio, each with a projection to one space.

The modules have LAION's names, so the names of tensors are those of LAION's files.

Shape legend: N texts, K tokens, E features of an embedding, T samples, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from math import ceil
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import torchaudio
from pydantic import Field
from torch import Tensor, nn

from engine.separators.clap.htsat import SAMPLE_RATE_HZ, Htsat, HtsatConfig, power_spectrum
from engine.settings import Count, CountOrZero, config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PAD = 1  # RoBERTa's token of padding; positions are counted from the number after it
_WINDOW_SAMPLES = 10 * SAMPLE_RATE_HZ  # of the sounds that CLAP was trained on
_WINDOWS_AT_ONCE = 8
_Depth = Annotated[Count, Field(le=100)]


@config
class ClapConfig:
    """Shape of a CLAP; the defaults are those of LAION's with HTSAT-base and RoBERTa-base."""

    embedding_width: Annotated[Count, Field(le=1 << 14)] = 512
    """Features of an embedding."""
    text_layers: Annotated[CountOrZero, Field(le=256)] = 12
    """Layers of the text encoder; 0: there is none."""
    text_width: Annotated[Count, Field(le=1 << 14)] = 768
    """Features of a token."""
    text_heads: Annotated[Count, Field(le=1 << 10)] = 12
    """Attention heads of a layer."""
    text_hidden: Annotated[Count, Field(le=1 << 16)] = 3072
    """Features inside a layer."""
    vocabulary: Annotated[Count, Field(le=1 << 20)] = 50265
    """Tokens that the tokenizer knows."""
    positions: Annotated[int, Field(ge=4, le=1 << 16)] = 514
    """Positions of tokens, two more than a text can have tokens."""
    audio_channels: Annotated[CountOrZero, Field(le=1 << 12)] = 128
    """Width of the audio encoder's first stage; 0: there is no audio encoder."""
    audio_heads: Annotated[Count, Field(le=1 << 8)] = 4
    """Attention heads of its first stage."""
    audio_depth_1: _Depth = 2
    """Blocks of its first stage."""
    audio_depth_2: _Depth = 2
    """Blocks of its second stage."""
    audio_depth_3: _Depth = 12
    """Blocks of its third stage."""
    audio_depth_4: _Depth = 2
    """Blocks of its fourth stage."""

    def __post_init__(self) -> None:
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_heads must divide text_width {self.text_width}, got {self.text_heads}; choose such as 1"
            )

    @property
    def audio(self) -> HtsatConfig:
        """Shape of the audio encoder, if there is one."""
        return HtsatConfig(**{one.name: getattr(self, f"audio_{one.name}") for one in fields(HtsatConfig)})


class Clap(nn.Module):
    """Maps text and audio to embeddings of unit length; follows :class:`engine.separators.queries.Encoder`.

    Either encoder may be absent. ``open_tokenizer`` is set by :func:`open_clap`, and called for the first text.
    """

    def __init__(self, config: ClapConfig) -> None:
        super().__init__()
        self.config = config
        self.open_tokenizer: Callable[[], Tokenizer] | None = None
        self._tokenizer: Tokenizer | None = None
        if config.text_layers:
            self.text_branch = _roberta(config)
            self.text_projection = _projection(config.text_width, config.embedding_width)
        if config.audio_channels:
            self.audio_branch = Htsat(config.audio)
            self.audio_projection = _projection(config.audio.features, config.embedding_width)
            self.logit_scale_a = nn.Parameter(torch.zeros(()))  # logarithm of what similarities to texts are scaled by

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def drop_text(self) -> None:
        """Free the memory of the text encoder, for workers that read audio alone."""
        if self.config.text_layers:
            del self.text_branch, self.text_projection
        self.config = replace(self.config, text_layers=0)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[N, E]`` of unit length, on the CPU; the end of very long texts is cut off.

        Raises ``ValueError`` without a text encoder or a tokenizer.
        """
        self._require("text", self.config.text_layers)
        if self._tokenizer is None:
            assert self.open_tokenizer is not None, "only open_clap gives an encoder that reads text"
            self._tokenizer = self.open_tokenizer()
        return self.embed_ids([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])

    @torch.no_grad()
    def embed_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings ``[N, E]`` of tokenized texts, with the tokens of their begin and end; see :meth:`embed_text`."""
        if not ids:
            return torch.zeros(0, self.config.embedding_width)
        lengths_N = torch.tensor([len(one) for one in ids])
        ids_NK = torch.full((len(ids), int(lengths_N.max())), _PAD)
        for row_K, one in zip(ids_NK, ids, strict=True):
            row_K[: len(one)] = torch.tensor(one)
        mask_NK = (torch.arange(ids_NK.shape[1]) < lengths_N[:, None]).long()
        inputs = {"input_ids": ids_NK.to(self.device), "attention_mask": mask_NK.to(self.device)}
        return _unit(self.text_projection(self.text_branch(**inputs).pooler_output))

    @torch.no_grad()
    def embed_audio(self, samples_T: np.ndarray, *, sample_rate_hz: int) -> Tensor:
        """Embedding ``[E]`` of unit length of a sound, on the CPU; the mean over windows of at most 10 s.

        A window is repeated until it fills 10 s, as in CLAP's training. Raises ``ValueError`` without an audio encoder,
        and for sound that is empty, silent or not finite.
        """
        self._require("audio", self.config.audio_channels)
        wave_T = torch.from_numpy(np.asarray(samples_T, dtype=np.float32).copy())
        if wave_T.ndim != 1 or not wave_T.isfinite().all() or not wave_T.any():
            raise ValueError(
                f"an audio query must be one channel of sound, finite and not silent, got shape {tuple(wave_T.shape)}; "
                "give another example"
            )
        wave_T = torchaudio.functional.resample(wave_T, sample_rate_hz, SAMPLE_RATE_HZ)
        windows = [_filled(one) for one in wave_T.tensor_split(ceil(len(wave_T) / _WINDOW_SAMPLES))]
        parts_WE = [self.embed_windows(torch.stack(part)) for part in _batches(windows)]
        return _unit(torch.cat(parts_WE).mean(0))

    @torch.no_grad()
    def embed_windows(self, wave_WT: Tensor) -> Tensor:
        """Embeddings ``[W, E]`` of unit length, on the CPU, of windows of 10 s at 48 kHz."""
        return _unit(self.audio_projection(self.audio_branch(power_spectrum(wave_WT.to(self.device)))))

    def _require(self, what: str, size: int) -> None:
        if not size:
            raise ValueError(
                f"a CLAP must have an encoder of {what} for a query of {what}, got one without; convert a file that "
                "has both"
            )


def _filled(wave_T: Tensor) -> Tensor:
    """A window of 10 s with as many whole repetitions of a sound as fit; silence follows."""
    repeated_T = wave_T.repeat(_WINDOW_SAMPLES // len(wave_T))
    return nn.functional.pad(repeated_T, (0, _WINDOW_SAMPLES - len(repeated_T)))


def _batches(windows: list[Tensor]) -> list[list[Tensor]]:
    return [windows[i : i + _WINDOWS_AT_ONCE] for i in range(0, len(windows), _WINDOWS_AT_ONCE)]


def _unit(vector: Tensor) -> Tensor:
    return nn.functional.normalize(vector.float(), dim=-1).cpu()


def _projection(width: int, embedding_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, embedding_width), nn.ReLU(), nn.Linear(embedding_width, embedding_width))


def _roberta(config: ClapConfig) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel  # takes seconds

    return RobertaModel(
        RobertaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_hidden,
            max_position_embeddings=config.positions,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=_PAD,
        )
    )
