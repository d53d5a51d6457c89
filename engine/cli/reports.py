"""Reports on files: passes with their failures and shards, checkpoints of others; as tables and as plain values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from engine.cli.tables import Report, Table, pass_table
from engine.passes.records import done_names, failure_reasons, failure_rows
from engine.passes.shards import damaged_files, open_shard, read_summary, verify
from engine.schema import SCORES
from engine.separators.convert.convert import Conversion
from engine.separators.convert.identify import identify
from engine.separators.convert.pickles import WEIGHTS, read_tensors
from engine.storage.files import parquet_file
from engine.storage.paths import Location, Name, location

_MAX_FAILURES = 50
DAMAGED = "damaged_files"
"""Name of the list of damaged files in a report; ``clearsep inspect`` fails if it has any."""


def values_report(kind: str, value: Mapping[str, Any]) -> Report:
    """A mapping as a table of two columns."""
    rows = [[key, json.dumps(item, ensure_ascii=False)] for key, item in value.items()]
    return [Table(title=kind, columns=["", ""], rows=rows)], {"kind": kind, **value}


def pass_report(stems: Location) -> Report:
    """Summary, failures and damaged shards of the pass in a stems folder."""
    damaged = damaged_files(stems.parent)
    if not (stems / "manifest.json").is_file():
        found = {DAMAGED: damaged} if damaged else {}
        return values_report("unfinished pass", {"num_shards_done": len(done_names(stems.parent)), **found})
    summary = read_summary(stems)
    value = {"kind": "pass", **summary, "failures": [], "damaged_shards": verify(stems, damaged), DAMAGED: damaged}
    if damaged:  # its failures may not be readable
        return [Table(title="Damaged files", columns=[""], rows=[[file] for file in damaged])], value
    tables, failed = failures_report(stems.parent)
    return [pass_table(summary), *(table for table in tables if table.rows)], value | {"failures": failed["failures"]}


def failures_report(path: Name) -> Report:
    """Failures of a pass or of a run's iterations: reasons with their counts, then the rows.

    Raises ``ValueError`` if the path is neither.
    """
    path = location(path)
    passes = {"": path}
    if (path / "iterations").is_dir():
        passes = {file.parent.parent.name: file.parent.parent for file in path.glob("iterations/*/stems/pass.json")}
        if (path / "iterations" / "0" / "tags").is_dir():
            passes["0"] = path / "iterations" / "0" / "tags"  # the pass that tagged the corpus
    elif not (path / "stems" / "pass.json").is_file():
        raise ValueError(f"{path} must be a run or a pass, got a path without iterations/ and stems/; give its folder")
    reasons: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for iteration, folder in sorted(passes.items()):
        origin = {"iteration": int(iteration)} if iteration else {}
        found = [row for _, row in failure_rows(folder)]
        reasons += [origin | reason for reason in failure_reasons(found)]
        rows += [origin | row for row in found]
    value = {"num_rows": len(rows), "num_queries": sum(row["num_queries"] for row in rows)}
    return [_reasons_table(reasons), _failures_table(rows)], value | {"reasons": reasons, "failures": rows}


def _reasons_table(reasons: Sequence[Mapping[str, Any]]) -> Table:
    names = ("iteration", "step", "error_class", "num_queries", "example")
    cells = [[str(reason.get(name, "")) for name in names] for reason in reasons]
    return Table(title="Reasons", columns=["iteration", "step", "error", "queries", "for example"], rows=cells)


def _failures_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("step", "path", "label", "error_class", "attempts", "message")
    cells = [["" if row[name] is None else str(row[name]) for name in names] for row in rows[:_MAX_FAILURES]]
    is_cut = len(rows) > _MAX_FAILURES
    title = f"Failures (the first {_MAX_FAILURES} of {len(rows)}; all with --json)" if is_cut else "Failures"
    return Table(title=title, columns=names, rows=cells)


def is_shard(path: Location) -> bool:
    """True for a Parquet file of stems."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    with parquet_file(path) as file:
        return "audio_flac" in file.schema_arrow.names


def shard_report(path: Location) -> Report:
    """Stems and scores of a shard, without their audio."""
    with open_shard(path) as file:
        names = [field.name for field in file.schema_arrow if field.type != pa.binary()]
        rows = file.read(columns=names).to_pylist()
    columns = ("clip_id", "label", "num_samples", *SCORES.names)
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    return [Table(title=f"{len(rows)} stems", columns=columns, rows=cells)], {"kind": "stems", "stems": rows}


def checkpoint_report(path: Location) -> Report:
    """The model in a checkpoint of another project, from the header of its tensors, and what to do with it."""
    checkpoint = read_tensors(path)
    identity, tensors = identify(checkpoint), checkpoint.tensors
    return values_report(
        "foreign checkpoint",
        {
            "model": identity.name,
            "format": checkpoint.format,
            "num_tensors": len(tensors),
            "num_values": sum(one.numel() for one in tensors.values()),
            "dtypes": dict(Counter(str(one.dtype).removeprefix("torch.") for one in tensors.values())),
            "num_bytes": checkpoint.path.stat().st_size,
            "sha256": checkpoint.sha256,
            "other_entries": list(checkpoint.ignored[:20]),
            "licence": identity.licence,
            "next": identity.next.replace("FILE", str(path)),
        },
    )


def is_checkpoint(path: Location) -> bool:
    """True for a file by whose name a program keeps weights, and for a folder of Hugging Face."""
    if path.is_file():
        return path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    return (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHTS)


def conversion_tables(converted: Conversion) -> list[Table]:
    """Result of a conversion, and how to use it."""
    folder = converted["folder"]
    rows = [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in converted.items()]
    encoder = f" --set text_encoder={folder}" if "text" in converted["queries"] else ""
    uses = [
        ["separate a file", f"clearsep separate FILE --query 'dog bark' --separator {folder} -o OUT"],
        ["separate a corpus", f"clearsep separate-corpus LIST --separator {folder} -o OUT"],
        ["distil students", f"clearsep run clearsep -o RUN --set corpus=LIST --set separator={folder}{encoder}"],
        ["in Python", f"clearsep.load_separator({folder!r})"],
    ]
    if converted["kind"] == "clap":
        uses = [
            ["with CLAPSep", f"clearsep convert CLAPSEP --clap {folder} -o OUT"],
            ["as a tagger", f"clearsep separate-corpus LIST --separator DIR --tagger {folder} -o OUT"],
        ]
    given = Table(title="Converted", columns=["", ""], rows=[row for row in rows if row[0] != "notes"])
    return [given, Table(title="Use", columns=["", ""], rows=uses)]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
