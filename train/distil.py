"""One distillation with Ray Train: a student learns from tracks and clips, its average is the next teacher."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray._private.utils import get_num_cpus
from torch import nn

from engine.separators import NetworkConfig, load, read_description, save
from engine.storage.files import remove_tree
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from train.batch_feed import _batches, _made_elsewhere
from train.data.training_data import TrainingData
from train.evaluation.evaluate import estimator, evaluate
from train.evaluation.mixtures import ValidationConfig, draw_mixtures
from train.student import DistilConfig, Student
from train.task import TrainingTask, _check, _identity, _mixer, _task

_LOGGER = logging.getLogger(__name__)


def _train_loop(values: dict[str, Any]) -> None:
    """What every worker runs."""
    task: TrainingTask = values["task"]
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(task.config.threads_per_worker or max(1, get_num_cpus() // num_ranks - 1))
    network = NetworkConfig(**read_description(task.start)["network"]) if task.start else task.network
    place = {"sample_rate_hz": network.sample_rate_hz, "rank": rank, "num_ranks": num_ranks}
    mixer = _mixer(task, **place)
    student = Student(task.config, mixer.labels, start=task.start, network=task.network, device=device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            student.restore(torch.load(Path(folder) / "student.pt", map_location=device, weights_only=True))
        if rank == 0:
            _tell(task, {"resumed_after_step": student.step})
    model: nn.Module = student.separator
    if num_ranks > 1:
        model = ray.train.torch.prepare_model(student.separator, move_to_device=False)
    mixtures = []
    if rank == 0 and task.validation is not None:
        mixtures = draw_mixtures(task.validation, sample_rate_hz=network.sample_rate_hz)
    losses: list[float] = []
    span = (student.step, task.config.steps)
    batches = _made_elsewhere(task, place, *span) if task.config.batch_makers else _batches(mixer, *span)
    for batch, num_unusable in batches:
        losses.append(student.learn(model, batch, device))
        if student.step % task.config.validate_every_steps == 0 or student.step == task.config.steps:
            if rank == 0:
                judged = evaluate(estimator(student.average), mixtures, quick=True) if mixtures else None
                student.note(sum(losses) / len(losses), judged, num_unusable=num_unusable)
                _tell(task, student.curve[-1])
            losses.clear()
            stop = _agree(student.finished, num_ranks)
            saved = _checkpoint(student, rank, Path(task.progress).parent, last=stop)
            ray.train.report({"step": student.step}, checkpoint=saved, delete_local_checkpoint_after_upload=True)
            if stop:
                break


def _tell(task: TrainingTask, values: Mapping[str, float]) -> None:
    """A line for the driver, who does not see it from a machine that shares no disk with its own."""
    Path(task.progress).parent.mkdir(parents=True, exist_ok=True)
    with open(task.progress, "a") as file:
        file.write(json.dumps(values) + "\n")


def _agree(finished: bool, num_ranks: int) -> bool:
    """Rank 0's word on whether to stop, for all ranks."""
    if num_ranks == 1:
        return finished
    word = [finished]
    torch.distributed.broadcast_object_list(word, src=0)
    return word[0]


def _checkpoint(student: Student, rank: int, folder: Path, *, last: bool) -> ray.train.Checkpoint | None:
    """Rank 0's checkpoint to report; the last one also holds the finished separator."""
    if rank != 0:
        return None
    made = Path(tempfile.mkdtemp(dir=folder, prefix="student-"))
    torch.save(student.state(), made / "student.pt")
    if last:
        save(student.result(), made / "separator")
    return ray.train.Checkpoint.from_directory(made)


