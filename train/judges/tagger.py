"""Training of the built-in tagger on mixtures of single-source clips, where the energy of every label is known.

Shape legend: B mixtures, N spectral frames, K mel bands, M tagged frames, L labels.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from engine.audio.loading import loaded
from engine.corpus.sources import SourceClips
from engine.settings import Count, Fraction, NonNegative, Positive, Seed, Tree, config, deciding, plain
from engine.storage.factories import in_32_bits, own_device
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location
from engine.taggers import ShareTagger, TagNetworkConfig, read_tagger, save_tagger
from engine.taggers.network import FRAMES_PER_TAG
from train.data.items import Item, clean_items
from train.judges.power_mixtures import FINER, PowerMixer

_CLIPS_AT_ONCE = 32  # turned into mel powers


@config
class TaggerConfig:
    """Training of the built-in tagger."""

    steps: Count = 1000
    """Updates."""
    batch_size: Count = 24
    """Mixtures in a batch."""
    segment_s: Positive = 3.0
    """Length of a mixture, in seconds."""
    learning_rate: Positive = 3e-3
    """Highest learning rate of AdamW; it rises over the first tenth of the steps and falls to zero along a cosine."""
    weight_decay: NonNegative = 0.02
    """Weight decay of AdamW."""
    gain_db: NonNegative = 15.0
    """A source's level is moved up or down by at most this, so two sources differ by at most twice as much."""
    pitch_fraction: Fraction = 0.1
    """A source is moved up or down by at most this fraction of the mel bands."""
    colour_db: NonNegative = 8.0
    """Standard deviation of a source's random colouring."""
    mask_rate: Fraction = 0.5
    """Fraction of mixtures masked as by an imperfect separator of one of the sources."""
    num_bands: Count = 64
    """Mel bands of the network."""
    channels: Count = 128
    """Width of the network."""
    pool_s: Positive = 7200.0
    """Audio in memory, in seconds; of more clips a part is drawn, with the labels taking turns."""
    seed: Seed = 0
    """Seed of weights, mixtures and dropout."""


class TaggerRecord(TypedDict):
    """Entry of a tagger's history: one training."""

    identity: str
    """Fingerprint of settings, sample rate and clips."""
    config: Tree
    """Settings, all of them."""
    num_clips: int
    """Clips in memory."""
    num_unusable: int
    """Clips that could not be read or are silent."""
    loss: float
    """Mean loss over the last tenth of the steps."""
    wall_s: float
    """Wall time, in seconds."""


def train_tagger(
    out: Name, *, clean: SourceClips, config: TaggerConfig | None = None, sample_rate_hz: int = 16000
) -> TaggerRecord:
    """Train a tagger on single-source clips into the folder ``out``; returns the entry of its history.

    It trains on this process's GPU if there is one; the same training gives the same tagger on the same kind of device.
    A finished training returns at once. Raises ``ValueError`` for clips of fewer than two labels, for a label without a
    usable clip, and if ``out`` holds a tagger of another training.
    """
    config, started = config or TaggerConfig(), time.perf_counter()
    identity = fingerprint([deciding(config), sample_rate_hz, clean.fingerprint])
    if (location(out) / "tagger.json").is_file():
        done = cast(TaggerRecord, read_tagger(out)["history"][-1])
        if done["identity"] != identity:
            clean.require_same_as(location(out))
            raise ValueError(
                f"{out} must be empty or hold this training, got a tagger of another training; give another folder"
            )
        return done
    network = TagNetworkConfig(
        sample_rate_hz=sample_rate_hz,
        num_fft=2 ** round(math.log2(0.064 * sample_rate_hz)),
        num_bands=config.num_bands,
        channels=config.channels,
    )
    items = clean_items(clean, sample_rate_hz=sample_rate_hz)
    device = torch.device(own_device())
    with _repeatable(config.seed, device):
        tagger = ShareTagger(network, sorted(set(clean.labels))).to(device)
        powers, num_unusable = _load(items, tagger, config)
        num_clips = sum(map(len, powers))
        loss = _learn(tagger, powers, config)
    record: TaggerRecord = {
        "identity": identity,
        "config": plain(config),
        "num_clips": num_clips,
        "num_unusable": num_unusable,
        "loss": loss,
        "wall_s": time.perf_counter() - started,
    }
    clean.keep_with(location(out))
    save_tagger(tagger.cpu(), out, history=[dict(record)])
    return record


