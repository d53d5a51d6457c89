"""Settings of the training mixtures."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from engine.settings import NEWER, Count, Fraction, NonNegative, Positive, config
from train.data.query_variation import QueryVariation
from train.data.strategies.absent_labels import AbsentLabels
from train.data.strategies.consistency import Consistency
from train.data.strategies.estimate_weights import EstimateWeights
from train.data.strategies.label_balance import LabelBalance
from train.data.strategies.mixit import MixIt
from train.data.strategies.natural_targets import NaturalTargets
from train.data.strategies.self_remix import SelfRemix


@config
class MixConfig:
    """Training mixtures. The last six settings are ablations; null switches each off."""

    batch_size: Count = 16
    """Mixtures in a step, on each worker."""
    segment_s: Positive = 2.0
    """Length of a training mixture, in seconds."""
    three_source_fraction: Fraction = 0.25
    """Fraction of remixes with three sources; the others have two."""
    gain_db: NonNegative = 5.0
    """Sources are brought to equal level and then moved up or down by at most this."""
    silence_rate: Fraction = 0.05
    """Fraction of mixtures whose query names a sound that they do not contain; the target is silence (ClearSep)."""
    rivals_rate: Fraction = 0.8
    """Fraction of mixtures whose query names the other sounds as unwanted, as a pass does; the others keep the student
    able to answer a label alone."""
    clean_fraction: Fraction = 0.5
    """Fraction of sources drawn from single-source clips where a label has both clips and tracks."""
    max_events_ratio: Annotated[NonNegative, NEWER] = 4.0
    """Single events of a label that join its clean clips, at most, for each of these; the purest are taken.

    A label without clean clips gets as many as the median label has room for. 0: none.
    """
    share_mixture: bool = True
    """Learn from tracks that divide their clip among its labels (``engine/scoring/sharing.py``), not from stems."""
    augment: bool = True
    """Change the speed (and with it the pitch) by up to a quarter and colour the spectrum by some dB."""
    clip_fraction: Fraction = 0.0
    """Fraction of mixtures that are a natural clip; the query is one of its labels and the target the kept track."""
    eq_db: NonNegative = 3.0
    """Standard deviation of the random colouring."""
    pool_s: Positive = 7200.0
    """Audio of each kind that a worker keeps in memory, in seconds; a larger pool rotates."""
    refresh_steps: Count = 200
    """Steps after which a rotating pool loads its next part."""
    query_variation: Annotated[QueryVariation, NEWER] = field(default_factory=QueryVariation)
    """Variation of queries in text, for students that read it."""
    self_remix: Annotated[SelfRemix | None, NEWER] = None
    """Separate two natural clips, exchange their stems, separate again, and learn to add up to the clips
    (Self-Remixing, arXiv 2211.10194). A step takes longer, and on a GPU it cannot be replayed as a graph."""
    natural_targets: NaturalTargets | None = None
    """Remix natural clips whose whole mixture is the target."""
    mixit: MixIt | None = None
    """Mix two natural clips and learn both as targets (MixIT, arXiv 2006.12701)."""
    consistency: Consistency | None = None
    """Add the loss of the sum of all stems against the mixture."""
    estimate_weights: EstimateWeights | None = None
    """Weight tracks by their estimated SI-SDR."""
    absent_labels: AbsentLabels | None = None
    """Learn silence from labels that the filter found absent from their own clip."""
    label_balance: LabelBalance | None = None
    """Draw labels by how many sounds they have; null: evenly."""

    def __post_init__(self) -> None:
        for name in ("mixit", "consistency"):
            if getattr(self, name) is not None and self.self_remix is not None:
                raise ValueError(
                    f"one of {name} and self_remix must be null, got both; set distil.mix.self_remix=null, or leave "
                    f"{name} out"
                )
        for name, pairs in (("mixit", self.mixit), ("self_remix", self.self_remix)):
            if pairs is not None and (together := self.clip_fraction + pairs.fraction) > 1.0:
                raise ValueError(
                    f"clip_fraction and {name}.fraction must be at most 1 together, got {together}; lower one of them"
                )
