"""Arrow schemas: the columns in which the steps of the engine meet.

Row types, in the order in which a pass makes them:

* *clip*: one piece of natural audio with its labels;
* *stem*: what the separator returned for one clip and one label, with every score;
* *failure*: what could not be done, with its reason. Nothing is dropped without one.

Unit suffixes: ``_s`` seconds, ``_hz``, ``_db``, ``_dbfs``, ``_fraction`` (0 to 1), ``num_`` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

CLIPS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),  # hash of path, segment and labels
        pa.field("path", pa.string(), nullable=False),  # as the manifest wrote it
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("start_s", pa.float64()),  # null: from the beginning
        pa.field("end_s", pa.float64()),  # null: to the end
    ]
)

SCORES_VERSION = 2
"""Of what the scores mean: a pass made under another one is not gone on with, an estimator of another one not used."""

SCORES = pa.schema(
    [
        pa.field("re_sdr_db", pa.float32()),  # per clip, repeated on each of its stems
        pa.field("re_si_sdr_db", pa.float32()),  # per clip
        pa.field("remix_snr_db", pa.float32()),  # per clip
        pa.field("stem_level_db", pa.float32()),  # stem energy relative to the mixture's
        pa.field("active_fraction", pa.float32()),  # of the stem's time within reach of its loudest moment
        pa.field("coherence_fraction", pa.float32()),  # with the most similar other stem; null for one stem
        pa.field("mixture_coherence_fraction", pa.float32()),  # with the mixture
        pa.field("mask_snr_db", pa.float32()),  # what the masks that make the clip's stems expect of this one
        pa.field("share_si_sdr_db", pa.float32()),  # against its share of the clip
        pa.field("contested_db", pa.float32()),  # how much of the stem its clip's other stems claim too; null for one
        pa.field("cycle_si_sdr_db", pa.float32()),  # remixed and separated again, against itself; null: switched off
        pa.field("rival_leak_db", pa.float32()),  # what the rivals' queries pull out of the stem alone; likewise
        pa.field("tagger_margin_db", pa.float32()),  # own label over the strongest rival; null without a tagger
    ]
)

ESTIMATES = pa.schema(
    [
        pa.field("estimated_si_sdr_db", pa.float32()),  # of the stem against the truth that nobody has
        pa.field("estimated_error_db", pa.float32()),  # standard deviation of that estimate
    ]
)

STEMS = pa.schema(
    [
        *CLIPS,
        pa.field("label", pa.string(), nullable=False),
        pa.field("sample_rate_hz", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("audio_flac", pa.binary(), nullable=False),  # 24-bit FLAC of stem / 2**audio_exponent
        pa.field("audio_exponent", pa.int8(), nullable=False),
        pa.field("mixture_flac", pa.binary()),  # the clip itself, likewise, with the first of its stems
        pa.field("mixture_exponent", pa.int8()),
        *SCORES,
    ]
)

FAILURES = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # null: the whole clip failed
        pa.field("num_queries", pa.int32(), nullable=False),  # how many stems are missing because of it, 1 at least
        pa.field("step", pa.string(), nullable=False),  # manifest, decode, separate or score
        pa.field("error_class", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),  # more than 1 where the error was one that may pass
    ]
)


_SENTENCE = "the sound of "


def plain_label(label: str) -> str:
    """What makes two spellings one label: lower case, spaces for underscores, without ClearSep's "The sound of"."""
    words = label.strip().lower().replace("_", " ")
    return words.removeprefix(_SENTENCE)


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """A clip with its samples: what decoding hands to separating."""

    row: dict[str, Any]
    """Its row of ``CLIPS``."""
    samples_T: np.ndarray
    """Float32 mono samples at the separator's rate."""


@dataclass(frozen=True, kw_only=True)
class SeparatedClip:
    """A clip and the stems of those labels that the separator could be asked for: what scoring takes."""

    clip: DecodedClip
    labels: list[str]
    stems_ST: np.ndarray
    extra: Sequence[Mapping[str, float | None]] = ()
    """Of each stem the scores that take a separator or a tagger, where they were asked for."""


def failure(
    *, clip_id: str, path: str, num_queries: int, step: str, error: Exception, label: str | None = None
) -> dict[str, Any]:
    """One row of ``FAILURES`` for an exception caught at a step; without a label it counts as one query."""
    return {
        "clip_id": clip_id,
        "path": path,
        "label": label,
        "num_queries": max(1, num_queries),
        "step": step,
        "error_class": getattr(error, "error_class", type(error).__name__),
        "message": str(error)[:2000],
        "attempts": getattr(error, "attempts", 1),
    }
