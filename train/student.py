"""A student while it learns: separator, moving average, optimiser and learning curve; knows no Ray."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.separators import NetworkConfig, QuerySeparator, load
from train.data.config import MixConfig
from train.data.mixer import Batch
from train.losses import batch_loss


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
    """Stop after so many validations without a gain of 0.05 dB, keep the best; null: run all steps, keep the last."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers (data parallel), each with batches of its own; or the fewest and the most, where nodes come
    and go: up to a hundred times the training goes on from its last checkpoint with what is left; 0 trains in this
    process, for tests."""
    batch_makers: int = 0
    """Processes beside each worker, on any node, that make its batches; 0: a thread of the worker makes them. For GPUs
    that would wait for one thread; the batches are the same."""
    use_gpu: bool | None = None
    """Train on GPUs; null: where the cluster has them as the training begins."""
    threads_per_worker: int | None = None
    """CPU threads that learn; null: this machine's CPUs shared among the workers, less one that makes the batches."""
    seed: int = 0
    """Of weights, draws and order."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "validate_every_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        fewest, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2
        if fewest < 0:
            raise ValueError(f"num_workers is {self.num_workers}; give 0 (this process) or more")
        if most != fewest and not 1 <= fewest < most:
            raise ValueError(f"num_workers is {self.num_workers}; give the fewest, 1 or more, and the most")
        if self.batch_makers < 0:
            raise ValueError(f"batch_makers is {self.batch_makers}; give 0 or more")


class Student:
    """Separator, its moving average, optimiser and learning curve; everything a checkpoint holds."""

    def __init__(
        self,
        config: DistilConfig,
        labels: Sequence[str],
        *,
        start: str | None,
        network: NetworkConfig,
        device: torch.device,
    ) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.separator = load(start) if start else QuerySeparator(network, labels)
        self.separator.queries.grow(labels)
        self.separator.to(device).train()
        self.average = copy.deepcopy(self.separator).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.separator.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step, self.best_db, self.waited = 0, -math.inf, 0
        self.best: dict[str, Tensor] | None = None
        self.curve: list[dict[str, float]] = []

    def learn(self, model: nn.Module, batch: Batch, device: torch.device) -> float:
        """One update; returns the loss in dB."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule()
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            stems_BT = model(batch.mix_BT, batch.index_B)
        loss = batch_loss(batch, stems_BT.float(), self.config.mix)
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

    def note(self, loss: float, validation: dict[str, Any] | None, *, num_unusable: int = 0) -> None:
        """Add a point to the learning curve and keep the best average where patience asks for it.

        ``num_unusable`` counts sounds that could not be read or are silent; the curve says so where there are any.
        """
        point = {"step": float(self.step), "loss_db": loss}
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