@contextmanager
def _repeatable(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed, and algorithms that give the same sums each time, in 32 bits."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), in_32_bits(repeatable=True):
        torch.manual_seed(seed)
        yield


def energy_loss(log_fraction_BML: Tensor, energy_BML: Tensor) -> Tensor:
    """Cross entropy between predicted and true fractions of the energy, of the frames and of the whole signal.

    A frame is weighted by the root of its energy.
    """
    total_BM = energy_BML.sum(2)
    fraction_BML = energy_BML / total_BM.clamp(min=1e-20)[..., None]
    weight_BM = total_BM.sqrt() / total_BM.sqrt().sum(1, keepdim=True).clamp(min=1e-20)
    frames = -(fraction_BML * log_fraction_BML).sum(2).mul(weight_BM).sum(1).mean()
    portion_BM = total_BM / total_BM.sum(1, keepdim=True).clamp(min=1e-20)
    overall_BL = torch.einsum("bml,bm->bl", log_fraction_BML.exp(), portion_BM)
    truth_BL = torch.einsum("bml,bm->bl", fraction_BML, portion_BM)
    return frames - (truth_BL * torch.log(overall_BL + 1e-8)).sum(1).mean()


def _load(items: Sequence[Item], tagger: ShareTagger, config: TaggerConfig) -> tuple[list[list[Tensor]], int]:
    """Mel powers of the clips by label, at a quarter of the network's step, and the number of unusable clips."""
    powers: list[list[Tensor]] = [[] for _ in tagger.labels]
    num_tried, loaded_s = 0, 0.0
    batch: list[tuple[Item, Tensor]] = []
    items = _label_by_label(items, np.random.default_rng([config.seed, 1]))
    for item, samples_T in zip(items, loaded([item.load for item in items]), strict=True):
        if loaded_s >= config.pool_s:
            break
        num_tried += 1
        if not isinstance(samples_T, Exception):
            batch.append((item, torch.from_numpy(np.ascontiguousarray(samples_T))))
        pending_s = sum(one.duration_s for one, _ in batch)
        if len(batch) == _CLIPS_AT_ONCE or loaded_s + pending_s >= config.pool_s or num_tried == len(items):
            for one, power_NK in _usable(batch, tagger):
                loaded_s += one.duration_s
                powers[tagger.labels.index(one.labels[0])].append(power_NK)
            batch.clear()
    missing = [label for label, clips in zip(tagger.labels, powers, strict=True) if not clips]
    if missing:
        raise ValueError(
            f"every label must have a readable clip with sound, got none of {missing[0]!r}; give more clips"
        )
    return powers, num_tried - sum(map(len, powers))


def _usable(batch: Sequence[tuple[Item, Tensor]], tagger: ShareTagger) -> list[tuple[Item, Tensor]]:
    """The clips of a batch that have a sound, with their mel powers on the tagger's device."""
    if not batch:
        return []
    hop = tagger.config.hop_samples // FINER
    padded_BT = torch.nn.utils.rnn.pad_sequence([samples_T for _, samples_T in batch], batch_first=True)
    power_BNK = tagger.network.powers(padded_BT.to(tagger.network.window_F.device), hop_samples=hop)
    is_usable_B = (power_BNK.isfinite().all(2).all(1) & (power_BNK.amax((1, 2)) > 1e-12)).tolist()
    return [
        (item, power_NK[: 1 + len(samples_T) // hop].clone())
        for (item, samples_T), power_NK, is_usable in zip(batch, power_BNK, is_usable_B, strict=True)
        if is_usable
    ]


def _label_by_label(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """The items in a random order in which the labels take turns."""
    by_label: dict[str, list[Item]] = {}
    for i in rng.permutation(len(items)):
        by_label.setdefault(items[i].labels[0], []).append(items[i])
    turns = itertools.zip_longest(*by_label.values())
    return [item for turn in turns for item in turn if item is not None]


def _learn(tagger: ShareTagger, powers: Sequence[Sequence[Tensor]], config: TaggerConfig) -> float:
    """Train and return the mean loss over the last tenth of the steps."""
    frames = config.segment_s * tagger.sample_rate_hz / tagger.config.hop_samples
    mixer = PowerMixer(powers, config, num_frames=FRAMES_PER_TAG * max(1, round(frames / FRAMES_PER_TAG)))
    optimizer = torch.optim.AdamW(
        tagger.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    num_last = max(1, config.steps // 10)
    last_loss = torch.zeros((), device=mixer.power_NK.device)
    tagger.train()
    for step in range(config.steps):
        mixes_BNK, energy_BML = mixer.batch(step)
        loss = energy_loss(tagger.network(mixes_BNK)[0], energy_BML)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step >= config.steps - num_last:
            last_loss += loss.detach()
    tagger.eval()
    return last_loss.item() / num_last
