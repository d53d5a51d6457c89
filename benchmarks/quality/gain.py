"""What a selection of tracks is worth to the student: one training for each arm and seed, all from the same teacher.

    python -m benchmarks.quality.gain --esc10 DIR [--out runs/quality] [--part K/N] [--only ARM ...]

Needs what ``benchmarks.quality.truth`` makes (seed, corpus with its truth, a pass, a calibrated estimator). Several
processes can share the work by parts; each writes ``gain.md`` and the table of docs/results.md from the trainings that
are there. Run it again to resume it.
"""

from __future__ import annotations

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

from benchmarks import pages
from benchmarks.setting import Setting, TrueSiSdr, add_parts, own_part, train
from engine.corpus.sources import read_sources
from engine.selection.thresholds import Quantile, Thresholds
from engine.selection.tracks import select_tracks
from engine.separators import NetworkConfig, load, read_description
from engine.settings import build, plain
from engine.storage.files import read_json, write_json
from train.data.config import MixConfig
from train.data.strategies.absent_labels import AbsentLabels
from train.data.strategies.consistency import Consistency
from train.data.strategies.estimate_weights import EstimateWeights
from train.data.strategies.label_balance import LabelBalance
from train.data.strategies.mixit import MixIt
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import draw_mixtures, resolve_validation
from tune.recipes import FIRST_THRESHOLDS, MIX, THRESHOLDS

