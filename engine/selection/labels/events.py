"""Single events: clips of a pass in which one label sounds alone, which are training material as a whole.

Shape suffix: L labels of the pass's tagger.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from engine.schema import plain_label
from engine.selection.index import INDEX
from engine.selection.labels.evidence import ClipEvidence
from engine.selection.labels.table import write_rows
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location

_SOUNDS = 0.5  # a label with at least this probability sounds
_PLACE = ("shard", "row", "first_row", "num_stems")
EVENTS = pa.schema(
    [
        *(INDEX.field(name) for name in (*_PLACE, "clip_id", "path", "labels", "label")),
        *(INDEX.field(name) for name in ("sample_rate_hz", "num_samples")),
        pa.field("purity_fraction", pa.float32(), nullable=False),  # probability that the label sounds alone
    ]
)
"""Columns of ``events.parquet``; ``row`` is that of the label's stem."""


class EventRow(TypedDict):
    """One row of ``EVENTS``."""

    shard: str
    row: int
    first_row: int
    num_stems: int
    clip_id: str
    path: str
    labels: list[str]
    label: str
    sample_rate_hz: int
    num_samples: int
    purity_fraction: float


class EventCounts(TypedDict):
    """The single events of a selection."""

    num_events: int
    events_by_label: dict[str, int]
    events_fingerprint: str
    """Equal for equal clips, labels and purities."""


def mine(
    evidence: ClipEvidence,
    probability_L: np.ndarray,
    labels: Sequence[str],
    *,
    min_purity_fraction: float,
    max_residual_level_db: float = -10.0,
    min_active_fraction: float = 0.05,
    refused: Counter[str] | None = None,
) -> tuple[str, float] | None:
    """The label that sounds alone in a clip and its purity, or None, with the reason counted in ``refused``.

    ``probability_L`` are the probabilities that the tagger's ``labels`` sound in the clip, 0 for one of which nothing
    is known. The purity is the label's probability times that of the absence of every other one. The stem of the label
    must be active, and all stems together must explain the clip.
    """
    alone = int(np.argmax(probability_L))
    purity = float(probability_L[alone] * np.prod(1.0 - np.delete(probability_L, alone)))
    known = {plain_label(label) for label, probability in zip(labels, probability_L, strict=True) if probability > 0.0}
    stems = [plain_label(label) for label in evidence.stem_labels]
    label, reason = plain_label(labels[alone]), None
    if not known.issuperset(map(plain_label, evidence.row["labels"])):
        reason = "unknown label"
    elif np.count_nonzero(np.asarray(probability_L) >= _SOUNDS) != 1:
        reason = "number of labels"
    elif purity < min_purity_fraction:
        reason = "purity"
    elif label not in stems:
        reason = "no stem"
    elif not evidence.residual_level_db <= max_residual_level_db:
        reason = "residual level"
    elif not evidence.active_fraction_S[stems.index(label)] >= min_active_fraction:
        reason = "activity"
    if reason is None:
        return evidence.stem_labels[stems.index(label)], purity
    if refused is not None:
        refused[reason] += 1
    return None


def event_row(evidence: ClipEvidence, label: str, purity_fraction: float) -> EventRow:
    """The row of a single event whose label has a stem."""
    return {
        "shard": evidence.shard,
        "row": evidence.first_row + evidence.stem_labels.index(label),
        "first_row": evidence.first_row,
        "num_stems": len(evidence.stem_labels),
        "clip_id": evidence.row["clip_id"],
        "path": evidence.row["path"],
        "labels": evidence.row["labels"],
        "label": label,
        "sample_rate_hz": evidence.sample_rate_hz,
        "num_samples": evidence.num_samples,
        "purity_fraction": purity_fraction,
    }


def write_events(path: Location, rows: Iterable[EventRow]) -> EventCounts:
    """Write a table of single events, some thousand in memory at a time; returns their counts."""
    by_label, digest = Counter[str](), hashlib.sha256()

    def counted() -> Iterator[EventRow]:
        for row in rows:
            by_label[row["label"]] += 1
            digest.update(f"{row['clip_id']} {fingerprint([row['label'], row['purity_fraction']])}\n".encode())
            yield row

    num_events = write_rows(path, counted(), EVENTS)
    return {
        "num_events": num_events,
        "events_by_label": dict(sorted(by_label.items())),
        "events_fingerprint": digest.hexdigest()[:16],
    }
