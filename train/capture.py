"""The forward and backward pass of a separator as CUDA graphs: one launch each, not one for every kernel.

Shape legend: B queries, T samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

_LOGGER = logging.getLogger(__name__)
Model = Callable[[Tensor, Tensor], Tensor]
"""Returns stems ``[B, T]`` of mixtures ``[B, T]`` and queries."""


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on a card; a graph must not remember the cast weights, which change from step to step."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class _Call(nn.Module):
    """A separator in another module: capturing replaces the module's ``forward``, and the separator must keep its."""

    def __init__(self, separator: nn.Module) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, mix_BT: Tensor, query: Tensor) -> Tensor:
        stems_BT: Tensor = self.separator(mix_BT, query)
        return stems_BT


def captured(separator: nn.Module, mix_BT: Tensor, query: Tensor) -> Model:
    """The separator, which replays graphs for batches of the shape of these samples and computes others as it is.

    No other thread may use the card meanwhile. If the separator cannot be captured, it is returned as it is.
    """
    try:
        with half_precision(mix_BT.device):
            call = torch.cuda.make_graphed_callables(_Call(separator), (mix_BT, query), allow_unused_input=True)
    except RuntimeError as error:
        _LOGGER.warning(f"training without CUDA graphs ({str(error).partition(chr(10))[0]}): slower, but the same")
        return separator
    replayed, shapes = cast(Model, call), (mix_BT.shape, query.shape)

    def model(mix_BT: Tensor, query: Tensor) -> Tensor:
        return (replayed if (mix_BT.shape, query.shape) == shapes else cast(Model, separator))(mix_BT, query)

    return model
