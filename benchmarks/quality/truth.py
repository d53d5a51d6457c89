"""How well the scores know the truth, and whether the loop keeps rising, on a natural corpus whose truth is kept.

    python -m benchmarks.quality.truth --esc10 DIR [--out runs/quality] [--iterations 4] [--quick]

Makes seed, tagger and estimator of fold 1 of ESC-10, then takes the natural corpus of folds 2 and 3 through the loop
with the default thresholds; the loop never reads the truth. Writes ``truth.md``, ``iterations.md`` and a table of
docs/results.md. Run it again to resume it, or with more iterations to continue it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import rankdata, spearmanr

from benchmarks import pages
from benchmarks.setting import Setting, TrueSiSdr, prepare
from cluster.session import connect
from engine.cli.console import show_progress
from engine.passes.shards import read_clip
from engine.schema import ESTIMATES, SCORES, ClipRow, DecodedClip, SeparatedClip
from engine.scoring.estimator import fit_estimator
from engine.scoring.reseparate import reseparate
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.storage.files import read_json
from tune.run import run

_HERE = Path(__file__).parent
_GOOD_DB = 8.0
_FITTED = "an estimator fitted to this very truth, on clips held out from it"
_RANKS = "ranks of Re-SDR, leak and level"
_CLIPS_AT_ONCE = 48  # clips among which the partners of a remix are drawn
_LOWER_IS_BETTER = ("coherence_fraction", "contested_db", "rival_leak_db")
_ITERATION_COLUMNS = (
    "iteration",
    "SDRi dB",
    "SI-SDRi dB",
    "kept h",
    "kept",
    "true SI-SDR of all",
    "of the kept",
    "above 8 dB of all",
    "of the kept",
)


def area(scores_N: np.ndarray, good_N: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a good stem has a higher score than a bad one."""
    ranks_N, num_good = rankdata(scores_N), int(good_N.sum())
    return float((ranks_N[good_N].sum() - num_good * (num_good + 1) / 2) / (num_good * (len(good_N) - num_good)))


def read_stems(work: Setting, iteration: int) -> tuple[pa.Table, np.ndarray]:
    """Scores and estimates of every stem of an iteration, and its true SI-SDR."""
    folder = work.run / "iterations" / str(iteration)
    kept, rejected = (pq.read_table(folder / "tracks" / f"{name}.parquet") for name in ("kept", "rejected"))
    names = [name for name in kept.column_names if name in rejected.column_names]
    tables = [
        table.select(names).append_column("kept", pa.array([is_kept] * len(table), pa.bool_()))
        for table, is_kept in ((kept, True), (rejected, False))
    ]
    index = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row", "ascending")])
    truth = pages.measured_once(
        work.out / "truth_db" / f"{iteration}-{_pass_fingerprint(folder)}.json",
        lambda: TrueSiSdr(work, folder / "stems").estimate(index)[ESTIMATES.names[0]].to_pylist(),  # noqa: PLW0108
    )
    index = with_reseparation(work, iteration, index)
    estimates = work.estimator().estimate(index)
    for number, name in enumerate(ESTIMATES.names):
        index = index.set_column(index.column_names.index(name), name, estimates[number])
    return index, np.asarray(truth)


def _pass_fingerprint(folder: Path) -> str:
    return str(read_json(folder / "stems" / "manifest.json")["fingerprint"])


def with_reseparation(work: Setting, iteration: int, index: pa.Table) -> pa.Table:
    """The index with the scores of re-separation by the iteration's teacher; the default thresholds do not use them."""
    folder = work.run / "iterations" / str(iteration)
    rows = pages.measured_once(
        work.out / "truth_db" / f"{iteration}-{_pass_fingerprint(folder)}-again.json",
        lambda: _reseparated(work, iteration, index),
    )
    for name in ("cycle_si_sdr_db", "rival_leak_db"):
        column = pa.array([row[name] for row in rows], pa.float32())
        index = index.set_column(index.column_names.index(name), name, column)
    return index


