"""What can be loaded to make mixtures: clean clips, tracks, natural clips, and both at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.audio.decode import decode, probe
from engine.corpus.sources import part_of, read_sources
from engine.errors import AudioError
from engine.passes.shards import read_audio, read_clip
from engine.selection.tracks import read_absent, read_tracks
from engine.storage.paths import Location, Name
from train.data.sharing import share_mixture


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sound that can be loaded.

    ``labels`` are what it is, ``heard`` what its clip names: a track may hold some of every sound of its clip.
    ``load`` gives samples ``[T]``, or ``[2, T]``: a track and the clip it is of. ``duration_s`` is what that holds in
    memory. The estimate is of a track against the truth that nobody has, with its standard deviation; None: not known.
    """

    labels: tuple[str, ...]
    labels_present: frozenset[str]
    clip: str
    duration_s: float
    load: Callable[[], np.ndarray]
    estimated_si_sdr_db: float | None = None
    estimated_error_db: float | None = None

    def weight(self, centre_db: float) -> float:
        """How far to trust it, 0 to 1; 1 where there is no estimate.

        The expectation of ``1 / (1 + 10 ** ((centre - SI-SDR) / 10))``, which for a centre of 0 dB is the share of the
        energy that is right, over the estimate's normal error (MacKay 1992).
        """
        if self.estimated_si_sdr_db is None or math.isnan(self.estimated_si_sdr_db):
            return 1.0
        error = (self.estimated_error_db or 0.0) * math.log(10.0) / 10.0
        narrower = 1.0 / math.sqrt(1.0 + math.pi * error**2 / 8.0)
        return float(1.0 / (1.0 + 10.0 ** (narrower * (centre_db - self.estimated_si_sdr_db) / 10.0)))


def clean_items(
    path: Name,
    *,
    folds: Sequence[int] | None,
    sample_rate_hz: int,
    max_s: float = 30.0,
    without: tuple[int, int] | None = None,
) -> list[Item]:
    """Single-source clips of a CSV ``path,label[,fold]``; only the first ``max_s`` seconds of each are used.

    ``without`` (k, n) leaves out the kth of n parts of each label's clips.

    A clip whose header cannot be read is an item all the same: the pool counts it as unusable.
    """

    def item(source: str, label: str) -> Item:
        try:
            duration_s = min(probe(source).duration_s, max_s)
        except (AudioError, OSError):
            duration_s = 0.0
        load = functools.partial(decode, source, sample_rate_hz=sample_rate_hz, duration_s=max_s)
        return Item(labels=(label,), labels_present=frozenset([label]), clip=source, duration_s=duration_s, load=load)

    sources = read_sources(path, folds=folds)
    if without is not None:
        sources = part_of(sources, *without, inside=False)
    return [item(row["path"], row["label"]) for row in sources.to_pylist()]


def track_items(tracks: Name, *, sample_rate_hz: int, share: bool = True) -> list[Item]:
    """The tracks of a selection, shared out of their clips or as separated; ``ValueError`` if of another rate."""
    index, stems = read_tracks(tracks)
    items = []
    for row in index.to_pylist():
        _check_rate(tracks, row, sample_rate_hz)
        items.append(_item(row, functools.partial(_load_track, stems, row, share)))
    return items


def pair_items(tracks: Name, *, sample_rate_hz: int, share: bool = True) -> list[Item]:
    """The same tracks, each with the clip it is of: natural mixtures with a target; ``ValueError`` likewise."""
    index, stems = read_tracks(tracks)
    items = []
    for row in index.to_pylist():
        _check_rate(tracks, row, sample_rate_hz)
        items.append(_item(row, functools.partial(_load_pair, stems, row, share), num_signals=2))
    return items


def absent_items(tracks: Name, *, sample_rate_hz: int) -> list[Item]:
    """The clips of which the filter found a label absent, once for each such label; ``ValueError`` likewise."""
    index, stems = read_absent(tracks)
    items = []
    for row in index.to_pylist():
        _check_rate(tracks, row, sample_rate_hz)
        items.append(_item(row, functools.partial(_load_clip, stems, row)))
    return items


def natural_items(tracks: Name, *, sample_rate_hz: int) -> list[Item]:
    """The whole clips of which a selection kept a stem, where every label of the clip has one: their truth is known."""
    index, stems = read_tracks(tracks)
    items: dict[str, Item] = {}
    for row in index.to_pylist():
        if row["num_stems"] == len(row["labels"]) >= 2:
            labels = tuple(row["labels"])
            items[row["clip_id"]] = Item(
                labels=labels,
                labels_present=frozenset(labels),
                clip=row["clip_id"],
                duration_s=row["num_samples"] / sample_rate_hz,
                load=functools.partial(_load_clip, stems, row),
            )
    return list(items.values())


def _check_rate(tracks: Name, row: dict[str, Any], sample_rate_hz: int) -> None:
    if row["sample_rate_hz"] != sample_rate_hz:
        raise ValueError(f"tracks in {tracks} are at {row['sample_rate_hz']} Hz, the separator wants {sample_rate_hz}")


def _item(row: dict[str, Any], load: Callable[[], np.ndarray], *, num_signals: int = 1) -> Item:
    """An item of one row of an index; an older index has no estimates."""
    return Item(
        labels=(row["label"],),
        labels_present=frozenset(row["labels"]),
        clip=row["clip_id"],
        duration_s=num_signals * row["num_samples"] / row["sample_rate_hz"],
        load=load,
        estimated_si_sdr_db=row.get("estimated_si_sdr_db"),
        estimated_error_db=row.get("estimated_error_db"),
    )


def _load_clip(stems: Location, row: dict[str, Any]) -> np.ndarray:
    mixture_T, _ = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
    return mixture_T


def _load_track(stems: Location, row: dict[str, Any], share: bool) -> np.ndarray:
    """A track as it was separated, or its share of the clip where every label of the clip has a stem."""
    if not share or not _divides(row):
        return read_audio(stems, row["shard"], [row["row"]])[0]
    track_T: np.ndarray = _load_pair(stems, row, share)[0]
    return track_T


def _load_pair(stems: Location, row: dict[str, Any], share: bool) -> np.ndarray:
    """The same and its clip, ``[2, T]``."""
    place = {"first_row": row["first_row"], "num_stems": row["num_stems"]}
    mixture_T, stems_ST = read_clip(stems, row["shard"], **place)
    if share and _divides(row):
        stems_ST = share_mixture(
            mixture_T=torch.from_numpy(mixture_T),
            stems_ST=torch.from_numpy(stems_ST),
            sample_rate_hz=row["sample_rate_hz"],
        ).numpy()
    return np.stack([stems_ST[row["row"] - row["first_row"]], mixture_T])


def _divides(row: dict[str, Any]) -> bool:
    """Whether every label of a clip has a stem, so that they can compete for it."""
    return bool(row["num_stems"] >= max(2, len(row["labels"])))
