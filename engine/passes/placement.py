"""TODO engine/passes/placement.py."""

from __future__ import annotations

from typing import NamedTuple

import ray

from engine.passes.config import PassConfig

_TASK_CPUS = 0.4  # of decoding and writing tasks; unlike the actors' share, else Ray fuses decoding into the actors


class Placement(NamedTuple):
    """Where the separators go."""

    num_gpus: float
    """GPU share of an actor."""
    min_actors: int
    """Actors to begin with."""
    max_actors: int
    """Actors that the pool may grow to as work piles up, also on nodes that are still to come."""
    waits: bool = False
    """Whether no node has room for one yet."""


def _placement(config: PassConfig) -> Placement:
    """The pool for the cluster as it is; with ``max_actors`` for one that nodes come to.

    What an autoscaler may add is known to nobody before it has: who names ``max_actors`` has the pool wait for it.
    """
    resources = ray.cluster_resources()
    num_cpus, share = resources.get("CPU", 0.0), config.num_cpus_per_actor
    available_gpus = resources.get("GPU", 0.0)
    num_gpus = config.num_gpus_per_actor
    if num_gpus is None:
        num_gpus = 1.0 if available_gpus else 0.0
    held = available_gpus / num_gpus if num_gpus else num_cpus / max(1.0, share)
    room = int(min(held, (num_cpus - _TASK_CPUS) / share))
    if config.max_actors is not None:
        first = min(config.min_actors or max(1, room), config.max_actors)
        return Placement(num_gpus, first, config.max_actors, waits=room < 1)
    if num_gpus > available_gpus:
        raise ValueError(
            f"num_gpus_per_actor is {num_gpus}, the cluster has {available_gpus:g}; set it to 0, or where nodes with "
            "GPUs are still to come set max_actors too"
        )
    if room < 1:
        raise ValueError(
            f"num_cpus_per_actor is {share:g}, but of the cluster's {num_cpus:g} CPUs {_TASK_CPUS:g} are needed to "
            "decode with; lower it, or where nodes are still to come set max_actors"
        )
    return Placement(num_gpus, min(config.min_actors or room, room), room)
