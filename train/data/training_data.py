"""Training data, and the mixer that draws from it; knows no Ray."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from engine.audio.loading import Loader
from engine.corpus.sources import SourceClips
from engine.schema import plain_label
from engine.separators import Embeddings, read_description
from engine.storage.paths import Name
from train.data.config import MixConfig
from train.data.items import Item, clean_items, event_items, pair_items, track_items
from train.data.mixer import Mixer
from train.data.pools import Pool
from train.data.strategies.compose import extra_items, mixer_class


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Single-source clips, tracks or both, for a student to learn from."""

    clean: SourceClips | None = None
    """Single-source clips; None: none."""
    tracks: Name | None = None
    """Folder of tracks that the filter selected; None: none."""

    def __post_init__(self) -> None:
        if self.clean is None and self.tracks is None:
            raise ValueError("training data must have clean clips or tracks, got neither; give at least one of them")


def make_mixer(
    data: TrainingData,
    mix: MixConfig,
    *,
    seed: int,
    sample_rate_hz: int,
    rank: int = 0,
    num_ranks: int = 1,
    start: str | None = None,
    embeddings: Embeddings | None = None,
    device: torch.device | None = None,
) -> Mixer:
    """The mixer of a worker; its labels are those of the checkpoint ``start``, then the others of the training data.

    Its batches are on ``device``; None: the CPU. ``embeddings`` has those of all labels, for a student that reads text.
    Raises ``ValueError`` for tracks that cannot be read or have another sample rate.
    """
    loader = Loader()
    items = _items(data, mix, sample_rate_hz=sample_rate_hz)
    spelling = _spelling(items, data, start)
    if data.clean is not None:
        items["clean"] += clean_items(data.clean, sample_rate_hz=sample_rate_hz, loader=loader)
    pools = {
        kind: Pool(
            _spelled(some, spelling),
            mix,
            sample_rate_hz=sample_rate_hz,
            seed=seed,
            rank=rank,
            num_ranks=num_ranks,
            device=device,
            loader=loader,
        )
        for kind, some in items.items()
    }
    kind, labels = mixer_class(mix), list(spelling.values())
    vectors_LE = embeddings.of(labels).numpy() if embeddings is not None else None
    return kind(
        pools, labels, mix, sample_rate_hz=sample_rate_hz, seed=seed, rank=rank, vectors_LE=vectors_LE, device=device
    )


def training_labels(data: TrainingData, mix: MixConfig, *, sample_rate_hz: int, start: str | None = None) -> list[str]:
    """The labels of :func:`make_mixer`, without opening a clip; raises the same errors."""
    return list(_spelling(_items(data, mix, sample_rate_hz=sample_rate_hz), data, start).values())


def _spelling(items: Mapping[str, Sequence[Item]], data: TrainingData, start: str | None) -> dict[str, str]:
    """Labels as the separator spells them, by what they are called plainly."""
    known = list(read_description(start)["labels"]) if start else []
    found = {label for kind, some in items.items() if kind != "absent" for item in some for label in item.labels}
    found.update(data.clean.labels if data.clean is not None else ())
    spelling: dict[str, str] = {}
    for label in (*known, *sorted(found)):
        spelling.setdefault(plain_label(label), label)
    return spelling


def _items(data: TrainingData, mix: MixConfig, *, sample_rate_hz: int) -> dict[str, list[Item]]:
    """Items of the tracks by pool; a pool that the settings do not use is empty."""
    items: dict[str, list[Item]] = {"clean": [], "tracks": [], "pairs": []}
    if data.tracks is None:
        return items | {"natural": [], "absent": []}
    if mix.max_events_ratio > 0.0:
        events = event_items(data.tracks, sample_rate_hz=sample_rate_hz)
        items["clean"] = capped_events(events, data.clean.labels if data.clean else (), mix.max_events_ratio)
    items["tracks"] = track_items(data.tracks, sample_rate_hz=sample_rate_hz, share=mix.share_mixture)
    if mix.clip_fraction > 0.0:
        items["pairs"] = pair_items(data.tracks, sample_rate_hz=sample_rate_hz, share=mix.share_mixture)
    return items | extra_items(data.tracks, mix, sample_rate_hz=sample_rate_hz)


def capped_events(events: Sequence[Item], clean: Sequence[str], ratio: float) -> list[Item]:
    """The first events of each label, at most ``ratio`` for each of its ``clean`` clips.

    A label without clean clips has as much room as the median label that has some, or, where no label has, the median
    number of events.
    """
    num_events = Counter(plain_label(event.labels[0]) for event in events)
    room = {label: ratio * num for label, num in Counter(map(plain_label, clean)).items()}
    median = statistics.median([*room.values()] or [*num_events.values()] or [0])
    taken = Counter[str]()
    kept: list[Item] = []
    for event in events:
        label = plain_label(event.labels[0])
        taken[label] += 1
        if taken[label] <= room.get(label, median):
            kept.append(event)
    return kept


def _spelled(items: Sequence[Item], spelling: dict[str, str]) -> list[Item]:
    """The same items with their labels spelled as the separator spells them.

    Items of labels that only occur as absent are left out: the separator would learn that they never sound.
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
