"""Training of the built-in tagger: on mixtures of single-source clips of which every frame's energy shares are known.

The power of a mixture is the sum of its sources' powers, but for cross terms that average out within a mel band. So
clips are brought to mel powers once and all that happens to a source (gain, pitch, tempo, colour, filters, a
separator's mask, leakage) happens there, which costs next to nothing beside the network.

Shape legend: B mixtures, S sources, N spectral frames, K mel bands, M tagged frames, L labels.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.corpus.sources import read_sources, source_root
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location
from engine.taggers import ShareTagger, TagNetworkConfig, read_tagger, save_tagger
from engine.taggers.network import FRAMES_PER_TAG
from train.data.items import Item, clean_items

_FINER = 4  # steps of the stored spectrograms within a frame's step
_FLOOR = 1e-4  # of the loudest frame: a frame above it is active

Powers = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TaggerConfig:
    """How the built-in tagger is trained."""

    steps: int = 1000
    """Batches to learn from."""
    batch_size: int = 24
    """Mixtures in a batch."""
    segment_s: float = 3.0
    """Length of a mixture."""
    learning_rate: float = 3e-3
    """Highest rate of AdamW; it rises over the first tenth of the steps and falls to zero along a cosine."""
    weight_decay: float = 0.02
    """Weight decay of AdamW."""
    gain_db: float = 15.0
    """A source's level is moved by up to this, up or down: two sources differ by up to twice as much."""
    pitch_fraction: float = 0.1
    """A source is moved up or down by up to this share of the mel bands."""
    colour_db: float = 8.0
    """Standard deviation of a source's random colouring."""
    mask_rate: float = 0.5
    """Share of mixtures masked as by a separator that asks for one of the sources and errs."""
    num_bands: int = 64
    """Mel bands of the network."""
    channels: int = 128
    """Width of the network."""
    pool_s: float = 7200.0
    """Audio held in memory; of more clips a part is drawn, label by label."""
    seed: int = 0
    """Of weights, mixtures and dropout."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "segment_s", "learning_rate", "pool_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("gain_db", "weight_decay", "colour_db"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("pitch_fraction", "mask_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")


class ShareMixer:
    """Draws mixtures, as the mel powers of their sources, from single-source clips by label."""

    def __init__(self, powers: Sequence[Sequence[Powers]], config: TaggerConfig, *, num_frames: int) -> None:
        self.powers, self.config, self.num_frames = powers, config, num_frames
        energies = [[power_NK.sum(1) for power_NK in clips] for clips in powers]
        self.active = [[np.flatnonzero(e_N >= _FLOOR * e_N.max()) for e_N in clips] for clips in energies]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Mixtures ``[B, N, K]`` and what each label has of each tagged frame's energy ``[B, M, L]``."""
        rng = np.random.default_rng([self.config.seed, 3, step])
        made = [self._mixture(rng) for _ in range(self.config.batch_size)]
        mixes_BNK, energies_BML = (np.stack(part) for part in zip(*made, strict=True))
        return torch.from_numpy(mixes_BNK), torch.from_numpy(energies_BML)

    def _mixture(self, rng: np.random.Generator) -> tuple[Powers, Powers]:
        num_sources = min(int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25])), len(self.powers))
        labels = rng.permutation(len(self.powers))[:num_sources]
        sources_SNK = np.stack([self._source(rng, int(label)) for label in labels])
        sources_SNK *= 10.0 ** (rng.uniform(-1.0, 1.0, (num_sources, 1, 1)) * self.config.gain_db / 10.0)
        if rng.random() < self.config.mask_rate:
            sources_SNK = sources_SNK * _separator_mask(rng, sources_SNK)
        mix_NK = sources_SNK.sum(0)
        if rng.random() < 0.3:
            mix_NK = mix_NK + _noise(rng, mix_NK)
        energy_MS = sources_SNK.sum(2).reshape(num_sources, -1, FRAMES_PER_TAG).sum(2).T
        energy_ML = np.zeros((len(energy_MS), len(self.powers)), np.float32)
        energy_ML[:, labels] = energy_MS
        return mix_NK.astype(np.float32), energy_ML

    def _source(self, rng: np.random.Generator, label: int) -> Powers:
        """A crop ``[N, K]`` around an active moment, at a mean power of 1, with another pitch, tempo and colour."""
        which = int(rng.integers(len(self.powers[label])))
        power_NK, active = self.powers[label][which], self.active[label][which]
        step = _FINER * 2.0 ** rng.uniform(-0.3, 0.3)
        moment, place = int(active[rng.integers(len(active))]), int(rng.integers(self.num_frames))
        last = len(power_NK) - 1 - step * (self.num_frames - 1)
        first = min(max(moment - step * place, 0.0), max(last, 0.0))
        frames = np.rint(first + step * np.arange(self.num_frames)).astype(np.int64)
        crop_NK = power_NK[np.minimum(frames, len(power_NK) - 1)] * (frames < len(power_NK))[:, None]
        num_bands = crop_NK.shape[1]
        gains_db_K = _curve(rng, num_bands, knots=6, deviation=self.config.colour_db)
        if rng.random() < 0.3:  # a low or high pass of random slope
            slope_db = rng.uniform(-60.0, 60.0)
            gains_db_K = gains_db_K + slope_db * np.clip(np.linspace(-1, 1, num_bands) - rng.uniform(-1, 1), 0, None)
        bands = rng.uniform(-1.0, 1.0) * self.config.pitch_fraction * num_bands
        crop_NK = _shifted(crop_NK, bands) * 10.0 ** (gains_db_K / 10.0)
        levelled_NK: Powers = (crop_NK / max(crop_NK.mean(), 1e-20)).astype(np.float32)
        return levelled_NK


