"""TODO train/evaluation/mixtures.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.audio.decode import decode
from engine.audio.levels import active_rms
from engine.corpus.sources import read_sources

_LEVEL = 0.1  # active RMS of every source, full scale 1


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which mixtures a separator is judged on."""

    clips: str
    """CSV ``path,label[,fold]`` of single-source clips, or a folder of folders by label."""
    folds: tuple[int, ...] | None = None
    """Folds to draw from; null: all."""
    num_mixtures: int = 300
    """Mixtures to draw; every source in each is asked for once."""
    num_sources: int = 2
    """Sources of different labels in a mixture."""
    max_s: float = 10.0
    """Only this much of each clip is used."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.num_mixtures < 1 or self.num_sources < 1:
            raise ValueError("num_mixtures and num_sources are at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationMixture:
    """A mixture, which is the sum of its sources, and what is asked of it."""

    labels: tuple[str, ...]
    """The queries, each for the source of the same place."""
    clips: tuple[str, ...]
    """Files that it was made from."""
    sources_ST: np.ndarray
    """Float32; sources after those of ``labels`` are in the mixture and nobody asks for them."""
    other_labels: tuple[str, ...] | None = ()
    """What else sounds in it; None: not known, so that no sound is known to be absent."""

    @property
    def mix_T(self) -> np.ndarray:
        total: np.ndarray = self.sources_ST.sum(axis=0, dtype=np.float32)
        return total


def draw_mixture(
    sources: pa.Table,
    *,
    num_sources: int,
    sample_rate_hz: int,
    rng: np.random.Generator,
    max_s: float = 10.0,
    gain_db: float = 0.0,
) -> EvaluationMixture:
    """One mixture of clips of different labels, at equal level but for a drawn gain of up to ``gain_db`` up or down.

    The shorter clips are padded at a random place.
    """
    by_label: dict[str, list[str]] = {}
    for row in sources.to_pylist():
        by_label.setdefault(row["label"], []).append(row["path"])
    if len(by_label) < num_sources:
        raise ValueError(f"mixtures of {num_sources} sources need as many labels, the clips have {sorted(by_label)}")
    labels = [sorted(by_label)[i] for i in rng.permutation(len(by_label))[:num_sources]]
    paths = [by_label[label][rng.integers(len(by_label[label]))] for label in labels]
    sounds = [_levelled(path, sample_rate_hz, max_s) for path in paths]
    sources_ST = np.zeros((num_sources, max(len(sound) for sound in sounds)), np.float32)
    for row, sound in enumerate(sounds):
        first = int(rng.integers(sources_ST.shape[1] - len(sound) + 1))
        sources_ST[row, first : first + len(sound)] = sound * 10.0 ** (rng.uniform(-gain_db, gain_db) / 20.0)
    return EvaluationMixture(labels=tuple(labels), clips=tuple(paths), sources_ST=sources_ST)


def _levelled(path: str, sample_rate_hz: int, max_s: float) -> np.ndarray:
    samples_T = decode(path, sample_rate_hz=sample_rate_hz, duration_s=max_s)
    level = active_rms(samples_T, sample_rate_hz=sample_rate_hz)
    if level == 0.0:
        raise ValueError(f"{path} is silent; take it out of the list of single-source clips")
    scaled: np.ndarray = samples_T * (_LEVEL / level)
    return scaled


def draw_mixtures(config: ValidationConfig, *, sample_rate_hz: int) -> list[EvaluationMixture]:
    """The mixtures of a config: the same for the same seed and clips."""
    sources = read_sources(config.clips, folds=config.folds)
    return [
        draw_mixture(
            sources,
            num_sources=config.num_sources,
            sample_rate_hz=sample_rate_hz,
            rng=np.random.default_rng([config.seed, number]),
            max_s=config.max_s,
        )
        for number in range(config.num_mixtures)
    ]
