"""What a pass leaves on disk, and the filter's selection over it.

``stems/<part>.parquet`` holds every stem of a part with its audio and scores, ``failures/<part>.parquet`` what of it
could not be done, and ``stems/<part>.done.json``, written last, says that both are whole (``engine/account.py``).
``stems/manifest.json`` closes the pass. ``tracks/`` refers to rows of the stem shards instead of copying them (measured
in ``benchmarks/tracks.py``), so that a selection costs two scans of the score columns and no second copy of the audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engine.audio.flac import decode_flac24
from engine.passes.records import failure_rows
from engine.schema import FAILURES, STEMS
from engine.storage.files import parquet_file, read_json, sha256_file, write_parquet
from engine.storage.paths import Location

_AUDIO = ["audio_flac", "audio_exponent", "mixture_flac", "mixture_exponent"]


def write_part(
    out: Location, part: str, *, stems: list[dict[str, Any]], failures: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the stems and failures of a part; returns what its record says of them."""
    path = out / "stems" / f"{part}.parquet"
    write_parquet(path, pa.Table.from_pylist(stems, schema=STEMS), rows_per_group=8)
    failed = out / "failures" / f"{part}.parquet"
    if failures:
        write_parquet(failed, pa.Table.from_pylist(failures, schema=FAILURES))
    else:
        failed.unlink(missing_ok=True)  # of a try that was broken off before it was recorded
    num_failed = sum(row["num_queries"] for row in failures)
    return {"num_stems": len(stems), "num_failed": num_failed, "sha256": sha256_file(path)}


def stem_shards(stems: Location) -> list[Location]:
    """The stem shards of a closed pass, in order; ``ValueError`` if it is not closed or a shard is missing."""
    manifest = stems / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{stems} is not a finished pass: it has no manifest.json; finish separate-corpus first")
    shards = [stems / f"{part}.parquet" for part in sorted(read_json(manifest)["shards"])]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"{stems} lacks {len(missing)} of its shards, first {missing[0]}; restore or redo the pass")
    return shards


def verify(stems: Location) -> list[str]:
    """Names of the shards whose bytes are not those the manifest recorded."""
    shards = stem_shards(stems)
    recorded = read_json(stems / "manifest.json")["shards"]
    return [shard.name for shard in shards if sha256_file(shard) != recorded[shard.stem]]


def read_failures(out: Location) -> pa.Table:
    """All failure rows of a pass that stand, in memory."""
    return pa.Table.from_pylist([row for _, row in failure_rows(out)], schema=FAILURES)


def _read_columns(shard: Location, columns: list[str]) -> pa.Table:
    with parquet_file(shard) as file:
        return file.read(columns=columns)


def _read_rows(stems: Location, shard: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The coded audio of some rows of a stem shard, reading only the row groups that hold them."""
    with parquet_file(stems / shard) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        groups = np.searchsorted(ends, rows, side="right")
        columns = [name for name in _AUDIO if name in file.schema_arrow.names]
        tables = {group: file.read_row_group(int(group), columns=columns) for group in set(groups)}
    starts = [int(ends[group]) - len(tables[group]) for group in groups]
    return [
        tables[group].slice(row - start, 1).to_pylist()[0]
        for row, group, start in zip(rows, groups, starts, strict=True)
    ]


def read_audio(stems: Location, shard: str, rows: Sequence[int]) -> list[np.ndarray]:
    """The samples ``[T]`` (float32) of some rows of a stem shard."""
    return [decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in _read_rows(stems, shard, rows)]


def read_clip(stems: Location, shard: str, *, first_row: int, num_stems: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip ``[T]`` and all its stems ``[S, T]`` (float32), in the order of its rows."""
    rows = _read_rows(stems, shard, range(first_row, first_row + num_stems))
    if rows[0].get("mixture_flac") is None:
        raise ValueError(f"{stems / shard} holds no mixture at row {first_row}; make the pass again")
    mixture_T = decode_flac24(rows[0]["mixture_flac"], rows[0]["mixture_exponent"])
    return mixture_T, np.stack([decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in rows])
