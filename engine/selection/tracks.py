"""Selections: the stems of a pass that pass the thresholds, as references to rows of its shards.

A selection's folder has ``kept.parquet`` (the tracks), ``rejected.parquet`` (the other stems, with rule, value and
limit), ``events.parquet`` if single events were mined, and ``manifest.json``, which is written last. No audio is read
or copied (see benchmarks/speed/tracks.md).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NotRequired, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict

from engine.errors import DamagedError
from engine.passes.shards import PassManifest, read_columns, read_manifest, stem_shards
from engine.schema import ESTIMATES, labels_present
from engine.scoring.estimator import load_estimator
from engine.selection.filter import judge, require_scores
from engine.selection.index import INDEX, KEPT, REJECTED, IndexWriter, read_index
from engine.selection.labels.events import EVENTS, EventRow, write_events
from engine.selection.labels.table import AcceptedLabels
from engine.selection.thresholds import Thresholds, required_columns
from engine.storage.files import atomic_path, read_parquet, read_record, sha256_file, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, location, relative_name, resolve_name

_FILES, _EVENTS = ("kept.parquet", "rejected.parquet"), "events.parquet"
_MAX_TABLES = 256  # shards whose scores are combined into one table at a time
_ABSENT_RULE = "min_stem_level_db"  # rejects stems whose label is probably absent


class Estimator(Protocol):
    """Estimates the SI-SDR of stems, like ``engine.scoring.estimator.SiSdrEstimator``."""

    @property
    def fingerprint(self) -> str:
        """Equal for estimators that give equal estimates."""

    def estimate(self, scores: pa.Table) -> pa.Table:
        """Rows of ``schema.ESTIMATES`` for rows with ``schema.SCORES`` and ``label``; null without an estimate."""


class SelectionCounts(TypedDict):
    """Numbers of stems in a selection."""

    num_stems: int
    """Stems of the pass: kept and rejected ones."""
    num_kept: int
    num_kept_by_floor: int
    """Kept stems that a rule rejected and the floor readmitted."""
    num_rejected: dict[str, int]
    """Rejected stems by the name of the rule."""
    kept_h: float
    """Audio of the kept stems in hours."""
    kept_by_label: dict[str, int]
    """Kept stems by label."""
    kept_sha256: str
    """Hash of the verdicts, kept or not, on all stems in order."""
    kept_estimated_si_sdr_db: float | None
    """Mean estimate of the kept stems; None without estimates."""


class Selection(SelectionCounts):
    """The content of a selection's ``manifest.json``."""

    stems: str
    """Folder of the pass's stems, relative to the selection if possible."""
    pass_fingerprint: str
    separator_fingerprint: str
    config_fingerprint: str
    estimator_fingerprint: str | None
    """None if there was no estimator."""
    labels_fingerprint: NotRequired[str | None]
    """None if all stems have a label of their clip."""
    num_events: NotRequired[int]
    """Single events; this and the next two are absent if none were mined."""
    events_by_label: NotRequired[dict[str, int]]
    events_fingerprint: NotRequired[str]
    """Equal for equal clips, labels and purities."""
    thresholds: dict[str, Any]
    """Fields of the :class:`Thresholds`."""
    sha256: dict[str, str]
    """Checksums of the Parquet files by name."""
    kept_fingerprint: str
    """Equal for selections that keep the same stems of the same pass, whatever the thresholds."""
    fingerprint: str
    """Hash of all of the above."""