def _reseparated(work: Setting, iteration: int, index: pa.Table) -> list[dict[str, float | None]]:
    teacher = load(work.run / "iterations" / str(iteration - 1) / "separator")
    batched = BatchedSeparator(separator=teacher, batch_s=80.0)
    by_clip = [list(group) for _, group in itertools.groupby(index.to_pylist(), key=lambda row: row["clip_id"])]
    rows: list[dict[str, float | None]] = []
    for first in range(0, len(by_clip), _CLIPS_AT_ONCE):
        clips = [_read_clip(work, iteration, stems) for stems in by_clip[first : first + _CLIPS_AT_ONCE]]
        rows += itertools.chain.from_iterable(reseparate(clips, batched))
    return rows


def _read_clip(work: Setting, iteration: int, stems: list[dict[str, Any]]) -> SeparatedClip:
    """A clip of a pass, from the rows of its stems."""
    row, folder = stems[0], work.run / "iterations" / str(iteration) / "stems"
    mixture_T, found = read_clip(folder, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
    clip_row = ClipRow(clip_id=row["clip_id"], path=row["path"], labels=row["labels"], start_s=None, end_s=None)
    clip = DecodedClip(row=clip_row, samples_T=mixture_T)
    labels = [stem["label"] for stem in stems]
    signals = {"mixture_T": torch.from_numpy(mixture_T), "stems_ST": torch.from_numpy(np.stack([*found.values()]))}
    return SeparatedClip(clip=clip, labels=labels, **signals)


Figures = dict[str, tuple[float, float] | None]
"""Rank correlation and area by score; None for a score that is undefined throughout."""


def figures(index: pa.Table, truth_N: np.ndarray) -> Figures:
    """Rank correlation of every score with the truth, and its area for "above 8 dB"."""
    good_N = truth_N > _GOOD_DB
    columns: dict[str, np.ndarray | None] = {}
    for name in [*SCORES.names, ESTIMATES.names[0]]:
        values_N = np.asarray(index[name].to_numpy(), np.float64) * (-1.0 if name in _LOWER_IS_BETTER else 1.0)
        is_defined_N = ~np.isnan(values_N)
        columns[name] = np.where(is_defined_N, values_N, np.nanmedian(values_N)) if is_defined_N.any() else None
    ranked = [columns[name] for name in ("re_sdr_db", "rival_leak_db", "stem_level_db") if columns[name] is not None]
    columns[_FITTED] = fitted_to_truth(index, truth_N) if len(truth_N) >= 100 else None
    columns[_RANKS] = np.sum([rankdata(one) for one in ranked], axis=0) if len(ranked) == 3 else None
    result: Figures = {}
    for name, scores_N in columns.items():
        if scores_N is None or np.ptp(scores_N) == 0 or not 0 < good_N.sum() < len(good_N):
            result[name] = None
        else:
            result[name] = (float(spearmanr(scores_N, truth_N)[0]), area(scores_N, good_N))
    return result


def fitted_to_truth(index: pa.Table, truth_N: np.ndarray) -> np.ndarray:
    """Estimates by estimators fitted to the truth of the other clips of the same pass: the limit of these scores."""
    clip_N = np.unique(index["clip_id"].to_numpy(), return_inverse=True)[1]
    part_N = np.random.default_rng(0).permutation(clip_N.max() + 1)[clip_N] % 5
    estimate_N = np.zeros(len(truth_N))
    for part in range(5):
        others = part_N != part
        groups = clip_N[others].tolist()
        estimator = fit_estimator(index.filter(others), truth_N[others].tolist(), groups=groups, about={})
        estimate_N[~others] = estimator.estimate(index.filter(~others))["estimated_si_sdr_db"].to_numpy()
    return estimate_N


def interval(index: pa.Table, truth_N: np.ndarray) -> list[str]:
    """The middle 95 % of the estimate's correlation and area over 1,000 bootstrap draws of clips."""
    estimate_N = index["estimated_si_sdr_db"].to_numpy()
    clip_N = np.unique(index["clip_id"].to_numpy(), return_inverse=True)[1]
    rng, num_clips, draws = np.random.default_rng(0), clip_N.max() + 1, []
    for _ in range(1000):
        times_N = np.bincount(rng.integers(num_clips, size=num_clips), minlength=num_clips)[clip_N]
        rows = np.repeat(np.arange(len(truth_N)), times_N)
        good_N = truth_N[rows] > _GOOD_DB
        draws.append((float(spearmanr(estimate_N[rows], truth_N[rows])[0]), area(estimate_N[rows], good_N)))
    ends = np.quantile(draws, (0.025, 0.975), axis=0)
    return [f"{low:.2f} to {high:.2f}" for low, high in ends.T]


def truth_table(work: Setting, iterations: list[int]) -> str:
    """One row for each score, two columns for each iteration's teacher."""
    stems = {iteration: read_stems(work, iteration) for iteration in iterations}
    by_iteration = {iteration: figures(*one) for iteration, one in stems.items()}
    teachers = ["seed" if iteration == 1 else f"iteration {iteration - 1}" for iteration in iterations]
    columns = ["score", *itertools.chain.from_iterable((f"{one}: rank correlation", "area") for one in teachers)]
    rows = []
    for name in next(iter(by_iteration.values())):
        pairs = [found[name] for found in by_iteration.values()]
        cells = [[f"{value:.2f}" for value in pair] if pair else ["", ""] for pair in pairs]
        rows.append([name.replace("_", " "), *itertools.chain.from_iterable(cells)])
        if name == ESTIMATES.names[0]:
            ranges = [interval(*stems[one]) if by_iteration[one][name] else ["", ""] for one in iterations]
            rows.append(["its 95 % interval over clips", *itertools.chain.from_iterable(ranges)])
    return pages.markdown(columns, rows)


def iterations_table(work: Setting, summary: dict[str, Any]) -> str:
    """One row for each iteration: what its stems are worth, what the thresholds keep, and the student's figures."""
    rows = []
    for entry in summary["iterations"]:
        number, validation = entry["iteration"], entry["validation"]
        sdri = f"{validation['sdri_db']:.2f} ± {validation['sdri_standard_error_db']:.2f}"
        cells = [f"{number}", sdri, f"{validation['si_sdri_db']:.2f}"]
        if number > 0:
            index, truth_N = read_stems(work, number)
            both = (truth_N, truth_N[index["kept"].to_numpy()])
            cells += [f"{entry['kept_h']:.2f}", f"{entry['num_kept']} of {len(index)}"]
            cells += [f"{stems_N.mean():.1f}" for stems_N in both]
            cells += [f"{(stems_N > _GOOD_DB).mean():.0%}" for stems_N in both]
        rows.append([*cells, *[""] * (len(_ITERATION_COLUMNS) - len(cells))])
    return pages.markdown(_ITERATION_COLUMNS, rows)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=4, help="number of iterations of the loop")
    arguments = parser.parse_args()
    show_progress()
    torch.set_num_threads(1)
    work = Setting.from_arguments(arguments)
    prepare(work)
    with connect():
        summary: Any = run(work.config(arguments.iterations), work.run)
    size = work.size
    about = (
        f"{size.num_two} two- and {size.num_three} three-source clips of folds 2 and 3; seed of {size.seed_steps} "
        f"steps, iterations of {size.student_steps}, network of {size.network.channels} channels and "
        f"{size.network.num_blocks} blocks; validated on {size.num_mixtures} mixtures of fold 4; one training seed, ± "
        "is the standard error over the stems. "
        f"{pages.stamp()}"
    )
    scores = truth_table(work, [entry["iteration"] for entry in summary["iterations"][1:]])
    rising = iterations_table(work, summary)
    print(scores, rising, about, sep="\n\n")
    if not arguments.quick:
        pages.write_page(_HERE / "truth.md", "Scores against the truth", scores, about)
        pages.write_page(_HERE / "iterations.md", "Iterations", rising, about)
        pages.fill(pages.RESULTS, "iterations", f"{rising}\n\n{about}")


if __name__ == "__main__":
    main()
