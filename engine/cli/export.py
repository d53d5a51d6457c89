"""The command ``export``: tracks and separators in formats that other programs load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.console import Json, print_result
from engine.cli.tables import Table

if TYPE_CHECKING:
    from engine.selection.export.export import ExportManifest
    from engine.separators.exports.onnx import OnnxRecord

_TRACKS, _SEPARATORS = ("webdataset", "datasets", "flac"), ("hub", "onnx")


def export(
    source: Annotated[
        str, typer.Argument(metavar="TRACKS|SEPARATOR", help="Folder of a selection's tracks, or of a separator.")
    ],
    format_: Annotated[
        str, typer.Option("--format", help="Of tracks: webdataset, datasets or flac; of a separator: hub or onnx.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", help="Folder or s3:// address (onnx: a file FILE.onnx); the same command resumes there."
        ),
    ],
    shard_mb: Annotated[float, typer.Option(help="Most audio in a shard of tracks, in megabytes.")] = 500.0,
    chunk_s: Annotated[
        float | None, typer.Option(help="Length of the ONNX file's mixtures in seconds; default: the separator's own.")
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="Text whose vector is written next to an ONNX file; repeatable; default: the labels."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write tracks or a separator in a format that other programs load.

    Examples: `clearsep export RUN/iterations/2/tracks --format webdataset -o shared`,
    `clearsep export RUN/iterations/2/separator --format hub -o model`
    """
    if format_ in _TRACKS:
        from engine.selection.export.export import export_tracks

        manifest = export_tracks(source, out, format=format_, shard_mb=shard_mb)
        print_result(lambda: [_tracks_table(manifest)], manifest, as_json)
    elif format_ == "hub":
        from engine.separators.exports.hub import save_pretrained

        save_pretrained(source, out)
        print_result(lambda: [Table(title="Model", columns=["", ""], rows=[["folder", out]])], {"out": out}, as_json)
    elif format_ == "onnx":
        from engine.separators.exports.onnx import export_onnx

        record = export_onnx(source, out, chunk_s=chunk_s, queries=query)
        print_result(lambda: [_onnx_table(record)], record, as_json)
    else:
        *most, last = (*_TRACKS, *_SEPARATORS)
        raise ValueError(f"--format must be {', '.join(most)} or {last}, got {format_!r}; choose one of them")


def _tracks_table(manifest: ExportManifest) -> Table:
    rows = [
        ["tracks", str(manifest["num_tracks"])],
        ["hours", f"{manifest['audio_h']:.2f}"],
        ["labels", str(len(manifest["num_by_label"]))],
        ["shards", str(len(manifest["shards"]))],
        ["bytes", f"{sum(shard['num_bytes'] for shard in manifest['shards']):,}"],
    ]
    return Table(title="Exported tracks", columns=["", ""], rows=rows)


def _onnx_table(record: OnnxRecord) -> Table:
    rows = [
        ["mixture", f"[1, {record['num_samples']}] at {record['sample_rate_hz']} Hz"],
        ["query", f"[1, {record['query_features']}]"],
        ["queries with vectors", str(len(record["queries"]))],
        ["SNR with torch as reference (dB)", f"{record['snr_db']:.1f}"],
    ]
    return Table(title="ONNX", columns=["", ""], rows=rows)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(export)
