"""One row of a corpus: checked and turned into a clip or a failure, with a stable id, and cut into shorter clips."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Sequence

from engine.corpus.labels import labels_of, text_of
from engine.corpus.roots import resolve as resolve  # noqa: PLC0414 - it is also a step of a row
from engine.errors import AudioError, TooShortError
from engine.schema import MAX_TEXT, ClipRow, FailureRow, failure

CUT_TOLERANCE_S = 0.5
"""A segment that is longer than ``clip_s`` by at most this becomes one clip, limited to ``clip_s``."""
_ROUNDING_S = 1e-6

ManifestRow = dict[str, object]
"""Cells of a manifest's row by column, not checked; an exception under ``error`` says why the row is unusable."""


def clip_id(
    path: str,
    labels: Sequence[str],
    start_s: float | None,
    end_s: float | None,
    num_tentative: int | None = None,
) -> str:
    """20 hex characters that depend on nothing but the arguments; times count to the microsecond."""
    times = [None if t is None else round(float(t), 6) + 0.0 for t in (start_s, end_s)]
    tried = [] if num_tentative is None else [sorted(labels[len(labels) - num_tentative :])]
    canonical = json.dumps([path.replace("\\", "/"), sorted(labels), *times, *tried])
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def cut(clip: ClipRow, *, duration_s: float, clip_s: float, min_clip_s: float = 1.0) -> list[ClipRow]:
    """The clip itself, or consecutive clips of ``clip_s`` seconds if it is over 0.5 s longer than that.

    A clip that is not cut keeps its id even if its end is limited to the file's ``duration_s`` or to ``clip_s``. A last
    clip under ``min_clip_s`` is dropped if there are others. Raises AudioError if the clip starts after the end of the
    file, and TooShortError if all of it is shorter than ``min_clip_s``.
    """
    begin_s = clip["start_s"] or 0.0
    if begin_s >= duration_s:
        raise AudioError(
            f"start_s must be before the end of {clip['path']!r} at {duration_s} s, got {begin_s}; correct start_s"
        )
    end_s = duration_s if clip["end_s"] is None else min(clip["end_s"], duration_s)
    if end_s - begin_s < min_clip_s - _ROUNDING_S:
        raise TooShortError(
            f"a clip must last at least min_clip_s={min_clip_s:g} s, got {end_s - begin_s:.6g} s of {clip['path']!r}; "
            "remove it, or set min_clip_s lower (engine.min_clip_s in a run) in a new folder"
        )
    if end_s - begin_s <= clip_s + CUT_TOLERANCE_S:
        limited_s = min(end_s, begin_s + clip_s)
        return [{**clip, "end_s": None if clip["end_s"] is None and limited_s == duration_s else limited_s}]
    num_clips = math.ceil((end_s - begin_s) / clip_s - 1e-6)
    if end_s - (begin_s + (num_clips - 1) * clip_s) < min_clip_s:
        num_clips -= 1
    edges_s = [round(min(begin_s + i * clip_s, end_s), 6) for i in range(num_clips + 1)]
    return [_between(clip, start_s, end_s) for start_s, end_s in itertools.pairwise(edges_s)]


def _between(clip: ClipRow, start_s: float, end_s: float) -> ClipRow:
    identity = clip_id(clip["path"], clip["labels"], start_s, end_s, clip.get("num_tentative"))
    return {**clip, "clip_id": identity, "start_s": start_s, "end_s": end_s}


def clip_row(row: ManifestRow | Exception, *, needs_labels: bool = True) -> ClipRow:
    """The clip of a manifest's row; raises the error of a row that is none, and for no label if it ``needs_labels``."""
    if isinstance(row, Exception):
        raise row
    if isinstance(row.get("error"), Exception):
        raise row["error"]  # type: ignore[misc]
    path, labels = path_of(row), labels_of(row)
    if needs_labels and not labels:
        raise ValueError("a clip must have at least one label, got none; fill in labels")
    start_s, end_s = seconds_of(row, "start_s"), seconds_of(row, "end_s")
    if (start_s or 0.0) < 0 or (end_s is not None and end_s <= (start_s or 0.0)):
        raise ValueError(f"times must be 0 <= start_s < end_s, got {start_s} and {end_s}; correct or leave them empty")
    identity = clip_id(path, labels, start_s, end_s)
    return {"clip_id": identity, "path": path, "labels": labels, "start_s": start_s, "end_s": end_s}


def failure_row(row: ManifestRow | Exception, number: int, error: Exception) -> FailureRow:
    """The failure of row ``number`` of a manifest; if the row has no path or labels, its id comes from the number."""
    known = {} if isinstance(row, Exception) else row
    path = str(known.get("path") or "")[:MAX_TEXT].encode("utf-8", "replace").decode()
    clip: ClipRow = {"clip_id": "", "path": path, "labels": [], "start_s": None, "end_s": None}
    with contextlib.suppress(ValueError):
        clip["labels"] = labels_of(known)
    with contextlib.suppress(ValueError):
        clip["start_s"], clip["end_s"] = seconds_of(known, "start_s"), seconds_of(known, "end_s")
        if path and clip["labels"]:
            clip["clip_id"] = clip_id(path, clip["labels"], clip["start_s"], clip["end_s"])
    clip["clip_id"] = clip["clip_id"] or clip_id(f"row {number}", [path], None, None)
    return failure(clip, step="manifest", error=error, is_cut=False)


def path_of(row: ManifestRow) -> str:
    """The path of a row; ValueError if there is none."""
    path = text_of(row.get("path"), "path")
    if not path.strip():
        raise ValueError(f"a clip must have a path, got {path!r}; fill in path")
    return path


def seconds_of(row: ManifestRow, name: str) -> float | None:
    """The time in a cell, in seconds, None if it is empty."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{name} must be a number of seconds or empty, got {value!r}; correct the row")
    return seconds
