"""The loop on real sound (ESC-10), against a control, a bound and an oracle.

    python -m benchmarks.quality.esc10 --esc10 DIR [--out runs/esc10] [--seeds 0 1 2] [--quick]

Fold 1 trains the seed. Folds 2 and 3 become a natural corpus: mixtures of two and three sources, written as audio files
with a manifest of labels; the loop sees nothing else of them. Fold 4 validates: 300 two-source mixtures at 0 dB. Writes
``esc10.md`` and the tables of README.md and docs/results.md. Run it again to resume it.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from benchmarks import pages, setting
from cluster.session import connect
from engine.cli.console import show_progress
from engine.selection.thresholds import Thresholds
from engine.separators import NetworkConfig, Separator, find_separator, read_description
from engine.settings import Tree, build
from engine.storage.factories import own_device
from engine.storage.files import read_json, write_json
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.distil import distil
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import EvaluationMixture, ValidationConfig, draw_mixtures, resolve_validation
from train.student import DistilConfig
from tune.config import RunConfig
from tune.recipes import FIRST_THRESHOLDS, MIX, RECIPES, THRESHOLDS
from tune.run import RunSummary, run
from tune.tables import iterations_table, rules_table

_PAGE = Path(__file__).with_name("esc10.md")
_RATE_HZ = 16000
_RIVALS = {
    "control": ("control: seed trained further on its own clips (fold 1)", (1,)),
    "bound": ("bound: seed trained further on the true clips (folds 1 to 3)", (1, 2, 3)),
}
_ORACLE = "oracle: ideal ratio mask"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Steps, clips and mixtures."""

    seed_steps: int = 800
    student_steps: int = 1200
    num_two: int = 400
    num_three: int = 80
    num_mixtures: int = 300
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    batch_size: int = 16
    schedule: tuple[Thresholds, Thresholds] = (build(Thresholds, FIRST_THRESHOLDS), build(Thresholds, THRESHOLDS))


QUICK = Size(
    seed_steps=60,
    student_steps=30,
    num_two=12,
    num_three=4,
    num_mixtures=20,
    network=NetworkConfig(channels=64, num_blocks=4),
    batch_size=8,
    schedule=(Thresholds(min_stem_level_db=-30.0),) * 2,  # a seed of so few steps hardly separates
)


def ideal_ratio_mask(mixture: EvaluationMixture) -> Tensor:
    """The oracle: each source's part of the magnitudes as its mask (window 64 ms, step 16 ms), mixture phase."""
    window = torch.hann_window(1024)
    sources_ST = torch.from_numpy(mixture.sources_ST)
    spectra_SFN = torch.stft(sources_ST, 1024, 256, window=window, return_complex=True)
    magnitudes_SFN = spectra_SFN.abs()
    mask_SFN = magnitudes_SFN / magnitudes_SFN.sum(0).clamp(min=1e-8)
    return torch.istft(spectra_SFN.sum(0) * mask_SFN, 1024, 256, window=window, length=sources_ST.shape[1])