def select_tracks(
    stems: Name,
    out: Name,
    thresholds: Thresholds,
    *,
    estimator: Estimator | str | os.PathLike[str] | None = None,
    accepted: AcceptedLabels | None = None,
    events: Iterable[EventRow] | None = None,
) -> Selection:
    """Select the stems of a pass that pass the thresholds into the folder ``out``; returns its manifest.

    ``stems`` is the folder of the pass, or the folder of its stem shards, ``PASS/stems``; ``estimator`` a folder such
    as ``RUN/estimator``. Clips have the labels that are ``accepted``, and stems of others are rejected as ``no_label``;
    ``events`` are clips in which one label sounds alone. The scores that the thresholds need are in memory for all
    stems at once, other columns for one shard at a time. Raises ``ValueError`` if the thresholds need a score that no
    stem has, or if the pass is not finished.

    >>> selection = cs.select_tracks("pass", "tracks", cs.Thresholds(min_re_sdr_db=-100))
    >>> selection["num_stems"], selection["num_kept"], selection["num_rejected"]
    (4, 4, {})
    """
    stems, out = location(stems), location(out)
    stems = stems / "stems" if (stems / "stems").is_dir() else stems
    if isinstance(estimator, (str, os.PathLike)):
        estimator = load_estimator(estimator)
    shards, pass_manifest = stem_shards(stems), read_manifest(stems)
    if "num_tagged" in pass_manifest:
        raise ValueError(f"{stems.parent} must be a pass that separates, got one that tags; give a pass of a separator")
    if (out / "pass.json").is_file():
        raise ValueError(f"{out} must not be the folder of a pass, got one; give another folder for the tracks")
    for name in ("manifest.json", _EVENTS):
        (out / name).unlink(missing_ok=True)
    if accepted is None and "tagger_labels" in pass_manifest:
        accepted = _labels_present(shards)
    found: Mapping[str, object] = dict(write_events(out / _EVENTS, events)) if events is not None else {}
    verdicts = _judge_pass(shards, thresholds, estimator, accepted)
    indexes = read_index(shards)
    if accepted is not None:
        indexes = (_with_accepted(index, accepted) for index in indexes)
    counts = _write_selection(out, indexes, verdicts)
    _require_all(out, counts, len(verdicts), pass_manifest)
    estimator_fingerprint = estimator.fingerprint if estimator is not None else None
    kept = [pass_manifest["fingerprint"], estimator_fingerprint, counts["kept_sha256"]]
    selection: dict[str, Any] = {
        "stems": relative_name(stems, folder=out),
        "pass_fingerprint": pass_manifest["fingerprint"],
        "separator_fingerprint": pass_manifest["separator_fingerprint"],
        "config_fingerprint": pass_manifest["config_fingerprint"],
        "estimator_fingerprint": estimator_fingerprint,
        "labels_fingerprint": accepted.fingerprint or None if accepted is not None else None,
        "thresholds": asdict(thresholds),
        **counts,
        **found,
        "sha256": {name: sha256_file(out / name) for name in (*_FILES, *([_EVENTS] if found else []))},
        "kept_fingerprint": fingerprint(kept),
    }
    selection["fingerprint"] = fingerprint(selection)
    write_json(out / "manifest.json", selection)
    return cast(Selection, selection)


def _require_all(out: Location, counts: SelectionCounts, num_judged: int, made: PassManifest) -> None:
    """Raise ``RuntimeError`` unless kept, rejected and failed queries add up to those of the pass."""
    num_stems, num_failed = made.get("num_stems", num_judged), made.get("num_failed", 0)
    num_queries = made.get("num_queries", num_stems + num_failed)
    outcomes = counts["num_kept"] + sum(counts["num_rejected"].values()) + num_failed
    if not num_judged == num_stems == counts["num_stems"] or outcomes != num_queries:
        raise RuntimeError(
            f"cannot close the selection in {out} ({counts['num_kept']} kept, {sum(counts['num_rejected'].values())} "
            f"rejected and {num_failed} failed are not the {num_queries} queries of the pass, of which {num_stems} are "
            "stems); start the command of the pass again, then select again"
        )


def _judge_pass(
    shards: Iterable[Location],
    thresholds: Thresholds,
    estimator: Estimator | None,
    accepted: AcceptedLabels | None = None,
) -> pa.Table:
    """Columns of ``VERDICT`` and ``ESTIMATES`` of every stem, in the order of the shards.

    Quantiles and ranks need all stems at once, so the required columns of all shards are combined here.
    """
    names = ["num_stems", *dict.fromkeys([*required_columns(thresholds), *ESTIMATES.names])]
    tables = [_with_coded_labels(INDEX.empty_table().select(names))]
    has_label: list[np.ndarray] = []
    for index in read_index(shards):
        if accepted is not None:
            pairs = zip(index["clip_id"].to_pylist(), index["label"].to_pylist(), strict=True)
            has_label.append(np.array([accepted.has(*pair) for pair in pairs], np.bool_))
        tables.append(_with_coded_labels((_with_estimates(index, estimator) if estimator else index).select(names)))
        if len(tables) == _MAX_TABLES:
            tables = [_combined(tables)]
    scores = _combined(tables)
    require_scores(scores, thresholds)
    verdicts = judge(scores, thresholds, has_label_N=np.concatenate(has_label) if has_label else None)
    for name in ESTIMATES.names:
        verdicts = verdicts.append_column(name, scores[name])
    return verdicts


def _labels_present(shards: Iterable[Location]) -> AcceptedLabels:
    """The labels of the clips of a pass without those that it only tried."""
    tables = (read_columns(shard, ["clip_id", "labels", "num_tentative"]) for shard in shards)
    rows = {row["clip_id"]: labels_present(row) for table in tables for row in table.to_pylist()}
    return AcceptedLabels(rows.items(), "")


def _with_accepted(index: pa.Table, accepted: AcceptedLabels) -> pa.Table:
    """The table with the accepted labels of its clips."""
    pairs = zip(index["clip_id"].to_pylist(), index["labels"].to_pylist(), strict=True)
    labels = pa.array([accepted.of(*pair) for pair in pairs], INDEX.field("labels").type)
    return index.set_column(INDEX.names.index("labels"), INDEX.field("labels"), labels)


def _combined(tables: list[pa.Table]) -> pa.Table:
    """One table of one chunk; many small chunks take more memory than their values."""
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _with_estimates(index: pa.Table, estimator: Estimator) -> pa.Table:
    estimates = estimator.estimate(index)
    if len(estimates) != len(index) or estimates.column_names != ESTIMATES.names:
        raise ValueError(
            f"an estimator must return {ESTIMATES.names} of {len(index)} stems, got {estimates.column_names} of "
            f"{len(estimates)}; give another"
        )
    for name in ESTIMATES.names:
        index = index.set_column(INDEX.names.index(name), ESTIMATES.field(name), estimates[name].cast(pa.float32()))
    return index


