"""Stem shards of a pass and the manifest that closes it: write, check, and read the audio of single stems.

``stems/<shard>.parquet`` has every stem of a shard with its audio and scores, ``failures/<shard>.parquet`` has its
failures, and ``stems/<shard>.done.json``, written last, marks both as complete (``engine/passes/records.py``).
``stems/manifest.json`` closes the pass. A selection refers to rows of these shards and copies no audio (measured in
``benchmarks/speed/tracks.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_type_hints

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from engine.audio.flac import decode_flac24
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.records import Totals, WrittenShard
from engine.schema import FAILURES, STEMS, FailureRow
from engine.settings import deciding
from engine.storage.files import parquet_file, read_record, sha256_file, write_parquet
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location

_AUDIO = ["audio_flac", "audio_exponent", "mixture_flac", "mixture_exponent"]


class PassSummary(TypedDict):
    """Contents of ``OUT/summary.json``."""

    num_clips: int
    """Clips after cutting, with the rows of the manifest that are no clips."""
    num_set_aside: int
    """Rows of the manifest with fewer than ``min_labels`` labels."""
    num_queries: int
    """Each is a stem or failed."""
    num_stems: int
    num_failed: int
    """Failed queries."""
    audio_h: float
    wall_s: float
    """Time of the start that finished the pass."""
    audio_s_per_s: float
    """Audio separated in that start, in seconds per second of wall time."""
    step_s: dict[str, float]
    """Time of all workers by step."""
    step_fraction: dict[str, float]
    separator_fingerprint: str
    config_fingerprint: str
    fingerprint: str
    """Of the separator and all stems."""


class PassManifest(PassSummary):
    """Contents of ``OUT/stems/manifest.json``, which closes a pass."""

    shards: dict[str, str]
    """SHA-256 of every stem shard, by its name."""


def write_shard(
    out: Location, name: str, *, stems: Sequence[Mapping[str, object]], failures: Sequence[FailureRow]
) -> WrittenShard:
    """Write the stems and failures of a shard."""
    path = out / "stems" / f"{name}.parquet"
    write_parquet(path, pa.Table.from_pylist(stems, schema=STEMS), rows_per_group=8)
    failed = out / "failures" / f"{name}.parquet"
    if failures:
        write_parquet(failed, pa.Table.from_pylist(failures, schema=FAILURES))
    else:
        failed.unlink(missing_ok=True)  # an attempt that was interrupted before its record may have left one
    num_failed = sum(row["num_queries"] for row in failures)
    return {"num_stems": len(stems), "num_failed": num_failed, "sha256": sha256_file(path)}


def pass_manifest(
    totals: Totals,
    corpus: Corpus,
    config: PassConfig,
    *,
    separator: str,
    num_set_aside: int,
    wall_s: float,
    audio_s_before: float,
) -> PassManifest:
    """The manifest of a pass whose tasks are all done.

    ``separator`` is a fingerprint; ``audio_s_before`` is of shards that earlier starts made.
    """
    all_s = sum(totals.step_s.values()) or 1.0
    return {
        "num_clips": totals.num_clips + corpus.num_failures,
        "num_set_aside": num_set_aside,
        "num_queries": totals.num_queries + corpus.num_failed_queries,
        "num_stems": totals.num_stems,
        "num_failed": totals.num_failed + corpus.num_failed_queries,
        "audio_h": totals.audio_s / 3600.0,
        "wall_s": wall_s,
        "audio_s_per_s": (totals.audio_s - audio_s_before) / wall_s,
        "step_s": totals.step_s,
        "step_fraction": {step: step_s / all_s for step, step_s in totals.step_s.items()},
        "separator_fingerprint": separator,
        "config_fingerprint": fingerprint(deciding(config)),
        "shards": totals.sha256,
        "fingerprint": fingerprint([separator, totals.sha256]),
    }


def read_manifest(stems: Location, *needs: str) -> PassManifest:
    """The manifest of a closed pass; ``ValueError`` unless it has the fields in ``needs``."""
    return read_record(stems / "manifest.json", PassManifest, needs=needs)


def read_summary(stems: Location) -> PassSummary:
    """The summary of a closed pass, from its manifest."""
    manifest = read_manifest(stems, *get_type_hints(PassManifest))
    return cast(PassSummary, {name: value for name, value in manifest.items() if name != "shards"})


def stem_shards(stems: Location) -> list[Location]:
    """The stem shards of a closed pass, in order.

    Raises ``ValueError`` if the pass is not closed or a shard is missing.
    """
    manifest = stems / "manifest.json"
    if not manifest.is_file():
        cause = "the pass is not finished" if (stems / "pass.json").is_file() else "there is no pass"
        raise ValueError(f"cannot find {manifest} ({cause}); give the folder of a pass that separate-corpus finished")
    shards = [stems / f"{name}.parquet" for name in sorted(read_manifest(stems, "shards")["shards"])]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        number = f"{len(missing)} of the shards of {stems} (the first is {missing[0]})"
        raise ValueError(f"cannot find {number}; restore them, or start the pass again in another folder")
    return shards


def verify(stems: Location) -> list[str]:
    """Names of the shards whose bytes differ from those that the manifest recorded."""
    shards = stem_shards(stems)
    recorded = read_manifest(stems, "shards")["shards"]
    return [shard.name for shard in shards if sha256_file(shard) != recorded[shard.stem]]


def read_columns(shard: Location, columns: list[str]) -> pa.Table:
    """Some columns of a stem shard."""
    with parquet_file(shard) as file:
        return file.read(columns=columns)


def read_audio(stems: Location, shard: str, rows: Sequence[int]) -> list[np.ndarray]:
    """The samples ``[T]`` (float32) of some rows of a stem shard."""
    return [decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in _read_rows(stems, shard, rows)]


def read_clip(stems: Location, shard: str, *, first_row: int, num_stems: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip ``[T]`` and all its stems ``[S, T]`` (float32), in the order of its rows."""
    rows = _read_rows(stems, shard, range(first_row, first_row + num_stems))
    if rows[0].get("mixture_flac") is None:
        raise ValueError(f"{stems / shard} must have a mixture at row {first_row}, got none; make the pass again")
    mixture_T = decode_flac24(rows[0]["mixture_flac"], rows[0]["mixture_exponent"])
    return mixture_T, np.stack([decode_flac24(row["audio_flac"], row["audio_exponent"]) for row in rows])


def _read_rows(stems: Location, shard: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The coded audio of some rows of a stem shard; reads only the row groups that have them."""
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
