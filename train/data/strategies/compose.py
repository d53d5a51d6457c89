"""The mixer, the loss and the sounds of the ablations that a config switches on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from engine.separators import QuerySeparator
from engine.storage.paths import Name
from train.data.batch import Batch
from train.data.items import Item
from train.data.mixer import Mixer
from train.data.strategies.absent_labels import AbsentLabelMixer, absent_items
from train.data.strategies.consistency import ConsistencyMixer, with_consistency
from train.data.strategies.estimate_weights import EstimateWeightMixer
from train.data.strategies.label_balance import LabelBalanceMixer
from train.data.strategies.mixit import MixItMixer, mixit_loss
from train.data.strategies.natural_targets import NaturalTargetMixer, natural_items
from train.data.strategies.self_remix import self_remixed
from train.losses import batch_loss

if TYPE_CHECKING:
    from train.data.config import MixConfig

_MIXERS: dict[str, type[Mixer]] = {
    "absent_labels": AbsentLabelMixer,
    "mixit": MixItMixer,
    "self_remix": MixItMixer,
    "natural_targets": NaturalTargetMixer,
    "consistency": ConsistencyMixer,
    "estimate_weights": EstimateWeightMixer,
    "label_balance": LabelBalanceMixer,
}
"""Subclass of the mixer for each setting; each overrides other methods than the rest."""


def mixer_class(mix: MixConfig) -> type[Mixer]:
    """:class:`Mixer`, with the methods of the ablations that are on."""
    chosen = dict.fromkeys(kind for name, kind in _MIXERS.items() if getattr(mix, name) is not None)
    return type("AblationMixer", (*chosen, Mixer), {}) if chosen else Mixer


def loss_of(mix: MixConfig) -> Callable[[Batch, Tensor], Tensor]:
    """:func:`batch_loss`, with the changes of the ablations that are on."""
    loss = mixit_loss if mix.mixit is not None and mix.mixit.assignment == "best" else batch_loss
    return loss if mix.consistency is None else with_consistency(loss, mix.consistency.weight)


def prepared(mix: MixConfig, batch: Batch, average: QuerySeparator) -> Batch:
    """The batch as the student learns from it, with the changes that need the moving average of its weights."""
    return batch if mix.self_remix is None else self_remixed(batch, average)


def extra_items(tracks: Name, mix: MixConfig, *, sample_rate_hz: int) -> dict[str, list[Item]]:
    """Sounds of a selection that only the ablations that are on use, by the name of their pool."""
    items = {}
    if mix.natural_targets is not None or mix.mixit is not None or mix.self_remix is not None:
        items["natural"] = natural_items(tracks, sample_rate_hz=sample_rate_hz)
    if mix.absent_labels is not None:
        items["absent"] = absent_items(tracks, sample_rate_hz=sample_rate_hz) if learns_absence(mix) else []
    return items


def learns_absence(mix: MixConfig) -> bool:
    """True if some targets come from stems that the filter rejected as absent."""
    return mix.absent_labels is not None and mix.silence_rate * mix.absent_labels.fraction > 0.0
