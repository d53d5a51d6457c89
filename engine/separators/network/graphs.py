"""Replay of the built-in network on a GPU, for shapes that recur: its many small kernels are launched at once.

Shape legend: B queries, M mixtures, T samples, Q query features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_MOST_SHAPES = 4


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """The kernels of one shape, with the memory that they read and write."""

    graph: torch.cuda.CUDAGraph
    mix_BT: Tensor
    query_BQ: Tensor
    rows_B: Tensor | None
    stems_BT: Tensor

    def __call__(self, network: nn.Module, mix_MT: Tensor, query_BQ: Tensor, rows_B: Tensor | None) -> Tensor:
        self.mix_BT[: len(mix_MT)].copy_(mix_MT)  # no query is of the other rows
        self.query_BQ.copy_(query_BQ)
        if self.rows_B is not None and rows_B is not None:
            self.rows_B.copy_(rows_B)
        self.graph.replay()
        return self.stems_BT.clone()


_Run = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
_RUNS: WeakKeyDictionary[nn.Module, OrderedDict[object, _Run | None]] = WeakKeyDictionary()
"""For the shapes that a network met last: what runs it; None for a shape that was met once."""


def replayed(network: nn.Module, mix_MT: Tensor, query_BQ: Tensor, rows_B: Tensor | None) -> Tensor:
    """Stems ``[B, T]`` of mixtures without padding on a GPU, without gradients; a shape is recorded when it recurs."""
    runs = _RUNS.setdefault(network, OrderedDict())
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    weights = next(network.parameters()).data_ptr()  # which a recording reads where they are
    shape = (len(query_BQ), mix_MT.shape[1], rows_B is None, precision, torch.is_inference_mode_enabled(), weights)
    run: _Run = _launched
    if shape in runs:
        run = runs[shape] or _record(network, mix_MT, query_BQ, rows_B) or _launched
    runs[shape] = run if shape in runs else None
    runs.move_to_end(shape)
    if len(runs) > _MOST_SHAPES:
        runs.popitem(last=False)
    return run(network, mix_MT, query_BQ, rows_B)


def _launched(network: nn.Module, mix_MT: Tensor, query_BQ: Tensor, rows_B: Tensor | None) -> Tensor:
    stems_BT: Tensor = network(mix_MT, query_BQ, None, rows_B)
    return stems_BT


def _record(network: nn.Module, mix_MT: Tensor, query_BQ: Tensor, rows_B: Tensor | None) -> _Recording | None:
    """The recording for a shape; None if memory is short or a kernel cannot be recorded."""
    device, is_16_bit = mix_MT.device, torch.is_autocast_enabled("cuda")
    if torch.cuda.mem_get_info(device)[0] < torch.cuda.memory_reserved(device):
        return None  # the kernels get memory of their own
    mix_BT = mix_MT.new_zeros(len(query_BQ), mix_MT.shape[1])
    query_BQ, rows_B = query_BQ.clone(), None if rows_B is None else rows_B.clone()
    mix_BT[: len(mix_MT)] = mix_MT
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    try:
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=is_16_bit, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                network(mix_BT, query_BQ, None, rows_B)  # libraries allocate and choose before they can be recorded
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                stems_BT = network(mix_BT, query_BQ, None, rows_B)
    except RuntimeError:
        return None
    return _Recording(graph=graph, mix_BT=mix_BT, query_BQ=query_BQ, rows_B=rows_B, stems_BT=stems_BT)
