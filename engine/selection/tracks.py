"""TODO engine/selection/tracks.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.passes.shards import _read_columns, stem_shards
from engine.schema import ESTIMATES, SCORES, STEMS
from engine.selection.filter import VERDICT, judge, require_scores
from engine.selection.thresholds import Thresholds, columns_asked
from engine.storage.files import atomic_path, read_json, read_parquet, sha256_file, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, beside, found_beside, location

_INDEX = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # file name in the stems folder
        pa.field("row", pa.int32(), nullable=False),  # row in that file
        pa.field("first_row", pa.int32(), nullable=False),  # where the stems of its clip begin
        pa.field("num_stems", pa.int32(), nullable=False),  # how many they are
        *(STEMS.field(name) for name in ("clip_id", "path", "labels", "label", "sample_rate_hz", "num_samples")),
        *SCORES,
        *ESTIMATES,
    ]
)
_KEPT = pa.schema([*_INDEX, VERDICT.field("kept_by_floor")])
_REJECTED = pa.schema([*_INDEX, *(VERDICT.field(f"rejected_{name}") for name in ("by", "value", "limit"))])
_TOGETHER = 256  # shards whose scores are held apart at the most
_ROWS_A_GROUP = 16_384  # of a selection
_ABSENT = "min_stem_level_db"  # the rule that says so

Estimate = Callable[[pa.Table], pa.Table]
"""Maps an index with the columns of ``SCORES`` and ``label``, row by row, to a table of ``ESTIMATES``.

A stem that cannot be estimated is null in both columns.
"""


def _scan(shards: Iterable[Location]) -> Iterator[pa.Table]:
    """Identity and scores of every stem, a table a shard, without its audio; what its pass did not score is null."""
    columns = [name for name in _INDEX.names if name in STEMS.names]
    for shard in shards:
        table = _read_columns(shard, columns)
        first, count = _runs(table["clip_id"].to_pylist())
        places = {"shard": [shard.name] * len(table), "row": range(len(table)), "first_row": first, "num_stems": count}
        arrays = {field.name: pa.nulls(len(table), field.type) for field in _INDEX if field.name not in places}
        arrays |= {name: pa.array(values, _INDEX.field(name).type) for name, values in places.items()}
        arrays |= {name: table[name] for name in table.column_names}
        yield pa.table({name: arrays[name] for name in _INDEX.names}, schema=_INDEX)


def _runs(clip_ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """For every row the first row and the number of rows of its clip, whose stems stand one after another."""
    first: list[int] = []
    for row, clip_id in enumerate(clip_ids):
        first.append(first[-1] if row and clip_id == clip_ids[row - 1] else row)
    sizes = Counter(first)
    return first, [sizes[row] for row in first]


def write_tracks(
    stems: Name,
    out: Name,
    thresholds: Thresholds,
    *,
    estimate: Estimate | None = None,
    estimator_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Select the stems that pass into ``out``; returns the manifest, which is written last.

    ``kept.parquet`` refers to the tracks, ``rejected.parquet`` to the rest with rule, value and limit of each.
    ``estimate`` maps a shard's index (scores and labels among its columns), row by row, to a table of ``ESTIMATES``.
    The scores that the thresholds ask for are held in memory for the whole pass at once, everything else and the
    writing a shard at a time. Raises ``ValueError`` where a threshold asks for a score that no stem has.
    """
    stems, out = location(stems), location(out)
    shards = stem_shards(stems)
    if (out / "pass.json").is_file():
        raise ValueError(f"{out} holds the stems of a pass; give another folder for the tracks")
    (out / "manifest.json").unlink(missing_ok=True)
    verdicts = _judge_pass(shards, thresholds, estimate)
    counts = _write_selection(out, _scan(shards), verdicts)
    pass_manifest = read_json(stems / "manifest.json")
    manifest: dict[str, Any] = {
        "stems": beside(out, stems),
        "pass_fingerprint": pass_manifest["fingerprint"],
        "separator_fingerprint": pass_manifest["separator_fingerprint"],
        "config_fingerprint": pass_manifest["config_fingerprint"],
        "estimator_fingerprint": estimator_fingerprint,
        "thresholds": asdict(thresholds),
        **counts,
        "sha256": {name: sha256_file(out / name) for name in ("kept.parquet", "rejected.parquet")},
    }
    same = ("pass_fingerprint", "estimator_fingerprint", "kept_sha256")
    manifest["kept_fingerprint"] = fingerprint([manifest[name] for name in same])  # whatever rules kept them
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(out / "manifest.json", manifest)
    return manifest


def _judge_pass(shards: Iterable[Location], thresholds: Thresholds, estimate: Estimate | None) -> pa.Table:
    """Columns of ``VERDICT`` and ``ESTIMATES`` of every stem, in the order of the shards.

    Quantiles and ranks need all stems at once, so the columns that they and the rules ask for are gathered here.
    """
    names = ["num_stems", *dict.fromkeys([*columns_asked(thresholds), *ESTIMATES.names])]
    parts = [_coded(_INDEX.empty_table().select(names))]
    for index in _scan(shards):
        parts.append(_coded((_with_estimates(index, estimate) if estimate else index).select(names)))
        if len(parts) == _TOGETHER:
            parts = [_combined(parts)]
    scores = _combined(parts)
    require_scores(scores, thresholds)
    verdicts = judge(scores, thresholds)
    for name in ESTIMATES.names:
        verdicts = verdicts.append_column(name, scores[name])
    return verdicts


