"""The formats of exported tracks: each writes a shard of tracks, then the files that make the folder complete."""

from __future__ import annotations

import abc
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.schema import ESTIMATES, SCORES
from engine.selection.export.records import TrackRecord
from engine.storage.files import atomic_path, open_binary, sha256_file, write_bytes, write_json
from engine.storage.paths import Location

_ROWS_PER_GROUP = 32  # of a Parquet file: what a reader of one track reads, and what is in memory when it is written
Tracks = Iterable[tuple[TrackRecord, bytes]]


class ExportedShard(TypedDict):
    """A shard of an export that is complete."""

    file: str
    """Name of the file that has its tracks, relative to the export."""
    sha256: str
    num_tracks: int
    num_bytes: int
    """Size of the file."""


class Format(abc.ABC):
    """A format of exported tracks; every shard is written completely or not at all."""

    suffix: str

    def file(self, number: int, num_shards: int) -> str:
        """Name of the file of a shard."""
        return f"tracks-{number:05d}-of-{num_shards:05d}.{self.suffix}"

    def write(self, out: Location, file: str, tracks: Tracks, *, num_tracks: int) -> ExportedShard:
        """Write a shard."""
        with atomic_path(out / file) as temporary:
            self.write_shard(out, temporary, tracks)
            sha256, num_bytes = sha256_file(temporary), temporary.stat().st_size
        return {"file": file, "sha256": sha256, "num_tracks": num_tracks, "num_bytes": num_bytes}

    @abc.abstractmethod
    def write_shard(self, out: Location, path: Path, tracks: Tracks) -> None:
        """Write the file of a shard to a local path."""

    def is_intact(self, out: Location, shard: ExportedShard) -> bool:
        """True if the bytes of a shard are those that were written."""
        return (out / shard["file"]).is_file() and sha256_file(out / shard["file"]) == shard["sha256"]

    def finish(self, out: Location, shards: Sequence[ExportedShard]) -> list[str]:
        """Write the files that list all shards; returns their names."""
        return []


class WebDataset(Format):
    """Tar files with ``KEY.flac`` and ``KEY.json`` for each track, and the index of webdataset's ``wids``."""

    suffix = "tar"

    def write_shard(self, out: Location, path: Path, tracks: Tracks) -> None:
        """See :meth:`Format.write_shard`."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record, flac in tracks:
                for suffix, data in (("flac", flac), ("json", _line(record))):
                    info = tarfile.TarInfo(f"{record['key']}.{suffix}")  # of no user, and of no time
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    def finish(self, out: Location, shards: Sequence[ExportedShard]) -> list[str]:
        """See :meth:`Format.finish`."""
        entries = [
            {"url": shard["file"], "nsamples": shard["num_tracks"], "filesize": shard["num_bytes"]} for shard in shards
        ]
        write_json(out / "index.json", {"wids_version": 1, "shardlist": entries, "name": "tracks"})
        return ["index.json"]


class Datasets(Format):
    """Parquet files with an audio column, which ``datasets.load_dataset`` opens."""

    suffix = "parquet"

    def file(self, number: int, num_shards: int) -> str:
        """See :meth:`Format.file`."""
        return f"data/train-{number:05d}-of-{num_shards:05d}.parquet"

    def write_shard(self, out: Location, path: Path, tracks: Tracks) -> None:
        """See :meth:`Format.write_shard`."""
        writer: pq.ParquetWriter | None = None
        for rows in _groups(tracks):
            schema = _parquet_schema(rows[0]["sample_rate_hz"])
            if writer is None:
                writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        if writer is not None:
            writer.close()


def _groups(tracks: Tracks) -> Iterator[list[Any]]:
    """Rows of the Parquet file, as many at a time as a row group has."""
    rows: list[Any] = []
    for record, flac in tracks:
        audio = {"bytes": flac, "path": f"{record['key']}.flac"}
        rows.append({**record, "audio": audio, "thresholds": json.dumps(record["thresholds"])})
        if len(rows) == _ROWS_PER_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _parquet_schema(sample_rate_hz: int) -> pa.Schema:
    """Columns of the Parquet file, which names the features of Hugging Face's datasets that they are."""
    scores = pa.struct([*SCORES, *ESTIMATES])
    columns: dict[str, pa.DataType] = {"key": pa.string()}
    columns |= {"audio": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    columns |= {"label": pa.string(), "labels": pa.list_(pa.string()), "clip_id": pa.string(), "source": pa.string()}
    columns |= dict.fromkeys(("start_s", "end_s", "scale"), pa.float64())
    columns |= {"sample_rate_hz": pa.int32(), "num_samples": pa.int64(), "kept_by_floor": pa.bool_()}
    columns |= {"scores": scores, "teacher": pa.string(), "pass_fingerprint": pa.string(), "iteration": pa.int32()}
    columns |= {"thresholds": pa.string(), "flac_sha256": pa.string()}
    features = {name: _feature(kind) for name, kind in columns.items()}
    features["audio"] = {"sampling_rate": sample_rate_hz, "_type": "Audio"}
    return pa.schema(list(columns.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> object:
    """The feature of Hugging Face's datasets for a type of Arrow."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    names = {pa.float64(): "float64", pa.float32(): "float32"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


class FlacFiles(Format):
    """FLAC files in ``audio``, and ``tracks.jsonl`` with a line for each of them."""

    suffix = "jsonl"

    def file(self, number: int, num_shards: int) -> str:
        """See :meth:`Format.file`."""
        return f"shards/{number:05d}.jsonl"

    def write_shard(self, out: Location, path: Path, tracks: Tracks) -> None:
        """See :meth:`Format.write_shard`."""
        with open(path, "wb") as lines:
            for record, flac in tracks:
                file = f"audio/{record['key'].rpartition('-')[2][:2]}/{record['key']}.flac"
                write_bytes(out / file, flac)
                lines.write(_line({"file": file, **record}))

    def is_intact(self, out: Location, shard: ExportedShard) -> bool:
        """See :meth:`Format.is_intact`; of files in S3 only the shard's list is compared."""
        if not super().is_intact(out, shard) or not isinstance(out, Path):
            return super().is_intact(out, shard)
        with open(out / shard["file"], "rb") as lines:
            records = map(json.loads, lines)
            return all(_has_sha256(out / one["file"], one["flac_sha256"]) for one in records)

    def finish(self, out: Location, shards: Sequence[ExportedShard]) -> list[str]:
        """See :meth:`Format.finish`."""
        with atomic_path(out / "tracks.jsonl") as temporary, open(temporary, "wb") as lines:
            for shard in shards:
                with open_binary(out / shard["file"]) as part:
                    lines.writelines(part)
        return ["tracks.jsonl"]


def _has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _line(record: object) -> bytes:
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


FORMATS: dict[str, Format] = {"webdataset": WebDataset(), "datasets": Datasets(), "flac": FlacFiles()}
"""Every format of exported tracks, by its name."""