def _curve(rng: np.random.Generator, num: int, *, knots: int, deviation: float) -> NDArray[np.float64]:
    """A smooth random line ``[num]``."""
    return np.interp(np.linspace(0, knots - 1, num), np.arange(knots), rng.normal(0.0, deviation, knots))


def _shifted(power_NK: Powers, bands: float) -> Powers:
    """The same sound higher or lower by some mel bands, linearly between bands."""
    whole, part = math.floor(bands), bands - math.floor(bands)
    num_bands = power_NK.shape[1]
    padded_NK = np.pad(power_NK, ((0, 0), (abs(whole) + 1, abs(whole) + 1)), mode="edge")
    first = abs(whole) + 1 - whole
    moved: Powers = (1 - part) * padded_NK[:, first : first + num_bands]
    return moved + part * padded_NK[:, first - 1 : first - 1 + num_bands]


def _separator_mask(rng: np.random.Generator, sources_SNK: Powers) -> Powers:
    """Power gains ``[N, K]``: the first source's Wiener mask with smooth errors, holes and a floor."""
    total_NK = sources_SNK.sum(0) + 1e-12
    share_NK = sources_SNK[0] / total_NK
    num_frames, num_bands = share_NK.shape
    knots = rng.normal(0.0, rng.uniform(0.0, 12.0), (num_frames // 4 + 2, num_bands // 4 + 2))
    error_db = knots.repeat(4, 0)[:num_frames].repeat(4, 1)[:, :num_bands]
    error_db = error_db + rng.normal(0.0, rng.uniform(0.0, 6.0), share_NK.shape)  # musical noise
    odds = share_NK / (1.0 - share_NK + 1e-6) * 10.0 ** ((error_db + rng.normal(0.0, 6.0)) / 10.0)
    mask_NK = np.maximum(odds / (1.0 + odds), 10.0 ** (rng.uniform(-40.0, -5.0) / 20.0))
    gains_NK: Powers = np.square(mask_NK).astype(np.float32)
    return gains_NK


def _noise(rng: np.random.Generator, mix_NK: Powers) -> Powers:
    """Steady noise of a random colour that is no label's, 10 to 40 dB under the mixture."""
    colour_K = 10.0 ** (_curve(rng, mix_NK.shape[1], knots=4, deviation=8.0) / 10.0)
    noise_NK = colour_K / colour_K.mean() * rng.gamma(4.0, 0.25, mix_NK.shape)
    level: Powers = mix_NK.mean() * 10.0 ** (rng.uniform(-4.0, -1.0)) * noise_NK
    return level


def share_loss(log_share_BML: Tensor, energy_BML: Tensor) -> Tensor:
    """Cross entropy to the true shares, of frames weighted by the root of their energy and of the whole signal."""
    total_BM = energy_BML.sum(2)
    share_BML = energy_BML / total_BM.clamp(min=1e-20)[..., None]
    weight_BM = total_BM.sqrt() / total_BM.sqrt().sum(1, keepdim=True).clamp(min=1e-20)
    frames = -(share_BML * log_share_BML).sum(2).mul(weight_BM).sum(1).mean()
    portion_BM = total_BM / total_BM.sum(1, keepdim=True).clamp(min=1e-20)
    whole_BL = torch.einsum("bml,bm->bl", log_share_BML.exp(), portion_BM)
    truth_BL = torch.einsum("bml,bm->bl", share_BML, portion_BM)
    return frames - (truth_BL * torch.log(whole_BL + 1e-8)).sum(1).mean()


def train_tagger(
    out: Name,
    *,
    clean: Name,
    clean_folds: Sequence[int] | None = None,
    without: tuple[int, int] | None = None,
    config: TaggerConfig | None = None,
    sample_rate_hz: int = 16000,
) -> dict[str, Any]:
    """Train a tagger of the single-source clips ``clean`` into the folder ``out``; returns its history entry.

    ``without`` (k, n) leaves out the kth of n parts of each label's clips. A training that is done returns at once.
    Raises ``ValueError`` for clips of fewer than two labels and where ``out`` holds a tagger of another training.
    """
    config, started = config or TaggerConfig(), time.perf_counter()
    identity = _identity(str(clean), clean_folds, without, config, sample_rate_hz)
    if (location(out) / "tagger.json").is_file():
        done: dict[str, Any] = read_tagger(out)["history"][-1]
        if done["identity"] != identity:
            raise ValueError(f"{out} holds a tagger of another training; give another folder, or delete this one")
        return done
    items = clean_items(clean, folds=clean_folds, sample_rate_hz=sample_rate_hz, without=without)
    labels = sorted({item.labels[0] for item in items})
    network = TagNetworkConfig(
        sample_rate_hz=sample_rate_hz,
        num_fft=2 ** round(math.log2(0.064 * sample_rate_hz)),
        num_bands=config.num_bands,
        channels=config.channels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tagger = ShareTagger(network, labels)
        powers, num_unusable = _load(items, tagger, config)
        loss = _learn(tagger, powers, config)
    entry = {
        "identity": identity,
        "config": asdict(config),
        "num_clips": sum(map(len, powers)),
        "num_unusable": num_unusable,
        "loss": loss,
        "wall_s": time.perf_counter() - started,
    }
    save_tagger(tagger, out, history=[entry])
    return entry


def _identity(
    clean: str,
    folds: Sequence[int] | None,
    without: tuple[int, int] | None,
    config: TaggerConfig,
    sample_rate_hz: int,
) -> str:
    """What a training is; a list that has changed is noticed, one that moved is not."""
    root = source_root(clean)
    rows = read_sources(clean, folds=folds).to_pylist()
    sources = [(os.path.relpath(row["path"], root), row["label"]) for row in rows]
    return fingerprint([asdict(config), sample_rate_hz, sources, without])


def _load(items: Sequence[Item], tagger: ShareTagger, config: TaggerConfig) -> tuple[list[list[Powers]], int]:
    """Mel powers of the clips by label, at a quarter of the network's step, and how many could not be used."""
    powers: list[list[Powers]] = [[] for _ in tagger.labels]
    num_unusable, held_s = 0, 0.0
    for item in _in_turns(items, np.random.default_rng([config.seed, 1])):
        if held_s >= config.pool_s:
            break
        try:
            samples_T = torch.from_numpy(np.ascontiguousarray(item.load()))
        except (ValueError, OSError):
            num_unusable += 1
            continue
        power_NK = tagger.network.powers(samples_T[None], hop_samples=tagger.config.hop_samples // _FINER)[0].numpy()
        if not np.isfinite(power_NK).all() or power_NK.max() <= 1e-12:
            num_unusable += 1
            continue
        held_s += item.duration_s
        powers[tagger.labels.index(item.labels[0])].append(power_NK)
    missing = [label for label, clips in zip(tagger.labels, powers, strict=True) if not clips]
    if missing:
        raise ValueError(f"every label needs a readable clip with sound, {missing[0]!r} has none; give more clips")
    return powers, num_unusable


def _in_turns(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """The items in a random order in which the labels take turns."""
    by_label: dict[str, list[Item]] = {}
    for i in rng.permutation(len(items)):
        by_label.setdefault(items[i].labels[0], []).append(items[i])
    rounds = itertools.zip_longest(*by_label.values())
    return [item for turn in rounds for item in turn if item is not None]


def _learn(tagger: ShareTagger, powers: list[list[Powers]], config: TaggerConfig) -> float:
    """Train and return the mean loss of the last tenth of the steps."""
    frames = config.segment_s * tagger.sample_rate_hz / tagger.config.hop_samples
    mixer = ShareMixer(powers, config, num_frames=FRAMES_PER_TAG * max(1, round(frames / FRAMES_PER_TAG)))
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    tagger.train()
    for step in range(config.steps):
        mixes_BNK, energy_BML = mixer.batch(step)
        loss = share_loss(tagger.network(mixes_BNK)[0], energy_BML)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    tagger.eval()
    last = losses[-max(1, config.steps // 10) :]
    return sum(last) / len(last)