def _combined(parts: list[pa.Table]) -> pa.Table:
    """One table of one chunk: chunks of a shard's size weigh more than what is in them."""
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks()


def _with_estimates(index: pa.Table, estimate: Estimate) -> pa.Table:
    estimates = estimate(index)
    if len(estimates) != len(index) or estimates.column_names != ESTIMATES.names:
        raise ValueError(
            f"an estimator gives {ESTIMATES.names} of each of {len(index)} stems, this one gave "
            f"{estimates.column_names} of {len(estimates)}; give another"
        )
    for name in ESTIMATES.names:
        index = index.set_column(_INDEX.names.index(name), ESTIMATES.field(name), estimates[name].cast(pa.float32()))
    return index


def _coded(part: pa.Table) -> pa.Table:
    """Labels as numbers, of which there are many fewer than stems."""
    if "label" not in part.column_names:
        return part
    return part.set_column(part.column_names.index("label"), "label", part["label"].dictionary_encode())


def _write_selection(out: Location, indexes: Iterable[pa.Table], verdicts: pa.Table) -> dict[str, Any]:
    """Write both files; returns what they hold in numbers."""
    rejected_by: dict[str, int] = {}
    labels: dict[str, int] = {}
    num_kept, kept_s, start = 0, 0.0, 0
    which, estimates = hashlib.sha256(), [0.0, 0.0]  # of the kept: their sum and number
    with (
        atomic_path(out / "kept.parquet") as kept_file,
        atomic_path(out / "rejected.parquet") as rejected_file,
    ):
        with (
            _Rows(kept_file, _KEPT) as kept,
            _Rows(rejected_file, _REJECTED) as rejected,
        ):
            for index in indexes:
                verdict = verdicts.slice(start, len(index))
                start += len(index)
                good = _beside(index, verdict, _KEPT).filter(verdict["kept"])
                bad = _beside(index, verdict, _REJECTED).filter(pc.invert(verdict["kept"]))
                kept.add(good)
                rejected.add(bad)
                num_kept += len(good)
                kept_s += _seconds(good)
                which.update(verdict["kept"].to_numpy().tobytes())
                known = good["estimated_si_sdr_db"]
                estimates = [estimates[0] + (pc.sum(known).as_py() or 0.0), estimates[1] + pc.count(known).as_py()]
                _count(labels, good["label"])
                _count(rejected_by, bad["rejected_by"])
    return {
        "num_stems": num_kept + sum(rejected_by.values()),
        "num_kept": num_kept,
        "num_kept_by_floor": int(pc.sum(verdicts["kept_by_floor"]).as_py() or 0),
        "num_rejected": rejected_by,
        "kept_h": kept_s / 3600.0,
        "kept_by_label": dict(sorted(labels.items())),
        "kept_sha256": which.hexdigest(),
        "kept_estimated_si_sdr_db": estimates[0] / estimates[1] if estimates[1] else None,
    }


class _Rows:
    """A Parquet file made of many small tables, whose row groups are large: each costs memory and a piece of footer."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer, self._tables, self._count = pq.ParquetWriter(path, schema), list[pa.Table](), 0

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Write a table, now or with the next ones."""
        self._tables.append(table)
        self._count += len(table)
        if self._count >= _ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._count:
            self._writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._count = [], 0


def _beside(index: pa.Table, verdict: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = {name: (verdict if name in verdict.column_names else index)[name] for name in schema.names}
    return pa.table(columns, schema=schema)


def _seconds(index: pa.Table) -> float:
    num_samples = index["num_samples"].to_numpy()
    return float(np.sum(num_samples / index["sample_rate_hz"].to_numpy())) if len(index) else 0.0


def _count(counts: dict[str, int], values: pa.ChunkedArray) -> None:
    for entry in values.value_counts().to_pylist():
        counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]


def read_tracks(tracks: Name) -> tuple[pa.Table, Location]:
    """The index of a selection (columns of ``kept.parquet``) and the folder of the stem shards it refers to."""
    return _read_selection(location(tracks), "kept.parquet")


def read_absent(tracks: Name) -> tuple[pa.Table, Location]:
    """The stems of a selection that are too quiet for their label to be in the clip, and the folder of their shards.

    Columns of ``rejected.parquet``: those of the index, then rule, value and limit; ``first_row`` and ``num_stems``
    lead to the clip. Stems that an earlier rule rejected are not among them: where the stems do not explain the clip,
    a quiet one says nothing of it.
    """
    table, stems = _read_selection(location(tracks), "rejected.parquet")
    return table.filter(pc.equal(table["rejected_by"], _ABSENT)), stems


def _read_selection(tracks: Location, name: str) -> tuple[pa.Table, Location]:
    if not (tracks / "manifest.json").is_file():
        raise ValueError(f"{tracks} is not a finished selection: it has no manifest.json; run `clearsep filter` first")
    manifest = read_json(tracks / "manifest.json")
    if sha256_file(tracks / name) != manifest["sha256"][name]:
        raise ValueError(f"{tracks}/{name} is not the file that its manifest recorded; run the filter again")
    stems = found_beside(tracks, manifest["stems"])
    stem_shards(stems)
    if read_json(stems / "manifest.json")["fingerprint"] != manifest["pass_fingerprint"]:
        raise ValueError(f"{tracks} selects from another pass than the one now in {stems}; run the filter again")
    return read_parquet(tracks / name), stems
