"""What a pass leaves on disk, and the filter's selection over it.

``stems/<part>.parquet`` holds every stem of a part with its audio and scores, ``failures/<part>.parquet`` what could
not be done, and ``stems/<part>.done.json``, written last, says that both are whole. ``stems/manifest.json`` closes the
pass. ``tracks/`` refers to rows of the stem shards instead of copying them (measured in ``benchmarks/tracks.py``), so
that a selection costs a scan of the score columns and no second copy of the audio.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.audio import decode_flac24
from engine.filter import VERDICT, Thresholds, judge
from engine.schema import FAILURES, SCORES, STEMS
from engine.storage import atomic_path, fingerprint, read_json, sha256_file, write_json, write_parquet

_INDEX = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # file name in the stems folder
        pa.field("row", pa.int32(), nullable=False),  # row in that file
        pa.field("first_row", pa.int32(), nullable=False),  # where the stems of its clip begin
        pa.field("num_stems", pa.int32(), nullable=False),  # how many they are
        *(STEMS.field(name) for name in ("clip_id", "path", "labels", "label", "sample_rate_hz", "num_samples")),
        *SCORES,
    ]
)
_AUDIO = ["audio_flac", "audio_exponent", "mixture_flac", "mixture_exponent"]
_REJECTED = pa.schema([*_INDEX, *(VERDICT.field(name) for name in VERDICT.names if name != "kept")])


def write_part(out: Path, part: str, *, stems: list[dict[str, Any]], failures: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the stems and failures of a part; returns what its record says of them."""
    path = out / "stems" / f"{part}.parquet"
    write_parquet(path, pa.Table.from_pylist(stems, schema=STEMS), rows_per_group=8)
    write_parquet(out / "failures" / f"{part}.parquet", pa.Table.from_pylist(failures, schema=FAILURES))
    num_failed = sum(row["num_queries"] for row in failures)
    return {"num_stems": len(stems), "num_failed": num_failed, "sha256": sha256_file(path)}


def write_done(out: Path, part: str, record: dict[str, Any]) -> None:
    """Record that a part is whole."""
    write_json(out / "stems" / f"{part}.done.json", record)


def done_parts(out: Path) -> dict[str, dict[str, Any]]:
    """The record of every part that is whole, by part name."""
    return {
        path.name.removesuffix(".done.json"): read_json(path) for path in sorted((out / "stems").glob("*.done.json"))
    }


def stem_shards(stems: Path) -> list[Path]:
    """The stem shards of a closed pass, in order; ``ValueError`` if it is not closed or a shard is missing."""
    manifest = stems / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{stems} is not a finished pass: it has no manifest.json; finish separate-corpus first")
    shards = [stems / f"{part}.parquet" for part in sorted(read_json(manifest)["shards"])]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"{stems} lacks {len(missing)} of its shards, first {missing[0]}; restore or redo the pass")
    return shards


def verify(stems: Path) -> list[str]:
    """Names of the shards whose bytes are not those the manifest recorded."""
    shards = stem_shards(stems)
    recorded = read_json(stems / "manifest.json")["shards"]
    return [shard.name for shard in shards if sha256_file(shard) != recorded[shard.stem]]


def read_failures(out: Path) -> pa.Table:
    """All failure rows of a pass."""
    tables = [pq.read_table(path, schema=FAILURES) for path in sorted((out / "failures").glob("*.parquet"))]
    return pa.concat_tables(tables) if tables else FAILURES.empty_table()


def _scan(shards: Iterable[Path]) -> Iterator[pa.Table]:
    """Identity and scores of every stem, a table a shard, without its audio."""
    columns = [name for name in _INDEX.names if name in STEMS.names]
    for shard in shards:
        table = pq.ParquetFile(shard).read(columns=columns)
        first, count = _runs(table["clip_id"].to_pylist())
        places = {"shard": [shard.name] * len(table), "row": range(len(table)), "first_row": first, "num_stems": count}
        arrays = {name: pa.array(values, _INDEX.field(name).type) for name, values in places.items()}
        arrays |= {name: table[name] for name in columns}
        yield pa.table({name: arrays[name] for name in _INDEX.names}, schema=_INDEX)