_PAGE = Path(__file__).with_name("gain.md")
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose and use training data."""

    about: str
    thresholds: Thresholds | None = None
    """Null: no tracks."""
    knows_truth: bool = False
    """The estimate of the thresholds is the truth."""
    learns_truth: bool = False
    """The kept tracks are replaced by their true sources."""
    folds: tuple[int, ...] = (1,)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    network: NetworkConfig | None = None
    """It learns from scratch; null: it starts from the seed."""
    is_long: bool = False
    """It learns for as many steps as the seed and a student together."""
    seeds: tuple[int, ...] = SEEDS


_LOOSE = {"min_remix_snr_db": 0.0, "min_stem_level_db": -25.0, "max_stem_level_db": 3.0}
_BEST_60 = Thresholds(**_LOOSE, min_estimated_si_sdr_db=Quantile(quantile=0.4, by_label=True))  # type: ignore[arg-type]
_ALL = Thresholds()
_FIRST, _LATER, _MIX = build(Thresholds, FIRST_THRESHOLDS), build(Thresholds, THRESHOLDS), build(MixConfig, MIX)


def _all_stems(about: str, seeds: tuple[int, ...] = (0,), **mix: Any) -> Arm:  # noqa: ANN401 - any setting's value
    return Arm(about=f"every stem{about}", thresholds=_ALL, mix=MixConfig(**mix), seeds=seeds)


def _long(how: str, network: NetworkConfig | None) -> Arm:
    about = f"our thresholds and training, {how}"
    return Arm(about=about, thresholds=_FIRST, mix=_MIX, network=network, is_long=True, seeds=(0,))


ARMS = {
    "seed_only": Arm(about="no data engine: the seed's own clips (fold 1)"),
    "all_stems": _all_stems("", seeds=SEEDS),
    "clearsep_10": Arm(about="ClearSep: Re-SDR of 10 dB", thresholds=Thresholds(min_re_sdr_db=10.0)),
    "clearsep_15": Arm(about="ClearSep: Re-SDR of 15 dB", thresholds=Thresholds(min_re_sdr_db=15.0)),
    "oracle": Arm(
        about="oracle: true SI-SDR above 8 dB",
        thresholds=Thresholds(min_estimated_si_sdr_db=8.0),
        knows_truth=True,
    ),
    "mixit": Arm(
        about="MixIT on the natural clips, no stems",
        thresholds=_ALL,
        mix=MixConfig(clean_fraction=1.0, mixit=MixIt(fraction=0.5, assignment="best")),
    ),
    "true_sources": Arm(about="the true sources (folds 1 to 3): the bound", folds=(1, 2, 3)),
    "laptop": Arm(about="our thresholds and training (recipe laptop)", thresholds=_FIRST, mix=_MIX),
    "strict": Arm(
        about="the default thresholds of later iterations, our training",
        thresholds=_LATER,
        mix=_MIX,
    ),
    "kept_truth": Arm(
        about="the true sources of the stems that our thresholds keep",
        thresholds=_FIRST,
        learns_truth=True,
    ),
    "no_self_remix": Arm(
        about="our thresholds and training without Self-Remixing",
        thresholds=_FIRST,
        mix=dataclasses.replace(_MIX, self_remix=None),
    ),
    "scratch": _long("from scratch", NetworkConfig()),
    "longer": _long("as many steps from the seed", None),
    "larger": _long("from scratch, 384 channels and 12 blocks", NetworkConfig(channels=384, num_blocks=12)),
    "best_60": Arm(about="best 60 % of each label by the estimate", thresholds=_BEST_60, seeds=(0,)),
    "all_weighted": _all_stems(", loss weighted by the estimate", estimate_weights=EstimateWeights(use="loss")),
    "all_drawn": _all_stems(", drawn by the estimate", estimate_weights=EstimateWeights(use="draw")),
    "no_clips": Arm(
        about="our thresholds and training, no natural clips as mixtures",
        thresholds=_FIRST,
        mix=dataclasses.replace(_MIX, clip_fraction=0.0),
        seeds=(0, 1),
    ),
    "all_clips_half": _all_stems(", half of the mixtures natural clips", clip_fraction=0.5),
    "all_clips_most": _all_stems(", seven tenths of the mixtures natural clips", clip_fraction=0.7),
    "all_clips": Arm(about="every stem, our training", thresholds=_ALL, mix=_MIX),
    "all_labelled_mixit": _all_stems(
        ", a third of the mixtures two natural clips, labels assigned", mixit=MixIt(fraction=0.33)
    ),
    "all_consistent": Arm(
        about="the same with mixture consistency",
        thresholds=_ALL,
        mix=MixConfig(mixit=MixIt(fraction=0.33), consistency=Consistency(weight=0.5)),
        seeds=(0,),
    ),
    "best_60_absent": Arm(
        about="best 60 %, half of the silence examples true absent labels",
        thresholds=_BEST_60,
        mix=MixConfig(absent_labels=AbsentLabels(fraction=0.5)),
        seeds=(0,),
    ),
    "all_unbalanced": _all_stems(
        ", labels drawn as often as they have tracks", label_balance=LabelBalance(balance=0.0)
    ),
    "all_quarter_clean": _all_stems(", a quarter of the sources clean", clean_fraction=0.25),
}


def select(work: Setting, name: str, arm: Arm) -> Path | None:
    """The arm's selection from the seed's pass, made once; None for an arm without tracks."""
    if arm.thresholds is None:
        return None
    folder, stems = work.out / "gain" / name / "tracks", work.run / "iterations" / "1" / "stems"
    estimator = TrueSiSdr(work) if arm.knows_truth else work.estimator()
    wanted = {
        "pass_fingerprint": read_json(stems / "manifest.json")["fingerprint"],
        "thresholds": json.loads(json.dumps(plain(arm.thresholds))),
        "estimator_fingerprint": estimator.fingerprint,
    }
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    if {key: manifest.get(key) for key in wanted} != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        select_tracks(stems, folder, arm.thresholds, estimator=estimator)
    return folder


def true_sources(work: Setting, selection: Path, folds: tuple[int, ...]) -> Path:
    """A list of single-source clips: those of some folds, and the true source of every track of a selection."""
    kept = pq.read_table(selection / "kept.parquet", columns=["path", "label"]).to_pylist()
    rows = work.sources(*folds).table.select(["path", "label"]).to_pylist()
    rows += [{"path": str(work.truth_file(row["path"], row["label"])), "label": row["label"]} for row in kept]
    pa_csv.write_csv(pa.Table.from_pylist(rows), selection / "sources.csv")
    return selection / "sources.csv"


def train_arm(work: Setting, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one student of one arm in this process on one thread, once; returns its figures."""
    folder, arm = work.out / "gain" / name, ARMS[name]
    path = folder / f"seed-{seed}.json"
    selection = select(work, name, arm)
    manifest = read_json(selection / "manifest.json") if selection else {}
    steps = work.size.student_steps + (work.size.seed_steps if arm.is_long else 0)
    inputs = {
        "mix": plain(arm.mix),
        "folds": arm.folds,
        "learns_truth": arm.learns_truth,
        "network": plain(arm.network),
        "steps": steps,
        "seed_separator": read_description(work.seed)["fingerprint"],
        "kept": {key: manifest[key] for key in ("thresholds", "num_kept", "kept_h")} if manifest else None,
    }
    if path.is_file() and read_json(path)["inputs"] == json.loads(json.dumps(inputs)):
        return read_json(path)  # type: ignore[no-any-return]
    shutil.rmtree(folder / f"student-{seed}", ignore_errors=True)
    if arm.learns_truth and selection:
        data = TrainingData(clean=read_sources(true_sources(work, selection, arm.folds), allow_outside=True))
    else:
        data = TrainingData(clean=work.sources(*arm.folds), tracks=str(selection) if selection else None)
    sized = dataclasses.replace(work, size=dataclasses.replace(work.size, network=arm.network or work.size.network))
    student = train(
        sized,
        folder / f"student-{seed}",
        data,
        steps=steps,
        mix=arm.mix,
        seed=seed,
        start=None if arm.network else work.seed,
    )
    mixtures = draw_mixtures(resolve_validation(work.validation), sample_rate_hz=work.rate_hz)
    figures = evaluate(SeparatorSystem(load(student)), mixtures, quick=True)
    write_json(path, {**figures, "num_kept": manifest.get("num_kept"), "inputs": inputs, "commit": pages.commit()})
    pages.log(f"{name}, seed {seed}: SDRi {figures['sdri_db']:.2f}, SI-SDRi {figures['si_sdri_db']:.2f}")
    return read_json(path)  # type: ignore[no-any-return]


