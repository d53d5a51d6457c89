"""What a selection of tracks is worth to the student: every arm, same teacher, steps and seeds; resumes piece by piece.

    python benchmarks/gain.py --esc10 DIR [--out runs/quality] [--part K/N] [--only ARM ...]

Needs what `benchmarks/truth.py` makes (seed, corpus with its truth, a pass, a calibrated estimator). Several processes
can share the work by parts; each writes `benchmarks/gain.md` and the README's table of the pieces that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from setting import Setting, commit, hardware, say, train, true_si_sdr

from engine.cli.tables import fill
from engine.corpus.sources import read_sources
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import write_tracks
from engine.separators import load, read_description
from engine.settings import build
from engine.storage.files import read_json, write_bytes, write_json
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.evaluation.evaluate import estimator, evaluate
from train.evaluation.mixtures import draw_mixtures
from tune.recipes import FIRST_GATE, GATE, MIX

_HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose and use material."""

    about: str
    gate: Thresholds | None = None  # null: no tracks
    truth: bool = False  # the gate's estimate is the truth
    unmixed: bool = False  # what the gate keeps is replaced by its true source
    folds: tuple[int, ...] = (1,)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    seeds: tuple[int, ...] = SEEDS


def _gate(**rules: float | Quantile) -> Thresholds:
    sane = {"min_remix_snr_db": 0.0, "min_stem_level_db": -25.0, "max_stem_level_db": 3.0}
    return Thresholds(**{**sane, **rules})


_HALF = _gate(min_estimated_si_sdr_db=Quantile(quantile=0.4, by_label=True))
_ALL = Thresholds()
ARMS = {
    "seed_only": Arm(about="no data engine: the seed's own clips (fold 1)"),
    "all_stems": Arm(about="every stem", gate=_ALL),
    "clearsep_10": Arm(about="ClearSep: Re-SDR of 10 dB", gate=Thresholds(min_re_sdr_db=10.0)),
    "clearsep_15": Arm(about="ClearSep: Re-SDR of 15 dB", gate=Thresholds(min_re_sdr_db=15.0)),
    "oracle": Arm(about="oracle: true SI-SDR above 8 dB", gate=Thresholds(min_estimated_si_sdr_db=8.0), truth=True),
    "mixit": Arm(
        about="MixIT on the natural clips, no stems",
        gate=_ALL,
        mix=MixConfig(clean_fraction=1.0, mixit_fraction=0.5, mixit_assignment="best"),
    ),
    "true_sources": Arm(about="the true sources (folds 1 to 3): the bound", folds=(1, 2, 3)),
    "laptop": Arm(
        about="our gate and training (recipe laptop)", gate=build(Thresholds, FIRST_GATE), mix=build(MixConfig, MIX)
    ),
    "strict": Arm(
        about="the default gate of later iterations, our training",
        gate=build(Thresholds, GATE),
        mix=build(MixConfig, MIX),
    ),
    "kept_truth": Arm(
        about="the true sources of the stems that our gate keeps",
        gate=build(Thresholds, FIRST_GATE),
        unmixed=True,
        seeds=(0, 1),
    ),
    "gate_quantile": Arm(about="best 60 % of each label by the estimate", gate=_HALF, seeds=(0,)),
    "all_weighted": Arm(
        about="every stem, loss weighed by the estimate", gate=_ALL, mix=MixConfig(quality_weight="loss"), seeds=(0,)
    ),
    "all_drawn": Arm(
        about="every stem, drawn by the estimate", gate=_ALL, mix=MixConfig(quality_weight="draw"), seeds=(0,)
    ),
    "no_clips": Arm(
        about="our gate and training, no natural clips as mixtures",
        gate=build(Thresholds, FIRST_GATE),
        mix=build(MixConfig, MIX | {"clip_fraction": 0.0}),
        seeds=(0, 1),
    ),
    "all_clips_half": Arm(
        about="every stem, half of the mixtures natural clips",
        gate=_ALL,
        mix=MixConfig(clip_fraction=0.5),
        seeds=(0,),
    ),
    "all_clips_most": Arm(
        about="every stem, seven tenths of the mixtures natural clips",
        gate=_ALL,
        mix=MixConfig(clip_fraction=0.7),
        seeds=(0,),
    ),
    "all_clips": Arm(
        about="every stem, a third of the mixtures natural clips",
        gate=_ALL,
        mix=MixConfig(clip_fraction=0.33),
    ),
    "all_labelled_mixit": Arm(
        about="every stem, a third of the mixtures two natural clips, labels assigned",
        gate=_ALL,
        mix=MixConfig(mixit_fraction=0.33),
        seeds=(0,),
    ),
    "all_consistent": Arm(
        about="the same with mixture consistency",
        gate=_ALL,
        mix=MixConfig(mixit_fraction=0.33, consistency_weight=0.5),
        seeds=(0,),
    ),
    "gate_absent": Arm(
        about="best 60 %, half of the silence examples true absent labels",
        gate=_HALF,
        mix=MixConfig(absent_fraction=0.5),
        seeds=(0,),
    ),
    "all_unbalanced": Arm(
        about="every stem, labels drawn as often as they have tracks",
        gate=_ALL,
        mix=MixConfig(label_balance=0.0),
        seeds=(0,),
    ),
    "all_quarter_clean": Arm(
        about="every stem, a quarter of the sources clean", gate=_ALL, mix=MixConfig(clean_fraction=0.25), seeds=(0,)
    ),
}


