"""Seeded mixtures of single-source clips with known sources."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from engine.audio.decoder import shared_decoder
from engine.audio.levels import active_rms, is_silent
from engine.audio.loading import loaded
from engine.corpus.sources import SourceClips, read_sources
from engine.settings import NEWER, Count, Fraction, Positive, Seed, config, deciding

READING = ("clips", "folds", "columns", "audio_root")
"""Settings of a validation that say where its clips are; the others say how they are mixed."""

_LEVEL = 0.1  # active RMS of every source, relative to full scale


@config
class ValidationConfig:
    """Mixtures on which a separator is measured."""

    clips: str
    """Single-source clips: CSV ``path,label[,fold]``, or a folder of folders by label."""
    folds: tuple[int, ...] | None = None
    """Folds to draw from; null: all."""
    columns: str | None = None
    """Names of columns in the list of ``clips``, such as ``path=filename,label=category``; null: path, label, fold."""
    audio_root: str | None = None
    """Folder of the audio files of ``clips``; null: the folder of their list."""
    num_mixtures: Count = 300
    """Mixtures to draw; each of their sources is a query once."""
    num_sources: Count = 2
    """Sources of different labels in a mixture."""
    max_s: Positive = 10.0
    """Only this much of each clip is used, in seconds."""
    seed: Seed = 0
    """Seed of the draw."""
    names_rivals: bool = True
    """Name the other labels of a mixture in each query as unwanted, as a pass does, if the separator uses that; false:
    one label in each query."""
    same_label_fraction: Annotated[Fraction, NEWER] = 0.0
    """Fraction of mixtures in which one label has a second source; above 0, class-aware figures are reported too."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """A validation whose clips are read: what trainings and evaluations are given."""

    config: ValidationConfig
    """Settings of the draw."""
    sources: SourceClips
    """Clips to draw from."""

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Settings and fingerprint of the clips: equal identities give the same mixtures."""
        settings = {name: value for name, value in deciding(self.config).items() if name not in READING}
        return settings | {"sources": self.sources.fingerprint}


def resolve_validation(config: ValidationConfig, *, allow_outside: bool = False) -> ValidationSet:
    """Read the clips of a validation; raises ``ValueError`` if they cannot be read."""
    sources = read_sources(
        config.clips,
        folds=config.folds,
        audio_root=config.audio_root,
        columns=config.columns,
        allow_outside=allow_outside,
    )
    return ValidationSet(config=config, sources=sources)


@dataclass(frozen=True, kw_only=True)
class EvaluationMixture:
    """A mixture, which is the sum of its sources, and its queries."""

    labels: tuple[str, ...]
    """The queries, in the order of their sources."""
    clips: tuple[str, ...]
    """Files that it was made from."""
    sources_ST: np.ndarray
    """Float32; sources after those of ``labels`` are in the mixture but no query names them."""
    sources_of: tuple[np.ndarray, ...] | None = None
    """Sources ``[P, T]`` of each label, which add up to its row of ``sources_ST``; None: no class-aware scores."""
    other_labels: tuple[str, ...] | None = ()
    """Labels of those other sources; None: unknown, so that no label is known to be absent."""
    names_rivals: bool = False
    """Name the other queries' labels in each query as unwanted, if the separator uses that."""

    @property
    def mix_T(self) -> np.ndarray:
        """The mixture, float32."""
        total: np.ndarray = self.sources_ST.sum(axis=0, dtype=np.float32)
        return total


