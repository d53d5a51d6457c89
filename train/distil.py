"""One distillation with Ray Train: a student learns from tracks and single-source clips, an EMA of it becomes the teacher."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn

from engine.corpus import read_sources
from engine.separators import NetworkConfig, QuerySeparator, load, read_description, save
from engine.storage import fingerprint, read_json
from train.batches import Batch, MixConfig, Mixer, Pool, clean_items, track_items
from train.evaluate import ValidationConfig, draw_mixtures, estimator, evaluate
from train.losses import clearsep_loss


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a student is trained."""

    steps: int = 800
    """Updates; the learning rate follows a cosine to zero over them."""
    mix: MixConfig = field(default_factory=MixConfig)
    """How its mixtures are made."""
    learning_rate: float = 1e-3
    """Peak, after the warm-up."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    clip_norm: float = 5.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.995
    """Of the average of weights that is validated, saved and becomes the next teacher."""
    validate_every_steps: int = 200
    """Steps between validations, checkpoints and progress lines."""
    patience: int | None = None
    """Stop after so many validations without a gain of 0.05 dB and return the best; null: run all steps, return the last."""
    num_workers: int = 1
    """Ray Train workers (data parallel); 0 trains in this process, for tests."""
    use_gpu: bool | None = None
    """Train on GPUs; null: where the cluster has them."""
    threads_per_worker: int | None = None
    """CPU threads of a worker; null: this machine's CPUs shared among the workers."""
    seed: int = 0
    """Of weights, draws and order."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "validate_every_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; give 0 (this process) or more")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a distillation learns from; at least one of the two."""

    clean: str | None = None
    """CSV ``path,label[,fold]`` of single-source clips, or a folder of folders by label."""
    clean_folds: tuple[int, ...] | None = None
    """Folds of ``clean``; null: all."""
    tracks: str | None = None
    """A selection made by the filter."""

    def __post_init__(self) -> None:
        if self.clean is None and self.tracks is None:
            raise ValueError("nothing to learn from; give single-source clips or tracks")


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker needs, as plain data."""

    config: DistilConfig
    material: Material
    network: NetworkConfig
    start: str | None
    validation: ValidationConfig | None


class Student:
    """Separator, its moving average, optimiser and learning curve; everything a checkpoint holds."""

    def __init__(self, task: Task, labels: list[str], device: torch.device) -> None:
        self.config = task.config
        torch.manual_seed(task.config.seed)
        self.separator = load(task.start) if task.start else QuerySeparator(task.network, labels)
        self.separator.queries.grow(labels)
        self.separator.to(device).train()
        self.average = copy.deepcopy(self.separator).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.separator.parameters(), lr=task.config.learning_rate, weight_decay=task.config.weight_decay
        )
        self.step, self.best_db, self.waited = 0, -math.inf, 0
        self.best: dict[str, Tensor] | None = None
        self.curve: list[dict[str, float]] = []

    def learn(self, model: nn.Module, batch: Batch, device: torch.device) -> float:
        """One update; returns the loss in dB."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule()
        mix_BT, target_BT = batch.mix_BT.to(device), batch.target_BT.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            estimate_BT = model(mix_BT, batch.index_B.to(device))
        loss = clearsep_loss(estimate=estimate_BT.float(), reference=target_BT, mixture=mix_BT)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.separator.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._follow()
        return float(loss.detach())

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return warm * 0.5 * (1.0 + math.cos(math.pi * self.step / self.config.steps))

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.separator.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def note(self, loss: float, validation: dict[str, Any] | None) -> None:
        """Add a point to the learning curve and keep the best average where patience asks for it."""
        point = {"step": float(self.step), "loss_db": loss}
        if validation is not None:
            point |= {"sdri_db": validation["sdri_db"], "si_sdri_db": validation["si_sdri_db"]}
            gained = validation["sdri_db"] > self.best_db + 0.05
            self.waited = 0 if gained else self.waited + 1
            if gained and self.config.patience is not None:
                self.best_db = validation["sdri_db"]
                self.best = copy.deepcopy(self.average.state_dict())
        self.curve.append(point)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or patience is at its end."""
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.waited >= patience)

    def result(self) -> QuerySeparator:
        """The average to keep: the best one under patience, else the last."""
        if self.best is not None:
            self.average.load_state_dict(self.best)
        return self.average

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, so that it loads with ``weights_only=True``."""
        return {
            "separator": self.separator.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "counters": {"step": self.step, "best_db": self.best_db, "waited": self.waited},
            "curve": self.curve,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.separator.load_state_dict(state["separator"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.curve = state["best"], state["curve"]
        for name, value in state["counters"].items():
            setattr(self, name, value)


def _mixer(task: Task, *, sample_rate_hz: int, rank: int, num_ranks: int) -> tuple[Mixer, list[str]]:
    material, mix, seed = task.material, task.config.mix, task.config.seed
    clean = []
    if material.clean is not None:
        clean = clean_items(material.clean, folds=material.clean_folds, sample_rate_hz=sample_rate_hz)
    tracks = track_items(material.tracks, sample_rate_hz=sample_rate_hz) if material.tracks else []
    known = list(read_description(task.start)["labels"]) if task.start else []
    labels = list(dict.fromkeys([*known, *sorted({item.label for item in [*clean, *tracks]})]))
    pools = [
        Pool(items, mix, sample_rate_hz=sample_rate_hz, seed=seed, rank=rank, num_ranks=num_ranks)
        for items in (clean, tracks)
    ]
    return Mixer(pools[0], pools[1], labels, mix, seed=seed, rank=rank), labels


def _batches(mixer: Mixer, first: int, end: int) -> Iterator[Batch]:
    """Batches of steps ``first`` to ``end``, the next one made while this one is learned from."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(mixer.batch, first)
        for step in range(first, end):
            batch = coming.result()
            if step + 1 < end:
                coming = maker.submit(mixer.batch, step + 1)
            yield batch


def _train_loop(values: dict[str, Any]) -> None:
    """What every worker runs."""
    task: Task = values["task"]
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(task.config.threads_per_worker or max(1, (os.cpu_count() or 1) // num_ranks))
    network = NetworkConfig(**read_description(task.start)["network"]) if task.start else task.network
    mixer, labels = _mixer(task, sample_rate_hz=network.sample_rate_hz, rank=rank, num_ranks=num_ranks)
    student = Student(task, labels, device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            student.restore(torch.load(Path(folder) / "student.pt", map_location=device, weights_only=True))
    model: nn.Module = student.separator
    if num_ranks > 1:
        model = ray.train.torch.prepare_model(student.separator, move_to_device=False)
    judge = _Judge(task, network.sample_rate_hz) if rank == 0 else None
    losses: list[float] = []
    for batch in _batches(mixer, student.step, task.config.steps):
        losses.append(student.learn(model, batch, device))
        if student.step % task.config.validate_every_steps == 0 or student.step == task.config.steps:
            if judge is not None:
                student.note(sum(losses) / len(losses), judge(student.average))
            losses.clear()
            stop = _agree(student.finished, num_ranks)
            with _checkpoint(student, rank, stop) as saved:
                ray.train.report({"step": student.step, **(student.curve or [{}])[-1]}, checkpoint=saved)
            if stop:
                break


class _Judge:
    """Validates the average on a draw of its own, and says how it goes."""

    def __init__(self, task: Task, sample_rate_hz: int) -> None:
        self.steps, self.started = task.config.steps, time.perf_counter()
        self.mixtures = draw_mixtures(task.validation, sample_rate_hz=sample_rate_hz) if task.validation else []

    def __call__(self, average: QuerySeparator) -> dict[str, Any] | None:
        report = evaluate(estimator(average), self.mixtures) if self.mixtures else None
        return report


def _agree(finished: bool, num_ranks: int) -> bool:
    """Rank 0's word on whether to stop, for all ranks."""
    if num_ranks == 1:
        return finished
    word = [finished]
    torch.distributed.broadcast_object_list(word, src=0)
    return word[0]


@contextmanager
def _checkpoint(student: Student, rank: int, last: bool) -> Iterator[ray.train.Checkpoint | None]:
    """Rank 0's checkpoint to report; the last one also holds the finished separator."""
    if rank != 0:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(student.state(), Path(folder) / "student.pt")
        if last:
            save(student.result(), Path(folder) / "separator")
        yield ray.train.Checkpoint.from_directory(folder)


def distil(
    out: str | Path,
    *,
    material: Material,
    config: DistilConfig | None = None,
    start: str | Path | None = None,
    network: NetworkConfig | None = None,
    validation: ValidationConfig | None = None,
) -> dict[str, Any]:
    """Train a student into the checkpoint folder ``out``; returns its history entry, with the learning curve.

    ``start`` is the teacher's checkpoint to go on from; without it a network of ``network``'s shape is trained from scratch.
    A training that was stopped goes on from its last checkpoint, and one that is done returns at once. Raises
    ``ValueError`` for material or settings that cannot work, ``RuntimeError`` if training itself failed.
    """
    out, config = Path(out).resolve(), config or DistilConfig()
    started = time.perf_counter()
    task = Task(
        config=config,
        material=material,
        network=network or NetworkConfig(),
        start=str(Path(start).resolve()) if start else None,
        validation=validation,
    )
    identity = _identity(task)
    if (out / "separator.json").is_file():
        entry: dict[str, Any] = read_description(out)["history"][-1]
        if entry["identity"] != identity:
            raise ValueError(f"{out} holds a separator of another training; give another folder, or delete this one")
        return entry
    work = out.parent / f".{out.name}-training"
    _check(task)
    trained = _fit(task, work, name=f"distil-{identity}")
    history = list(read_description(task.start)["history"]) if task.start else []
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
    shutil.rmtree(work, ignore_errors=True)
    return entry


def _identity(task: Task) -> str:
    """What a training is: settings, material and start; not how many workers ran it or where its files lie."""
    config = {key: value for key, value in asdict(task.config).items() if key not in ("use_gpu", "threads_per_worker")}
    tracks = task.material.tracks
    return fingerprint(
        {
            "config": config,
            "network": None if task.start else asdict(task.network),
            "start": read_description(task.start)["fingerprint"] if task.start else None,
            "clean_folds": task.material.clean_folds,
            "tracks": read_json(Path(tracks) / "manifest.json")["fingerprint"] if tracks else None,
        }
    )


def _check(task: Task) -> None:
    """Fail on the driver, in words, before workers are started."""
    rate = read_description(task.start)["sample_rate_hz"] if task.start else task.network.sample_rate_hz
    _, labels = _mixer(task, sample_rate_hz=rate, rank=0, num_ranks=1)
    if len(labels) < 2:
        raise ValueError(f"training needs sounds of two labels at least, found {labels}; give more clips or tracks")
    if task.validation is not None:
        read_sources(task.validation.clips, folds=task.validation.folds)


def _fit(task: Task, work: Path, *, name: str) -> Path:
    """Run the workers and return the folder of the last checkpoint."""
    use_gpu = task.config.use_gpu
    if use_gpu is None:
        use_gpu = task.config.num_workers > 0 and ray.cluster_resources().get("GPU", 0) > 0
    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=task.config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=None if use_gpu else {"CPU": 0.5},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(work),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=1),
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError(f"training reported no checkpoint; its files are in {work}")
    return Path(result.checkpoint.path)
