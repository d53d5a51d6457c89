"""The evidence of a pass: levels and tags by which the labels of its clips are kept, dropped or added.

Shape suffixes: S stems of a clip, L labels of the pass's tagger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from engine.passes.shards import read_columns, read_manifest, stem_shards
from engine.schema import CLIPS, ClipRow, clip_columns
from engine.storage.paths import Location
from engine.taggers.presence import StemEvidence

_SCORES = ("stem_level_db", "active_fraction")
_FIRST = ("clip_tags_db", "residual_tags_db", "residual_level_db")  # with the first stem of a clip only
_COLUMNS = [*CLIPS.names, "label", "sample_rate_hz", "num_samples", *_SCORES, "tags_db", *_FIRST]
_REMEDY = "make the pass again in a run whose labels move"


@dataclass(frozen=True, kw_only=True)
class ClipEvidence(StemEvidence):
    """Findings of a pass about a clip; tags are in dB, in the order of :func:`tagger_labels`."""

    row: ClipRow
    """The clip as the pass had it."""
    shard: str
    first_row: int
    """Row of its first stem in the shard."""
    sample_rate_hz: int
    """Rate of the stored mixture and stems."""
    num_samples: int
    """Their length."""
    stem_labels: list[str]
    """Labels that have a stem, in the order of the rows; the others failed."""
    residual_tags_L: np.ndarray
    """Strongest tags of the windows of the clip minus its stems."""
    residual_level_db: float
    """Level of the clip minus its stems, relative to the clip."""


def tagger_labels(stems: Location) -> list[str]:
    """The labels of the tags that a closed pass stored; ``ValueError`` if it stored none."""
    labels = read_manifest(stems).get("tagger_labels")
    if not labels:
        cause = "it had no tagger, or is too old"
        raise ValueError(f"cannot find the tags of the pass in {stems} ({cause}); {_REMEDY}")
    return labels


def read_evidence(stems: Location) -> Iterator[ClipEvidence]:
    """The evidence of every clip with a stem, in the order of the shards; ``ValueError`` if the pass stored none."""
    tagger_labels(stems)
    for shard in stem_shards(stems):
        table = read_columns(shard, _COLUMNS)
        if missing := sorted({*_COLUMNS} - {*table.column_names}):
            raise ValueError(f"cannot find {', '.join(missing)} in {shard} (an older version wrote it); {_REMEDY}")
        rows = enumerate(table.to_pylist())
        for _, clip in groupby(rows, key=lambda numbered: numbered[1]["clip_id"]):
            numbers, stem_rows = zip(*clip, strict=True)
            yield _evidence(shard.name, numbers[0], stem_rows)


def _evidence(shard: str, first_row: int, stems: tuple[Mapping[str, Any], ...]) -> ClipEvidence:
    first = stems[0]
    levels, active = (np.array([row[name] for row in stems], np.float32) for name in _SCORES)  # None: NaN
    clip_tags, residual_tags = (np.array(first[name], np.float32) for name in _FIRST[:2])
    return ClipEvidence(
        row=clip_columns(first),
        shard=shard,
        first_row=first_row,
        sample_rate_hz=first["sample_rate_hz"],
        num_samples=first["num_samples"],
        stem_labels=[row["label"] for row in stems],
        stem_tags_SL=np.array([row["tags_db"] for row in stems], np.float32),
        stem_level_db_S=levels,
        active_fraction_S=active,
        clip_tags_L=clip_tags,
        residual_tags_L=residual_tags,
        residual_level_db=first["residual_level_db"],
    )
