"""What the scores know of the truth, and whether the loop keeps rising: ESC-10's natural corpus, whose truth is kept.

    python benchmarks/truth.py --esc10 DIR [--out runs/quality] [--iterations 4] [--quick]

Makes seed, tagger and estimator of fold 1, then takes the natural corpus of folds 2 and 3 through the loop with the
default gate; the loop never reads the truth. Stopped, it goes on where it was; with fewer iterations it can be
run in parts. Writes `benchmarks/truth.md`, `benchmarks/iterations.md` and the README's tables.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import rankdata, spearmanr
from setting import Setting, prepare, say, stamp, true_si_sdr

from cluster.session import connected
from engine.cli.tables import fill
from engine.passes.shards import read_clip
from engine.schema import ESTIMATES, SCORES, DecodedClip, SeparatedClip
from engine.scoring.estimator import calibrate
from engine.scoring.reseparate import reseparate
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.storage.files import read_json, write_bytes, write_json
from tune.run import run

_HERE = Path(__file__).parent
_GOOD_DB = 8.0
_FITTED = "an estimator fitted to this very truth, on clips held out from it"
_CLIPS_AT_ONCE = 48  # of which the partners of a remix are drawn
_LOWER_IS_BETTER = ("coherence_fraction", "contested_db", "rival_leak_db")


def area(scores_N: np.ndarray, good_N: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a good stem has a higher score than a bad one."""
    ranks_N, num_good = rankdata(scores_N), int(good_N.sum())
    return float((ranks_N[good_N].sum() - num_good * (num_good + 1) / 2) / (num_good * (len(good_N) - num_good)))


def stems_of(work: Setting, iteration: int) -> tuple[pa.Table, np.ndarray]:
    """Scores and estimates of every stem of an iteration, and its true SI-SDR."""
    folder = work.run / "iterations" / str(iteration)
    kept, rejected = (pq.read_table(folder / "tracks" / f"{name}.parquet") for name in ("kept", "rejected"))
    names = [name for name in kept.column_names if name in rejected.column_names]
    tables = [
        table.select(names).append_column("kept", pa.array([is_kept] * len(table), pa.bool_()))
        for table, is_kept in ((kept, True), (rejected, False))
    ]
    index = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row", "ascending")])  # however it was filtered
    path = work.out / "truth_db" / f"{iteration}-{_of_pass(folder)}.json"
    if not path.is_file():
        write_json(path, true_si_sdr(work, folder / "stems")(index)["estimated_si_sdr_db"].to_pylist())
    index = reseparated(work, iteration, index)
    estimates = work.quality().estimate(index)
    for place, name in enumerate(ESTIMATES.names):
        index = index.set_column(index.column_names.index(name), name, estimates[place])
    return index, np.asarray(read_json(path))


def _of_pass(folder: Path) -> str:
    """Stands for the pass of an iteration's folder."""
    return str(read_json(folder / "stems" / "manifest.json")["fingerprint"])


def reseparated(work: Setting, iteration: int, index: pa.Table) -> pa.Table:
    """The index with the scores of re-separation by the iteration's teacher, which the gate does without."""
    path = work.out / "truth_db" / f"{iteration}-{_of_pass(work.run / 'iterations' / str(iteration))}-again.json"
    if not path.is_file():
        say(f"separating the stems of iteration {iteration} again")
        teacher = load(work.run / "iterations" / str(iteration - 1) / "separator")
        by_clip = [list(some) for _, some in itertools.groupby(index.to_pylist(), key=lambda row: row["clip_id"])]
        found: list[dict[str, float | None]] = []
        for first in range(0, len(by_clip), _CLIPS_AT_ONCE):
            some = by_clip[first : first + _CLIPS_AT_ONCE]
            clips = [_clip(work, iteration, stems) for stems in some]
            found += itertools.chain.from_iterable(reseparate(clips, BatchedSeparator(separator=teacher, batch_s=80.0)))
        write_json(path, found)
    for name in ("cycle_si_sdr_db", "rival_leak_db"):
        column = pa.array([row[name] for row in read_json(path)], pa.float32())
        index = index.set_column(index.column_names.index(name), name, column)
    return index


