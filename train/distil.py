"""Distillation with Ray Train: a student learns from tracks and clips; its averaged weights are the next teacher."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import joblib
import ray
import ray.exceptions
import torch
import torch.distributed
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from cluster.session import require_connection
from engine.separators import NetworkConfig, load, read_description, save
from engine.settings import plain
from engine.storage.files import remove_leftovers, remove_tree
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location
from train.capture import Model, captured
from train.data.mixer import Mixer
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import ValidationSet, draw_mixtures
from train.progress import load_state, logged_progress, remove_damaged, report_progress, save_state
from train.student import DistilConfig, Student
from train.task import (
    TrainingRecord,
    TrainingTask,
    about,
    check_task,
    data_record,
    make_task,
    task_identity,
    with_embeddings,
)

_LOGGER = logging.getLogger(__name__)
_MAX_FAILURES = 3  # of workers, before a training is given up


def distil(
    out: Name,
    *,
    data: TrainingData,
    config: DistilConfig | None = None,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationSet | None = None,
    text_encoder: Name | None = None,
) -> TrainingRecord:
    """Train a student into the checkpoint folder ``out``; returns the entry of its history, with the learning curve.

    ``start`` is the teacher's checkpoint folder; without it a network of ``network``'s shape is trained from scratch,
    which reads text if there is a ``text_encoder``: the folder of a CLAP, or of a separator that has one.
    A training that was stopped resumes from its last checkpoint, and a finished one returns at once. Raises
    ``ValueError`` for training data or settings that cannot work, ``RuntimeError`` if the training itself failed.
    """
    out, config = location(out), config or DistilConfig()
    started = time.perf_counter()
    task = make_task(
        data=data, config=config, start=start, network=network, validation=validation, text_encoder=text_encoder
    )
    identity = task_identity(task)
    if (out / "separator.json").is_file():
        record = cast(TrainingRecord, read_description(out)["history"][-1])
        if record["identity"] != identity:
            if data.clean is not None:
                data.clean.require_same_as(out)
            raise ValueError(
                f"{out} must be empty or hold this training, got a separator of another training; give another folder"
            )
        return record
    labels = check_task(task)
    work = out.parent / f".{out.name}-training"
    with lock(work, "training"):
        history = list(read_description(task.start)["history"]) if task.start else []
        states = work / identity
        remove_leftovers(states)
        remove_damaged(states)
        task = with_embeddings(task, labels, work / "queries")
        with logged_progress(work) as progress:
            _fit(replace(task, progress=str(progress), states=str(states)), work)
        state = load_state(states)
        if state is None:
            raise RuntimeError(f"cannot find a state of the training (none was written); see its files in {work}")
        record = {
            "identity": identity,
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "steps": int(state["counters"]["step"]),
            "config": plain(config),
            "data": data_record(task.data),
            "curve": state["curve"],
            "wall_s": time.perf_counter() - started,
        }
        if data.clean is not None:
            data.clean.keep_with(out)
        save(load(states / "separator"), out, history=[*history, dict(record)], about=about(task))
        remove_tree(work)
    return cast(TrainingRecord, read_description(out)["history"][-1])


def _fit(task: TrainingTask, work: Location) -> None:
    """Run the workers to the last step."""
    use_gpu, number = task.config.use_gpu, task.config.num_workers
    if number:
        require_connection()
    if use_gpu is None:
        use_gpu = number != 0 and ray.cluster_resources().get("GPU", 0) > 0
    if number == 1:
        _fit_in_task(task, work, use_gpu)
    else:
        _fit_with(number, task, work, use_gpu)


def _fit_in_task(task: TrainingTask, work: Location, use_gpu: bool) -> None:
    """Train with one worker: Ray Train's local mode in a Ray task, whose process Ray keeps for the next training.

    A controller and a group of workers take three times as long to start (docs/guides/training.md).
    """
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # that of a trial has no CPU
    resources = {"num_cpus": 0.5, "num_gpus": int(use_gpu)}
    remote = ray.remote(max_retries=0, name="distil", scheduling_strategy=anywhere, **resources)(_fit_with)
    for failures in range(_MAX_FAILURES + 1):
        training = remote.remote(0, task, work, use_gpu)
        try:
            ray.get(training)
            return
        except ray.exceptions.RayError as error:
            if failures == _MAX_FAILURES:
                raise _failed(error) from error
            _LOGGER.warning(f"the worker of the training failed ({_reason(error)}); it resumes from its last state")
        except BaseException:  # such as Ctrl-C; cancelling a task that is over would end this process
            ray.cancel(training, force=True)
            raise


def _fit_with(number: int | tuple[int, int], task: TrainingTask, work: Location, use_gpu: bool) -> None:
    """Train with Ray Train and some workers; 0: in this process."""
    import ray.train.torch  # takes a second

    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={"task": replace(task, config=replace(task.config, use_gpu=use_gpu))},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=number,
            use_gpu=use_gpu and number != 0,
            resources_per_worker=None if use_gpu else {"CPU": 0.5},
        ),
        run_config=ray.train.RunConfig(
            name=f"ray-{uuid.uuid4().hex}",  # Ray Train would read the files of an earlier start of the same name
            **storage(work),
            failure_config=ray.train.FailureConfig(max_failures=100 if isinstance(number, tuple) else _MAX_FAILURES),
        ),
    )
    threads = torch.get_num_threads()
    try:
        _in_thread(trainer.fit) if number else trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _failed(error) from error
    finally:
        torch.set_num_threads(threads)  # a training in this process changed it, and float sums depend on it


def _failed(error: Exception) -> RuntimeError:
    return RuntimeError(f"cannot finish the training ({_reason(error)}); see the log of its workers")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _train_loop(values: dict[str, TrainingTask]) -> None:
    """The work of every worker, from the last state of the training to its end."""
    import ray.train.torch

    task, context = values["task"], ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if task.config.use_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(
        task.config.threads_per_worker or max(1, joblib.cpu_count() // context.get_local_world_size())
    )
    mixer = task.mixer(rank=rank, num_ranks=num_ranks, device=device)
    student = task.student(mixer.labels, device=device)
    _restore(student, task, device, rank)
    if student.finished:
        return
    model = _model(student, mixer, num_ranks)
    mixtures = []
    if rank == 0 and task.validation is not None:
        mixtures = draw_mixtures(task.validation, sample_rate_hz=task.sample_rate_hz)
    end = task.config.steps
    losses_db: list[Tensor] = []  # on the device: fetching one waits for its step
    while student.step < end:
        losses_db.append(student.learn(model, mixer.batch(student.step)))
        if student.step % task.config.validate_every_steps == 0 or student.step == end:
            if rank == 0:
                figures = evaluate(SeparatorSystem(student.average), mixtures, quick=True) if mixtures else None
                student.note(float(torch.stack(losses_db).mean()), figures, num_unusable=mixer.num_unusable)
                report_progress(task.progress, student.curve[-1])
            losses_db.clear()
            stop = _agree(student.finished, num_ranks)
            if rank == 0:
                if stop:
                    save(student.result(), location(task.states) / "separator", about=about(task))
                save_state(location(task.states), student.state(), step=student.step)
            ray.train.report({"step": student.step})
            if stop:
                break


def _model(student: Student, mixer: Mixer, num_ranks: int) -> Model:
    """The separator as it is called: in parallel with other ranks, captured on a card, or as it is."""
    if num_ranks > 1:
        import ray.train.torch

        parallel: Model = ray.train.torch.prepare_model(student.separator, move_to_device=False)
        return parallel
    if student.device.type != "cuda" or student.config.mix.self_remix is not None:  # whose batches differ in shape
        return student.separator
    return captured(student.separator, mixer.batch(student.step))


def _restore(student: Student, task: TrainingTask, device: torch.device, rank: int) -> None:
    """Continue from the last state of this training, if there is one."""
    state = load_state(location(task.states), device=device)
    if state is None:
        return
    student.restore(state)
    if rank == 0:
        report_progress(task.progress, {"resumed_after_step": student.step})


def _agree(finished: bool, num_ranks: int) -> bool:
    """The decision of rank 0 whether to stop, on all ranks."""
    if num_ranks == 1:
        return finished
    decision = [finished]
    torch.distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def _in_thread(fit: Callable[[], object]) -> None:
    """Call ``fit`` in a thread of its own, so that Ctrl-C stays with this one.

    In the main thread Ray Train replaces Python's signal handler, leaves its own there when it is done, and waits in it
    for a controller that may be busy or gone.
    """
    failed: list[BaseException] = []

    def call() -> None:
        try:
            fit()
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]


def storage(work: Location) -> dict[str, Any]:
    """Arguments of ``RunConfig`` for a working folder on disk or in S3."""
    if isinstance(work, Path):
        return {"storage_path": str(work)}
    from engine.storage.s3_client import arrow_filesystem

    return {"storage_path": f"{work.bucket}/{work.key}", "storage_filesystem": arrow_filesystem()}
