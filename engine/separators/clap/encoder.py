"""The networks of CLAP: RoBERTa for text, each with a projection to the space that text and audio share.

The modules have LAION's names, so the names of tensors are those of LAION's files.

Shape legend: N texts, K tokens, E features of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from engine.settings import Count, CountOrZero, config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PAD = 1
_FIRST_POSITION = _PAD + 1  # RoBERTa counts positions from the token after the padding's


@config
class ClapConfig:
    """Shape of a CLAP; the defaults are those of LAION's text encoder, RoBERTa-base."""

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

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

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

    def embed_audio(self, samples_T: np.ndarray, *, sample_rate_hz: int) -> Tensor:
        """Embedding ``[E]`` of unit length, on the CPU; ``ValueError`` without an audio encoder."""
        self._require("audio", 0)
        raise NotImplementedError

    def _require(self, what: str, size: int) -> None:
        if not size:
            raise ValueError(
                f"a CLAP must have an encoder of {what} for a query of {what}, got one without; convert a file that "
                "has both"
            )


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
