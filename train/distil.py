"""One distillation with Ray Train: a student learns from tracks and clips, its average is the next teacher."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray._private.utils import get_num_cpus  # of a container, where it has fewer than its machine
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn

from engine.corpus import read_sources, source_root
from engine.lock import held
from engine.separators import NetworkConfig, load, read_description, save
from engine.shards import read_tracks
from engine.storage import Location, Name, fingerprint, location, read_json, remove_tree
from train.batches import Batch, Mixer
from train.evaluate import ValidationConfig, draw_mixtures, estimator, evaluate
from train.material import Material, make_mixer
from train.student import DistilConfig, Student

_MAKER_S = 900.0  # in which an autoscaler adds a node
HOW = ("use_gpu", "threads_per_worker", "batch_makers")
"""Settings that decide how a training is run, not what it is."""
__all__ = ["HOW", "Material", "Task", "distil", "storage", "training_identity"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker needs, as plain data."""

    config: DistilConfig
    material: Material
    network: NetworkConfig
    start: str | None
    validation: ValidationConfig | None
    progress: str = ""
    """File to which the first worker adds a line of JSON at every validation and when it goes on after a stop."""


def _mixer(task: Task, *, sample_rate_hz: int, rank: int, num_ranks: int) -> Mixer:
    """What a worker draws its batches from."""
    return make_mixer(
        task.material,
        task.config.mix,
        seed=task.config.seed,
        sample_rate_hz=sample_rate_hz,
        rank=rank,
        num_ranks=num_ranks,
        start=task.start,
    )


class _Maker:
    """Actor that makes batches of a worker; they are what the worker would make, for they depend on the step alone."""

    def __init__(self, task: Task, **place: int) -> None:
        torch.set_num_threads(1)
        self.mixer = _mixer(task, **place)

    def batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, and how many sounds were unusable so far."""
        return self.mixer.batch(step), self.mixer.num_unusable


def _made_elsewhere(task: Task, place: dict[str, int], first: int, end: int) -> Iterator[tuple[Batch, int]]:
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


def _train_loop(values: dict[str, Any]) -> None:
    """What every worker runs."""
    task: Task = values["task"]
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


def _tell(task: Task, values: Mapping[str, float]) -> None:
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
    material: Material,
    config: DistilConfig | None = None,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationConfig | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a student into the checkpoint folder ``out``; returns its history entry, with the learning curve.

    ``start`` is the teacher's checkpoint to go on from; without it a network of ``network``'s shape is trained from
    scratch. A training that was stopped goes on from its last checkpoint, and one that is done returns at once. Raises
    ``ValueError`` for material or settings that cannot work, ``RuntimeError`` if training itself failed.
    """
    out, config = location(out), config or DistilConfig()
    started = time.perf_counter()
    work = out.parent / f".{out.name}-training"
    task = _task(material=material, config=config, start=start, network=network, validation=validation)
    identity = _identity(task)
    if (out / "separator.json").is_file():
        entry: dict[str, Any] = read_description(out)["history"][-1]
        if entry["identity"] != identity:
            raise ValueError(f"{out} holds a separator of another training; give another folder, or delete this one")
        return entry
    _check(task)
    with held(work, "training"):
        history = list(read_description(task.start)["history"]) if task.start else []
        with _progress_file(work) as progress:
            with _told(progress, say):
                checkpoint = _fit(replace(task, progress=str(progress)), work, name=f"distil-{identity}")
            with checkpoint.as_directory() as folder:  # beside the progress still, where it was made in this process
                trained = Path(folder)
                state = torch.load(trained / "student.pt", map_location="cpu", weights_only=True)
                entry = {
                    "identity": identity,
                    "start": read_description(task.start)["fingerprint"] if task.start else None,
                    "steps": state["counters"]["step"],
                    "config": asdict(config),
                    "material": asdict(material),
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
def _told(progress: Path, say: Callable[[str], None] | None) -> Iterator[None]:
    """Say every line that the workers add to the progress file while the block runs."""
    progress.touch()
    done = threading.Event()

    def follow() -> None:
        with progress.open() as file:
            file.seek(0, os.SEEK_END)
            while not done.wait(1.0):
                for line in file:
                    if say is not None:
                        say("  " + ", ".join(f"{key} {value:.5g}" for key, value in json.loads(line).items()))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _task(
    *,
    material: Material,
    config: DistilConfig,
    start: Name | None,
    network: NetworkConfig | None,
    validation: ValidationConfig | None,
) -> Task:
    def named(path: str | None) -> str | None:  # absolute: workers are not in our folder
        return str(location(path)) if path else None

    return Task(
        config=config,
        material=replace(material, clean=named(material.clean), tracks=named(material.tracks)),
        network=network or NetworkConfig(),
        start=str(location(start)) if start else None,
        validation=validation and replace(validation, clips=str(location(validation.clips))),
    )


def training_identity(
    *,
    material: Material,
    config: DistilConfig,
    start: Name | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationConfig | None = None,
) -> str:
    """A fingerprint of what a training is made of; trainings of which it is the same give the same separator."""
    return _identity(_task(material=material, config=config, start=start, network=network, validation=validation))


def _identity(task: Task) -> str:
    """What a training is: settings, material and start; not where it ran or where its files lie."""
    material = task.material
    config = {key: value for key, value in asdict(task.config).items() if key not in HOW}
    chosen_by = task.validation if task.config.patience is not None else None
    return fingerprint(
        {
            "config": config,
            "network": None if task.start else asdict(task.network),
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "clean": _sources(material.clean, material.clean_folds),
            "clean_without": material.clean_without,
            "tracks": _selection(task) if material.tracks is not None else None,
            "chosen_by": chosen_by and asdict(replace(chosen_by, clips="")),
            "chosen_by_clips": _sources(chosen_by.clips, chosen_by.folds) if chosen_by else None,
        }
    )


def _selection(task: Task) -> str:
    """The tracks that a training learns from, whatever rules kept them; ``ValueError`` where they are not whole."""
    assert task.material.tracks is not None
    read_tracks(task.material.tracks)
    mix, manifest = task.config.mix, read_json(location(task.material.tracks) / "manifest.json")
    learns_absence = mix.silence_rate * mix.absent_fraction > 0.0  # from stems that one of the rules rejected
    return str(manifest["fingerprint" if learns_absence else "kept_fingerprint"])


def _sources(path: str | None, folds: tuple[int, ...] | None) -> list[tuple[str, str]] | None:
    """The single-source clips of a list by name: a list that has changed is noticed, one that moved is not."""
    if path is None:
        return None
    root = source_root(path)
    rows = read_sources(path, folds=folds).to_pylist()
    return [(os.path.relpath(row["path"], root), row["label"]) for row in rows]


def _check(task: Task) -> None:
    """Fail on the driver, in words, before workers are started."""
    rate = read_description(task.start)["sample_rate_hz"] if task.start else task.network.sample_rate_hz
    labels = list(_mixer(task, sample_rate_hz=rate, rank=0, num_ranks=1).labels)
    if len(labels) < 2:
        raise ValueError(f"training needs sounds of two labels at least, found {labels}; give more clips or tracks")
    if task.config.patience is not None and task.validation is None:
        raise ValueError("patience chooses by validation; name its clips, or leave patience null to run all steps")
    if task.validation is not None:
        read_sources(task.validation.clips, folds=task.validation.folds)


def _fit(task: Task, work: Location, *, name: str) -> ray.train.Checkpoint:
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
    from engine.s3 import arrow_filesystem

    return {"storage_path": f"{work.bucket}/{work.key}", "storage_filesystem": arrow_filesystem()}