Results = dict[str, list[dict[str, Any]]]
"""Figures of every student of every arm."""


def gain_table(results: Results) -> str:
    """One row for each arm: mean and standard deviation over seeds, and the fraction of the gap that it closes."""
    columns = ["what the student learns from", "seeds", "stems kept", "SDRi dB", "SI-SDRi dB", "gap closed"]
    low, high = (np.mean([one["sdri_db"] for one in results[name]]) for name in ("seed_only", "true_sources"))
    rows = []
    for name, students in results.items():
        sdri, si_sdri = ([one[key] for one in students] for key in ("sdri_db", "si_sdri_db"))
        kept = "" if students[0]["num_kept"] is None else str(students[0]["num_kept"])
        spread = f" ± {np.std(sdri, ddof=1):.2f}" if len(sdri) > 1 else ""
        closed = (np.mean(sdri) - low) / (high - low)
        figures = [f"{np.mean(sdri):.2f}{spread}", f"{np.mean(si_sdri):.2f}", f"{closed:.0%}"]
        rows.append([ARMS[name].about, str(len(students)), kept, *figures])
    return pages.markdown(columns, rows)


def tables(work: Setting, results: Results) -> list[str]:
    """The table of the arms with all seeds; that of the options, of which fewer were run, with the ends of the gap."""
    base = {name: students for name, students in results.items() if ARMS[name].seeds == SEEDS}
    options = {name: students for name, students in results.items() if name not in base}
    ends = {name: base[name] for name in ("seed_only", "laptop", "true_sources") if name in base}
    commits = ", ".join(sorted({one["commit"] for students in results.values() for one in students}))
    size = work.size
    about = (
        f"One training of {size.student_steps} steps from the seed; ± is the standard deviation over training seeds; "
        f"{size.num_mixtures} two-source mixtures of fold 4; gap: from the seed's own clips to the true sources. "
        f"Commits {commits}; {pages.hardware()}"
    )
    steps = size.seed_steps + size.student_steps
    long = (
        f"Students from scratch and that of as many steps have {steps}, as the seed and a student together; the ends "
        f"of the gap have {size.student_steps}, so they can close more than all of it."
    )
    more = ["## Options", gain_table(ends | options), long] if options else []
    return [f"{gain_table(base)}\n\n{about}", *more]


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    add_parts(parser, ARMS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.from_arguments(arguments)
    for name, seed in own_part(arguments, [(name, seed) for name, arm in ARMS.items() for seed in arm.seeds]):
        train_arm(work, name, seed)
    folders = {name: sorted((work.out / "gain" / name).glob("seed-*.json")) for name in ARMS}
    results = {name: [read_json(path) for path in paths] for name, paths in folders.items() if paths}
    if not {"seed_only", "true_sources"} <= results.keys():
        pages.log("this part is done; the table needs the arms seed_only and true_sources")
        return
    parts = tables(work, results)
    if arguments.quick:
        print(*parts, sep="\n\n")
        return
    pages.write_page(_PAGE, "Gain of a selection", *parts)
    pages.fill(pages.RESULTS, "gain", parts[0])


if __name__ == "__main__":
    main()
