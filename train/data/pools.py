"""Sounds that a worker keeps in memory, and random crops of them.

Shape legend: R signals of a sound: one, or two (a track and its clip); T samples of it; N samples of all sounds.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from engine.audio.levels import active_mask
from engine.audio.loading import Loader
from engine.errors import DamagedError
from engine.storage.retry import is_transient
from train.data.drawn import NUM_KNOTS, SPEEDS, Crop, crop_width
from train.data.items import Item

if TYPE_CHECKING:
    from train.data.config import MixConfig

_WINDOW_S = 0.1
_LEVEL = 0.1  # RMS that sources are brought to, relative to full scale
_CARD_FRACTION = 1 / 8  # of a card's free memory that a pool may take; a rotating one is there twice for a moment
_CHUNK_SAMPLES = 1 << 24  # sent at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Sound:
    """A loaded item."""

    item: Item
    """The item that it was loaded from."""
    samples_N: Tensor
    """The sounds of its pool."""
    first: int
    """Number of its first sample among them; its signals follow each other."""
    num_samples: int
    """Length of each signal."""
    num_signals: int
    """One, or two: a track and its clip."""
    active: np.ndarray
    """Numbers of the windows in which the first signal is active."""


class Pool:
    """Sounds in memory by their first label: all sounds if they fit, else a part that rotates.

    They are one tensor, on the device of the training if it has room.
    """

    def __init__(
        self,
        items: Sequence[Item],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
        num_ranks: int,
        device: torch.device | None = None,
        loader: Loader | None = None,
    ) -> None:
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.device, self.loader = device or torch.device("cpu"), loader or Loader()
        self.rotates = sum(item.duration_s for item in items) > config.pool_s
        order = [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]
        self.items = _label_by_label(order[rank::num_ranks] if self.rotates else order)
        self._ranks = (rank, num_ranks) if not self.rotates and torch.distributed.is_initialized() else (0, 1)
        self.counts = Counter(item.labels[0] for item in items)  # of all sounds, in memory or not
        self.turn = -1
        self.by_label: dict[str, list[Sound]] = {}
        self.unusable: set[str] = set()
        self._failed: set[Item] = set()  # each may have taken the decoder's time limit: once is enough

    def prepare(self, step: int) -> bool:
        """Load the sounds that belong to a step; True if they are others than before."""
        turn = step // self.config.refresh_steps if self.rotates else 0
        if turn == self.turn or not self.items:
            return False
        self.turn, self.by_label = turn, {}
        self._load([item for item in self._items_of(turn) if item not in self._failed])
        if not self.rotates:
            self.loader.close()
        return True

    def _items_of(self, turn: int) -> list[Item]:
        if not self.rotates:
            return self.items
        mean_s = sum(item.duration_s for item in self.items) / len(self.items)
        size = max(1, int(self.config.pool_s / mean_s))
        return [self.items[i % len(self.items)] for i in range(turn * size, turn * size + min(size, len(self.items)))]

    def _load(self, items: Sequence[Item]) -> None:
        """Load items into a new tensor; those of one clip together, by one thread.

        Ranks that need the same sounds load a part each and send it to the others.
        """
        num_samples = sum(math.ceil(item.duration_s * self.sample_rate_hz) for item in items)
        store = _Store(num_samples, self.config.segment_s * self.sample_rate_hz, self.device)
        clips: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            clips.setdefault(item.clip, []).append(number)

        def add(numbers: Sequence[int]) -> list[tuple[int, _Span | None]]:
            return [(number, self._added(items[number], store)) for number in numbers]

        rank, num_ranks = self._ranks
        mine = list(clips.values())[rank::num_ranks]
        spans: dict[int, _Span | None] = dict(itertools.chain.from_iterable(self.loader.map(add, mine)))
        if num_ranks > 1:
            spans, self.unusable = store.exchange(spans, self.unusable, rank=rank, num_ranks=num_ranks)
        for number, item in enumerate(items):
            if (span := spans[number]) is not None:
                sound = Sound(item=item, samples_N=store.samples_N, **vars(span))
                self.by_label.setdefault(item.labels[0], []).append(sound)

    def _added(self, item: Item, store: _Store) -> _Span | None:
        """Load and store an item; None if it is unusable."""
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
            return None
        active = np.flatnonzero(active_mask(samples_RT[0], sample_rate_hz=self.sample_rate_hz, window_s=_WINDOW_S))
        if not len(active):
            self.unusable.add(item.clip)
            return None
        return _Span(
            first=store.add(samples_RT), num_samples=samples_RT.shape[1], num_signals=len(samples_RT), active=active
        )


@dataclass(frozen=True, kw_only=True)
class _Span:
    """The place of a sound in its pool's tensor."""

    first: int
    num_samples: int
    num_signals: int
    active: np.ndarray


