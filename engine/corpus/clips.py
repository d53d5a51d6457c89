"""TODO engine/corpus/clips.py."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import posixpath
from collections.abc import Collection

from engine.errors import AudioError
from engine.schema import failure, plain_label

CUT_TOLERANCE_S = 0.5  # a segment this much longer than clip_s is one clip, limited to clip_s
_MAX_TEXT = 4096  # characters of a path or a label; Linux opens no longer path
_Row = dict[str, object]


def clip_id(path: str, labels: Collection[str], start_s: float | None, end_s: float | None) -> str:
    """20 hex characters that depend on nothing but the arguments; times count to the microsecond."""
    times = [None if t is None else round(float(t), 6) + 0.0 for t in (start_s, end_s)]
    canonical = json.dumps([path.replace("\\", "/"), sorted(labels), *times])
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def resolve(root: str, path: str) -> str:
    """The path to open: absolute paths and URIs as they are, others under ``root``."""
    path = path.replace("\\", "/")
    return path if path.startswith("/") or "://" in path else f"{root.rstrip('/')}/{path}"


def cut(row: _Row, *, duration_s: float, clip_s: float, min_clip_s: float = 1.0) -> list[_Row]:
    """A clip row, or its consecutive pieces of ``clip_s`` seconds if it is over 0.5 s longer than that.

    A row that is not cut keeps its id even where its end is limited to the file's ``duration_s`` or to
    ``clip_s``. A last piece under ``min_clip_s`` is dropped where others remain.

    Raises AudioError where the row starts after the end of the file.
    """
    if not clip_s > 0:
        raise ValueError(f"clip_s is above 0, not {clip_s}: choose a length such as 10")
    start_s, asked_end_s = _seconds(row, "start_s"), _seconds(row, "end_s")
    begin_s = start_s or 0.0
    if begin_s >= duration_s:
        raise AudioError(f"{row['path']!r} ends at {duration_s} s, before start_s {begin_s}: correct start_s")
    end_s = min(duration_s if asked_end_s is None else asked_end_s, duration_s)
    if end_s - begin_s <= clip_s + CUT_TOLERANCE_S:
        limited_s = min(end_s, begin_s + clip_s)
        return [{**row, "end_s": None if asked_end_s is None and limited_s == duration_s else limited_s}]
    num = math.ceil((end_s - begin_s) / clip_s - 1e-6)
    if end_s - (begin_s + (num - 1) * clip_s) < min_clip_s:
        num -= 1
    edges_s = [round(min(begin_s + i * clip_s, end_s), 6) for i in range(num + 1)]
    return [_piece(row, *edges) for edges in itertools.pairwise(edges_s)]


def _clip_row(row: _Row | Exception) -> _Row:
    if isinstance(row, Exception):
        raise row
    if isinstance(row.get("error"), Exception):
        raise row["error"]  # type: ignore[misc]
    path, labels = _path(row), _labels(row)
    if not labels:
        raise ValueError("a clip has at least one label, this row has none: fill labels")
    start_s, end_s = _seconds(row, "start_s"), _seconds(row, "end_s")
    if (start_s or 0.0) < 0 or (end_s is not None and end_s <= (start_s or 0.0)):
        raise ValueError(f"0 <= start_s < end_s, not {start_s} and {end_s}: correct the times or leave them empty")
    identity = clip_id(path, labels, start_s, end_s)
    return {"clip_id": identity, "path": path, "labels": labels, "start_s": start_s, "end_s": end_s}


def _failure_row(row: _Row | Exception, number: int, error: Exception) -> _Row:
    """The failure of a row; without path or labels its number stands in for its id."""
    known = {} if isinstance(row, Exception) else row
    path = str(known.get("path") or "")[:_MAX_TEXT].encode("utf-8", "replace").decode()
    labels, identity = [], clip_id(f"row {number}", [path], None, None)
    with contextlib.suppress(ValueError):
        labels = _labels(known)
    with contextlib.suppress(ValueError):
        if path and labels:
            identity = clip_id(path, labels, _seconds(known, "start_s"), _seconds(known, "end_s"))
    return failure(clip_id=identity, path=path, num_queries=len(labels), step="manifest", error=error)


def _path(row: _Row) -> str:
    path = _text(row.get("path"), "path").strip()
    if not path:
        raise ValueError(f"a clip has a path, this row has {path!r}: fill path")
    plain = path.replace("\\", "/")
    if not plain.startswith("/") and "://" not in plain and posixpath.normpath(plain).split("/")[0] == "..":
        raise ValueError(f"a relative path stays below the root, {path!r} climbs out: write it absolute")
    return path


def _labels(row: _Row) -> list[str]:
    """Labels without blanks and repeats (also in another spelling), in the order of the row."""
    cell = row.get("labels", row.get("label"))
    if isinstance(cell, str) and "labels" in row:
        cell = _split(cell)
    items = [] if cell is None else [cell] if isinstance(cell, str) else cell
    if not isinstance(items, list):
        raise ValueError(f"labels are a list of strings, not {cell!r}: correct the row")
    spelled: dict[str, str] = {}
    for item in items:
        if label := _text(item, "a label").strip():
            spelled.setdefault(plain_label(label), label)
    return list(spelled.values())


def _split(cell: str) -> object:
    cell = cell.strip()
    if not cell.startswith("["):
        return cell.split(";" if ";" in cell else ",")
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"labels that start with '[' are a JSON list, not {cell[:80]!r}: {error}") from error


def _text(value: object, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is a string, not {value!r}: correct the row")
    if value and ("\0" in value or len(value) > _MAX_TEXT):
        what = f"at most {_MAX_TEXT} characters, {value[:80]!r}... has {len(value)}"
        what = what if len(value) > _MAX_TEXT else f"no NUL, {value!r} has one"
        raise ValueError(f"{name} has {what}: correct the row")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is UTF-8, not {value!r}: rename it") from error
    return value or ""


def _seconds(row: _Row, name: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{name} is a number of seconds or empty, not {value!r}: correct the row")
    return seconds


def _piece(row: _Row, start_s: float, end_s: float) -> _Row:
    labels = _labels({"labels": row["labels"]})
    return {
        **row,
        "clip_id": clip_id(str(row["path"]), labels, start_s, end_s),
        "start_s": start_s,
        "end_s": end_s,
    }
