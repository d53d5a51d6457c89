"""Tables of plans, passes, selections and scores: the same rows for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.cli.display import markdown

if TYPE_CHECKING:
    from engine.files.score import StemVerdict
    from engine.files.separate import FileStem
    from engine.passes.labels.label import LabelSummary
    from engine.passes.shards import PassSummary
    from engine.passes.speed.plan import PassPlan
    from engine.scoring.estimator import SiSdrEstimator
    from engine.selection.tracks import Selection

FLOOR = "label_floor_fraction"
"""The one threshold that keeps stems instead of rejecting them."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Named columns of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self, *, is_markdown: bool = False) -> str:
        """The table in Markdown, without its title; ``is_markdown``: its cells are ours and already Markdown."""
        cells = [line if is_markdown else list(map(markdown, line)) for line in [self.columns, *self.rows]]
        cells.insert(1, ["---"] * len(self.columns))
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)


Report = tuple[list[Table], dict[str, Any]]
"""Tables for the terminal, and the same as plain values for ``--json``."""


def db_text(value: float | None) -> str:
    """Decibels with two decimals; empty for None."""
    return "" if value is None else f"{value:.2f}"


def limit_text(limit: float | Mapping[str, Any]) -> str:
    """A threshold's limit: its number, or its quantile."""
    if not isinstance(limit, Mapping):
        return f"{limit:g}"
    return f"quantile {limit['quantile']:g}" + (" by label" if limit["by_label"] else "")


def plan_table(plan: PassPlan) -> Table:
    """Expected work, time and failures of a pass."""
    low, high = plan["failed_fraction_low"], plan["failed_fraction_high"]
    machines = f"{plan['num_cpus']:g} CPUs" + (f", {plan['num_gpus']:g} GPUs" if plan["num_gpus"] else "")
    rows = [
        ["rows in the manifest", str(plan["num_rows"])],
        ["rows set aside (too few labels)", str(plan["num_set_aside"])],
        ["clips", str(plan["num_clips"])],
        ["queries, each a stem (or tagged clip) or a failure", str(plan["num_queries"])],
        ["audio", f"{plan['audio_h']:.2f} h"],
        ["failures expected", f"{plan['num_failed']} ({low:.1%} to {high:.1%} of the queries, with 95 % confidence)"],
        ["CPU time", f"{plan['core_h']:.2f} core hours"],
        ["GPU time", f"{plan['gpu_h']:.2f} h" if plan["num_gpus"] else "none: measured without a GPU"],
        ["wall time", f"{plan['wall_h']:.2f} h on {machines}"],
        [f"limit: {plan['limit']['limit']}", plan["limit"]["advice"]],
        ["result on disk", f"{plan['stem_gib']:.2f} GiB in {plan['num_shards']} shards"],
    ]
    rows += [[f"time in {step}", f"{hours:.2f} h"] for step, hours in plan["step_h"].items()]
    title = f"Plan, from {plan['sample_rows']} rows ({plan['sample_audio_s']:.0f} s of audio) on {plan['measured_on']}"
    return Table(title=title, columns=["", ""], rows=rows)


def tracks_table(selection: Selection) -> Table:
    """Stems that the filter kept and rejected, rule by rule."""
    rows = [["kept", str(selection["num_kept"]), f"{selection['kept_h']:.3f} h"]]
    limits: Mapping[str, Any] = selection["thresholds"]
    rows += [
        [f"rejected by {rule}", str(count), f"limit {limit_text(limits[rule])}"]
        for rule, count in sorted(selection["num_rejected"].items())
    ]
    if limits.get(FLOOR) is not None:
        rows.append([f"kept by {FLOOR}", str(selection["num_kept_by_floor"]), f"limit {limits[FLOOR]:g}"])
    rows += [[f"kept of {label}", str(count), ""] for label, count in selection["kept_by_label"].items()]
    return Table(title=f"{selection['num_stems']} stems", columns=["outcome", "stems", ""], rows=rows)


