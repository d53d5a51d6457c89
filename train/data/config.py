"""How training mixtures are made and what is asked of them: the settings."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

MAX_QUERIES = 6  # of a mixture of two natural clips: the best of 2**6 assignments can still be tried

_SHARES = (
    *("three_source_fraction", "silence_rate", "clean_fraction", "natural_fraction"),
    *("clip_fraction", "mixit_fraction", "absent_fraction", "label_balance"),
)

QualityWeight = Literal["none", "loss", "draw"]
Assignment = Literal["labels", "best"]


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How training mixtures are made."""

    batch_size: int = 16
    """Mixtures in a step, on each worker."""
    segment_s: float = 2.0
    """Length of a training mixture."""
    three_source_fraction: float = 0.25
    """Share of remixes of three sources; the rest have two."""
    gain_db: float = 5.0
    """Sources are brought to equal level and then moved by up to this, up or down."""
    silence_rate: float = 0.05
    """Share of mixtures whose query names a sound that is not in them and whose target is silence (ClearSep)."""
    absent_fraction: float = 0.0
    """Share of those that are natural clips, asked for a label that the clip names but that the filter found absent."""
    clean_fraction: float = 0.5
    """Share of sources drawn from single-source clips where there are tracks too."""
    share_mixture: bool = True
    """Learn from tracks that divide their clip among its labels (``train/refine.py``), not from bare stems."""
    label_balance: float = 1.0
    """1: labels are drawn evenly; 0: as often as they have sounds; between: by that number to the power 1 - balance."""
    quality_weight: QualityWeight = "none"
    """Whether a track's estimated quality weighs its loss or its chance to be drawn among its label's tracks."""
    quality_centre_db: float = 0.0
    """Estimated SI-SDR at which a track weighs half; at 0 the weight is the share of its energy that is right."""
    augment: bool = True
    """Change speed (and pitch) by up to a quarter and colour the spectrum by some dB."""
    clip_fraction: float = 0.0
    """Share of mixtures that are a natural clip itself, asked for one label of which a stem was kept: the target."""
    mixit_fraction: float = 0.0
    """Share of mixtures of two natural clips that name nothing in common, each the target of all its labels."""
    mixit_assignment: Assignment = "labels"
    """Whose labels' stems add up to which of those two clips: as labelled, or as fits best (MixIT, 2006.12701)."""
    natural_fraction: float = 0.0
    """Share of the other mixtures whose target is a whole natural clip: the stems of all its labels add up to it."""
    consistency_weight: float = 0.0
    """Weight of a loss of the sum of all stems against the mixture, where it is natural clips and all are asked for."""
    eq_db: float = 3.0
    """Standard deviation of the random colouring."""
    pool_s: float = 7200.0
    """Audio held in memory by a worker, of each kind of sound; beyond it a pool rotates."""
    refresh_steps: int = 200
    """Steps after which a pool that does not hold everything is filled anew."""

    def __post_init__(self) -> None:
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")
        if self.clip_fraction + self.mixit_fraction > 1.0:
            together = self.clip_fraction + self.mixit_fraction
            raise ValueError(f"clip_fraction and mixit_fraction are {together} together; give shares of 1 at most")
        for name in ("batch_size", "segment_s", "pool_s", "refresh_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.consistency_weight < 0:
            raise ValueError(f"consistency_weight is {self.consistency_weight}; give 0 (off) or more")
        for name, kinds in (("quality_weight", QualityWeight), ("mixit_assignment", Assignment)):
            if getattr(self, name) not in typing.get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(typing.get_args(kinds))}")
