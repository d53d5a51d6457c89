"""Manifests, folders and AudioSet's lists → a clip table with stable ids: every row a clip or a failure."""

from __future__ import annotations

from collections.abc import Iterator

from engine.corpus.audioset import _audioset_rows, _display_names
from engine.corpus.clips import _clip_row, _failure_row, _Row
from engine.corpus.rows import _MANIFESTS, _folder_rows
from engine.corpus.table import Corpus
from engine.storage.paths import Location, Name, location


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
