"""TODO engine/passes/config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.audio.decode import MAX_DURATION_S


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How a corpus is cut, packed and placed; the first six settings decide what comes out, the rest how fast."""

    clip_s: float = 10.0
    """Longer recordings are cut into clips of this length."""
    min_clip_s: float = 1.0
    """A remainder shorter than this is dropped when a recording is cut."""
    min_labels: int = 2
    """Clips with fewer labels are set aside (and counted): there is nothing to separate them from."""
    reseparate: bool = False
    """Score re-separation too (``engine/reseparate.py``): two forward passes more for each stem."""
    rows_per_task: int = 64
    """Rows of the manifest that one decoding task owns."""
    part_s: float = 320.0
    """Audio of a stem shard, in seconds of mixture: what travels together and is redone together."""
    batch_s: float = 80.0
    """Audio in one call of the separator, in seconds, padding included; one that is too much for its GPU lowers it."""
    min_actors: int | None = None
    """Separator actors to start with; null: all that there is room for."""
    max_actors: int | None = None
    """Separator actors at the most, which Ray adds as work piles up and there is room; null: as many as the GPUs, or
    without any the CPUs, hold that are there when a pass begins. Give a number where nodes are still to come, added
    by hand or by an autoscaler, and ``num_gpus_per_actor`` too where GPUs are: the pass then waits for them."""
    num_gpus_per_actor: float | None = None
    """GPU share of an actor; null: a whole one where the cluster has GPUs when a pass begins."""
    num_cpus_per_actor: float = 0.5
    """CPU share of an actor; below 1 leaves CPUs for reading and writing on small machines."""
    autocast: bool = True
    """Separate in 16 bits on a GPU."""
    decode_limit_s: float = 60.0
    """Decoding of a clip that takes longer is given up: the file is damaged or made to do harm."""
    max_failed_fraction: float = 0.5
    """A pass in which more of the queries fail stops early, with a summary of the reasons; 1 lets all fail."""

    def __post_init__(self) -> None:
        if self.clip_s > MAX_DURATION_S:
            raise ValueError(f"clip_s is {self.clip_s}; clips are held in memory, give {MAX_DURATION_S:g} s at most")
        for name in ("clip_s", "part_s", "batch_s", "rows_per_task", "min_actors", "num_cpus_per_actor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if not self.decode_limit_s > 0:
            raise ValueError(f"decode_limit_s is {self.decode_limit_s}; give seconds above 0")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction is {self.max_failed_fraction}; it is a fraction, 0 to 1")
        if self.max_actors is not None and self.max_actors < (self.min_actors or 1):
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}; raise it")

    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        names = ("clip_s", "min_clip_s", "min_labels", "reseparate", "rows_per_task", "part_s")
        return {name: getattr(self, name) for name in names}