class Bench:
    """Folders and settings of this benchmark."""

    def __init__(self, esc10: Path, out: Path, size: Size, *, seed: int, threads: int | None) -> None:
        sizes = setting.QUICK if size is QUICK else setting.Size()
        sizes = dataclasses.replace(sizes, num_two=size.num_two, num_three=size.num_three, network=size.network)
        self.work = setting.Setting(
            clips=str(esc10 / "clips.csv"),
            out=out,
            size=sizes,
            rate_hz=_RATE_HZ,
            corpus_seed=seed,
        )
        self.out, self.size, self.seed, self.threads = out, size, seed, threads
        self.validation = ValidationConfig(clips=self.work.clips, folds=(4,), num_mixtures=size.num_mixtures, seed=0)
        self.curve_validation = dataclasses.replace(self.validation, num_mixtures=min(60, size.num_mixtures), seed=1)
        self.mixtures = draw_mixtures(resolve_validation(self.validation), sample_rate_hz=_RATE_HZ)

    def training(self, steps: int, mix: Tree | None = None) -> DistilConfig:
        """Settings of a training; all trainings differ in their length and mixtures only."""
        return DistilConfig(
            steps=steps,
            mix=build(MixConfig, {"batch_size": self.size.batch_size} | (mix or {})),
            validate_every_steps=max(steps // 4, 10),
            threads_per_worker=self.threads,
            seed=self.seed,
        )

    def train(self, name: str, steps: int, *, folds: tuple[int, ...], start: Path | None = None) -> Path:
        """Train a separator on single-source clips of some folds; returns its folder."""
        distil(
            self.out / name,
            data=TrainingData(clean=self.work.sources(*folds)),
            config=self.training(steps),
            start=start,
            network=self.size.network,
            validation=resolve_validation(self.curve_validation),
        )
        return self.out / name

    def loop(self, seed: Path) -> None:
        """Run two iterations of the data engine; its judges are made from fold 1."""
        setting.prepare(self.work)
        settings = RECIPES["laptop"]() | {
            "corpus": str(self.work.natural()),
            "separator": str(seed),
            "clean": self.work.clips,
            "clean_folds": (1,),
            "estimator": str(self.out / "estimator"),
            "tagger": str(self.out / "tagger"),
            "distil": self.training(self.size.student_steps, MIX),
            "validation": self.validation,
            "schedule": self.size.schedule,
        }
        run(build(RunConfig, settings), self.out / "run")

    def opened(self, name: str) -> Separator:
        """A trained separator, on the GPU if there is one."""
        return find_separator(self.out / name).open(own_device())

    def measure(self, name: str) -> dict[str, Any]:
        """Evaluation of a trained rival or of the oracle on the validation mixtures, kept on disk."""
        system = ideal_ratio_mask if name == "oracle" else SeparatorSystem(self.opened(name))
        figures: dict[str, Any] = pages.measured_once(
            self.out / "figures" / f"{name}.json", lambda: evaluate(system, self.mixtures)
        )
        return figures


class Result(TypedDict):
    """Results of one seed."""

    rows: dict[str, Any]
    """Evaluation of every separator by its title."""
    summary: RunSummary
    wall_s: float
    """Of seed, iterations, control and bound."""
    commit: str


def bench(work: Bench, part: str) -> Result | None:
    """Train what belongs to a part; returns the results once all parts are there, else None."""
    size = work.size
    steps_after_seed = len(RECIPES["laptop"]()["schedule"]) * size.student_steps
    with connect():
        pages.log(f"seed {work.seed}: {size.seed_steps} steps on fold 1")
        seed_folder = work.train("seed", size.seed_steps, folds=(1,))
        if part in ("all", "loop"):
            work.loop(seed_folder)
        if part in ("all", "rivals"):
            for name, (_, folds) in _RIVALS.items():
                pages.log(
                    f"{name}: the seed trained for {steps_after_seed} more steps on the true clips of folds {folds}"
                )
                work.train(name, steps_after_seed, folds=folds, start=seed_folder)
                work.measure(name)
            work.measure("oracle")
    path = work.out / "run" / "summary.json"
    summary: RunSummary = read_json(path) if path.is_file() else {"iterations": []}
    iterations = summary["iterations"]
    are_trained = all((work.out / name / "separator.json").is_file() for name in _RIVALS)
    if not are_trained or steps_after_seed != size.student_steps * (len(iterations) - 1):
        return None
    rows: dict[str, Any] = {"seed (iteration 0)": iterations[0]["validation"]}
    rows |= {f"iteration {entry['iteration']}": entry["validation"] for entry in iterations[1:]}
    rows |= {title: work.measure(name) for name, (title, _) in _RIVALS.items()}
    rows[_ORACLE] = work.measure("oracle")
    trainings = (read_description(work.out / name)["history"][-1] for name in ("seed", *_RIVALS))
    wall_s = sum(entry["wall_s"] for entry in (*iterations, *trainings))
    found = read_json(work.out / "result.json") if (work.out / "result.json").is_file() else {}
    commit = found["commit"] if found.get("wall_s") == wall_s else pages.commit()  # that of the trainings
    return {"rows": rows, "summary": summary, "wall_s": wall_s, "commit": commit}


def _provenance(size: Size, results: dict[int, Result]) -> str:
    hours = np.mean([one["wall_s"] for one in results.values()]) / 3600
    commits = ", ".join(sorted({one["commit"] for one in results.values()}))
    seeds = f"Mean ± standard deviation over {len(results)} seeds" if len(results) > 1 else "One seed"
    return (
        f"{seeds}; gap: from control to bound. {size.num_mixtures} "
        f"two-source mixtures at 0 dB of fold 4; corpus of {size.num_two} two- and {size.num_three} three-source clips "
        f"of folds 2 and 3; seed {size.seed_steps} steps, each iteration {size.student_steps}, batches of "
        f"{size.batch_size} mixtures of {MixConfig().segment_s:g} s, network of {size.network.channels} channels and "
        f"{size.network.num_blocks} blocks at 16 kHz; commit {commits}, {pages.hardware().rstrip('.')}; the times of "
        f"all trainings and passes of a seed add up to {hours:.1f} hours."
    )


def report(results: dict[int, Result], *, without: tuple[str, ...] = ()) -> str:
    """The main table, in Markdown: means and standard deviations over the seeds."""
    sdri_db = {
        name: [one["rows"][name]["sdri_db"] for one in results.values()]
        for name in next(iter(results.values()))["rows"]
    }
    low, high = (np.mean(sdri_db[title]) for title, _ in _RIVALS.values())
    rows = []
    for name, values in sdri_db.items():
        if name in without:
            continue
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        si_sdri_db = np.mean([one["rows"][name]["si_sdri_db"] for one in results.values()])
        closed = f"{(np.mean(values) - low) / (high - low):.0%}" if name.startswith("iteration") else ""
        rows.append([name, f"{np.mean(values):.2f}{spread}", f"{si_sdri_db:.2f}", closed])
    return pages.markdown(["separator", "SDRi dB", "SI-SDRi dB", "gap closed"], rows)


def details(results: dict[int, Result]) -> list[str]:
    """Tables of the figures by label, and for each seed of what came in and was kept in each iteration."""
    first = next(iter(results.values()))["rows"]
    labels = sorted(next(iter(first.values()))["by_label"])
    rows = []
    for name in first:
        cells = []
        for label in labels:
            figures = [one["rows"][name]["by_label"][label] for one in results.values()]
            cells.append(
                " / ".join(f"{np.mean([one[key] for one in figures]):.1f}" for key in ("sdri_db", "si_sdri_db"))
            )
        rows.append([name, *cells])
    parts = [pages.markdown(["SDRi / SI-SDRi dB", *labels], rows)]
    for seed, one in results.items():
        summary = one["summary"]
        parts += [f"## Seed {seed}", iterations_table(summary).markdown(), rules_table(summary).markdown()]
    return parts


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    parser.add_argument("--esc10", type=Path, required=True, help="folder with clips.csv and audio/")
    parser.add_argument("--out", type=Path, help="working folder (default runs/esc10, or runs/esc10-quick)")
    parser.add_argument("--quick", action="store_true", help="minutes; shows that it runs, writes no figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of trainings and corpus")
    parser.add_argument("--threads", type=int, help="CPU threads of a training (default all)")
    parser.add_argument(
        "--part",
        choices=("all", "seed", "loop", "rivals"),
        default="all",
        help="do this part only, so that two processes can share the work",
    )
    arguments = parser.parse_args()
    show_progress()
    out = (arguments.out or Path("runs/esc10-quick" if arguments.quick else "runs/esc10")).resolve()
    size, results = QUICK if arguments.quick else Size(), {}
    for seed in arguments.seeds:
        work = Bench(arguments.esc10.resolve(), out / f"seed-{seed}", size, seed=seed, threads=arguments.threads)
        result = bench(work, arguments.part)
        if result is None:
            pages.log(
                "this part is done; start the script without --part, or wait for the other part, to get the table"
            )
        else:
            results[seed] = result
            write_json(work.out / "result.json", result)
    if len(results) < len(arguments.seeds):
        return
    tables = [report(results), _provenance(size, results), *details(results)]
    print(*tables, sep="\n\n")
    if not arguments.quick:
        pages.write_page(_PAGE, "ESC-10: the loop on real sound", *tables)
        pages.fill(pages.RESULTS, "esc10", "\n\n".join(tables[:2]))
        short = [report(results, without=(_ORACLE,)), textwrap.fill(tables[1], 100)]
        pages.fill(pages.README, "esc10", "\n\n".join(short))


if __name__ == "__main__":
    main()
