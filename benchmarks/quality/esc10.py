"""The whole loop on real sound (ESC-10), against what it should beat and what bounds it; writes the README's table.

    python benchmarks/esc10.py --esc10 DIR [--out runs/esc10] [--quick]

Fold 1 trains the seed. Folds 2 and 3 become a natural corpus: mixtures of two and three sources, written as audio files
with a manifest of labels; the loop sees nothing else of them. Fold 4 validates: 300 two-source mixtures at 0 dB. The
script can be stopped and started again; it does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
from pathlib import Path
from typing import Any

import setting
import torch
from torch import Tensor

from cluster.session import connected
from engine.cli.tables import fill
from engine.corpus.sources import read_sources
from engine.selection.thresholds import Thresholds
from engine.separators import NetworkConfig, load, read_description
from engine.settings import Tree, build
from engine.storage.files import read_json, write_bytes, write_json
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.distil import distil
from train.evaluation.evaluate import estimator, evaluate
from train.evaluation.mixtures import EvaluationMixture, ValidationConfig, draw_mixtures
from train.student import DistilConfig
from tune.config import RunConfig
from tune.demo.corpus import write_natural
from tune.recipes import FIRST_GATE, GATE, MIX, RECIPES
from tune.run import run
from tune.tables import iterations_table, rules_table

_HERE = Path(__file__).parent
_RATE_HZ = 16000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    seed_steps: int = 800
    round_steps: int = 1200
    num_two: int = 400
    num_three: int = 80
    num_mixtures: int = 300
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    batch_size: int = 16
    gates: tuple[Thresholds, Thresholds] = (build(Thresholds, FIRST_GATE), build(Thresholds, GATE))


QUICK = Size(
    seed_steps=60,
    round_steps=30,
    num_two=12,
    num_three=4,
    num_mixtures=20,
    network=NetworkConfig(channels=64, num_blocks=4),
    batch_size=8,
    gates=(Thresholds(min_stem_level_db=-30.0),) * 2,  # a seed of so few steps hardly separates: its stems are copies
)


def ideal_ratio_mask(mixture: EvaluationMixture) -> Tensor:
    """The oracle: each source's share of the magnitudes as its mask (window 64 ms, step 16 ms), mixture phase."""
    window = torch.hann_window(1024)
    sources_ST = torch.from_numpy(mixture.sources_ST)
    spectra_SFN = torch.stft(sources_ST, 1024, 256, window=window, return_complex=True)
    magnitudes_SFN = spectra_SFN.abs()
    mask_SFN = magnitudes_SFN / magnitudes_SFN.sum(0).clamp(min=1e-8)
    return torch.istft(spectra_SFN.sum(0) * mask_SFN, 1024, 256, window=window, length=sources_ST.shape[1])


