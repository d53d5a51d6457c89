"""A run in progress: its settings and inputs, and what it has built so far."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.corpus.table import Corpus
from engine.selection.labels.table import corpus_of, read_label_rows
from engine.selection.thresholds import moves_labels
from engine.separators import SeparatorSource
from engine.storage.paths import Location
from train.distil import distil
from tune.config import RunConfig
from tune.inputs import Inputs, student_rate_hz
from tune.steps.artifacts import Artifacts
from tune.steps.judges import Judges

if TYPE_CHECKING:
    from train.task import TrainingRecord


@dataclass(kw_only=True)
class Work:
    """A run in progress."""

    config: RunConfig
    """Its settings."""
    inputs: Inputs
    """Everything that the settings name."""
    artifacts: Artifacts
    """Folders of what the run builds."""
    seed: SeparatorSource
    """The teacher of iteration 1."""
    contents: str | None = None
    """Fingerprint of the contents of the corpus' files, if the artifacts are shared."""
    judges: Judges = field(default_factory=Judges)
    """Judges of its stems."""
    labels: Location | None = None
    """Folder of the labels that the next pass queries; null: those of the corpus."""
    distil: Callable[..., TrainingRecord] = distil
    """Trains its students: :func:`train.distil.distil`, or the same in another process."""

    @property
    def student_rate_hz(self) -> int:
        """Rate of its students, at which stems are written and separators are measured."""
        return student_rate_hz(self.config, self.seed)

    @property
    def corpus(self) -> Corpus:
        """The natural clips with the labels that the next pass queries."""
        corpus = self.inputs.corpus
        return corpus if self.labels is None else corpus_at(self.labels, corpus.root, self.labels_move)

    @property
    def labels_move(self) -> bool:
        """True if a threshold of the schedule moves labels: passes store evidence for that."""
        return any(map(moves_labels, self.config.schedule))


@functools.lru_cache(maxsize=2)
def corpus_at(labels: Location, root: str, moving: bool) -> Corpus:
    """The corpus that queries the labels in a folder."""
    return corpus_of(read_label_rows(labels / "labels.parquet"), root, moving=moving)
