"""Rows of AudioSet's segment CSV, with audio files found by YouTube id and class names found by code.

A file is named ``ID`` or ``YID``, and for a segment its start follows, or start and end, in seconds or milliseconds:
``YID_30.000_40.000.wav``, ``ID_30000.flac``. Without a start it is the video, or the segment alone: its length shows.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

from engine.corpus.clips import CUT_TOLERANCE_S, ManifestRow, seconds_of
from engine.corpus.rows import audio_files, csv_cells, csv_rows
from engine.errors import AudioError
from engine.schema import ClipRow
from engine.storage.paths import Location, location

_TIME = r"([0-9]+(?:\.[0-9]+)?)(?:m?s)?"
_TIMES = re.compile(f"[_-]{_TIME}(?:[_-]{_TIME})?")
_Segments = Mapping[str, list[tuple[str, str | None, str]]]
"""For each name before the times in a file's name: start, end and file."""


def display_names(path: Location) -> dict[str, str]:
    """Class names by code (mid), from AudioSet's ``class_labels_indices.csv``."""
    if not path.is_file():
        raise ValueError(f"class_map must be a CSV file, got no file {str(path)!r}; fetch class_labels_indices.csv")
    rows = csv_rows(path, required=[("mid",), ("display_name",)])
    return {str(row["mid"]): str(row["display_name"]) for row in rows if isinstance(row, dict)}


def audioset_rows(path: Location, names: Mapping[str, str], root: str) -> Iterator[ManifestRow | ValueError]:
    """Rows of a segment CSV (ytid, start, end, codes) with the audio below ``root``."""
    recordings: dict[str, str] = {}
    segments: dict[str, list[tuple[str, str | None, str]]] = {}
    for file in audio_files(location(root)):
        stem = posixpath.splitext(posixpath.basename(file))[0]
        recordings.setdefault(stem, file)
        for dash in re.finditer("[_-](?=[0-9])", stem):
            if times := _TIMES.fullmatch(stem, dash.start()):
                segments.setdefault(stem[: dash.start()], []).append((times[1], times[2], file))
    for cells in csv_cells(path, skip_spaces=True):
        if not cells[0].startswith("#"):
            yield _row([cell.strip() for cell in cells], names, recordings, segments)


def _row(
    cells: list[str], names: Mapping[str, str], recordings: Mapping[str, str], segments: _Segments
) -> ManifestRow | ValueError:
    if len(cells) != 4:
        return ValueError(f'a row must be ytid, start, end, "labels", got {len(cells)} cells; correct {cells}')
    ytid, start, end, codes = cells
    mids = [mid for code in codes.split(",") if (mid := code.strip())]
    row: ManifestRow = {"path": ytid, "labels": [names.get(mid, mid) for mid in mids], "start_s": start, "end_s": end}
    if unknown := [mid for mid in mids if mid not in names]:
        return {**row, "error": ValueError(f"class_map must name every class, got no {unknown}; use AudioSet's own")}
    try:
        start_s, end_s = seconds_of(row, "start_s") or 0.0, seconds_of(row, "end_s")
    except ValueError as error:
        return {**row, "error": error}
    for key in (ytid, f"Y{ytid}"):
        for first, last, file in segments.get(key, ()):
            if _is_named(first, last, start_s, end_s):
                return {**row, "path": file, "start_s": None, "end_s": None}
    for key in (ytid, f"Y{ytid}"):
        if key in recordings:
            return {**row, "path": recordings[key]}
    return {
        **row,
        "error": FileNotFoundError(f"there is no audio named {ytid}.* or Y{ytid}*; fetch it or set audio_root"),
    }


def _is_named(first: str, last: str | None, start_s: float, end_s: float | None) -> bool:
    """True if the times in a file's name are those of a segment, both in seconds or both in milliseconds."""
    pairs = [(float(first), start_s)] + ([(float(last), end_s)] if last is not None and end_s is not None else [])
    in_seconds = all(abs(named - time_s) < 1e-3 or named == int(time_s) for named, time_s in pairs)
    return in_seconds or all(abs(named - 1000 * time_s) <= 0.5 for named, time_s in pairs)


def located(clip: ClipRow, *, duration_s: float) -> ClipRow:
    """A clip in a file that is named by its id alone and lasts ``duration_s``: the video, or the clip's segment alone.

    A file as long as the segment, or one that ends before the segment would start in the video, is the segment. One
    that reaches to the segment's end is the video. Raises AudioError if its length fits neither or both.
    """
    start_s, end_s = clip["start_s"], clip["end_s"]
    if not start_s or end_s is None:  # the same seconds in both
        return clip
    length_s = end_s - start_s
    may_be_segment = abs(duration_s - length_s) <= CUT_TOLERANCE_S or duration_s <= min(start_s, length_s)
    may_be_video = duration_s >= end_s - CUT_TOLERANCE_S
    if may_be_segment == may_be_video:
        raise AudioError(
            f"cannot tell whether {clip['path']!r} is a video or its segment from {start_s:g} to {end_s:g} s (it lasts "
            f"{duration_s:.3f} s); name a segment by its start, such as ID_{start_s:g}.wav, or fetch it again"
        )
    return clip if may_be_video else {**clip, "start_s": None, "end_s": None}
