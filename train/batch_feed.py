"""Batches of a worker, made ahead of time in a thread of the worker or by other processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from train.data.batch import Batch
from train.data.mixer import Mixer
from train.task import TrainingTask

_TIMEOUT_S = 900.0  # long enough for an autoscaler to add a node


class _BatchMaker:
    """Actor that makes batches of a worker; they equal the worker's own, because they depend on the step alone."""

    def __init__(self, task: TrainingTask, rank: int, num_ranks: int) -> None:
        torch.set_num_threads(1)
        self.mixer = task.mixer(rank=rank, num_ranks=num_ranks)

    def batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, and the number of unusable sounds so far."""
        return self.mixer.batch(step), self.mixer.num_unusable


def batches_from_actors(
    task: TrainingTask, *, rank: int, num_ranks: int, first: int, end: int
) -> Iterator[tuple[Batch, int]]:
    """Batches of steps ``first`` to ``end``, made by actors some steps ahead."""
    number = task.config.batch_makers
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # the worker's own placement group has no room
    maker = ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1, scheduling_strategy=anywhere)(_BatchMaker)
    makers = [maker.remote(task, rank, num_ranks) for _ in range(number)]
    try:
        pending: deque[ray.ObjectRef] = deque()
        for step in range(first, end + 2 * number):
            if step < end:
                pending.append(makers[step % number].batch.remote(step))
            if step >= first + 2 * number and pending:
                yield _wait_for(pending.popleft())
    finally:
        for one in makers:
            ray.kill(one)


def _wait_for(pending: ray.ObjectRef) -> tuple[Batch, int]:
    try:
        made: tuple[Batch, int] = ray.get(pending, timeout=_TIMEOUT_S)
        return made
    except ray.exceptions.GetTimeoutError:
        raise RuntimeError(
            f"cannot make a batch within {_TIMEOUT_S:.0f} s (the cluster has no free CPU for batch makers); set "
            "distil.batch_makers lower, or to 0"
        ) from None


def batches_from_thread(mixer: Mixer, *, first: int, end: int) -> Iterator[tuple[Batch, int]]:
    """Batches of steps ``first`` to ``end``; the next one is made during the training step.

    It is made on one thread: two pools of OpenMP threads on the same cores wait for each other, and a step takes three
    times as long.
    """
    with ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(1,)) as maker:
        pending = maker.submit(mixer.batch, first)
        for step in range(first, end):
            batch = pending.result()
            if step + 1 < end:
                pending = maker.submit(mixer.batch, step + 1)
            yield batch, mixer.num_unusable
