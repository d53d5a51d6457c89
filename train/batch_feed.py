"""TODO train/batch_feed.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from train.data.mixer import Batch, Mixer
from train.task import TrainingTask, _mixer

_MAKER_S = 900.0  # in which an autoscaler adds a node


class _Maker:
    """Actor that makes batches of a worker; they are what the worker would make, for they depend on the step alone."""

    def __init__(self, task: TrainingTask, **place: int) -> None:
        torch.set_num_threads(1)
        self.mixer = _mixer(task, **place)

    def batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, and how many sounds were unusable so far."""
        return self.mixer.batch(step), self.mixer.num_unusable


def _made_elsewhere(task: TrainingTask, place: dict[str, int], first: int, end: int) -> Iterator[tuple[Batch, int]]:
    """Batches of steps ``first`` to ``end``, made by actors, some steps ahead."""
    number = task.config.batch_makers
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # not in the worker's own, which has no room
    maker = ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1, scheduling_strategy=anywhere)(_Maker)
    makers = [maker.remote(task, **place) for _ in range(number)]
    try:
        coming: deque[ray.ObjectRef] = deque()
        for step in range(first, end + 2 * number):
            if step < end:
                coming.append(makers[step % number].batch.remote(step))
            if step >= first + 2 * number and coming:
                yield _waited_for(coming.popleft())
    finally:
        for one in makers:
            ray.kill(one)


def _waited_for(batch: ray.ObjectRef) -> tuple[Batch, int]:
    try:
        made: tuple[Batch, int] = ray.get(batch, timeout=_MAKER_S)
        return made
    except ray.exceptions.GetTimeoutError:
        raise RuntimeError(
            f"no batch for {_MAKER_S:.0f} s: the cluster has no CPU left for the processes that make them; set "
            "distil.batch_makers lower, or to 0"
        ) from None


def _batches(mixer: Mixer, first: int, end: int) -> Iterator[tuple[Batch, int]]:
    """Batches of steps ``first`` to ``end``, the next one made while this one is learned from.

    It is made on one thread: two pools of OpenMP threads on the same cores wait for each other, which trebles a step.
    """
    with ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(1,)) as maker:
        coming = maker.submit(mixer.batch, first)
        for step in range(first, end):
            batch = coming.result()
            if step + 1 < end:
                coming = maker.submit(mixer.batch, step + 1)
            yield batch, mixer.num_unusable
