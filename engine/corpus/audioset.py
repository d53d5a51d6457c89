"""Rows of AudioSet's segment CSV, with audio files found by YouTube id and class names found by code."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

from engine.corpus.clips import ManifestRow, seconds_of
from engine.corpus.rows import audio_files, csv_cells, csv_rows
from engine.storage.paths import Location, location


def display_names(path: Location) -> dict[str, str]:
    """Class names by code (mid), from AudioSet's ``class_labels_indices.csv``."""
    if not path.is_file():
        raise ValueError(f"class_map must be a CSV file, got no file {str(path)!r}; fetch class_labels_indices.csv")
    rows = csv_rows(path, required=[("mid",), ("display_name",)])
    return {str(row["mid"]): str(row["display_name"]) for row in rows if isinstance(row, dict)}


def audioset_rows(path: Location, names: Mapping[str, str], root: str) -> Iterator[ManifestRow | ValueError]:
    """Rows of a segment CSV (ytid, start, end, codes).

    Audio below ``root`` is a whole recording named by its id, or a segment named by its id and start in milliseconds.
    """
    recordings: dict[str, str] = {}
    segments: dict[str, str] = {}
    for file in audio_files(location(root)):
        stem = posixpath.splitext(posixpath.basename(file))[0]
        recordings.setdefault(stem, file)
        for match in re.finditer(r"_\d+(?!\d)", stem):
            segments.setdefault(stem[: match.end()], file)
    for cells in csv_cells(path, skip_spaces=True):
        if not cells[0].startswith("#"):
            yield _row([cell.strip() for cell in cells], names, recordings, segments)


def _row(
    cells: list[str], names: Mapping[str, str], recordings: Mapping[str, str], segments: Mapping[str, str]
) -> ManifestRow | ValueError:
    if len(cells) != 4:
        return ValueError(f'a row must be ytid, start, end, "labels", got {len(cells)} cells; correct {cells}')
    ytid, start, end, codes = cells
    mids = [mid for code in codes.split(",") if (mid := code.strip())]
    row: ManifestRow = {"path": ytid, "labels": [names.get(mid, mid) for mid in mids], "start_s": start, "end_s": end}
    if unknown := [mid for mid in mids if mid not in names]:
        return {**row, "error": ValueError(f"class_map must name every class, got no {unknown}; use AudioSet's own")}
    try:
        start_ms = round(1000 * (seconds_of(row, "start_s") or 0.0))
    except ValueError as error:
        return {**row, "error": error}
    for key in (f"{ytid}_{start_ms}", f"Y{ytid}_{start_ms}"):
        if key in segments:
            return {**row, "path": segments[key], "start_s": None, "end_s": None}
    for key in (ytid, f"Y{ytid}"):
        if key in recordings:
            return {**row, "path": recordings[key]}
    return {
        **row,
        "error": FileNotFoundError(f"there is no audio named {ytid}.* or Y{ytid}*; fetch it or set audio_root"),
    }
