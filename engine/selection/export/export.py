"""Export the tracks of a selection: shard by shard, resumable, the manifest last."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from typing_extensions import TypedDict

from engine.cli.display import markdown
from engine.errors import DamagedError, nearest
from engine.selection.export.formats import FORMATS, ExportedShard, Format
from engine.selection.export.records import Provenance, read_records
from engine.selection.tracks import Selection, read_tracks
from engine.storage.files import read_record, sha256_file, write_bytes, write_json
from engine.storage.fingerprints import claim, fingerprint, read_sealed, require_unused, write_sealed
from engine.storage.lock import lock
from engine.storage.paths import Location, Name, location

_LOGGER = logging.getLogger(__name__)
_VERSION = 1  # of the layout of all formats
_BYTES_PER_SAMPLE = 3  # FLAC is smaller
_CLAIM, _LOCK = "export.json", "export"


class ExportManifest(TypedDict):
    """The content of an export's ``manifest.json``, which is written last."""

    format: str
    selection: str
    """Fingerprint of the selection."""
    num_tracks: int
    audio_h: float
    num_by_label: dict[str, int]
    """Tracks by label."""
    shards: list[ExportedShard]
    """Files with the tracks."""
    sha256: dict[str, str]
    """Checksums of the files that list the shards."""
    fingerprint: str
    """Hash of all of the above."""


def export_tracks(tracks: Name, out: Name, *, format: str, shard_mb: float = 500.0) -> ExportManifest:
    """Write the tracks of a selection into the folder ``out``, as ``webdataset``, ``datasets`` or ``flac``.

    ``shard_mb`` is the most audio of a shard in megabytes, before compression. Start it again to resume: only shards
    that are missing or damaged are written. The same selection gives the same bytes. Raises ``ValueError`` if
    ``tracks`` is no finished selection or has no tracks, or if ``out`` has anything else.

    >>> manifest = cs.export_tracks("tracks", "shared", format="flac")
    >>> manifest["num_tracks"], manifest["num_by_label"]
    (4, {'bell': 2, 'dog': 2})
    """
    tracks, out, kind = location(tracks), location(out), _find_format(format)
    if not shard_mb > 0.0:
        raise ValueError(f"shard_mb must be above 0, got {shard_mb}; give a size such as 500")
    index, stems = read_tracks(tracks)
    if not len(index):
        raise ValueError(f"{tracks} must have tracks, got none; run `clearsep filter` with looser thresholds")
    selection = read_record(tracks / "manifest.json", Selection, needs=["fingerprint"])
    identity = {"export": format, "selection": selection["fingerprint"], "shard_mb": shard_mb, "version": _VERSION}
    if not (out / _CLAIM).is_file():
        require_unused(out)
    with lock(out, _LOCK):
        claim(out / _CLAIM, identity, what="an export")
        shards = _write_shards(index, stems, out, kind, _provenance(selection, tracks), shard_mb)
        manifest = _manifest(index, selection, format, shards)
        manifest["sha256"] = {name: sha256_file(out / name) for name in kind.finish(out, shards)}
        manifest["fingerprint"] = fingerprint(manifest)
        if not (out / "README.md").is_file():  # its licence is filled in by hand
            write_bytes(out / "README.md", _card(manifest, selection).encode())
        write_json(out / "manifest.json", manifest)
    return manifest


def _find_format(name: str) -> Format:
    """The format of a name; ``ValueError`` for another."""
    if name not in FORMATS:
        raise ValueError(f"the format of exported tracks must be a known one, got {name!r}; {nearest(name, FORMATS)}")
    return FORMATS[name]


def _provenance(selection: Selection, tracks: Location) -> Provenance:
    """A run keeps the tracks of an iteration in ``iterations/NUMBER/tracks``."""
    number, iterations = tracks.parent.name, tracks.parent.parent.name
    return {
        "teacher": selection["separator_fingerprint"],
        "pass_fingerprint": selection["pass_fingerprint"],
        "iteration": int(number) if iterations == "iterations" and number.isdecimal() else None,
        "thresholds": {name: value for name, value in selection["thresholds"].items() if value is not None},
    }


def _write_shards(
    index: pa.Table, stems: Location, out: Location, kind: Format, provenance: Provenance, shard_mb: float
) -> list[ExportedShard]:
    """Write the shards that are missing or damaged; returns all of them."""
    starts = _plan(index["num_samples"].to_numpy() * _BYTES_PER_SAMPLE, shard_mb * 1e6)
    ends = [*starts[1:], len(index)]
    shards = []
    for number, (first, end) in enumerate(zip(starts, ends, strict=True)):
        file, record = kind.file(number, len(starts)), out / "shards" / f"{number:05d}.json"
        shard = _finished(record)
        if shard is None or shard["file"] != file or not kind.is_intact(out, shard):
            tracks = read_records(index.slice(first, end - first), stems, provenance)
            shard = kind.write(out, file, tracks, num_tracks=end - first)
            write_sealed(record, shard)
            _LOGGER.info("exported shard %d of %d (%d tracks)", number + 1, len(starts), shard["num_tracks"])
        shards.append(shard)
    return shards


def _plan(num_bytes_N: np.ndarray, most: float) -> list[int]:
    """First rows of the shards: of as many tracks as fit, and of one at least."""
    starts, total = [0], 0
    for row, num_bytes in enumerate(num_bytes_N.tolist()):
        if total and total + num_bytes > most:
            starts.append(row)
            total = 0
        total += num_bytes
    return starts


def _finished(record: Location) -> ExportedShard | None:
    try:
        return read_sealed(record, ExportedShard, needs=list(ExportedShard.__annotations__))
    except (FileNotFoundError, DamagedError):
        return None


def _manifest(index: pa.Table, selection: Selection, format: str, shards: list[ExportedShard]) -> ExportManifest:
    num_tracks = sum(shard["num_tracks"] for shard in shards)
    assert num_tracks == len(index), "every track is in one shard"
    durations = pc.divide(pc.cast(index["num_samples"], pa.float64()), index["sample_rate_hz"])
    return {
        "format": format,
        "selection": selection["fingerprint"],
        "num_tracks": num_tracks,
        "audio_h": pc.sum(durations).as_py() / 3600.0,
        "num_by_label": dict(sorted(Counter(index["label"].to_pylist()).items())),
        "shards": shards,
        "sha256": {},
        "fingerprint": "",
    }


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("engine.selection.export", "")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["markdown"] = markdown
    return environment.get_template("card.md.jinja")


def _card(manifest: ExportManifest, selection: Selection) -> str:
    front: Mapping[str, Any] = {"tags": ["audio", "sound-separation", "clearsep"]}
    if manifest["format"] == "datasets":
        files = [{"split": "train", "path": "data/*.parquet"}]
        front = {**front, "configs": [{"config_name": "default", "data_files": files}]}
    rules = {name: value for name, value in selection["thresholds"].items() if value is not None}
    head = yaml.safe_dump(dict(front), sort_keys=False)
    return _template().render(front_matter=head, manifest=manifest, selection=selection, rules=rules) + "\n"
