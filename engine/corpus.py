"""Manifests, folders and AudioSet's lists → a clip table with stable ids: every row a clip or a failure."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from engine.audio import AudioError
from engine.clip_table import Corpus
from engine.schema import failure, plain_label
from engine.storage import Location, Name, location, open_binary, parquet_file

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .mp4 .webm .mka .mkv .aif .aiff .au .caf .w64 .wma".split()
)
SOURCES = pa.schema([("path", pa.string()), ("label", pa.string()), ("fold", pa.int32())])
CUT_TOLERANCE_S = 0.5  # a segment this much longer than clip_s is one clip, limited to clip_s
_MAX_TEXT = 4096  # characters of a path or a label; Linux opens no longer path
_MAX_CELL = 1 << 26  # of a CSV: a quote that is never closed ends there, a long list of labels does not
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


def read_corpus(source: Name, *, class_map: Name | None = None, audio_root: Name | None = None) -> Corpus:
    """Reads a ``.csv``, ``.jsonl`` or ``.parquet`` manifest, a folder of folders by label, or AudioSet's CSV.

    Manifests have columns path, labels (or label) and optionally start_s, end_s; AudioSet's needs
    ``class_map`` (index, mid, display_name) and finds its audio by YouTube id. Audio files are not opened.

    Raises ValueError for what concerns the whole: no such file, unknown kind, missing column, no rows.
    """
    place = location(source)
    if not place.exists():
        raise ValueError(f"a corpus is a file or folder that exists, not {str(place)!r}: check the path")
    is_folder = place.is_dir()
    root = str(location(audio_root) if audio_root is not None else place if is_folder else place.parent)
    if class_map is not None:
        rows = _audioset_rows(place, _display_names(location(class_map)), root)
    elif is_folder:
        rows = _folder_rows(place)
    elif place.suffix.lower() in _MANIFESTS:
        rows = _MANIFESTS[place.suffix.lower()](place)
    else:
        raise ValueError(f"a manifest ends in {', '.join(_MANIFESTS)}, not {place.suffix!r}: convert it")
    return _corpus(rows, place, root)


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


def read_sources(path: Name, *, folds: Collection[int] | None = None) -> pa.Table:
    """Single-source clips as ``SOURCES`` (absolute path, label, fold) from a CSV or a folder by label.

    The CSV has columns path, label and optionally fold (0 where absent); others are ignored.

    Raises ValueError for a missing file or column, a bad row, and folds that no row is in.
    """
    place = location(path)
    if not place.exists():
        raise ValueError(f"sources are a CSV or folder that exists, not {str(place)!r}: check the path")
    root = source_root(path)
    rows = _folder_rows(place) if place.is_dir() else _csv_rows(place, required=[("path",), ("label",)])
    sources = [_source_row(row, root, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if not sources:
        raise ValueError(f"sources have at least one row, {str(path)!r} has none: add clips")
    kept = [row for row in sources if folds is None or row["fold"] in folds]
    if not kept:
        known = sorted({row["fold"] for row in sources})  # type: ignore[type-var]
        raise ValueError(f"some row is in the folds asked, none in {list(folds or [])}: {path} has folds {known}")
    return pa.Table.from_pylist(kept, schema=SOURCES)


def source_root(path: Name) -> str:
    """The folder that relative paths in a list start from: the list's own, or the folder itself."""
    place = location(path)
    return str(place if place.is_dir() else place.parent)


def _corpus(rows: Iterator[_Row | ValueError], source: Location, root: str) -> Corpus:
    corpus = Corpus(root)
    for number, row in enumerate(rows, 1):
        try:
            corpus.add_clip({**_clip_row(row), "row": number})
        except (ValueError, FileNotFoundError) as error:
            corpus.add_failure(_failure_row(row, number, error))
    corpus.close(_repeated)
    if not corpus.num_clips and not corpus.num_failures:
        raise ValueError(f"a corpus has at least one row, {str(source)!r} has none: add clips")
    return corpus


def _repeated(row: _Row) -> _Row:
    error = ValueError(f"a clip stands once in a corpus, row {row['row']} repeats one: remove it")
    return _failure_row(row, 0, error)


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


def _lines(path: Location) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte order mark."""
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"a manifest is UTF-8 text, {str(path)!r} is not ({error}): convert it") from error


def _cells(path: Location, *, skip_spaces: bool = False) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(_lines(path), skipinitialspace=skip_spaces, strict=True)
    try:
        yield from (cells for cells in reader if cells)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is no CSV near line {reader.line_num} ({error}): check its quotes") from error


_CLIP_COLUMNS = [("path",), ("labels", "label")]


def _check_columns(columns: Collection[str], path: Location, required: list[tuple[str, ...]]) -> None:
    for names in required:
        if not any(name in columns for name in names):
            raise ValueError(f"{str(path)!r} needs a column {' or '.join(names)}, it has {sorted(columns)}: rename one")


def _csv_rows(path: Location, required: list[tuple[str, ...]] = _CLIP_COLUMNS) -> Iterator[_Row | ValueError]:
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


def _jsonl_rows(path: Location) -> Iterator[_Row | ValueError]:
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"each line is one JSON object, line {number} is not ({error}): correct it")
            continue
        if isinstance(row, dict):
            columns.update(row)
            yield row
        else:
            yield ValueError(f"each line is one JSON object, line {number} is {line[:80]!r}: correct it")
    if columns:
        _check_columns(columns, path, _CLIP_COLUMNS)


def _parquet_rows(path: Location) -> Iterator[_Row | ValueError]:
    try:
        with parquet_file(path) as file:
            _check_columns(file.schema_arrow.names, path, _CLIP_COLUMNS)
            names = [n for n in ("path", "labels", "label", "start_s", "end_s") if n in file.schema_arrow.names]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is no Parquet file ({error}): write it again") from error


_MANIFESTS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _audio_files(root: Location) -> Iterator[str]:
    """Audio files below ``root`` by suffix, hidden ones left out, as sorted relative paths."""
    for file in _local_files(root) if isinstance(root, Path) else root.files():
        hidden = any(part.startswith(".") for part in file.split("/"))
        if not hidden and posixpath.splitext(file)[1].lower() in AUDIO_SUFFIXES:
            yield file


def _local_files(folder: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files first, then folders; links are followed, but not to a folder that the link is in."""
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted((entry.name, _is_folder(entry)) for entry in found)
    except OSError as error:
        raise ValueError(f"a corpus's folders can be read, {str(folder)!r} cannot ({error}): check it") from error
    if (identity := (status.st_dev, status.st_ino)) in above:
        return
    yield from (inside + name for name, is_folder in entries if not is_folder)
    for name, is_folder in entries:
        if is_folder and not name.startswith("."):
            yield from _local_files(folder / name, f"{inside}{name}/", above | {identity})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _folder_rows(root: Location) -> Iterator[_Row | ValueError]:
    """Files directly in the folder become rows without a label: accounted for, not guessed."""
    for path in _audio_files(root):
        label, slash, _ = path.partition("/")
        yield {"path": path, "label": label if slash else ""}


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
