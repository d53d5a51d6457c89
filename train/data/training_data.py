"""From lists and selections to a mixer: what a training learns from, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.schema import plain_label
from engine.separators import read_description
from train.data.config import MixConfig
from train.data.items import Item, absent_items, clean_items, natural_items, pair_items, track_items
from train.data.mixer import Mixer
from train.data.pools import KINDS, Pool


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a distillation learns from; at least one of the two."""

    clean: str | None = None
    """CSV ``path,label[,fold]`` of single-source clips, or a folder of folders by label."""
    clean_folds: tuple[int, ...] | None = None
    """Folds of ``clean``; null: all."""
    clean_without: tuple[int, int] | None = None
    """Leave out the kth of n parts of each label's clips, (k, n): what a calibration holds out."""
    tracks: str | None = None
    """A selection made by the filter."""

    def __post_init__(self) -> None:
        if self.clean is None and self.tracks is None:
            raise ValueError("nothing to learn from; give single-source clips or tracks")


def make_mixer(
    training_data: TrainingData,
    mix: MixConfig,
    *,
    seed: int,
    sample_rate_hz: int,
    rank: int = 0,
    num_ranks: int = 1,
    start: str | None = None,
) -> Mixer:
    """The mixer of a worker, with the labels of the checkpoint ``start`` first and those of the material after them.

    ``ValueError`` for lists and selections that cannot be read, or of another rate.
    """
    items = _items(training_data, mix, sample_rate_hz=sample_rate_hz)
    known = list(read_description(start)["labels"]) if start else []
    found = {label for kind in KINDS if kind != "absent" for item in items[kind] for label in item.labels}
    spelling: dict[str, str] = {}
    for label in (*known, *sorted(found)):
        spelling.setdefault(plain_label(label), label)
    pools = {
        kind: Pool(
            _spelled(some, spelling), mix, sample_rate_hz=sample_rate_hz, seed=seed, rank=rank, num_ranks=num_ranks
        )
        for kind, some in items.items()
    }
    return Mixer(pools, list(spelling.values()), mix, sample_rate_hz=sample_rate_hz, seed=seed, rank=rank)


def _items(training_data: TrainingData, mix: MixConfig, *, sample_rate_hz: int) -> dict[str, list[Item]]:
    """Items by kind; of the kinds that the mix has no use for, none."""
    items: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    if training_data.clean is not None:
        items["clean"] = clean_items(
            training_data.clean,
            folds=training_data.clean_folds,
            sample_rate_hz=sample_rate_hz,
            without=training_data.clean_without,
        )
    if training_data.tracks is None:
        return items
    items["tracks"] = track_items(training_data.tracks, sample_rate_hz=sample_rate_hz, share=mix.share_mixture)
    if mix.natural_fraction > 0.0 or mix.mixit_fraction > 0.0:
        items["natural"] = natural_items(training_data.tracks, sample_rate_hz=sample_rate_hz)
    if mix.clip_fraction > 0.0:
        items["pairs"] = pair_items(training_data.tracks, sample_rate_hz=sample_rate_hz, share=mix.share_mixture)
    if mix.silence_rate * mix.absent_fraction > 0.0:
        items["absent"] = absent_items(training_data.tracks, sample_rate_hz=sample_rate_hz)
    return items


def _spelled(items: Sequence[Item], spelling: dict[str, str]) -> list[Item]:
    """The same sounds with their labels as the separator writes them.

    Left out are those of labels that it has no sound of, only their absence: it would learn that they never sound.
    """
    return [
        replace(
            item,
            labels=tuple(spelling[plain_label(label)] for label in item.labels),
            labels_present=frozenset(spelling.get(plain_label(label), label) for label in item.labels_present),
        )
        for item in items
        if all(plain_label(label) in spelling for label in item.labels)
    ]
