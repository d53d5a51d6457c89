"""The tracks of a selection as others get them: FLAC bytes and a record of label, scores and provenance.

Shape legend: ``T`` samples.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from engine.audio.flac import encode_flac24
from engine.passes.shards import read_audio, read_columns
from engine.schema import ESTIMATES, SCORES
from engine.settings import Tree
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location

_ROWS = 8  # of a stem shard that are read together: a row group
_SLUG_CHARACTERS = 40


class Provenance(TypedDict):
    """The fields that all tracks of a selection have in common."""

    teacher: str
    """Fingerprint of the separator that made the track."""
    pass_fingerprint: str
    """Fingerprint of the pass, of which the track is a stem."""
    iteration: int | None
    """Iteration of the run that selected the track; None for a selection of its own."""
    thresholds: Tree
    """Thresholds that the track passed; rules that did not apply are left out."""


class TrackRecord(Provenance):
    """A track without its audio."""

    key: str
    """Name of the track, equal in all exports of one pass: ASCII letters, digits, hyphens and underscores."""
    label: str
    labels: list[str]
    """Labels present in the clip: the track may contain leakage of each of them."""
    clip_id: str
    source: str
    """The clip's file as the corpus names it; of an absolute path only the file's name."""
    start_s: float | None
    end_s: float | None
    sample_rate_hz: int
    num_samples: int
    scale: float
    """Decoded samples times this are the samples of the track: 1 unless their peak is above 1."""
    flac_sha256: str
    kept_by_floor: bool
    """A rule rejected the track, and the floor of its label readmitted it."""
    scores: dict[str, float | None]
    """Scores and estimates; None for those that the pass did not compute."""


def read_records(rows: pa.Table, stems: Location, provenance: Provenance) -> Iterator[tuple[TrackRecord, bytes]]:
    """The record and FLAC bytes of some rows of a selection, in their order; a few stems are in memory at a time.

    Raises ``DamagedError`` for stems that are not those that the pass recorded.
    """
    index = rows.to_pylist()
    times: dict[str, dict[str, list[float | None]]] = {}
    for first in range(0, len(index), _ROWS):
        some = index[first : first + _ROWS]
        for shard in dict.fromkeys(row["shard"] for row in some):
            if shard not in times:
                times = {shard: read_columns(stems / shard, ["start_s", "end_s"]).to_pydict()}
            of_shard = [row for row in some if row["shard"] == shard]
            for row, samples_T in zip(of_shard, read_audio(stems, shard, [r["row"] for r in of_shard]), strict=True):
                flac, exponent = encode_flac24(samples_T, sample_rate_hz=row["sample_rate_hz"], min_exponent=0)
                start_s, end_s = (times[shard][name][row["row"]] for name in ("start_s", "end_s"))
                yield _record(row, provenance, flac, 2.0**exponent, (start_s, end_s)), flac


def _record(
    row: Mapping[str, Any],
    provenance: Provenance,
    flac: bytes,
    scale: float,
    times: tuple[float | None, float | None],
) -> TrackRecord:
    same = [provenance["pass_fingerprint"], row["shard"], row["row"]]
    return {
        "key": f"{_slug(row['label'])}-{fingerprint(same)}",
        "label": row["label"],
        "labels": row["labels"],
        "clip_id": row["clip_id"],
        "source": _source(row["path"]),
        "start_s": times[0],
        "end_s": times[1],
        "sample_rate_hz": row["sample_rate_hz"],
        "num_samples": row["num_samples"],
        "scale": scale,
        "flac_sha256": hashlib.sha256(flac).hexdigest(),
        "kept_by_floor": bool(row["kept_by_floor"]),
        "scores": {name: _finite(row.get(name)) for name in (*SCORES.names, *ESTIMATES.names)},
        **provenance,
    }


def _slug(label: str) -> str:
    """A label as a part of a file's name; letters of other scripts are left out."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:_SLUG_CHARACTERS].strip("_") or "track"


def _source(path: str) -> str:
    """A path without folders of the machine that made the corpus."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return kind(path).name
    return path


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