def draw_mixture(
    sources: SourceClips,
    *,
    num_sources: int,
    sample_rate_hz: int,
    rng: np.random.Generator,
    max_s: float = 10.0,
    gain_db: float = 0.0,
    same_label_fraction: float = 0.0,
) -> EvaluationMixture:
    """One mixture of clips of different labels, at equal level but for a drawn gain of up to ``gain_db`` up or down.

    Shorter clips are padded at a random position. In ``same_label_fraction`` of the mixtures a second clip of one of
    the labels is added. Raises ``ValueError`` for too few labels or clips, and for a silent clip.
    """
    by_label: dict[str, list[str]] = {}
    for path, label in zip(sources.table["path"].to_pylist(), sources.labels, strict=True):
        by_label.setdefault(label, []).append(path)
    if len(by_label) < num_sources:
        raise ValueError(
            f"mixtures of {num_sources} sources must have as many labels to draw from, got {sorted(by_label)}; "
            "add clips of other labels or set num_sources lower"
        )
    labels = [sorted(by_label)[i] for i in rng.permutation(len(by_label))[:num_sources]]
    paths = [by_label[label][rng.integers(len(by_label[label]))] for label in labels]
    sounds = [_levelled(path, sample_rate_hz, max_s) for path in paths]
    sources_ST = np.zeros((num_sources, max(len(sound_T) for sound_T in sounds)), np.float32)
    for row, sound_T in enumerate(sounds):
        _put(sources_ST[row], sound_T, rng, gain_db)
    mixture = EvaluationMixture(labels=tuple(labels), clips=tuple(paths), sources_ST=sources_ST)
    if same_label_fraction == 0.0:
        return mixture
    if not any(len(set(some)) > 1 for some in by_label.values()):
        raise ValueError(
            f"same_label_fraction must be 0 for clips of which no label has two, got {same_label_fraction}; add clips"
        )
    second = _draw_second(mixture, by_label, rng) if rng.random() < same_label_fraction else None
    if second is None:
        return dataclasses.replace(mixture, sources_of=tuple(source_T[None] for source_T in sources_ST))
    sound_T = _levelled(second[1], sample_rate_hz, max_s)
    added_T = np.zeros(max(sources_ST.shape[1], len(sound_T)), np.float32)
    _put(added_T, sound_T, rng, gain_db)
    return _with_second(mixture, *second, added_T)


def _draw_second(
    mixture: EvaluationMixture, by_label: Mapping[str, Sequence[str]], rng: np.random.Generator
) -> tuple[int, str] | None:
    """The number of a label and another of its clips; None if each label of the mixture has a single clip."""
    others = [sorted(set(by_label[label]) - {clip}) for label, clip in zip(mixture.labels, mixture.clips, strict=True)]
    rows = [row for row, paths in enumerate(others) if paths]
    if not rows:
        return None
    row = rows[rng.integers(len(rows))]
    return row, others[row][rng.integers(len(others[row]))]


def _with_second(mixture: EvaluationMixture, row: int, clip: str, added_T: np.ndarray) -> EvaluationMixture:
    """The mixture with a second source of one label; zeros follow the sources if the second one is longer."""
    missing = len(added_T) - mixture.sources_ST.shape[1]
    sources_ST = np.pad(mixture.sources_ST, ((0, 0), (0, missing)))
    sources_of = [source_T[None].copy() for source_T in sources_ST]
    sources_of[row] = np.stack([sources_ST[row], added_T])
    sources_ST[row] += added_T
    return dataclasses.replace(
        mixture, clips=(*mixture.clips, clip), sources_ST=sources_ST, sources_of=tuple(sources_of)
    )


def _put(source_T: np.ndarray, sound_T: np.ndarray, rng: np.random.Generator, gain_db: float) -> None:
    """Write a sound into a source, at a random position and with a random gain."""
    first = int(rng.integers(len(source_T) - len(sound_T) + 1))
    source_T[first : first + len(sound_T)] = sound_T * 10.0 ** (rng.uniform(-gain_db, gain_db) / 20.0)


def _levelled(path: str, sample_rate_hz: int, max_s: float) -> np.ndarray:
    samples_T = shared_decoder().decode(path, sample_rate_hz=sample_rate_hz, duration_s=max_s)
    level = active_rms(samples_T, sample_rate_hz=sample_rate_hz)
    if is_silent(samples_T, sample_rate_hz=sample_rate_hz):
        raise ValueError(f"{path} must contain sound, got silence; remove it from the single-source clips")
    scaled: np.ndarray = samples_T * (_LEVEL / level)
    return scaled


def draw_mixtures(validation: ValidationSet, *, sample_rate_hz: int) -> list[EvaluationMixture]:
    """The mixtures of a validation; the same seed and clips give the same mixtures."""
    settings, mixtures = validation.config, list[EvaluationMixture]()
    draws = [
        functools.partial(
            draw_mixture,
            validation.sources,
            num_sources=settings.num_sources,
            sample_rate_hz=sample_rate_hz,
            rng=np.random.default_rng([settings.seed, number]),
            max_s=settings.max_s,
            same_label_fraction=settings.same_label_fraction,
        )
        for number in range(settings.num_mixtures)
    ]
    for mixture in loaded(draws):
        if isinstance(mixture, Exception):
            raise mixture
        mixtures.append(dataclasses.replace(mixture, names_rivals=settings.names_rivals))
    return mixtures
