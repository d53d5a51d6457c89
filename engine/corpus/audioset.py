"""TODO engine/corpus/audioset.py."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from engine.corpus.clips import _Row, _seconds
from engine.corpus.rows import _audio_files, _cells, _csv_rows
from engine.storage.paths import Location, location


def _display_names(path: Location) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"class_map is a CSV that exists, not {str(path)!r}: fetch class_labels_indices.csv")
    rows = _csv_rows(path, required=[("mid",), ("display_name",)])
    return {str(row["mid"]): str(row["display_name"]) for row in rows if isinstance(row, dict)}


def _audioset_rows(path: Location, names: dict[str, str], root: str) -> Iterator[_Row | ValueError]:
    whole: dict[str, str] = {}
    cuts: dict[str, str] = {}
    for file in _audio_files(location(root)):
        stem = posixpath.splitext(posixpath.basename(file))[0]
        whole.setdefault(stem, file)
        for match in re.finditer(r"_\d+(?!\d)", stem):
            cuts.setdefault(stem[: match.end()], file)
    for cells in _cells(path, skip_spaces=True):
        if not cells[0].startswith("#"):
            yield _audioset_row([cell.strip() for cell in cells], names, whole, cuts)


def _audioset_row(
    cells: list[str], names: dict[str, str], whole: dict[str, str], cuts: dict[str, str]
) -> _Row | ValueError:
    if len(cells) != 4:
        return ValueError(f'ytid, start, end, "labels" are 4 cells, not {len(cells)}: correct {cells}')
    ytid, start, end, codes = cells
    mids = [mid for code in codes.split(",") if (mid := code.strip())]
    row: _Row = {
        "path": ytid,
        "labels": [names.get(mid, mid) for mid in mids],
        "start_s": start,
        "end_s": end,
    }
    if unknown := [mid for mid in mids if mid not in names]:
        return {**row, "error": ValueError(f"class_map names every class, not {unknown}: use AudioSet's own")}
    try:
        start_ms = round(1000 * (_seconds(row, "start_s") or 0.0))
    except ValueError as error:
        return {**row, "error": error}
    for key in (f"{ytid}_{start_ms}", f"Y{ytid}_{start_ms}"):
        if key in cuts:
            return {**row, "path": cuts[key], "start_s": None, "end_s": None}
    for key in (ytid, f"Y{ytid}"):
        if key in whole:
            return {**row, "path": whole[key]}
    return {
        **row,
        "error": FileNotFoundError(f"no audio named {ytid}.* or Y{ytid}*: fetch it or set audio_root"),
    }