def _runs(clip_ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """For every row the first row and the number of rows of its clip, whose stems stand one after another."""
    first: list[int] = []
    for row, clip_id in enumerate(clip_ids):
        first.append(first[-1] if row and clip_id == clip_ids[row - 1] else row)
    sizes = Counter(first)
    return first, [sizes[row] for row in first]


def write_tracks(stems: Path, out: Path, thresholds: Thresholds) -> dict[str, Any]:
    """Select the stems that pass, one shard at a time, into ``out``; returns the manifest, which is written last.

    ``kept.parquet`` refers to the tracks, ``rejected.parquet`` to the rest with rule, value and limit of each.
    """
    stems, out = Path(stems), Path(out)
    shards = stem_shards(stems)
    if (out / "pass.json").is_file():
        raise ValueError(f"{out} holds the stems of a pass; give another folder for the tracks")
    rejected_by: dict[str, int] = {}
    num_kept, kept_s, labels = 0, 0.0, {}  # type: int, float, dict[str, int]
    (out / "manifest.json").unlink(missing_ok=True)
    with (
        atomic_path(out / "kept.parquet") as kept_file,
        atomic_path(out / "rejected.parquet") as rejected_file,
    ):
        with (
            pq.ParquetWriter(kept_file, _INDEX) as kept,
            pq.ParquetWriter(rejected_file, _REJECTED) as rejected,
        ):
            for index in _scan(shards):
                verdict = judge(index, thresholds)
                good = index.filter(verdict["kept"])
                bad = verdict["rejected_by"].is_valid()
                kept.write_table(good)
                rejected.write_table(_beside(index.filter(bad), verdict.filter(bad)))
                num_kept += len(good)
                kept_s += _seconds(good)
                _count(labels, good["label"])
                _count(rejected_by, verdict["rejected_by"].filter(bad))
    pass_manifest = read_json(stems / "manifest.json")
    manifest: dict[str, Any] = {
        "stems": os.path.relpath(stems.resolve(), out.resolve()),
        "pass_fingerprint": pass_manifest["fingerprint"],
        "separator_fingerprint": pass_manifest["separator_fingerprint"],
        "config_fingerprint": pass_manifest["config_fingerprint"],
        "thresholds": asdict(thresholds),
        "num_stems": num_kept + sum(rejected_by.values()),
        "num_kept": num_kept,
        "num_rejected": rejected_by,
        "kept_h": kept_s / 3600.0,
        "kept_by_label": dict(sorted(labels.items())),
        "sha256": {name: sha256_file(out / name) for name in ("kept.parquet", "rejected.parquet")},
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(out / "manifest.json", manifest)
    return manifest


def _beside(left: pa.Table, right: pa.Table) -> pa.Table:
    columns = {name: right[name] for name in right.column_names if name != "kept"}
    return pa.table({name: left[name] for name in left.column_names} | columns, schema=_REJECTED)


def _seconds(index: pa.Table) -> float:
    num_samples = index["num_samples"].to_numpy()
    return float(np.sum(num_samples / index["sample_rate_hz"].to_numpy())) if len(index) else 0.0


def _count(counts: dict[str, int], values: pa.ChunkedArray) -> None:
    for entry in values.value_counts().to_pylist():
        counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]


def read_tracks(tracks: str | Path) -> tuple[pa.Table, Path]:
    """The index of a selection (columns of ``kept.parquet``) and the folder of the stem shards it refers to."""
    tracks = Path(tracks)
    if not (tracks / "manifest.json").is_file():
        raise ValueError(f"{tracks} is not a finished selection: it has no manifest.json; run `clearsep filter` first")
    manifest = read_json(tracks / "manifest.json")
    if sha256_file(tracks / "kept.parquet") != manifest["sha256"]["kept.parquet"]:
        raise ValueError(f"{tracks}/kept.parquet is not the file that its manifest recorded; run the filter again")
    stems = (tracks / manifest["stems"]).resolve()
    stem_shards(stems)
    if read_json(stems / "manifest.json")["fingerprint"] != manifest["pass_fingerprint"]:
        raise ValueError(f"{tracks} selects from another pass than the one now in {stems}; run the filter again")
    return pq.read_table(tracks / "kept.parquet"), stems


def _read_rows(stems: Path, shard: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The coded audio of some rows of a stem shard, reading only the row groups that hold them."""
    file = pq.ParquetFile(stems / shard)
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    groups = np.searchsorted(ends, rows, side="right")
    columns = [name for name in _AUDIO if name in file.schema_arrow.names]
    tables = {group: file.read_row_group(int(group), columns=columns) for group in set(groups)}
    starts = [int(ends[group]) - len(tables[group]) for group in groups]
    return [
        tables[group].slice(row - start, 1).to_pylist()[0]
        for row, group, start in zip(rows, groups, starts, strict=True)
    ]


def read_audio(stems: Path, shard: str, rows: Sequence[int]) -> list[np.ndarray]:
    """The samples ``[T]`` (float32) of some rows of a stem shard."""
    return [decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in _read_rows(stems, shard, rows)]


def read_clip(stems: Path, shard: str, *, first_row: int, num_stems: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip ``[T]`` and all its stems ``[S, T]`` (float32), in the order of its rows."""
    rows = _read_rows(stems, shard, range(first_row, first_row + num_stems))
    if rows[0].get("mixture_flac") is None:
        raise ValueError(f"{stems / shard} holds no mixture at row {first_row}; make the pass again")
    mixture_T = decode_flac24(rows[0]["mixture_flac"], rows[0]["mixture_exponent"])
    return mixture_T, np.stack([decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in rows])
