"""The forward and backward pass of a separator as CUDA graphs: one launch each, not one for every kernel.

Shape legend: B queries, T samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from train.data.batch import Batch

_LOGGER = logging.getLogger(__name__)
Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns stems ``[B, T]`` of mixtures ``[B, T]``, queries and their rivals."""


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on a card; a graph must not remember the cast weights, which change from step to step."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class _Call(nn.Module):
    """A separator in another module: capturing replaces the module's ``forward``, and the separator must keep its."""

    def __init__(self, separator: nn.Module) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, mix_BT: Tensor, query: Tensor, rivals: Tensor) -> Tensor:
        stems_BT: Tensor = self.separator(mix_BT, query, rivals)
        return stems_BT


def captured(separator: nn.Module, batch: Batch) -> Model:
    """The separator, which replays graphs for batches of the shape of this one and computes others as it is.

    No other thread may use the card meanwhile. If the separator cannot be captured, it is returned as it is.
    """
    try:
        sample = (batch.mix_BT, batch.query, batch.rivals)
        with half_precision(batch.mix_BT.device):
            call = torch.cuda.make_graphed_callables(_Call(separator), sample, allow_unused_input=True)
    except RuntimeError as error:
        _LOGGER.warning(f"training without CUDA graphs ({str(error).partition(chr(10))[0]}): slower, but the same")
        return separator
    replayed, shapes = cast(Model, call), [one.shape for one in sample]

    def model(mix_BT: Tensor, query: Tensor, rivals: Tensor) -> Tensor:
        given = (mix_BT, query, rivals)
        return (replayed if [one.shape for one in given] == shapes else cast(Model, separator))(*given)

    return model
