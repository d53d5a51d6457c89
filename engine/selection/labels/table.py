"""The labels of all clips at an iteration, and the changes that led there; each is a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from engine.corpus.clips import clip_id
from engine.corpus.roots import Root
from engine.corpus.table import Corpus, chunks
from engine.schema import CLIPS, plain_label
from engine.storage.files import atomic_path, parquet_file
from engine.storage.paths import Location

_BATCH_ROWS = 4096
LABELS = pa.schema(
    [
        *(field for field in CLIPS if field.name != "num_tentative"),
        pa.field("tentative", pa.list_(pa.string()), nullable=False),  # queried to find out whether they sound
    ]
)
"""Columns of a table of labels."""
CHANGES = pa.schema(
    [
        *(CLIPS.field(name) for name in ("path", "start_s", "end_s")),
        pa.field("label", pa.string(), nullable=False),
        pa.field("change", pa.string(), nullable=False),  # dropped, added or relabelled
        pa.field("new_label", pa.string()),  # what a relabelled one became
        pa.field("reason", pa.string(), nullable=False),  # the value of evidence that decided it
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("limit", pa.float32(), nullable=False),
        pa.field("evidence", pa.map_(pa.string(), pa.float32()), nullable=False),
    ]
)
"""Columns of a table of changes."""


class LabelRow(TypedDict):
    """One row of ``LABELS``."""

    clip_id: str
    path: str
    labels: list[str]
    start_s: float | None
    end_s: float | None
    tentative: list[str]


class ChangeRow(TypedDict):
    """One row of ``CHANGES``."""

    path: str
    start_s: float | None
    end_s: float | None
    label: str
    change: str
    new_label: str | None
    reason: str
    probability: float
    limit: float
    evidence: list[tuple[str, float]]


def label_row(
    path: str, start_s: float | None, end_s: float | None, *, labels: Iterable[str], tentative: Iterable[str] = ()
) -> LabelRow:
    """A row with the id of the clip in a pass that queries its labels and its tentative ones."""
    accepted, others = list(labels), list(tentative)
    identity = clip_id(path, [*accepted, *others], start_s, end_s, len(others))
    return LabelRow(clip_id=identity, path=path, labels=accepted, start_s=start_s, end_s=end_s, tentative=others)


def write_rows(path: Location, rows: Iterable[Mapping[str, object]], schema: pa.Schema) -> int:
    """Write rows, some thousand in memory at a time; returns their number."""
    num_rows = 0
    with atomic_path(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        for some in chunks(rows, _BATCH_ROWS):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            num_rows += len(some)
    return num_rows


def read_label_rows(path: Location) -> Iterator[LabelRow]:
    """The rows of a table of labels, some thousand in memory at a time."""
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()


def corpus_of(rows: Iterable[LabelRow], root: str, *, moving: bool) -> Corpus:
    """The corpus of a pass that queries the labels of the rows, and, if they may move, the tentative ones.

    Clips without any are left out. Rows are clips of a pass: their times are those of their files, also for AudioSet.
    """
    is_confined = root.is_confined if isinstance(root, Root) else False
    corpus = Corpus(Root(str(root), is_confined=is_confined))
    for number, row in enumerate(rows, 1):
        place, times = row["path"], (row["start_s"], row["end_s"])
        queried = [*row["labels"], *row["tentative"]] if moving else row["labels"]
        if queried:
            corpus.add_clip(
                {
                    "clip_id": row["clip_id"] if moving else clip_id(place, queried, *times),
                    "path": place,
                    "labels": queried,
                    "start_s": times[0],
                    "end_s": times[1],
                    "num_tentative": len(row["tentative"]) if moving else None,
                    "row": number,
                }
            )
    corpus.close()
    return corpus


class AcceptedLabels:
    """The accepted labels of the clips of a pass, by which a selection keeps stems."""

    def __init__(self, rows: Iterable[tuple[str, Iterable[str]]], fingerprint: str) -> None:
        """``rows`` have the id of a clip in the pass and its accepted labels."""
        self._labels = {identity: list(labels) for identity, labels in rows}
        self.fingerprint = fingerprint

    def of(self, identity: str, queried: list[str]) -> list[str]:
        """The labels of a clip; all that were queried if it is not in the table."""
        return self._labels.get(identity, queried)

    def has(self, identity: str, label: str) -> bool:
        """True for an accepted label; all labels of a clip that is not in the table are accepted."""
        return plain_label(label) in map(plain_label, self.of(identity, [label]))
