"""Sounds that a worker keeps in memory, and random crops of them.

Shape legend: R signals of a sound: one, or two (a track and its clip); T samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchaudio

from engine.audio.levels import active_mask, active_rms
from engine.errors import DamagedError
from engine.storage.retry import is_transient
from train.data.items import Item

if TYPE_CHECKING:
    from train.data.config import MixConfig

_SPEEDS = ((1, 1), (4, 5), (9, 10), (10, 9), (5, 4))
_WINDOW_S = 0.1
_LEVEL = 0.1  # RMS that sources are brought to, relative to full scale


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A loaded item."""

    item: Item
    """The item that it was loaded from."""
    samples_RT: np.ndarray
    """Its samples."""
    active: np.ndarray
    """Numbers of the windows in which the first signal is active."""


class Pool:
    """Sounds in memory by their first label: all sounds if they fit, else a part that rotates."""

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
        self.counts = Counter(item.labels[0] for item in items)  # of all sounds, in memory or not
        self.turn = -1
        self.by_label: dict[str, list[Sound]] = {}
        self.unusable: set[str] = set()
        self._failed: set[Item] = set()  # each may have taken the decoder's time limit: once is enough

    def prepare(self, step: int) -> None:
        """Load the sounds that belong to a step."""
        turn = step // self.config.refresh_steps if self.rotates else 0
        if turn != self.turn and self.items:
            self.turn, self.by_label = turn, {}
            for item in self._items_of(turn):
                self._add(item)

    def _items_of(self, turn: int) -> list[Item]:
        if not self.rotates:
            return self.items
        mean_s = sum(item.duration_s for item in self.items) / len(self.items)
        size = max(1, int(self.config.pool_s / mean_s))
        return [self.items[i % len(self.items)] for i in range(turn * size, turn * size + min(size, len(self.items)))]

    def _add(self, item: Item) -> None:
        if item in self._failed:
            return
        try:
            samples_RT = np.atleast_2d(item.load())
        except DamagedError as error:  # no file of the user's: the pass can make it again
            cause = str(error).partition("; ")[0]
            raise DamagedError(
                f"cannot load {', '.join(map(repr, item.labels))} of clip {item.clip} ({cause}); "
                "start the command of its pass again, which replaces what is damaged"
            ) from error
        except (ValueError, OSError) as error:
            self.unusable.add(item.clip)
            if not is_transient(error):
                self._failed.add(item)
            return
        active = np.flatnonzero(active_mask(samples_RT[0], sample_rate_hz=self.sample_rate_hz, window_s=_WINDOW_S))
        if not len(active):
            self.unusable.add(item.clip)
            return
        sound = Sound(item=item, samples_RT=samples_RT, active=active)
        self.by_label.setdefault(item.labels[0], []).append(sound)


def _label_by_label(items: Sequence[Item]) -> list[Item]:
    """The same items with the labels taking turns, so that every part of a rotating pool has many labels."""
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
        """A crop ``[R, T]`` in which the first signal is active; all signals get the same speed, colour and gain.

        The gain brings the last signal to the drawn level: the clip, if the sound is a track with its clip.
        """
        up, down = _SPEEDS[rng.integers(len(_SPEEDS))] if self.config.augment else (1, 1)
        wanted = -(-self.num_samples * up // down) + 1
        window = round(_WINDOW_S * self.sample_rate_hz)
        active = int(sound.active[rng.integers(len(sound.active))]) * window
        first = active - int(rng.integers(max(1, wanted - window)))  # the crop contains all of the active window
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