class Bench:
    """Folders and settings that the parts share."""

    def __init__(self, esc10: Path, out: Path, size: Size, *, seed: int, threads: int | None) -> None:
        self.clips, self.out, self.size = str(esc10 / "clips.csv"), out, size
        self.seed, self.threads = seed, threads
        self.validation = ValidationConfig(clips=self.clips, folds=(4,), num_mixtures=size.num_mixtures, seed=0)
        self.curve_validation = dataclasses.replace(self.validation, num_mixtures=min(60, size.num_mixtures), seed=1)
        self.mixtures = draw_mixtures(self.validation, sample_rate_hz=_RATE_HZ)

    def training(self, steps: int, mix: Tree | None = None) -> DistilConfig:
        """The same for all trainings but for their length and what tracks are mixed to."""
        return DistilConfig(
            steps=steps,
            mix=build(MixConfig, {"batch_size": self.size.batch_size} | (mix or {})),
            validate_every_steps=max(steps // 4, 10),
            threads_per_worker=self.threads,
            seed=self.seed,
        )

    def train(self, name: str, steps: int, *, folds: tuple[int, ...], start: Path | None = None) -> Path:
        """A separator trained on single-source clips of some folds."""
        distil(
            self.out / name,
            training_data=TrainingData(clean=self.clips, clean_folds=folds),
            config=self.training(steps),
            start=start,
            network=self.size.network,
            validation=self.curve_validation,
            say=_say,
        )
        return self.out / name

    def natural(self) -> Path:
        """The natural corpus of folds 2 and 3; its truth lies apart."""
        sources = read_sources(self.clips, folds=[2, 3])
        num_clips = [(2, self.size.num_two), (3, self.size.num_three)]
        return write_natural(
            sources,
            self.out / "corpus",
            num_clips=num_clips,
            sample_rate_hz=_RATE_HZ,
            seed=self.seed,
            truth=self.out / "truth",
        )

    def loop(self, seed: Path) -> dict[str, Any]:
        """Two iterations of the data engine; its judges are of fold 1, as :func:`setting.prepare` makes them."""
        sizes = setting.QUICK if self.size is QUICK else setting.Size()
        sizes = dataclasses.replace(sizes, network=self.size.network)
        setting.prepare(setting.Setting(clips=self.clips, out=self.out, size=sizes))
        settings = RECIPES["laptop"]() | {"corpus": str(self.natural()), "separator": str(seed), "clean": self.clips}
        config = dataclasses.replace(
            build(RunConfig, settings),
            clean_folds=(1,),
            quality=str(self.out / "quality"),
            tagger=str(self.out / "tagger"),
            distil=self.training(self.size.round_steps, MIX),
            validation=self.validation,
        )
        config = dataclasses.replace(config, schedule=self.size.gates)
        return run(config, self.out / "run", say=_say)

    def measure(self, name: str, folder: Path | None) -> dict[str, Any]:
        """Evaluation of a checkpoint (null: the oracle) on the validation mixtures, kept on disk."""
        path = self.out / "figures" / f"{name}.json"
        if not path.is_file():
            _say(f"evaluating {name}")
            write_json(path, evaluate(estimator(load(folder)) if folder else ideal_ratio_mask, self.mixtures))
        return read_json(path)


def _say(text: str) -> None:
    print(f"[{dt.datetime.now():%H:%M:%S}] {text}", flush=True)


def bench(work: Bench, part: str) -> dict[str, Any] | None:
    """The trainings of a part, and the table where all of them are there; null where another part is still to come."""
    size = work.size
    after_seed = len(RECIPES["laptop"]()["schedule"]) * size.round_steps
    rivals = {"control": (1,), "supervised": (1, 2, 3)}
    with connected():
        _say(f"seed: {size.seed_steps} steps on fold 1")
        seed_folder = work.train("seed", size.seed_steps, folds=(1,))
        if part in ("all", "loop"):
            work.loop(seed_folder)
        if part in ("all", "rivals"):
            for name, folds in rivals.items():
                _say(f"{name}: the seed trained on for {after_seed} steps on the true clips of folds {folds}")
                work.measure(name, work.train(name, after_seed, folds=folds, start=seed_folder))
            work.measure("ideal_ratio_mask", None)
    summary = read_json(work.out / "run" / "summary.json") if (work.out / "run" / "summary.json").is_file() else {}
    iterations = summary.get("iterations", [])
    trained = all((work.out / name / "separator.json").is_file() for name in rivals)
    if not trained or after_seed != size.round_steps * (len(iterations) - 1):
        return None
    rows = {"seed (iteration 0)": iterations[0]["validation"]}
    rows |= {f"iteration {entry['iteration']}": entry["validation"] for entry in iterations[1:]}
    rows["seed trained on, same steps, own data (fold 1)"] = work.measure("control", work.out / "control")
    rows["seed trained on, same steps, true clips (folds 1 to 3)"] = work.measure("supervised", work.out / "supervised")
    rows["ideal ratio mask (oracle)"] = work.measure("ideal_ratio_mask", None)
    trainings = (read_description(work.out / name)["history"][-1] for name in ("seed", *rivals))
    wall_s = sum(entry["wall_s"] for entry in (*iterations, *trainings))
    return {"rows": rows, "iterations": iterations, "about": _about(size, work.seed, wall_s)}


def _about(size: Size, seed: int, wall_s: float) -> str:
    return (
        f"{size.num_mixtures} two-source mixtures at 0 dB of fold 4, seed {seed}; corpus of {size.num_two} two- "
        f"and {size.num_three} three-source clips of folds 2 and 3; seed {size.seed_steps} steps, each iteration "
        f"{size.round_steps}, batches of {size.batch_size} mixtures of {MixConfig.segment_s:g} s, network of "
        f"{size.network.channels} channels and {size.network.num_blocks} blocks at 16 kHz; "
        f"commit {setting.commit()}, {setting.hardware().rstrip('.')}; "
        f"the wall times of seed, iterations, control and bound add up to {wall_s / 60:.0f} minutes."
    )


def report(result: dict[str, Any]) -> str:
    """The Markdown that goes into the README and ``benchmarks/esc10.md``."""
    lines = ["| separator | SDRi dB | SI-SDRi dB |", "| --- | --- | --- |"]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['sdri_db']:.2f} ± {row['sdri_standard_error_db']:.2f} | {row['si_sdri_db']:.2f} |"
        )
    return "\n".join([*lines, "", result["about"]])


def details(result: dict[str, Any]) -> str:
    """What came in and was kept in each iteration, and the figures by label."""
    labels = sorted(next(iter(result["rows"].values()))["by_label"])
    lines = ["| SDRi / SI-SDRi dB | " + " | ".join(labels) + " |", "| --- |" + " --- |" * len(labels)]
    for name, row in result["rows"].items():
        figures = (row["by_label"][label] for label in labels)
        cells = [f"{figure['sdri_db']:.1f} / {figure['si_sdri_db']:.1f}" for figure in figures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n\n".join([iterations_table(result).markdown(), rules_table(result).markdown(), "\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, required=True, help="folder with clips.csv and audio/")
    parser.add_argument("--out", type=Path, help="working folder (default runs/esc10, or runs/esc10-quick)")
    parser.add_argument(
        "--quick", action="store_true", help="minutes instead of an hour; shows that it runs, no figures"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of a training (default all)")
    parser.add_argument(
        "--part",
        choices=("all", "seed", "loop", "rivals"),
        default="all",
        help="two processes can share the work by parts",
    )
    arguments = parser.parse_args()
    out = (arguments.out or Path("runs/esc10-quick" if arguments.quick else "runs/esc10")).resolve()
    size = QUICK if arguments.quick else Size()
    work = Bench(arguments.esc10.resolve(), out, size, seed=arguments.seed, threads=arguments.threads)
    result = bench(work, arguments.part)
    if result is None:
        _say("this part is done; start the script without --part, or wait for the other part, to get the table")
        return
    write_json(out / "result.json", result)
    print(report(result), details(result), sep="\n\n")
    if not arguments.quick:
        write_bytes(
            _HERE / "esc10.md", f"# ESC-10: the loop on real sound\n\n{report(result)}\n\n{details(result)}\n".encode()
        )
        fill(_HERE.parent / "README.md", "esc10", report(result))


if __name__ == "__main__":
    main()
