"""Sounds that can be loaded to make mixtures: single-source clips, tracks, and tracks with the clip they are from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from engine.audio.decoder import shared_decoder
from engine.audio.levels import is_silent
from engine.audio.loading import Loader
from engine.corpus.sources import SourceClips
from engine.errors import AudioError, SilentError
from engine.passes.shards import read_audio, read_clip
from engine.schema import plain_label
from engine.scoring.sharing import share_mixture
from engine.selection.tracks import read_events, read_tracks
from engine.storage.paths import Location, Name


class TrackRow(TypedDict):
    """One row of a selection's index, with the columns that training needs."""

    shard: str
    row: int
    first_row: int
    num_stems: int
    clip_id: str
    labels: list[str]
    label: str
    sample_rate_hz: int
    num_samples: int
    estimated_si_sdr_db: float | None
    estimated_error_db: float | None


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sound that can be loaded."""

    labels: tuple[str, ...]
    """Labels of the sound itself."""
    labels_present: frozenset[str]
    """Labels of the clip that the sound is from: a track may contain leakage of each of them."""
    clip: str
    """Name of that clip."""
    duration_s: float
    """Audio that the loaded samples keep in memory, in seconds."""
    load: Callable[[], np.ndarray]
    """Returns samples ``[T]``, or ``[2, T]``: a track and its clip."""
    estimated_si_sdr_db: float | None = None
    """Estimated SI-SDR of a track against the unknown true source; None if there is no estimate."""
    estimated_error_db: float | None = None
    """Standard deviation of that estimate."""
    weight: float = 1.0
    """Weight in the loss: of a single event, the probability that its label sounds alone."""


def clean_items(
    clean: SourceClips, *, sample_rate_hz: int, max_s: float = 30.0, loader: Loader | None = None
) -> list[Item]:
    """Single-source clips; only the first ``max_s`` seconds of each are used.

    A clip whose header cannot be read becomes an item as well: the pool counts it as unusable.
    """

    def item(clip: tuple[str, str]) -> Item:
        path, label = clip
        try:
            duration_s = min(shared_decoder().probe(path).duration_s, max_s)
            load = functools.partial(_load_clean, path, sample_rate_hz, max_s)
        except AudioError as error:  # it may have taken the decoder's time limit: once is enough
            duration_s, load = 0.0, functools.partial(_fail, error)
        return Item(labels=(label,), labels_present=frozenset([label]), clip=path, duration_s=duration_s, load=load)

    return (loader or Loader()).map(item, zip(clean.table["path"].to_pylist(), clean.labels, strict=True))


def _load_clean(path: str, sample_rate_hz: int, max_s: float) -> np.ndarray:
    samples_T = shared_decoder().decode(path, sample_rate_hz=sample_rate_hz, duration_s=max_s)
    if is_silent(samples_T, sample_rate_hz=sample_rate_hz):
        raise SilentError(f"{path} must contain sound, got silence; remove it from the single-source clips")
    return samples_T


def _fail(error: AudioError) -> np.ndarray:
    raise error


def track_items(tracks: Name, *, sample_rate_hz: int, share: bool = True) -> list[Item]:
    """Tracks of a selection; with ``share`` they divide their clip among its labels.

    Raises ``ValueError`` for a selection of another sample rate.
    """
    index, stems = read_tracks(tracks)
    items = []
    for row in index.to_pylist():
        check_rate(tracks, row, sample_rate_hz)
        items.append(track_item(row, functools.partial(_load_track, stems, row, share)))
    return items


def pair_items(tracks: Name, *, sample_rate_hz: int, share: bool = True) -> list[Item]:
    """The same tracks, each with its clip: natural mixtures with a target.

    Raises ``ValueError`` for a selection of another sample rate.
    """
    index, stems = read_tracks(tracks)
    items = []
    for row in index.to_pylist():
        check_rate(tracks, row, sample_rate_hz)
        items.append(track_item(row, functools.partial(_load_pair, stems, row, share), num_signals=2))
    return items


def event_items(tracks: Name, *, sample_rate_hz: int) -> list[Item]:
    """Single events of a selection as clips of their label, purest first; their weight is their purity.

    Raises ``ValueError`` for a selection of another sample rate.
    """
    index, stems = read_events(tracks)
    items = []
    for row in index.sort_by([("purity_fraction", "descending"), ("clip_id", "ascending")]).to_pylist():
        check_rate(tracks, row, sample_rate_hz)
        item, present = track_item(row, functools.partial(load_clip, stems, row)), {*row["labels"], row["label"]}
        items.append(replace(item, labels_present=frozenset(present), weight=row["purity_fraction"]))
    return items


def check_rate(tracks: Name, row: TrackRow, sample_rate_hz: int) -> None:
    """Raise ``ValueError`` if a stem has another sample rate than the separator that learns from it."""
    if row["sample_rate_hz"] != sample_rate_hz:
        raise ValueError(
            f"tracks in {tracks} must have the separator's sample rate of {sample_rate_hz} Hz, got "
            f"{row['sample_rate_hz']} Hz; select tracks of a pass at that rate"
        )


def track_item(row: TrackRow, load: Callable[[], np.ndarray], *, num_signals: int = 1) -> Item:
    """The item of one row of a selection's index; an index written by an older version has no estimates."""
    return Item(
        labels=(row["label"],),
        labels_present=frozenset(row["labels"]),
        clip=row["clip_id"],
        duration_s=num_signals * row["num_samples"] / row["sample_rate_hz"],
        load=load,
        estimated_si_sdr_db=row.get("estimated_si_sdr_db"),
        estimated_error_db=row.get("estimated_error_db"),
    )


def load_clip(stems: Location, row: TrackRow) -> np.ndarray:
    """The whole clip ``[T]`` that a stem is from."""
    mixture_T, _ = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
    return mixture_T


def _load_track(stems: Location, row: TrackRow, share: bool) -> np.ndarray:
    """A track as separated, or its part of the clip if every label of the clip has a stem."""
    if not share or row["num_stems"] < max(2, len(row["labels"])):
        return read_audio(stems, row["shard"], [row["row"]])[0]
    track_T: np.ndarray = _load_pair(stems, row, share)[0]
    return track_T


def _load_pair(stems: Location, row: TrackRow, share: bool) -> np.ndarray:
    """The same track and its clip, ``[2, T]``."""
    rows = (row["shard"], row["first_row"], row["num_stems"])
    among = frozenset(map(plain_label, row["labels"])) if share else None
    mixture_T, parts = _divided_clip(stems, *rows, row["sample_rate_hz"], among)
    return np.stack([parts[row["label"]], mixture_T])


@functools.lru_cache(maxsize=16)  # the tracks of a clip are loaded together, by each thread of a loader
def _divided_clip(
    stems: Location, shard: str, first_row: int, num_stems: int, sample_rate_hz: int, among: frozenset[str] | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A clip and its stems; those of the labels ``among`` which it is divided, in plain spelling, if all have one.

    A stem of another label, which was only queried to find out whether it sounds, has no part in the clip.
    """
    mixture_T, found = read_clip(stems, shard, first_row=first_row, num_stems=num_stems)
    own = {label: stem_T for label, stem_T in found.items() if among is not None and plain_label(label) in among}
    if among is None or len(own) < max(2, len(among)):
        return mixture_T, found
    parts_ST = share_mixture(
        mixture_T=torch.from_numpy(mixture_T),
        stems_ST=torch.from_numpy(np.stack([*own.values()])),
        sample_rate_hz=sample_rate_hz,
    )
    return mixture_T, found | dict(zip(own, parts_ST.numpy(), strict=True))
