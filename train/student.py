"""A student during its training: separator, moving average, optimiser and learning curve; knows no Ray."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, TypedDict

import torch
from torch import Tensor, nn

from engine.separators import NetworkConfig, QueryEmbedder, QuerySeparator, load
from engine.settings import RUNTIME, Count, CountOrZero, Fraction, NonNegative, Positive, Seed, config
from train.capture import Model, half_precision
from train.data.batch import Batch
from train.data.config import MixConfig
from train.data.strategies.compose import loss_of, prepared
from train.evaluation.figures import Evaluation


@config
class DistilConfig:
    """Training of a student."""

    steps: Count = 800
    """Updates; the learning rate follows a cosine to zero over them."""
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    """Its training mixtures."""
    learning_rate: Positive = 1e-3
    """Highest learning rate, after the warm-up."""
    warmup_steps: CountOrZero = 50
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 1e-2
    """Weight decay of AdamW."""
    clip_norm: Positive = 5.0
    """Gradients are clipped to this norm."""
    ema_decay: Fraction = 0.995
    """Decay of the moving average of weights, which is validated, saved and becomes the next teacher."""
    validate_every_steps: Count = 200
    """Steps between validations, checkpoints and progress lines."""
    patience: Count | None = None
    """Stop after this many validations without a gain of 0.05 dB, keep the best; null: run all steps, keep the last."""
    num_workers: CountOrZero | tuple[Count, Count] = 1
    """Workers (data parallel, with Ray Train), each with batches of its own, so that their number decides the result.

    A pair is the smallest and the largest number, for clusters whose nodes come and go: the training then resumes up to
    a hundred times from its last state with the nodes that are left. 0 trains in this process, for tests.
    """
    use_gpu: Annotated[bool | None, RUNTIME] = None
    """Train on GPUs; null: if the cluster has GPUs when the training begins."""
    threads_per_worker: Annotated[Count | None, RUNTIME] = None
    """CPU threads of each worker; null: the CPUs of its machine divided by the workers on it."""
    seed: Seed = 0
    """Seed of weights, draws and order."""

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(
                f"num_workers must be the smallest and the largest number, got {list(self.num_workers)}; swap them"
            )


class CurvePoint(TypedDict, total=False):
    """One validation of a student; figures that were not taken have no key."""

    step: float
    """Updates so far."""
    loss_db: float
    """Mean loss since the last point."""
    num_unusable: float
    """Sounds so far that could not be read or are silent."""
    sdri_db: float
    si_sdri_db: float


class StudentState(TypedDict):
    """Everything that a student resumes from: tensors and plain values, so that it loads with ``weights_only=True``."""

    separator: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, object]
    best: dict[str, Tensor] | None
    """The best average so far, under patience."""
    counters: dict[str, float]
    """``step``, ``best_db`` and ``waited``."""
    curve: list[CurvePoint]


class Student:
    """Separator, its moving average, optimiser and learning curve: everything that a checkpoint stores."""

    def __init__(
        self,
        config: DistilConfig,
        labels: Sequence[str],
        *,
        start: str | None,
        network: NetworkConfig,
        device: torch.device,
        embedder: QueryEmbedder | None = None,
    ) -> None:
        """``embedder`` knows all labels; only for a student that reads text."""
        self.config, self.loss = config, loss_of(config.mix)
        torch.manual_seed(config.seed)
        self.separator = load(start) if start else QuerySeparator(network, [] if embedder else labels)
        self.separator.embedder = embedder
        self.separator.grow(labels)
        self.separator.to(device).train()
        self.average = copy.deepcopy(self.separator).requires_grad_(False).eval()
        self.device, self.weights = device, list[Tensor](self.separator.parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.best_db, self.waited = 0, -math.inf, 0
        self.best: dict[str, Tensor] | None = None
        self.curve: list[CurvePoint] = []

    def learn(self, model: Model, batch: Batch) -> Tensor:
        """One update; returns the loss in dB, on the device, without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule()
        batch = prepared(self.config.mix, batch, self.average)
        with half_precision(self.device):
            stems_BT = model(batch.mix_BT, batch.query, batch.rivals)
        loss = self.loss(batch, stems_BT.float())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm, foreach=True)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        return loss.detach()

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return warm * 0.5 * (1.0 + math.cos(math.pi * self.step / self.config.steps))

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list[Tensor](self.average.parameters()), self.weights, 1.0 - decay)

    def note(self, loss: float, validation: Evaluation | None, *, num_unusable: int = 0) -> None:
        """Add a point to the learning curve and, under patience, remember the best average.

        ``num_unusable`` counts sounds that could not be read or are silent; the point has it only if there are any.
        """
        point: CurvePoint = {"step": float(self.step), "loss_db": loss}
        if num_unusable:
            point["num_unusable"] = float(num_unusable)
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
        """True once all steps are done or patience has run out."""
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.waited >= patience)

    def result(self) -> QuerySeparator:
        """The average to keep: the best one under patience, else the last."""
        if self.best is not None:
            self.average.load_state_dict(self.best)
        return self.average

    def state(self) -> StudentState:
        """Everything that :meth:`restore` needs."""
        return {
            "separator": self.separator.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "counters": {"step": self.step, "best_db": self.best_db, "waited": self.waited},
            "curve": self.curve,
        }

    def restore(self, state: StudentState) -> None:
        """Continue from a :meth:`state`."""
        self.separator.load_state_dict(state["separator"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.curve = state["best"], state["curve"]
        for name, value in state["counters"].items():
            setattr(self, name, value)
