"""Batches of a worker, made ahead of time: in a thread of the worker, or one at a time for another process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from train.data.batch import Batch
from train.data.mixer import Mixer
from train.task import TrainingTask


class BatchMaker:
    """Makes batches of a worker in another process; they equal the worker's own, for they depend on the step alone."""

    def __init__(self, task: TrainingTask, rank: int, num_ranks: int) -> None:
        torch.set_num_threads(1)
        self.mixer = task.mixer(rank=rank, num_ranks=num_ranks)

    def batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, and the number of unusable sounds so far."""
        return self.mixer.batch(step), self.mixer.num_unusable


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
