"""Our networks as callables for comparisons with those that other projects released.

Each takes the paths of checkpoint files in the original layout by kind, and the inputs of one case.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch

from engine.separators import audiosep as audiosep_family
from engine.separators.clapsep import layout as clapsep_layout


def audiosep(files: Mapping[str, str], mixture_T: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    """The stem ``[T]`` of AudioSep, in one piece whatever the length."""
    return _in_one_piece(audiosep_family.from_original(_tensors(files["checkpoint"])), mixture_T, query_Q)


def clapsep(files: Mapping[str, str], mixture_T: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    """The stem ``[T]`` of CLAPSep for its decoder's query vector, by its file and its CLAP's."""
    separator = clapsep_layout.from_original(_tensors(files["checkpoint"]), clap=_tensors(files["clap"]))
    return _in_one_piece(separator, mixture_T, query_Q)


def text(files: Mapping[str, str], ids: np.ndarray) -> np.ndarray:
    """The embedding of token ids by the text encoder in an AudioSep checkpoint, which is opened once."""
    return _clap_of_audiosep(files["checkpoint"]).embed_ids([ids.tolist()])[0].numpy()


@functools.cache
def _clap_of_audiosep(path):
    from engine.separators.clap.layout import from_audiosep

    return from_audiosep(_tensors(path))


def _tensors(path: str) -> Mapping[str, torch.Tensor]:
    content = torch.load(path, weights_only=True, mmap=True)
    return content.get("state_dict", content)


@torch.inference_mode()
def _in_one_piece(separator, mixture_T: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    mix_BT, query_BQ = torch.from_numpy(mixture_T)[None], torch.from_numpy(query_Q)[None]
    return separator.separate_chunk(mix_BT, query_BQ, [len(mixture_T)], [0])[0].numpy()