def pass_table(summary: PassSummary) -> Table:
    """Result of a pass, and its time by step."""
    outcomes = [
        ["stems", str(summary["num_stems"])],
        ["queries", str(summary["num_queries"])],
        ["queries that failed", str(summary["num_failed"])],
    ]
    if "num_tagged" in summary:
        outcomes = [["clips tagged", str(summary["num_tagged"])], ["clips that failed", str(summary["num_failed"])]]
    rows = [
        ["clips", str(summary["num_clips"])],
        ["clips set aside (too few labels)", str(summary["num_set_aside"])],
        *outcomes,
        ["audio", f"{summary['audio_h']:.3f} h"],
        ["throughput", f"{summary['audio_s_per_s']:.1f} s of audio per second"],
    ]
    if "missing_slices" in summary:
        rows.append(["slices that are not done", ", ".join(summary["missing_slices"])])
    if "limit" in summary:
        rows.append([f"limit: {summary['limit']['limit']}", summary["limit"]["advice"]])
    rows += [
        [f"time in {step}", f"{fraction:.0%} ({summary['step_s'][step]:.1f} s)"]
        for step, fraction in summary["step_fraction"].items()
    ]
    return Table(title="Engine pass", columns=["", ""], rows=rows)


def label_tables(summary: LabelSummary) -> list[Table]:
    """Clips of a labelled corpus by outcome, then its labels with their thresholds."""
    rows = [
        ["clips", str(summary["num_clips"])],
        ["clips with labels", str(summary["num_labelled"])],
        ["clips without label", str(summary["num_unlabelled"])],
        ["clips that failed", str(summary["num_failed"])],
        ["tags", summary["tags"]],
    ]
    if summary["audio_root"] is not None:
        rows.append(["read it with", f"--audio-root {summary['audio_root']}"])
    labels = [
        [
            row["label"],
            str(row["num_clips"]),
            f"{row['probability']:.2f}",
            f"{summary['precision']:.2f}",
            f"{row['precision']:.2f}",
            f"{row['recall']:.2f}",
        ]
        for row in summary["labels"]
    ]
    columns = ["label", "clips", "accepted from", "precision wanted", "precision measured", "recall measured"]
    return [Table(title="Labels", columns=["", ""], rows=rows), Table(title="By label", columns=columns, rows=labels)]


def estimator_report(estimator: SiSdrEstimator) -> Report:
    """Weights and error of a calibrated estimator."""
    weights = dict(zip(estimator.names, estimator.weight, strict=True))
    value = {"fingerprint": estimator.fingerprint, **estimator.about, "weights": weights}
    rows = [["stems", str(value["num_stems"])], ["error, root mean square", f"{value['rmse_db']:.1f} dB"]]
    if verdicts := value.get("verdicts"):
        rows += [
            ["good and bad stems", f"{verdicts['num_good']} and {verdicts['num_bad']}"],
            ["stems with contradicting verdicts", str(verdicts["num_contradicting"])],
            ["verdicts without a stem", str(verdicts["num_without_stem"])],
            ["AUC on the verdicts, fitted without them", f"{verdicts['auc_before']:.3f}"],
            ["AUC on the verdicts, cross-validated", f"{verdicts['auc']:.3f}"],
            ["level of a good stem", f"{verdicts['level_db']:.1f} dB"],
        ]
    rows += [[f"weight of {name}", f"{weight:+.2f} dB"] for name, weight in weights.items()]
    return [Table(title="Estimate of SI-SDR", columns=["", ""], rows=rows)], value


def scores_table(stems: Sequence[StemVerdict]) -> Table:
    """Every score of every stem, one column per stem, then the outcome of each rule and the verdict."""
    names = list(stems[0]["scores"])
    rows = [[name, *(db_text(stem["scores"][name]) for stem in stems)] for name in names]
    rows += [
        [f"rule {name}", *("passes" if stem["rules"][name]["passes"] else "fails" for stem in stems)]
        for name in stems[0]["rules"]
    ]
    rows += [[f"rule {name}", *("not judged" for _ in stems)] for name in stems[0]["not_judged"]]
    rows += [["kept", *("yes" if stem["kept"] else f"no: {stem['rejected_by']}" for stem in stems)]]
    return Table(title="Scores", columns=["", *(stem["label"] for stem in stems)], rows=rows)


def stems_table(stems: Sequence[FileStem]) -> Table:
    """Stems of files, with some of their scores."""
    shown = {
        "stem_level_db": "level dB",
        "remix_snr_db": "remix SNR dB",
        "mask_snr_db": "mask SNR dB",
        "estimated_si_sdr_db": "estimated SI-SDR dB",
    }
    names = [name for name in shown if any(name in (stem["scores"] or {}) for stem in stems)]
    rows = [
        [
            stem["source"],
            stem["query"],
            "there already" if stem["duration_s"] is None else f"{stem['duration_s']:.1f}",
            *(db_text((stem["scores"] or {}).get(name)) for name in names),
            stem["path"],
        ]
        for stem in stems
    ]
    columns = ["file", "query", "seconds", *(shown[name] for name in names), "stem"]
    return Table(title="Stems", columns=columns, rows=rows)