def tracks(work: Setting, name: str, some: Arm) -> Path | None:
    """The arm's selection from the seed's pass."""
    if some.gate is None:
        return None
    folder, stems = work.out / "gain" / name / "tracks", work.run / "iterations" / "1" / "stems"
    of = {
        "pass_fingerprint": read_json(stems / "manifest.json")["fingerprint"],
        "thresholds": json.loads(json.dumps(dataclasses.asdict(some.gate))),
        "estimator_fingerprint": "truth" if some.truth else work.quality().fingerprint,
    }
    there = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    if {name: there.get(name) for name in of} != of:
        shutil.rmtree(folder, ignore_errors=True)
        estimate = true_si_sdr(work) if some.truth else work.quality().estimate
        fingerprint = of["estimator_fingerprint"]
        write_tracks(stems, folder, some.gate, estimate=estimate, estimator_fingerprint=fingerprint)
    return folder


def unmixed(work: Setting, selection: Path, folds: tuple[int, ...]) -> str:
    """A list of single-source clips: those of some folds, and the true source of every track of a selection."""
    kept = pq.read_table(selection / "kept.parquet", columns=["path", "label"]).to_pylist()
    rows = read_sources(work.clips, folds=folds).select(["path", "label"]).to_pylist()
    rows += [{"path": str(work.truth_file(row["path"], row["label"])), "label": row["label"]} for row in kept]
    pa_csv.write_csv(pa.Table.from_pylist(rows), selection / "sources.csv")
    return str(selection / "sources.csv")


