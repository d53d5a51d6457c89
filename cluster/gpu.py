"""Calling a function where there is a GPU: in this process, or in a task of the connected Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def call_on_gpu(
    function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Call a function in a Ray task with a GPU if this process has none and the connected cluster has; else here.

    Function, arguments and result must be picklable, and files that they name must be there for all nodes. What the
    function raises is raised here. Inside, ``torch.cuda.is_available`` decides the device, and as in a process of the
    user's own, threads are as many as CPUs: the other steps of a run wait.
    """
    import torch

    if torch.cuda.is_available():
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.empty_cache()  # the next step of a run uses the GPU from another process
    ray = sys.modules.get("ray")  # to import it takes a second; before that, it is not connected
    if ray is None or not ray.is_initialized() or not ray.cluster_resources().get("GPU", 0):
        return function(*args, **kwargs)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # a trial's own group has no GPU
    remote = ray.remote(num_cpus=1, num_gpus=1, scheduling_strategy=anywhere)(_with_threads)
    try:
        return cast(_Result, ray.get(remote.remote(function, args, kwargs)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _with_threads(function: Callable[..., _Result], args: tuple[object, ...], kwargs: dict[str, object]) -> _Result:
    import joblib
    import torch

    torch.set_num_threads(joblib.cpu_count())
    return function(*args, **kwargs)
