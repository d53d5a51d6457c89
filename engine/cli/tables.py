"""TODO engine/cli/tables.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.passes.records import done_names, failure_rows, summarise_failures
from engine.passes.shards import verify
from engine.schema import SCORES
from engine.storage.files import parquet_file, read_json, write_bytes
from engine.storage.paths import Location, Name, location

_FLOOR = "label_floor_fraction"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Named columns of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _limit(limit: float | dict[str, Any]) -> str:
    """A number, or what a quantile is of."""
    if not isinstance(limit, dict):
        return f"{limit:g}"
    return f"quantile {limit['quantile']:g}" + (" by label" if limit["by_label"] else "")


def plan_table(cost: dict[str, Any]) -> Table:
    """What a pass is expected to take, make and lose."""
    low, high = cost["failed_fraction_low"], cost["failed_fraction_high"]
    where = f"{cost['num_cpus']:g} CPUs" + (f", {cost['num_gpus']:g} GPUs" if cost["num_gpus"] else "")
    rows = [
        ["rows in the manifest", str(cost["num_rows"])],
        ["of them set aside (too few labels)", str(cost["num_set_aside"])],
        ["clips", str(cost["num_clips"])],
        ["queries, each a stem or a failure", str(cost["num_queries"])],
        ["audio", f"{cost['audio_h']:.2f} h"],
        ["failures expected", f"{cost['num_failed']} ({low:.1%} to {high:.1%} of the queries, with 95 % confidence)"],
        ["CPU time", f"{cost['core_h']:.2f} core hours"],
        ["GPU time", f"{cost['gpu_h']:.2f} h" if cost["num_gpus"] else "none: measured without a GPU"],
        ["wall time", f"{cost['wall_h']:.2f} h on {where}"],
        ["stems on disk", f"{cost['stem_gib']:.2f} GiB in {cost['num_shards']} shards"],
    ]
    rows += [[f"time in {step}", f"{hours:.2f} h"] for step, hours in cost["step_h"].items()]
    title = f"Plan, from {cost['sample_rows']} rows ({cost['sample_audio_s']:.0f} s of audio) on {cost['measured_on']}"
    return Table(title=title, columns=["", ""], rows=rows)


def tracks_table(manifest: dict[str, Any]) -> Table:
    """What the filter did, rule by rule."""
    rows = [["kept", str(manifest["num_kept"]), f"{manifest['kept_h']:.3f} h"]]
    limits = manifest["thresholds"]
    rows += [
        [f"rejected by {rule}", str(count), f"limit {_limit(limits[rule])}"]
        for rule, count in sorted(manifest["num_rejected"].items())
    ]
    if limits.get(_FLOOR) is not None:
        rows.append([f"kept by {_FLOOR}", str(manifest["num_kept_by_floor"]), f"limit {limits[_FLOOR]:g}"])
    rows += [[f"kept of {label}", str(count), ""] for label, count in manifest["kept_by_label"].items()]
    return Table(title=f"{manifest['num_stems']} stems", columns=["outcome", "stems", ""], rows=rows)


def pass_table(summary: dict[str, Any]) -> Table:
    """What a pass did and where its time went."""
    rows = [
        ["clips", str(summary["num_clips"])],
        ["clips set aside (too few labels)", str(summary["num_set_aside"])],
        ["stems", str(summary["num_stems"])],
        ["queries", str(summary["num_queries"])],
        ["queries that failed", str(summary["num_failed"])],
        ["audio", f"{summary['audio_h']:.3f} h"],
        ["throughput", f"{summary['audio_s_per_s']:.1f} s of audio per second"],
    ]
    rows += [
        [f"time in {step}", f"{share:.0%} ({summary['step_s'][step]:.1f} s)"]
        for step, share in summary["step_fraction"].items()
    ]
    return Table(title="Engine pass", columns=["", ""], rows=rows)


def quality_table(value: dict[str, Any]) -> Table:
    """What a calibrated estimator listens to, and how right it is."""
    rows = [["stems", str(value["num_stems"])], ["error, root mean square", f"{value['rmse_db']:.1f} dB"]]
    rows += [[f"weight of {name}", f"{weight:+.2f} dB"] for name, weight in value["weights"].items()]
    return Table(title="Estimate of SI-SDR", columns=["", ""], rows=rows)


def scores_table(result: dict[str, Any]) -> Table:
    """Every score of every stem, a column a stem, then what each rule says and the verdict."""
    stems = result["stems"]
    names = list(stems[0]["scores"])
    rows = [
        [name, *("" if stem["scores"][name] is None else f"{stem['scores'][name]:.2f}" for stem in stems)]
        for name in names
    ]
    rows += [
        [f"rule {name}", *("passes" if stem["rules"][name]["passes"] else "fails" for stem in stems)]
        for name in stems[0]["rules"]
    ]
    rows += [["kept", *("yes" if stem["kept"] else f"no: {stem['rejected_by']}" for stem in stems)]]
    return Table(title="Scores", columns=["", *(stem["label"] for stem in stems)], rows=rows)


def _values(kind: str, value: dict[str, Any]) -> tuple[list[Table], dict[str, Any]]:
    rows = [[key, json.dumps(item)[:300]] for key, item in value.items()]
    return [Table(title=kind, columns=["", ""], rows=rows)], {"kind": kind, **value}


def _pass(stems: Location) -> tuple[list[Table], dict[str, Any]]:
    if not (stems / "manifest.json").is_file():
        return _values("unfinished pass", {"num_parts_done": len(done_names(stems.parent))})
    summary = read_json(stems / "manifest.json")
    summary.pop("shards")
    tables, failed = failures(stems.parent)
    value = {"kind": "pass", **summary, "failures": failed["failures"], "damaged_shards": verify(stems)}
    return [pass_table(summary), *tables], value


def failures(path: Name) -> tuple[list[Table], dict[str, Any]]:
    """What failed in a pass or in a run's iterations: why, how often, and each row; ``ValueError`` if it is neither."""
    path = location(path)
    passes = {"": path}
    if (path / "iterations").is_dir():
        passes = {found.parent.parent.name: found.parent.parent for found in path.glob("iterations/*/stems/pass.json")}
    elif not (path / "stems" / "pass.json").is_file():
        raise ValueError(f"{path} is neither a run nor a pass: it has neither iterations/ nor stems/; give its folder")
    reasons: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for iteration, folder in sorted(passes.items()):
        where = {"iteration": int(iteration)} if iteration else {}
        reasons += [where | reason for reason in summarise_failures(folder)["reasons"]]
        rows += [where | row for _, row in failure_rows(folder)]
    value = {"num_rows": len(rows), "num_queries": sum(row["num_queries"] for row in rows)}
    return [_reasons_table(reasons), _failures_table(rows)], value | {"reasons": reasons, "failures": rows}


