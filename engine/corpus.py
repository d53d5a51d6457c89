"""Manifests, folders and AudioSet's lists → a clip table with stable ids: every row a clip or a failure."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.audio import AudioError
from engine.schema import CLIPS, FAILURES, failure, plain_label

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .au .caf .w64 .wma".split()
)
SOURCES = pa.schema([("path", pa.string()), ("label", pa.string()), ("fold", pa.int32())])
CUT_TOLERANCE_S = 0.5  # a segment this much longer than clip_s is one clip, limited to clip_s
_PathLike = str | os.PathLike[str]
_Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Clips and the rows that could not become one; together they are the rows of the source."""

    clips: pa.Table  # schema CLIPS
    failures: pa.Table  # schema FAILURES, step "manifest"
    root: str  # absolute folder (or URI) that relative paths start from


def clip_id(path: str, labels: Collection[str], start_s: float | None, end_s: float | None) -> str:
    """20 hex characters that depend on nothing but the arguments; times count to the microsecond."""
    times = [None if t is None else round(float(t), 6) + 0.0 for t in (start_s, end_s)]
    canonical = json.dumps([path.replace("\\", "/"), sorted(labels), *times])
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def resolve(root: str, path: str) -> str:
    """The path to open: absolute paths and URIs as they are, others under ``root``."""
    path = path.replace("\\", "/")
    return path if path.startswith("/") or "://" in path else f"{root.rstrip('/')}/{path}"