def piece(work: Setting, name: str, seed: int) -> dict[str, Any]:
    """One student of one arm, trained in this process on one thread, and its validation."""
    path = work.out / "gain" / name / f"seed-{seed}.json"
    some = ARMS[name]
    selection = tracks(work, name, some)
    kept = read_json(selection / "manifest.json") if selection else {}
    of = {
        "mix": dataclasses.asdict(some.mix),
        "folds": some.folds,
        "unmixed": some.unmixed,
        "steps": work.size.round_steps,
        "seed_separator": read_description(work.seed)["fingerprint"],
        "kept": {name: kept[name] for name in ("thresholds", "num_kept", "kept_h")} if kept else None,
    }
    if path.is_file() and read_json(path)["of"] == json.loads(json.dumps(of)):
        return read_json(path)
    shutil.rmtree(work.out / "gain" / name / f"student-{seed}", ignore_errors=True)
    if some.unmixed and selection:
        training_data = TrainingData(clean=unmixed(work, selection, some.folds))
    else:
        training_data = TrainingData(
            clean=work.clips, clean_folds=some.folds, tracks=str(selection) if selection else None
        )
    student = train(
        work,
        work.out / "gain" / name / f"student-{seed}",
        training_data,
        steps=work.size.round_steps,
        mix=some.mix,
        seed=seed,
        start=work.seed,
    )
    mixtures = draw_mixtures(work.validation, sample_rate_hz=work.rate_hz)
    report = evaluate(estimator(load(student)), mixtures, quick=True)
    write_json(path, {**report, "num_kept": kept.get("num_kept"), "of": of, "commit": commit()})
    say(f"{name}, seed {seed}: SDRi {report['sdri_db']:.2f}, SI-SDRi {report['si_sdri_db']:.2f}")
    return read_json(path)


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row an arm: mean and standard deviation over seeds, and how much of the gap to the bound it closes."""
    lines = [
        "| what the student learns from | seeds | stems kept | SDRi dB | SI-SDRi dB | gap closed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    low, high = (np.mean([one["sdri_db"] for one in results[name]]) for name in ("seed_only", "true_sources"))
    for name, some in results.items():
        sdri, si_sdri = ([one[key] for one in some] for key in ("sdri_db", "si_sdri_db"))
        kept = "" if some[0]["num_kept"] is None else str(some[0]["num_kept"])
        spread = f" ± {np.std(sdri, ddof=1):.2f}" if len(sdri) > 1 else ""
        share = (np.mean(sdri) - low) / (high - low)
        cells = [ARMS[name].about, str(len(some)), kept, f"{np.mean(sdri):.2f}{spread}", f"{np.mean(si_sdri):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{share:.0%}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.arguments(parser)
    parser.add_argument("--part", default="0/1", help="K/N: this process does every Nth piece from the Kth")
    parser.add_argument("--only", nargs="*", choices=list(ARMS), help="arms to do (default all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.of(arguments)
    part, num_parts = map(int, arguments.part.split("/"))
    pieces = [(name, seed) for name in arguments.only or ARMS for seed in ARMS[name].seeds]
    for name, seed in sorted(pieces, key=lambda piece: piece[1])[part::num_parts]:
        piece(work, name, seed)
    there = {
        name: [read_json(path) for path in sorted((work.out / "gain" / name).glob("seed-*.json"))] for name in ARMS
    }
    if not (there["seed_only"] and there["true_sources"]):
        say("this part is done; the table needs the arms seed_only and true_sources")
        return
    text, options = tables(work, {name: some for name, some in there.items() if some})
    write_bytes(_HERE / "gain.md", f"# Gain of a selection\n\n{text}\n\n## Options\n\n{options}\n".encode())
    if not arguments.quick:
        fill(_HERE.parent / "README.md", "gain", text)


def tables(work: Setting, there: dict[str, list[dict[str, Any]]]) -> tuple[str, str]:
    """The arms of all seeds, and the options, of which fewer were run, between the bounds of the gap."""
    base = {name: some for name, some in there.items() if ARMS[name].seeds == SEEDS}
    ends = ("seed_only", "laptop", "true_sources")
    options = {name: some for name, some in there.items() if name not in base or name in ends}
    commits = ", ".join(sorted({one["commit"] for some in there.values() for one in some}))
    about = (
        f"One round of {work.size.round_steps} steps from the seed; ± is the standard deviation over training seeds; "
        f"{work.size.num_mixtures} two-source mixtures of fold 4; gap: from the seed's own clips to the true sources. "
        f"Commits {commits}; {hardware()}"
    )
    return f"{report(base)}\n\n{about}", report(options)


if __name__ == "__main__":
    main()