def _reasons_table(reasons: list[dict[str, Any]]) -> Table:
    cells = [
        [str(entry.get(name, "")) for name in ("iteration", "step", "error_class", "num_queries", "example")]
        for entry in reasons
    ]
    return Table(title="Reasons", columns=["iteration", "step", "error", "queries", "for example"], rows=cells)


def _failures_table(rows: list[dict[str, Any]]) -> Table:
    most = 50
    names = ("step", "path", "label", "error_class", "attempts", "message")
    cells = [["" if row[name] is None else str(row[name]) for name in names] for row in rows[:most]]
    title = f"Failures (the first {most} of {len(rows)}; all with --json)" if len(rows) > most else "Failures"
    return Table(title=title, columns=names, rows=cells)


def _columns(path: Location) -> list[str]:
    with parquet_file(path) as file:
        return list(file.schema_arrow.names)


def _shard(path: Location) -> tuple[list[Table], dict[str, Any]]:
    with parquet_file(path) as file:
        names = [field.name for field in file.schema_arrow if field.type != pa.binary()]
        rows = file.read(columns=names).to_pylist()
    columns = ("clip_id", "label", "num_samples", *SCORES.names)
    text = [["" if row[name] is None else f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name])
             for name in columns] for row in rows]  # fmt: skip
    return [Table(title=f"{len(rows)} stems", columns=columns, rows=text)], {"kind": "stems", "stems": rows}


def fill(page: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->`` on a page, which must be there."""
    before, found, rest = page.read_text().partition(f"<!-- {marker} -->")
    _, closed, after = rest.partition(f"<!-- /{marker} -->")
    if not (found and closed):
        raise ValueError(f"{page} has no place for {marker}; put <!-- {marker} --> and <!-- /{marker} --> in it")
    write_bytes(page, f"{before}{found}\n{text}\n{closed}{after}".encode())