def read_corpus(
    source: _PathLike, *, class_map: _PathLike | None = None, audio_root: _PathLike | None = None
) -> Corpus:
    """Reads a ``.csv``, ``.jsonl`` or ``.parquet`` manifest, a folder of folders by label, or AudioSet's CSV.

    Manifests have columns path, labels (or label) and optionally start_s, end_s; AudioSet's needs
    ``class_map`` (index, mid, display_name) and finds its audio by YouTube id. Audio files are not opened.

    Raises ValueError for what concerns the whole: no such file, unknown kind, missing column, no rows.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"a corpus is a file or folder that exists, not {str(source)!r}: check the path")
    default_root = source if source.is_dir() else source.parent
    root = str(audio_root) if "://" in str(audio_root) else os.path.abspath(audio_root or default_root)
    if class_map is not None:
        rows = _audioset_rows(source, _display_names(Path(class_map)), root)
    elif source.is_dir():
        rows = _folder_rows(source)
    elif source.suffix.lower() in _MANIFESTS:
        rows = _MANIFESTS[source.suffix.lower()](source)
    else:
        raise ValueError(f"a manifest ends in {', '.join(_MANIFESTS)}, not {source.suffix!r}: convert it")
    return _corpus(rows, source, root)


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


def read_sources(path: _PathLike, *, folds: Collection[int] | None = None) -> pa.Table:
    """Single-source clips as ``SOURCES`` (absolute path, label, fold) from a CSV or a folder by label.

    The CSV has columns path, label and optionally fold (0 where absent); others are ignored.

    Raises ValueError for a missing file or column, a bad row, and folds that no row is in.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"sources are a CSV or folder that exists, not {str(path)!r}: check the path")
    root = os.path.abspath(path if path.is_dir() else path.parent)
    rows = _folder_rows(path) if path.is_dir() else _csv_rows(path, required=[("path",), ("label",)])
    sources = [_source_row(row, root, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not sources:
        raise ValueError(f"sources have at least one row, {str(path)!r} has none: add clips")
    kept = [row for row in sources if folds is None or row["fold"] in folds]
    if not kept:
        known = sorted({row["fold"] for row in sources})  # type: ignore[type-var]
        raise ValueError(f"some row is in the folds asked, none in {list(folds or [])}: {path} has folds {known}")
    return pa.Table.from_pylist(kept, schema=SOURCES)


def _corpus(rows: Iterator[_Row | ValueError], source: Path, root: str) -> Corpus:
    clips: dict[str, _Row] = {}
    failures: list[_Row] = []
    for number, row in enumerate(rows, 1):
        try:
            clip = _clip_row(row)
            if clip["clip_id"] in clips:
                raise ValueError(f"a clip stands once in a corpus, row {number} repeats one: remove it")
            clips[str(clip["clip_id"])] = clip
        except (ValueError, FileNotFoundError) as error:
            failures.append(_failure_row(row, number, error))
    if not clips and not failures:
        raise ValueError(f"a corpus has at least one row, {str(source)!r} has none: add clips")
    return Corpus(
        clips=pa.Table.from_pylist(list(clips.values()), schema=CLIPS),
        failures=pa.Table.from_pylist(failures, schema=FAILURES),
        root=root,
    )


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
    path = str(known.get("path") or "").encode("utf-8", "replace").decode()
    labels, identity = [], clip_id(f"row {number}", [path], None, None)
    with contextlib.suppress(ValueError):
        labels = _labels(known)
    with contextlib.suppress(ValueError):
        if path and labels:
            identity = clip_id(path, labels, _seconds(known, "start_s"), _seconds(known, "end_s"))
    return failure(clip_id=identity, path=path, num_queries=len(labels), step="manifest", error=error)


def _path(row: _Row) -> str:
    path = _text(row.get("path"), "path").strip()
    if not path or "\0" in path:
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
    except json.JSONDecodeError as error:
        raise ValueError(f"labels that start with '[' are a JSON list, not {cell!r}: {error}") from error


def _text(value: object, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is a string, not {value!r}: correct the row")
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
    except (TypeError, ValueError):
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


def _source_row(row: _Row | ValueError, root: str, where: str) -> _Row:
    try:
        if isinstance(row, ValueError):
            raise row
        if isinstance(row.get("error"), ValueError):
            raise row["error"]  # type: ignore[misc]
        path, label, fold = _path(row), _text(row.get("label"), "label").strip(), row.get("fold") or 0
        if not label:
            raise ValueError("a source has a label, this row has none: fill label")
        return {"path": resolve(root, path), "label": label, "fold": int(str(fold))}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"a manifest is UTF-8 text, {str(path)!r} is not ({error}): convert it") from error


def _cells(path: Path, *, skip_spaces: bool = False) -> Iterator[list[str]]:
    reader = csv.reader(_lines(path), skipinitialspace=skip_spaces, strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is no CSV near line {reader.line_num} ({error}): check its quotes") from error


_CLIP_COLUMNS = [("path",), ("labels", "label")]


def _check_columns(columns: Collection[str], path: Path, required: list[tuple[str, ...]]) -> None:
    for names in required:
        if not any(name in columns for name in names):
            raise ValueError(f"{str(path)!r} needs a column {' or '.join(names)}, it has {sorted(columns)}: rename one")


def _csv_rows(path: Path, required: list[tuple[str, ...]] = _CLIP_COLUMNS) -> Iterator[_Row | ValueError]:
    table = _cells(path)
    header = [name.strip() for name in next(table, [])]
    if header and header[0].startswith("#"):
        raise ValueError(f"AudioSet's CSV {str(path)!r} names classes by code: give class_map (index,mid,display_name)")
    _check_columns(header, path, required)
    for cells in table:
        row: _Row = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            row["error"] = ValueError(f"{len(cells)} cells under {len(header)} columns: quote cells with commas")
        yield row


def _jsonl_rows(path: Path) -> Iterator[_Row | ValueError]:
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield ValueError(f"each line is one JSON object, line {number} is not ({error}): correct it")
            continue
        if isinstance(row, dict):
            columns.update(row)
            yield row
        else:
            yield ValueError(f"each line is one JSON object, line {number} is {line[:80]!r}: correct it")
    if columns:
        _check_columns(columns, path, _CLIP_COLUMNS)


def _parquet_rows(path: Path) -> Iterator[_Row | ValueError]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path, _CLIP_COLUMNS)
            names = [n for n in ("path", "labels", "label", "start_s", "end_s") if n in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is no Parquet file ({error}): write it again") from error


_MANIFESTS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _audio_files(root: _PathLike) -> Iterator[str]:
    """Audio files below ``root`` by suffix, hidden ones left out, as sorted relative paths."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                yield posixpath.normpath(posixpath.join(inside, name))


def _folder_rows(root: Path) -> Iterator[_Row | ValueError]:
    """Files directly in the folder become rows without a label: accounted for, not guessed."""
    for path in _audio_files(root):
        label, slash, _ = path.partition("/")
        yield {"path": path, "label": label if slash else ""}


def _display_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"class_map is a CSV that exists, not {str(path)!r}: fetch class_labels_indices.csv")
    rows = _csv_rows(path, required=[("mid",), ("display_name",)])
    return {str(row["mid"]): str(row["display_name"]) for row in rows if isinstance(row, dict)}


def _audioset_rows(path: Path, names: dict[str, str], root: str) -> Iterator[_Row | ValueError]:
    whole: dict[str, str] = {}
    cuts: dict[str, str] = {}
    for file in _audio_files(root):
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
