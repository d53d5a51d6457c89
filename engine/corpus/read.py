"""Read a corpus: every row of a manifest, folder or AudioSet list becomes a clip with a stable id or a failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine.corpus.audioset import audioset_rows, display_names
from engine.corpus.clips import ManifestRow, clip_row, failure_row
from engine.corpus.columns import Columns
from engine.corpus.roots import Root, find
from engine.corpus.rows import folder_rows, manifest_rows
from engine.corpus.table import Corpus
from engine.storage.paths import Location, Name


def read_corpus(
    source: Name,
    *,
    class_map: Name | None = None,
    audio_root: Name | None = None,
    columns: Mapping[str, str] | str | None = None,
    allow_outside: bool = False,
    needs_labels: bool = True,
) -> Corpus:
    """Read a ``.csv``, ``.jsonl`` or ``.parquet`` manifest, a folder with a subfolder per label, or AudioSet's CSV.

    Manifests have columns path, labels (or label) and optionally start_s, end_s; ``columns`` has their names where they
    are others (``"path=fname,labels=tags"``). AudioSet's CSV needs ``class_map`` (index, mid, display_name); its audio
    is found by YouTube id. ``audio_root`` is the folder of the audio files, by default the manifest's; a row that names
    a file outside it is a failure unless ``allow_outside`` is true. Audio files are not opened.

    A row without labels is a failure. With ``needs_labels`` false it is a clip with no label, a manifest needs no
    column of labels, and files may lie directly in a folder.

    Raises ValueError if the source as a whole is unusable: no such file, unknown kind, missing column, no rows.

    >>> corpus = cs.read_corpus("natural.csv")
    >>> corpus.num_clips, corpus.num_failures
    (2, 0)
    """
    path = find(source)
    if not path.exists():
        raise ValueError(f"a corpus must be a file or folder, got {str(path)!r} which does not exist; check the path")
    is_folder = path.is_dir()
    is_manifest = class_map is None and not is_folder
    if columns and not is_manifest:
        raise ValueError(f"columns must be those of a manifest, got {columns!r} for a list without; leave them out")
    # Files that were found by listing a folder are where its owner put them, also behind links.
    root = Root(
        str(find(audio_root) if audio_root is not None else path if is_folder else path.parent),
        is_confined=is_manifest and not allow_outside,
        is_audioset=class_map is not None,
    )
    if class_map is not None:
        rows = audioset_rows(path, display_names(find(class_map)), root)
    elif is_folder:
        rows = folder_rows(path)
    else:
        needed = (("path",), ("labels", "label")) if needs_labels else (("path",),)
        rows = manifest_rows(path, Columns(columns), *needed)
    return _corpus(rows, path, root, needs_labels=needs_labels)


def _corpus(rows: Iterator[ManifestRow | ValueError], source: Location, root: Root, *, needs_labels: bool) -> Corpus:
    corpus = Corpus(root)
    for number, row in enumerate(rows, 1):
        try:
            clip = clip_row(row, needs_labels=needs_labels)
            root.require_inside(clip["path"])
            corpus.add_clip({**clip, "row": number})
        except (ValueError, FileNotFoundError) as error:
            corpus.add_failure(failure_row(row, number, error))
    corpus.close()
    if not corpus.num_clips and not corpus.num_failures:
        raise ValueError(f"a corpus must have at least one row, got none in {str(source)!r}; add clips")
    return corpus