def distil(
    out: Name,
    *,
    training_data: TrainingData,
    config: DistilConfig | None = None,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationConfig | None = None,
) -> dict[str, Any]:
    """Train a student into the checkpoint folder ``out``; returns its history entry, with the learning curve.

    ``start`` is the teacher's checkpoint to go on from; without it a network of ``network``'s shape is trained from
    scratch. A training that was stopped goes on from its last checkpoint, and one that is done returns at once. Raises
    ``ValueError`` for material or settings that cannot work, ``RuntimeError`` if training itself failed.
    """
    out, config = location(out), config or DistilConfig()
    started = time.perf_counter()
    work = out.parent / f".{out.name}-training"
    task = _task(training_data=training_data, config=config, start=start, network=network, validation=validation)
    identity = _identity(task)
    if (out / "separator.json").is_file():
        entry: dict[str, Any] = read_description(out)["history"][-1]
        if entry["identity"] != identity:
            raise ValueError(f"{out} holds a separator of another training; give another folder, or delete this one")
        return entry
    _check(task)
    with lock(work, "training"):
        history = list(read_description(task.start)["history"]) if task.start else []
        with _progress_file(work) as progress:
            with _told(progress):
                checkpoint = _fit(replace(task, progress=str(progress)), work, name=f"distil-{identity}")
            with checkpoint.as_directory() as folder:  # beside the progress still, where it was made in this process
                trained = Path(folder)
                state = torch.load(trained / "student.pt", map_location="cpu", weights_only=True)
                entry = {
                    "identity": identity,
                    "start": read_description(task.start)["fingerprint"] if task.start else None,
                    "steps": state["counters"]["step"],
                    "config": asdict(config),
                    "material": asdict(training_data),
                    "curve": state["curve"],
                    "wall_s": time.perf_counter() - started,
                }
                save(load(trained / "separator"), out, history=[*history, entry])
        remove_tree(work)
    made: dict[str, Any] = read_description(out)["history"][-1]
    return made


@contextmanager
def _progress_file(work: Location) -> Iterator[Path]:
    """Where the first worker tells how it goes: beside its checkpoints, or where these are in S3 on this machine."""
    if isinstance(work, Path):
        yield work / "progress.jsonl"
        return
    with tempfile.TemporaryDirectory(prefix="clearsep-training-") as folder:
        yield Path(folder) / "progress.jsonl"


@contextmanager
def _told(progress: Path) -> Iterator[None]:
    """Say every line that the workers add to the progress file while the block runs."""
    progress.touch()
    done = threading.Event()

    def follow() -> None:
        with progress.open() as file:
            file.seek(0, os.SEEK_END)
            while not done.wait(1.0):
                for line in file:
                    _LOGGER.info("  " + ", ".join(f"{key} {value:.5g}" for key, value in json.loads(line).items()))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _fit(task: TrainingTask, work: Location, *, name: str) -> ray.train.Checkpoint:
    """Run the workers and return the last checkpoint."""
    use_gpu, number = task.config.use_gpu, task.config.num_workers
    if use_gpu is None:
        use_gpu = number != 0 and ray.cluster_resources().get("GPU", 0) > 0
    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=number,
            use_gpu=use_gpu,
            resources_per_worker=None if use_gpu else {"CPU": 0.5},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **storage(work),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=100 if isinstance(number, tuple) else 3),
        ),
    )
    threads = torch.get_num_threads()
    try:
        result = _beside(trainer.fit) if task.config.num_workers else trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RuntimeError(f"training broke off: {reason}") from error
    finally:
        torch.set_num_threads(threads)  # a training in this process has set its own, and sums depend on their number
    if result.checkpoint is None:
        raise RuntimeError(f"training reported no checkpoint; its files are in {work}")
    return result.checkpoint


def _beside(fit: Callable[[], ray.train.Result]) -> ray.train.Result:
    """What ``fit`` returns, called in a thread of its own, so that Ctrl-C stays with this one.

    In the main thread Ray Train puts a handler of its own in the place of Python's, leaves it there when it is done,
    and waits in it for a controller that may be busy or gone.
    """
    outcome: list[ray.train.Result | BaseException] = []

    def call() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def storage(work: Location) -> dict[str, Any]:
    """Where Ray Train keeps its checkpoints."""
    if isinstance(work, Path):
        return {"storage_path": str(work)}
    from engine.storage.s3_client import arrow_filesystem

    return {"storage_path": f"{work.bucket}/{work.key}", "storage_filesystem": arrow_filesystem()}