def _clip(work: Setting, iteration: int, stems: list[dict[str, Any]]) -> SeparatedClip:
    """A clip of a pass, of the rows of its stems."""
    row, folder = stems[0], work.run / "iterations" / str(iteration) / "stems"
    mixture_T, stems_ST = read_clip(folder, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
    clip = DecodedClip(row=row, samples_T=mixture_T)
    return SeparatedClip(clip=clip, labels=[stem["label"] for stem in stems], stems_ST=stems_ST)


def figures(index: pa.Table, truth_N: np.ndarray) -> dict[str, tuple[float, float] | None]:
    """Rank correlation with the truth and area for "above 8 dB", by score; None where it is undefined throughout."""
    good_N = truth_N > _GOOD_DB
    found: dict[str, tuple[float, float] | None] = {}
    columns = {}
    for name in [*SCORES.names, ESTIMATES.names[0]]:
        values_N = np.asarray(index[name].to_numpy(), np.float64) * (-1.0 if name in _LOWER_IS_BETTER else 1.0)
        columns[name] = (
            np.where(np.isnan(values_N), np.nanmedian(values_N), values_N) if (~np.isnan(values_N)).any() else None
        )
    ranked = [columns[name] for name in ("re_sdr_db", "rival_leak_db", "stem_level_db") if columns[name] is not None]
    columns[_FITTED] = fitted(index, truth_N) if len(truth_N) >= 100 else None
    columns["ranks of Re-SDR, leak and level"] = sum(rankdata(one) for one in ranked) if len(ranked) == 3 else None
    for name, values_N in columns.items():
        known = values_N is not None and np.ptp(values_N) > 0 and 0 < good_N.sum() < len(good_N)
        found[name] = (float(spearmanr(values_N, truth_N)[0]), area(values_N, good_N)) if known else None
    return found


def fitted(index: pa.Table, truth_N: np.ndarray) -> np.ndarray:
    """What an estimator says of stems that was fitted to the truth of other clips of the same pass: the limit."""
    clip_N = np.unique(index["clip_id"].to_numpy(), return_inverse=True)[1]
    part_N = np.random.default_rng(0).permutation(clip_N.max() + 1)[clip_N] % 5
    estimate_N = np.zeros(len(truth_N))
    for part in range(5):
        others = part_N != part
        quality = calibrate(index.filter(others), truth_N[others].tolist(), groups=clip_N[others].tolist(), about={})
        estimate_N[~others] = quality.estimate(index.filter(~others))["estimated_si_sdr_db"].to_numpy()
    return estimate_N


def interval(index: pa.Table, truth_N: np.ndarray) -> str:
    """The middle 95 % of the estimate's correlation and area over 1,000 bootstrap draws of clips."""
    estimate_N, clip_N = (
        index["estimated_si_sdr_db"].to_numpy(),
        np.unique(index["clip_id"].to_numpy(), return_inverse=True)[1],
    )
    rng, num_clips, found = np.random.default_rng(0), clip_N.max() + 1, []
    for _ in range(1000):
        times_N = np.bincount(rng.integers(num_clips, size=num_clips), minlength=num_clips)[clip_N]
        rows = np.repeat(np.arange(len(truth_N)), times_N)
        good_N = truth_N[rows] > _GOOD_DB
        found.append((float(spearmanr(estimate_N[rows], truth_N[rows])[0]), area(estimate_N[rows], good_N)))
    ends = np.quantile(found, (0.025, 0.975), axis=0)
    return " | ".join(f"{low:.2f} to {high:.2f}" for low, high in ends.T)


def truth_table(work: Setting, iterations: list[int]) -> str:
    """A row a score, two columns an iteration's teacher."""
    stems = {iteration: stems_of(work, iteration) for iteration in iterations}
    by_iteration = {iteration: figures(*some) for iteration, some in stems.items()}
    teachers = ["seed" if iteration == 1 else f"iteration {iteration - 1}" for iteration in iterations]
    lines = ["| score | " + " | ".join(f"{one}: rank correlation | area" for one in teachers) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(iterations))
    for name in next(iter(by_iteration.values())):
        cells = [f"{one[name][0]:.2f} | {one[name][1]:.2f}" if one[name] else " | " for one in by_iteration.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
        if name == ESTIMATES.names[0]:
            cells = [interval(*stems[iteration]) if one[name] else " | " for iteration, one in by_iteration.items()]
            lines.append("| its 95 % interval over clips | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def iterations_table(work: Setting, iterations: list[int], summary: dict[str, Any]) -> str:
    """A row an iteration: what its teacher's stems were worth, what the gate kept, and what came of it."""
    head = (
        "",
        "SDRi dB",
        "SI-SDRi dB",
        "kept h",
        "kept",
        "true SI-SDR of all",
        "of the kept",
        "above 8 dB of all",
        "of the kept",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in summary["iterations"]:
        number, judged = entry["iteration"], entry["validation"]
        cells = [
            f"{number}",
            f"{judged['sdri_db']:.2f} ± {judged['sdri_standard_error_db']:.2f}",
            f"{judged['si_sdri_db']:.2f}",
        ]
        if number in iterations:
            index, truth_N = stems_of(work, number)
            kept_N = truth_N[index["kept"].to_numpy()]
            cells += [f"{entry['kept_h']:.2f}", f"{entry['num_kept']} of {len(index)}"]
            cells += [f"{some.mean():.1f}" for some in (truth_N, kept_N)]
            cells += [f"{(some > _GOOD_DB).mean():.0%}" for some in (truth_N, kept_N)]
        lines.append("| " + " | ".join([*cells, *[""] * (len(head) - len(cells))]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.arguments(parser)
    parser.add_argument("--iterations", type=int, default=4, help="how many to take the loop through")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.of(arguments)
    prepare(work)
    with connected():
        summary = run(work.config(arguments.iterations), work.run, say=say)
    iterations = [entry["iteration"] for entry in summary["iterations"][1:]]
    size = work.size
    about = (
        f"{size.num_two} two- and {size.num_three} three-source clips of folds 2 and 3; seed of {size.seed_steps} "
        f"steps, rounds of {size.round_steps}; validated on {size.num_mixtures} mixtures of fold 4. {stamp()}"
    )
    scores, rising = truth_table(work, iterations), iterations_table(work, iterations, summary)
    print(scores, rising, about, sep="\n\n")
    if not arguments.quick:
        write_bytes(_HERE / "truth.md", f"# Scores against the truth\n\n{scores}\n\n{about}\n".encode())
        write_bytes(_HERE / "iterations.md", f"# Iterations\n\n{rising}\n\n{about}\n".encode())
        fill(_HERE.parent / "README.md", "iterations", f"{rising}\n\n{about}")


if __name__ == "__main__":
    main()