class _Store:
    """The tensor that a pool's sounds are written to, with as many zeros at its end as a crop may need."""

    def __init__(self, num_samples: int, segment_samples: float, device: torch.device) -> None:
        self._training_device = device
        if device.type == "cuda" and 4 * num_samples > _CARD_FRACTION * torch.cuda.mem_get_info(device)[0]:
            device = torch.device("cpu")  # the crops of each batch are sent
        self._tail = max(crop_width(math.ceil(segment_samples), speed) for speed in range(len(SPEEDS)))
        self.samples_N = torch.zeros(num_samples + self._tail, device=device)
        self._end, self._lock = 0, threading.Lock()

    def add(self, samples_RT: np.ndarray) -> int:
        """Write the signals of a sound one after the other; returns the number of its first sample."""
        with self._lock:
            first, self._end = self._end, self._end + samples_RT.size
            missing = self._end + self._tail - len(self.samples_N)
            if missing > 0:  # a file was longer than its header says
                self.samples_N = torch.nn.functional.pad(self.samples_N, (0, missing + len(self.samples_N) // 8))
            self.samples_N[first : self._end] = torch.from_numpy(np.ascontiguousarray(samples_RT).reshape(-1))
        return first

    def exchange(
        self, spans: dict[int, _Span | None], unusable: set[str], *, rank: int, num_ranks: int
    ) -> tuple[dict[int, _Span | None], set[str]]:
        """Put the sounds of all ranks one after the other; returns the spans and the unusable clips of all."""
        parts: list[tuple[dict[int, _Span | None], set[str], int]] = [({}, set(), 0)] * num_ranks
        torch.distributed.all_gather_object(parts, (spans, unusable, self._end))
        own_N, first = self.samples_N[: self._end], 0
        self._end = sum(num for _, _, num in parts)
        self.samples_N = own_N.new_zeros(self._end + self._tail)
        together: dict[int, _Span | None] = {}
        for source, (theirs, _, num) in enumerate(parts):
            part_N = self.samples_N[first : first + num]
            if source == rank:
                part_N.copy_(own_N)
            for chunk_N in torch.split(part_N, _CHUNK_SAMPLES):
                sent_N = chunk_N.to(self._training_device)  # the device that the ranks send from
                torch.distributed.broadcast(sent_N, src=source)
                chunk_N.copy_(sent_N)
            for number, span in theirs.items():
                together[number] = replace(span, first=span.first + first) if span is not None else None
            first += num
        return together, set().union(*(lost for _, lost, _ in parts))


def _label_by_label(items: Sequence[Item]) -> list[Item]:
    """The same items with the labels taking turns, so that every part of a rotating pool has many labels."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        turns.append(seen.get(item.labels[0], 0))
        seen[item.labels[0]] = turns[-1] + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


class Cropper:
    """Draws crops of sounds around an active moment, with their speed, colour and level."""

    def __init__(self, config: MixConfig, *, sample_rate_hz: int) -> None:
        self.config = config
        self.num_samples, self.window = round(config.segment_s * sample_rate_hz), round(_WINDOW_S * sample_rate_hz)

    def crop(self, rng: np.random.Generator, sound: Sound) -> list[Crop]:
        """A crop of every signal in which the first is active; all signals get the same speed, colour and gain.

        The gain brings the last signal to the drawn level: the clip, if the sound is a track with its clip.
        """
        augment = self.config.augment
        speed = int(rng.integers(len(SPEEDS))) if augment else 0
        width = crop_width(self.num_samples, speed)
        active = int(sound.active[rng.integers(len(sound.active))]) * self.window
        first = active - int(rng.integers(max(1, width - self.window)))  # the crop contains all of the active window
        first = max(0, min(first, sound.num_samples - width))
        knots_db = rng.normal(0.0, self.config.eq_db, NUM_KNOTS) if augment else None
        gain_db = rng.uniform(-self.config.gain_db, self.config.gain_db)
        crops: list[Crop] = []
        for number in reversed(range(sound.num_signals)):
            crop = Crop(
                samples_N=sound.samples_N,
                first=sound.first + number * sound.num_samples + first,
                num_samples=min(width, sound.num_samples - first),
                speed=speed,
                knots_db=knots_db,
                rms=_LEVEL * 10.0 ** (gain_db / 20.0),
                level_of=crops[-1] if crops else None,
            )
            crops.insert(0, crop)
        return crops
