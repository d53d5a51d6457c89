"""Columns of the files that the steps of the engine exchange, as Arrow schemas and typed rows.

Row types, in the order in which a pass makes them:

* *clip*: one piece of natural audio with its labels;
* *stem*: what the separator returned for one clip and one label, with every score;
* *failure*: a clip, or one of its labels, that could not be processed, with the reason. No clip is dropped silently.

Unit suffixes: ``_s`` seconds, ``_hz``, ``_db``, ``_dbfs``, ``_fraction`` (0 to 1), ``num_`` counts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from torch import Tensor  # takes seconds

CLIPS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),  # hash of path, labels and times
        pa.field("path", pa.string(), nullable=False),  # as in the manifest
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("start_s", pa.float64()),  # null: from the beginning
        pa.field("end_s", pa.float64()),  # null: to the end
        pa.field("num_tentative", pa.int32()),  # last labels that are only tried; null: labels do not move
    ]
)

_ALWAYS = tuple(name for name in CLIPS.names if name != "num_tentative")  # columns that every clip has

SCORES_VERSION = 2
"""Version of the score definitions; passes and estimators of another version are refused."""

SCORES = pa.schema(
    [
        pa.field("re_sdr_db", pa.float32()),  # per clip, on each of its stems; null below 512 samples
        pa.field("re_si_sdr_db", pa.float32()),  # per clip
        pa.field("remix_snr_db", pa.float32()),  # per clip
        pa.field("stem_level_db", pa.float32()),  # stem energy relative to the mixture's
        pa.field("active_fraction", pa.float32()),  # of the time, in which the stem is close to its loudest level
        pa.field("coherence_fraction", pa.float32()),  # with the most similar other stem; null if it is the only stem
        pa.field("mixture_coherence_fraction", pa.float32()),  # with the mixture
        pa.field("mask_snr_db", pa.float32()),  # expected from the masks that would make the clip's stems
        pa.field("share_si_sdr_db", pa.float32()),  # of the stem against its share of the mixture
        pa.field("contested_db", pa.float32()),  # part of the stem that other stems claim too; null if the only stem
        pa.field("cycle_si_sdr_db", pa.float32()),  # remixed and separated again, against itself; null if switched off
        pa.field("rival_leak_db", pa.float32()),  # separated from the stem by rivals' queries; null if switched off
        pa.field("tagger_margin_db", pa.float32()),  # own label over the strongest rival; null without a tagger
    ]
)

ESTIMATES = pa.schema(
    [
        pa.field("estimated_si_sdr_db", pa.float32()),  # of the stem against its true source, which is unknown
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
        pa.field("mixture_flac", pa.binary()),  # the clip itself, coded in the same way, with its first stem only
        pa.field("mixture_exponent", pa.int8()),
        *SCORES,
        pa.field("residual_level_db", pa.float32()),  # of the clip minus its stems, relative to it; first stem only
        pa.field("tags_db", pa.list_(pa.float32())),  # of all labels of the tagger; null if labels do not move
        pa.field("clip_tags_db", pa.list_(pa.float32())),  # strongest in windows of the clip, with its first stem only
        pa.field("residual_tags_db", pa.list_(pa.float32())),  # of the clip minus its stems, in the same way
    ]
)

FAILURES = pa.schema(
    [
        *CLIPS,  # path and labels may be empty in a failure of the step "manifest"
        pa.field("is_cut", pa.bool_(), nullable=False),  # its times are those of a file that was cut: see cut_rows
        pa.field("label", pa.string()),  # null: the whole clip failed
        pa.field("num_queries", pa.int32(), nullable=False),  # stems that are missing because of it, at least 1
        pa.field("step", pa.string(), nullable=False),  # manifest, decode, separate or score
        pa.field("error_class", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),  # more than 1 if the error was one that may pass by itself
    ]
)


MAX_TEXT = 4096
"""Characters of a path or a label; Linux opens no longer path."""


class ClipRow(TypedDict):
    """One row of ``CLIPS``."""

    clip_id: str
    path: str
    labels: list[str]
    start_s: float | None
    end_s: float | None
    num_tentative: NotRequired[int | None]
    """Labels at the end of ``labels`` that are only queried to find out whether they sound; null: labels do not move,
    and no evidence for that is stored."""


class FailureRow(ClipRow):
    """One row of ``FAILURES``."""

    is_cut: bool
    label: str | None
    num_queries: int
    step: str
    error_class: str
    message: str
    attempts: int


class FailureReason(TypedDict):
    """Failed queries of one step and class of error."""

    step: str
    error_class: str
    num_queries: int
    example: str
    """Path and message of one of them."""


_SENTENCE = "the sound of "


def plain_label(label: str) -> str:
    """The common spelling of a label: lower case, one space for underscores and spaces, without "The sound of".

    Composed and decomposed letters are the same (Unicode's NFC); a label without words is empty.
    """
    words = unicodedata.normalize("NFC", label).lower().replace("_", " ").split()
    return " ".join([*words, ""]).removeprefix(_SENTENCE).strip()


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """A clip with its samples, as decoding passes it to separation."""

    row: ClipRow
    samples_T: np.ndarray
    """Float32 mono samples at the separator's rate."""


@dataclass(frozen=True, kw_only=True)
class ClipTags:
    """Tags of a clip for the labels L of a tagger, float32, in dB."""

    stems_SL: np.ndarray
    """Of each stem as a whole."""
    clip_L: np.ndarray
    """The strongest in any window of the clip."""
    residual_L: np.ndarray
    """The strongest in any window of the clip minus its stems."""


@dataclass(frozen=True, kw_only=True)
class SeparatedClip:
    """A clip and its stems, as separation passes them to scoring; labels that failed are absent."""

    clip: DecodedClip
    labels: list[str]
    mixture_T: Tensor
    """The clip's samples, float32, on the device of the separator."""
    stems_ST: Tensor
    """Float32, on the same device."""
    extra: Sequence[Mapping[str, float | None]] = ()
    """For each stem, the scores that need a separator or a tagger; empty if none were computed."""
    tags: ClipTags | None = None
    """None if they are not stored."""


def clip_columns(row: Mapping[str, object]) -> ClipRow:
    """The columns of ``CLIPS`` in a row that may have more."""
    return {name: row[name] for name in _ALWAYS} | {"num_tentative": row.get("num_tentative")}  # type: ignore[return-value]


def labels_present(row: ClipRow) -> list[str]:
    """The labels of a clip without those that are only tried."""
    return row["labels"][: len(row["labels"]) - (row.get("num_tentative") or 0)]


def failure(
    clip: Mapping[str, object],
    *,
    step: str,
    error: Exception,
    label: str | None = None,
    num_queries: int | None = None,
    is_cut: bool = True,
) -> FailureRow:
    """One row of ``FAILURES`` for an exception caught at a step.

    ``num_queries`` is by default 1 for a failed label and the number of labels for a failed clip. ``is_cut`` is false
    for a row of the manifest whose file could not be opened.
    """
    row = clip_columns(clip)
    queries = len(row["labels"]) if label is None else 1
    return {
        **row,
        "is_cut": is_cut and row["end_s"] is not None,
        "label": label,
        "num_queries": max(1, queries if num_queries is None else num_queries),
        "step": step,
        "error_class": getattr(error, "error_class", type(error).__name__),
        "message": (str(error) or repr(error))[:2000].encode(errors="backslashreplace").decode(),
        "attempts": getattr(error, "attempts", 1),
    }