def _with_coded_labels(table: pa.Table) -> pa.Table:
    """The table with labels stored as numbers, because there are many fewer labels than stems."""
    if "label" not in table.column_names:
        return table
    return table.set_column(table.column_names.index("label"), "label", table["label"].dictionary_encode())


def _write_selection(out: Location, indexes: Iterable[pa.Table], verdicts: pa.Table) -> SelectionCounts:
    """Write both Parquet files of a selection and count its stems."""
    rejected_by, labels, verdict_hash = Counter[str](), Counter[str](), hashlib.sha256()
    num_kept, kept_s, start = 0, 0.0, 0
    sum_db, num_estimates = 0.0, 0
    with atomic_path(out / "kept.parquet") as kept_file, atomic_path(out / "rejected.parquet") as rejected_file:
        with IndexWriter(kept_file, KEPT) as kept, IndexWriter(rejected_file, REJECTED) as rejected:
            for index in indexes:
                verdict = verdicts.slice(start, len(index))
                start += len(index)
                tracks = kept.add(index, verdict, verdict["kept"])
                others = rejected.add(index, verdict, pc.invert(verdict["kept"]))
                num_kept += len(tracks)
                kept_s += _duration_s(tracks)
                verdict_hash.update(verdict["kept"].to_numpy().tobytes())
                estimates = tracks["estimated_si_sdr_db"]
                sum_db += pc.sum(estimates).as_py() or 0.0
                num_estimates += pc.count(estimates).as_py()
                labels.update(tracks["label"].to_pylist())
                rejected_by.update(others["rejected_by"].to_pylist())
    return {
        "num_stems": num_kept + rejected_by.total(),
        "num_kept": num_kept,
        "num_kept_by_floor": int(pc.sum(verdicts["kept_by_floor"]).as_py() or 0),
        "num_rejected": dict(rejected_by),
        "kept_h": kept_s / 3600.0,
        "kept_by_label": dict(sorted(labels.items())),
        "kept_sha256": verdict_hash.hexdigest(),
        "kept_estimated_si_sdr_db": sum_db / num_estimates if num_estimates else None,
    }


def _duration_s(index: pa.Table) -> float:
    num_samples = index["num_samples"].to_numpy()
    return float(np.sum(num_samples / index["sample_rate_hz"].to_numpy())) if len(index) else 0.0


def read_tracks(tracks: Name) -> tuple[pa.Table, Location]:
    """The tracks of a selection (columns of ``kept.parquet``) and the folder of the stem shards that they refer to."""
    return _read_selection(location(tracks), "kept.parquet")


def read_absent(tracks: Name) -> tuple[pa.Table, Location]:
    """The stems of a selection that are too quiet for their label to be in the clip, and the folder of their shards.

    Columns of ``rejected.parquet``; ``first_row`` and ``num_stems`` give the rows of the clip. Stems that an earlier
    rule rejected are left out: if the stems do not explain the clip, a quiet one does not show that a label is absent.
    """
    table, stems = _read_selection(location(tracks), "rejected.parquet")
    return table.filter(pc.equal(table["rejected_by"], _ABSENT_RULE)), stems


def read_events(tracks: Name) -> tuple[pa.Table, Location]:
    """The single events of a selection (columns of ``EVENTS``), maybe none, and the folder of their shards."""
    return _read_selection(location(tracks), _EVENTS, empty=EVENTS.empty_table())


def _read_selection(tracks: Location, name: str, *, empty: pa.Table | None = None) -> tuple[pa.Table, Location]:
    """A file of a selection and the folder of the stems; a file that the selection never had is ``empty``."""
    if not (tracks / "manifest.json").is_file():
        raise ValueError(f"cannot find {tracks / 'manifest.json'} (no finished selection); run `clearsep filter` first")
    manifest = read_record(tracks / "manifest.json", Selection, needs=["stems", "sha256", "pass_fingerprint"])
    values = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if fingerprint(values) != manifest.get("fingerprint"):
        raise DamagedError(
            f"{tracks / 'manifest.json'} must have the fingerprint of its values, got another; run the filter again"
        )
    recorded = manifest["sha256"].get(name)
    is_missing = recorded is None and empty is not None
    if not is_missing and (not (tracks / name).is_file() or sha256_file(tracks / name) != recorded):
        raise DamagedError(f"{tracks / name} must have the checksum in its manifest, got another; run the filter again")
    stems = resolve_name(manifest["stems"], folder=tracks)
    stem_shards(stems)
    if read_manifest(stems, "fingerprint")["fingerprint"] != manifest["pass_fingerprint"]:
        raise ValueError(
            f"{tracks} must select from the pass in {stems} as it is now, got other stems (the selection is stale); "
            "run the filter again"
        )
    return empty if is_missing else read_parquet(tracks / name), stems
