"""Our separators as callables for comparisons with the networks that other projects released.

Each takes checkpoint files in the original layout by kind, a mixture ``[T]`` and a query's vector ``[Q]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from engine.separators import audiosep as audiosep_family


def audiosep(files: Mapping[str, str], mixture_T: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    """The stem ``[T]`` of AudioSep, in one piece whatever the length."""
    tensors = torch.load(files["checkpoint"], weights_only=True)["state_dict"]
    return _in_one_piece(audiosep_family.from_original(tensors), mixture_T, query_Q)


@torch.inference_mode()
def _in_one_piece(separator, mixture_T: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    mix_BT, query_BQ = torch.from_numpy(mixture_T)[None], torch.from_numpy(query_Q)[None]
    return separator.separate_chunk(mix_BT, query_BQ, torch.tensor([len(mixture_T)]))[0].numpy()
