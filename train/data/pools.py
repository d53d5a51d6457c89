"""The sounds that a worker holds in memory, and crops of them.

Shape legend: R one row (a sound), or two (a track and the clip it is of); T samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio

from engine.audio.levels import active_mask, active_rms
from train.data.config import MixConfig
from train.data.items import Item

KINDS = ("clean", "tracks", "natural", "pairs", "absent")

_SPEEDS = ((1, 1), (4, 5), (9, 10), (10, 9), (5, 4))
_WINDOW_S = 0.1
_LEVEL = 0.1  # RMS that sources are brought to


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A loaded item with the windows in which it is active, and how far to trust it (:meth:`Item.weight`)."""

    labels: tuple[str, ...]
    labels_present: frozenset[str]
    clip: str
    samples_RT: np.ndarray
    active: np.ndarray
    weight: float


class Pool:
    """The sounds in memory, by first label; everything where it fits, else a part that rotates."""

    def __init__(
        self,
        items: Sequence[Item],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.rotates = sum(item.duration_s for item in items) > config.pool_s
        order = [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]
        self.items = _label_by_label(order[rank::num_ranks] if self.rotates else order)
        self.counts = Counter(item.labels[0] for item in items)  # of all, in memory or not
        self.turn = -1
        self.by_label: dict[str, list[Sound]] = {}
        self.unusable: set[str] = set()

    def prepare(self, step: int) -> None:
        """Hold what belongs to a step."""
        turn = step // self.config.refresh_steps if self.rotates else 0
        if turn != self.turn and self.items:
            self.turn, self.by_label = turn, {}
            for item in self._part(turn):
                self._add(item)

    def _part(self, turn: int) -> list[Item]:
        if not self.rotates:
            return self.items
        mean_s = sum(item.duration_s for item in self.items) / len(self.items)
        size = max(1, int(self.config.pool_s / mean_s))
        return [self.items[i % len(self.items)] for i in range(turn * size, turn * size + min(size, len(self.items)))]

    def _add(self, item: Item) -> None:
        try:
            samples_RT = np.atleast_2d(item.load())
        except (ValueError, OSError):
            self.unusable.add(item.clip)
            return
        active = np.flatnonzero(active_mask(samples_RT[0], sample_rate_hz=self.sample_rate_hz, window_s=_WINDOW_S))
        if not len(active):
            self.unusable.add(item.clip)
            return
        sound = Sound(
            labels=item.labels,
            labels_present=item.labels_present,
            clip=item.clip,
            samples_RT=samples_RT,
            active=active,
            weight=item.weight(self.config.quality_centre_db),
        )
        self.by_label.setdefault(item.labels[0], []).append(sound)


def _label_by_label(items: Sequence[Item]) -> list[Item]:
    """The same items with the labels taking turns, so that any part of a rotating pool holds as many as it can."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        turns.append(seen.get(item.labels[0], 0))
        seen[item.labels[0]] = turns[-1] + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


class Cropper:
    """Cuts sounds around an active moment, augments them and sets their level."""

    def __init__(self, config: MixConfig, *, sample_rate_hz: int) -> None:
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.num_samples = round(config.segment_s * sample_rate_hz)
        self.resample = {pair: torchaudio.transforms.Resample(*pair) for pair in _SPEEDS[1:]}

    def crop(self, rng: np.random.Generator, sound: Sound) -> np.ndarray:
        """A crop ``[R, T]`` where the first row is active; speed, colour and gain are the same for all rows.

        The level that a mixture gives it is that of the last row: the clip, where a sound comes with its clip.
        """
        up, down = _SPEEDS[rng.integers(len(_SPEEDS))] if self.config.augment else (1, 1)
        wanted = -(-self.num_samples * up // down) + 1
        window = round(_WINDOW_S * self.sample_rate_hz)
        active = int(sound.active[rng.integers(len(sound.active))]) * window
        first = active - int(rng.integers(max(1, wanted - window)))  # the active window lies wholly in the crop
        first = max(0, min(first, sound.samples_RT.shape[-1] - wanted))
        crop = torch.from_numpy(sound.samples_RT[:, first : first + wanted].copy())
        if up != down:
            crop = self.resample[up, down](crop)
        crop = torch.nn.functional.pad(crop, (0, max(0, self.num_samples - crop.shape[-1])))[:, : self.num_samples]
        samples_RT = self._colour(rng, crop.numpy())
        level = active_rms(samples_RT[-1], sample_rate_hz=self.sample_rate_hz)
        gain_db = rng.uniform(-self.config.gain_db, self.config.gain_db)
        levelled_RT: np.ndarray = samples_RT * (_LEVEL * 10.0 ** (gain_db / 20.0) / max(level, 1e-8))
        return levelled_RT.astype(np.float32)

    def _colour(self, rng: np.random.Generator, samples_RT: np.ndarray) -> np.ndarray:
        if not self.config.augment:
            return samples_RT
        spectra = torch.fft.rfft(torch.from_numpy(samples_RT))
        num_bins = spectra.shape[-1]
        knots_db = rng.normal(0.0, self.config.eq_db, 8)
        curve_db = np.interp(np.linspace(0.0, 7.0, num_bins), np.arange(8), knots_db).astype(np.float32)
        gains = torch.from_numpy(10.0 ** (curve_db / 20.0))
        coloured: np.ndarray = torch.fft.irfft(spectra * gains, samples_RT.shape[-1]).numpy()
        return coloured
