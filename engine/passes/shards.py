"""Stem shards of a pass and the manifest that closes it: write, check, and read the audio of single stems.

``stems/<shard>.parquet`` has every stem of a shard with its audio and scores, ``failures/<shard>.parquet`` has its
failures, and ``stems/<shard>.done.json``, written last, marks both as complete (``engine/passes/records.py``).
``stems/manifest.json`` closes the pass. A selection refers to rows of these shards and copies no audio (measured in
``benchmarks/speed/tracks.py``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Protocol, cast, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.audio.flac import decode_flac24
from engine.corpus.table import Corpus
from engine.errors import DamagedError
from engine.passes.config import PassConfig
from engine.passes.records import (
    ShardRecord,
    Totals,
    WrittenShard,
    adds_up,
    done_names,
    in_threads,
    parse_shard_name,
    record_path,
)
from engine.passes.speed.limits import PassLimit
from engine.passes.tasks import WHOLE, Slice, TaskCounts, Tasks
from engine.schema import FAILURES, FailureRow
from engine.settings import deciding
from engine.storage.files import (
    damaged,
    parquet_file,
    require_intact,
    sha256_file,
    sha256_footer,
    version_of,
    write_parquet,
)
from engine.storage.fingerprints import fingerprint, read_sealed
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)
_NOT_IN_SUMMARY = ("shards", "footer_sha256", "separator_terms", "tagger_labels")  # but in the manifest
_MANY = 100  # shards of which a second and more is needed to compare checksums
_NAMES = ["clip_id", "label"]
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
    num_tagged: NotRequired[int]
    """Of a pass that only tags: clips with tags. Each clip is one of its queries."""
    audio_h: float
    wall_s: float
    """Time of the start that finished the pass."""
    audio_s_per_s: float
    """Audio separated in that start, in seconds per second of wall time."""
    step_s: dict[str, float]
    """Time of all workers by step."""
    step_fraction: dict[str, float]
    separator_fingerprint: str
    """Of the tagger in a pass that only tags."""
    config_fingerprint: str
    fingerprint: str
    """Of the separator and all stems."""
    limit: NotRequired[PassLimit]
    """What limited that start; not of a slice, which shares its machines with others."""
    missing_slices: NotRequired[list[str]]
    """If a slice has ended before others: those, such as ``3/32``. All counts are then those of the slice."""


class PassStart(NamedTuple):
    """One start of a command that makes shards."""

    wall_s: float
    audio_s: float
    """Audio in the shards that it made."""
    limit: PassLimit | None
    """What limited it; null if it made no shard, or was one of several slices, which share machines."""


class Fingerprinted(Protocol):
    """The model that made the shards of a pass, such as a separator."""

    @property
    def fingerprint(self) -> str:
        """Equal for models with equal outputs."""

    @property
    def terms(self) -> Sequence[str]:
        """Licences of the released weights that it is or learned from."""


class PassManifest(PassSummary):
    """Contents of ``OUT/stems/manifest.json``, which closes a pass."""

    shards: dict[str, str]
    """SHA-256 of every stem shard, by its name."""
    footer_sha256: dict[str, str]
    """SHA-256 of their Parquet footers."""
    separator_terms: NotRequired[list[str]]
    """Licences of the released weights that the separator is or learned from."""
    tagger_labels: NotRequired[list[str]]
    """Labels of the tags in the shards, in their order; absent without a tagger."""


def write_shard(out: Location, name: str, *, stems: pa.Table, failures: Sequence[FailureRow]) -> WrittenShard:
    """Write the stems (``schema.STEMS``) and failures of a shard."""
    path = out / "stems" / f"{name}.parquet"
    write_parquet(path, stems, rows_per_group=8)
    failed = out / "failures" / f"{name}.parquet"
    if failures:
        write_parquet(failed, pa.Table.from_pylist(failures, schema=FAILURES))
    else:
        failed.unlink(missing_ok=True)  # an attempt that was interrupted before its record may have left one
    num_failed = sum(row["num_queries"] for row in failures)
    return {
        "num_stems": len(stems),
        "num_failed": num_failed,
        "sha256": sha256_file(path),
        "footer_sha256": sha256_footer(path),
        "etag": None if isinstance(path, Path) else path.etag(),
        "failures_sha256": sha256_file(failed) if failures else None,
    }


def pass_manifest(
    totals: Totals,
    corpus: Corpus,
    config: PassConfig,
    *,
    separator: Fingerprinted,
    counts: TaskCounts,
    start: PassStart,
) -> PassManifest:
    """The manifest of a pass whose tasks are all done; ``start`` is the one that finished it."""
    all_s = sum(totals.step_s.values()) or 1.0
    manifest: PassManifest = {
        "num_clips": totals.num_clips + corpus.num_failures,
        "num_set_aside": counts["num_set_aside"],
        "num_queries": totals.num_queries + corpus.num_failed_queries,
        "num_stems": totals.num_stems,
        "num_failed": totals.num_failed + corpus.num_failed_queries,
        "audio_h": totals.audio_s / 3600.0,
        "wall_s": start.wall_s,
        "audio_s_per_s": start.audio_s / start.wall_s,
        "step_s": totals.step_s,
        "step_fraction": {step: step_s / all_s for step, step_s in totals.step_s.items()},
        "separator_fingerprint": separator.fingerprint,
        "separator_terms": list(separator.terms),
        "config_fingerprint": fingerprint(deciding(config)),
        "shards": totals.sha256,
        "footer_sha256": totals.footer_sha256,
        "fingerprint": fingerprint([separator.fingerprint, totals.sha256]),
    }
    return manifest if start.limit is None else {**manifest, "limit": start.limit}


def read_manifest(stems: Location, *needs: str) -> PassManifest:
    """The manifest of a closed pass; ``ValueError`` if the pass is not closed, or without the fields in ``needs``."""
    path = stems / "manifest.json"
    if not path.is_file():
        cause = "the pass is not finished" if (stems / "pass.json").is_file() else "there is no pass"
        raise ValueError(f"cannot find {path} ({cause}); give the folder of a pass that separate-corpus finished")
    return read_sealed(path, PassManifest, needs=needs)


def read_summary(stems: Location) -> PassSummary:
    """The summary of a closed pass, from its manifest."""
    hints = get_type_hints(PassSummary, include_extras=True).items()
    return summary_of(
        read_manifest(stems, *(name for name, kind in hints if get_origin(kind) is not NotRequired), "shards")
    )


def summary_of(manifest: PassManifest) -> PassSummary:
    """The summary of a pass, from its manifest."""
    return cast(PassSummary, {name: value for name, value in manifest.items() if name not in _NOT_IN_SUMMARY})


def stem_shards(stems: Location) -> list[Location]:
    """The stem shards of a closed pass, in order.

    Raises ``ValueError`` if the pass is not closed or a shard is missing.
    """
    shards = [stems / f"{name}.parquet" for name in sorted(read_manifest(stems, "shards")["shards"])]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        number = f"{len(missing)} of the shards of {stems} (the first is {missing[0]})"
        raise DamagedError(f"cannot find {number}; start the command of the pass again, which makes them again")
    return shards


def verify(stems: Location, files: Sequence[str] | None = None) -> list[str]:
    """The stem shards of a closed pass among its damaged files, by default those of :func:`damaged_files`."""
    if files is None:
        stem_shards(stems)  # raises if one is missing
        files = damaged_files(stems.parent)
    return [
        file.removeprefix("stems/") for file in files if file.startswith("stems/") and not file.endswith(".done.json")
    ]


def damaged_files(out: Location, part: Slice = WHOLE) -> list[str]:
    """Files of a pass, relative to its folder, that are missing or whose bytes are not those that were recorded.

    Every shard is read once; an object in S3 only if its tag is another. With ``part`` only shards of a slice are.
    """
    names = done_names(out, part=part)
    if len(names) >= _MANY:
        _LOGGER.info("comparing the checksums of %d shards of %s", len(names), out)
    found = [file for files in in_threads(functools.partial(_damaged_in, out), names) for file in files]
    return found + [f"corpus/{name}" for name in Tasks(out / "corpus").damaged() if names]


def _damaged_in(out: Location, name: str) -> list[str]:
    """The damaged files of a shard that is done; the record itself if it cannot be trusted."""
    try:
        record = read_sealed(record_path(out, name), ShardRecord)
    except (FileNotFoundError, DamagedError):
        record = {}  # type: ignore[typeddict-item]
    if not record or not adds_up(record):
        return [f"stems/{name}.done.json"]
    recorded: dict[str, str | None] = {f"stems/{name}.parquet": record.get("sha256")}
    if record.get("num_failed"):
        recorded[f"failures/{name}.parquet"] = record.get("failures_sha256")  # an older version recorded none
    return [file for file, sha256 in recorded.items() if not _is_intact(out / file, sha256, record.get("etag"))]


def _is_intact(path: Location, sha256: str | None, etag: str | None) -> bool:
    """True if a file is there with its checksum; an object in S3 whose tag is the recorded one is not read."""
    try:
        return (
            (not isinstance(path, Path) and etag is not None and path.etag() == etag)
            or sha256_file(path) == sha256
            or sha256 is None
        )
    except FileNotFoundError:
        return False


def remove_damaged_manifest(out: Location) -> None:
    """Open a pass again whose manifest is damaged."""
    closed = out / "stems" / "manifest.json"
    try:
        _ = closed.is_file() and read_manifest(out / "stems")
    except DamagedError as error:
        _LOGGER.warning(str(error))
        closed.unlink()


def reopen_damaged(out: Location, damaged: Sequence[str], part: Slice = WHOLE) -> list[str]:
    """Let a pass make its shards again that have files among ``damaged``; opens a closed pass again.

    Returns the names of the slice's shards that are done, which a listing may not have if the pass was closed.
    """
    closed = out / "stems" / "manifest.json"
    is_closed, done = closed.is_file(), done_names(out, part=part)
    names = {file.rpartition("/")[2].partition(".")[0] for file in damaged if not file.startswith("corpus/")}
    retries = [file for file in damaged if file.startswith("corpus/retry-")]
    if retries and part != WHOLE:
        raise DamagedError(
            f"cannot use {out / retries[0]} (its bytes are not those that were recorded); start the "
            "command without --slice, which plans that retry again"
        )
    retry = Tasks(out / "corpus").remove_damaged_retries()
    if retry is not None:
        names |= {name for name in done if parse_shard_name(name)[0] >= retry}
    if not damaged:
        return done
    _LOGGER.warning(
        "%d files of %s are missing or damaged (the first is %s); making %d shards again%s%s",
        *(len(damaged), out, damaged[0], len(names)),
        "; clips that were tried again count as failed until the next --retry-failed" if retry is not None else "",
        "; what was selected from this pass is stale if its stems come out different" if is_closed else "",
    )
    closed.unlink(missing_ok=True)  # before the records: nobody looks for missing shards of a closed pass
    for name in names:
        record_path(out, name).unlink(missing_ok=True)
    return sorted(set(done) - names)


@functools.lru_cache(maxsize=8)
def _read_checksums(path: Location, version: object) -> tuple[Mapping[str, str], Mapping[str, str]]:
    manifest = read_sealed(path, PassManifest, needs=["shards"])
    return manifest["shards"], manifest.get("footer_sha256", {})


def _checksums(shard: Location) -> tuple[str, str]:
    """Checksums of a stem shard and of its footer, as its pass recorded them; empty if it did not."""
    path = shard.parent / "manifest.json"
    try:
        files, footer = _read_checksums(path, version_of(path))
    except FileNotFoundError:
        return "", ""
    return files.get(shard.stem, ""), footer.get(shard.stem, "")


def _require_intact(shard: Location) -> None:
    """Raise ``DamagedError`` unless a shard's footer is that which was recorded; the pages have their own checksums.

    For a shard of an older version, whose pages have none, the whole file is compared.
    """
    file, footer = _checksums(shard)
    if footer:
        require_intact(shard, footer, digest=sha256_footer)
    elif file:
        require_intact(shard, file)


@contextmanager
def open_shard(shard: Location) -> Iterator[pq.ParquetFile]:
    """A stem shard of a closed pass for reading; raises ``DamagedError`` for bytes that are not those recorded."""
    try:
        _require_intact(shard)
    except DamagedError:
        _read_checksums.cache_clear()  # the pass may have been closed again since
        _require_intact(shard)
    try:
        with parquet_file(shard) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        recorded, _ = _checksums(shard)
        if recorded and sha256_file(shard) != recorded:
            raise damaged(shard) from error
        raise


def read_columns(shard: Location, columns: list[str]) -> pa.Table:
    """Some columns of a stem shard."""
    with open_shard(shard) as file:
        return file.read(columns=columns)


def read_audio(stems: Location, shard: str, rows: Sequence[int]) -> list[np.ndarray]:
    """The samples ``[T]`` (float32) of some rows of a stem shard."""
    return [_decoded(stems / shard, row, "audio") for row in _read_rows(stems, shard, rows)]


def read_clip(
    stems: Location, shard: str, *, first_row: int, num_stems: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A clip ``[T]`` and all its stems ``[T]`` by label (float32), in the order of its rows."""
    rows = _read_rows(stems, shard, range(first_row, first_row + num_stems))
    if rows[0].get("mixture_flac") is None:
        raise ValueError(f"{stems / shard} must have a mixture at row {first_row}, got none; make the pass again")
    mixture_T = _decoded(stems / shard, rows[0], "mixture")
    return mixture_T, {row["label"]: _decoded(stems / shard, row, "audio") for row in rows}


def _decoded(shard: Location, row: Mapping[str, Any], what: str) -> np.ndarray:
    """The samples ``[T]`` of a row's stem or mixture."""
    try:
        return decode_flac24(row[f"{what}_flac"], row[f"{what}_exponent"])
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"cannot decode the {what} of {row['label']!r} of clip {row['clip_id']} in {shard} ({error}); start the "
            "command of the pass again, which makes damaged shards again, or the pass in another folder"
        ) from error


def _read_rows(stems: Location, shard: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The coded audio of some rows of a stem shard; reads only the row groups that have them."""
    with open_shard(stems / shard) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        groups = np.searchsorted(ends, rows, side="right")
        columns = [name for name in (*_NAMES, *_AUDIO) if name in file.schema_arrow.names]
        tables = {group: file.read_row_group(int(group), columns=columns) for group in set(groups)}
    starts = [int(ends[group]) - len(tables[group]) for group in groups]
    return [
        tables[group].slice(row - start, 1).to_pylist()[0]
        for row, group, start in zip(rows, groups, starts, strict=True)
    ]
