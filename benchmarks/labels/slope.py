"""What decibels of stems are worth in decibels of a student, and which faults of stems cost it most.

    python -m benchmarks.labels.slope --esc10 DIR [--out runs/stems] [--part K/N] [--only ARM ...] [--quick]

A student starts from the seed separator of fold 1, or from the student before, and learns from fold 1 and from one
target for each label of each natural clip of folds 2 and 3: a teacher's stems (the first teacher is the seed, the next
one its student), the truth, means of both, or the truth with known faults. No target is rejected, so arms differ in
nothing else. Several processes can share the work by parts; each writes ``slope.md`` and the table of docs/results.md
from the trainings that are there. Run it again to resume it.

Shape legend: S labels of a clip, T samples, F bins, N frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import soundfile
import torch
from torch import Tensor

from benchmarks import pages
from benchmarks.setting import QUICK, Setting, Size, add_parts, learn, own_part, train
from engine.audio.loading import Loader
from engine.corpus.read import read_corpus
from engine.schema import ClipRow
from engine.scoring.metrics import si_sdr_db, snr_db
from engine.scoring.sharing import share_mixture
from engine.separators import NetworkConfig, load
from engine.separators.queries import query_for
from engine.settings import build
from train.data.config import MixConfig
from train.data.items import Item, clean_items
from train.data.mixer import Mixer
from train.data.pools import Pool
from train.data.strategies.compose import mixer_class
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import draw_mixtures, resolve_validation
from train.student import DistilConfig
from tune.recipes import MIX

_PAGE = Path(__file__).with_name("slope.md")
_SEEDS = (0, 1, 2)
_FFT = 1024
_BLOB_FRAMES, _BLOB_BINS = 9, 17  # of a hole: 0.15 s and 270 Hz at 16 kHz


class Figures(TypedDict):
    """A student of one arm and seed."""

    sdri_db: float
    si_sdri_db: float
    by_label: dict[str, float]
    """SDRi."""


class Quality(TypedDict):
    """The targets of an arm against the truth."""

    snr_db: float
    si_sdr_db: float


@dataclasses.dataclass(frozen=True)
class Clip:
    """A natural clip with its true sources, as a target may use them."""

    mix_T: Tensor
    truth_ST: Tensor
    labels: Sequence[str]
    rng: np.random.Generator
    """Differs from clip to clip."""


Targets = Callable[[Clip], Tensor]
"""Targets ``[S, T]`` of a clip."""


def leak(level_db: float) -> Targets:
    """The truth with the rest of the clip in it, at a level relative to the target."""

    def targets(clip: Clip) -> Tensor:
        rest_ST = clip.mix_T - clip.truth_ST
        gain_S1 = clip.truth_ST.norm(dim=1, keepdim=True) / rest_ST.norm(dim=1, keepdim=True).clamp(min=1e-6)
        return clip.truth_ST + rest_ST * gain_S1 * 10.0 ** (level_db / 20.0)

    return targets


def holes(level_db: float) -> Targets:
    """The truth without blobs of its spectrogram whose energy, relative to the target, is about ``level_db``."""

    def targets(clip: Clip) -> Tensor:
        window = torch.hann_window(_FFT)
        spectra_SFN = torch.stft(clip.truth_ST, _FFT, _FFT // 4, window=window, return_complex=True)
        noise = torch.from_numpy(clip.rng.standard_normal(spectra_SFN.shape).astype(np.float32))
        blobs_SFN = torch.nn.functional.avg_pool2d(
            noise, (_BLOB_BINS, _BLOB_FRAMES), stride=1, padding=(_BLOB_BINS // 2, _BLOB_FRAMES // 2)
        )
        energy_SFN, removed = spectra_SFN.abs().square(), 10.0 ** (level_db / 10.0)
        kept_SFN = torch.ones(energy_SFN.shape)
        for blobs_FN, energy_FN, kept_FN in zip(blobs_SFN, energy_SFN, kept_SFN, strict=True):
            order = blobs_FN.flatten().argsort()
            cumulated = energy_FN.flatten()[order].cumsum(0)
            kept_FN.view(-1)[order[cumulated <= removed * cumulated[-1]]] = 0.0
        return torch.istft(spectra_SFN * kept_SFN, _FFT, _FFT // 4, window=window, length=clip.truth_ST.shape[1])

    return targets


def both(level_db: float) -> Targets:
    """Leak and holes, each of half the energy."""

    def targets(clip: Clip) -> Tensor:
        half_db = level_db - 10.0 * np.log10(2.0)
        return leak(half_db)(clip) + holes(half_db)(clip) - clip.truth_ST

    return targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One kind of targets."""

    about: str
    faults: Targets | None = None
    teacher: int | None = None
    """Number of the teacher, from 1; null: none."""
    truth_fraction: float = 0.0
    """Of the truth in a mean of it and the teacher's stems."""
    has_targets: bool = True
    """False: it learns from fold 1 alone."""
    iteration: int | None = None
    """It starts from the student of the iteration before; null: from the seed."""


def _arms() -> dict[str, Arm]:
    arms = {
        "control": Arm(about="none: fold 1 alone", has_targets=False),
        "truth": Arm(about="the truth", faults=lambda clip: clip.truth_ST),
    }
    for number in (1, 2, 3, 4):
        about = f"stems of teacher {number}" + (", the seed" if number == 1 else "")
        arms[f"teacher-{number}"] = Arm(about=about, teacher=number)
    for number in (1, 2, 3, 4):
        about = f"iteration {number}: stems of the student before, from which it starts"
        arms[f"iteration-{number}"] = Arm(about=about, teacher=number, iteration=number)
    for number in (1, 2, 3, 4):
        about = f"iteration {number}: the truth"
        arms[f"bound-{number}"] = Arm(about=about, faults=lambda clip: clip.truth_ST, iteration=number)
    for percent in (25, 50, 75):
        about = f"stems of teacher 1 and {percent} % of the truth"
        arms[f"truth-{percent}"] = Arm(about=about, teacher=1, truth_fraction=percent / 100)
    for name, fault in (("leak", leak), ("holes", holes), ("both", both)):
        about = "leak and holes" if name == "both" else name
        for level_db in (-6, -10, -15):
            arms[f"{name}{level_db}"] = Arm(about=f"the truth with {about} of {level_db} dB", faults=fault(level_db))
    return arms


ARMS = _arms()


class Bench:
    """Folders, clips and students of this benchmark."""

    def __init__(self, work: Setting) -> None:
        self.work, self.out = work, work.out / "slope"
        corpus = read_corpus(work.natural()).clips.to_pylist()
        self.rows: list[ClipRow] = [row for row in corpus if len(row["labels"]) > 1]
        train(work, work.seed, TrainingData(clean=work.sources(1)), steps=work.size.seed_steps)

    def targets(self, name: str, seed: int) -> Path:
        """Folder of an arm's targets: the seeds share them unless each has a teacher of its own."""
        own = ARMS[name].iteration is not None and ARMS[name].teacher is not None
        return self.out / name / f"targets-{seed if own else 0}"

    def write_targets(self, name: str, seed: int) -> Quality:
        """Write the targets of an arm, once; returns what they are worth."""
        arm, folder = ARMS[name], self.targets(name, seed)
        separate = self._separator(self._teacher(name, seed)) if arm.teacher is not None else None
        snr, si_sdr = list[float](), list[float]()
        for number, row in enumerate(self.rows):
            truth_ST = torch.from_numpy(np.stack([self.work.truth(row["path"], label) for label in row["labels"]]))
            rng = np.random.default_rng([9, number])
            clip = Clip(mix_T=truth_ST.sum(0), truth_ST=truth_ST, labels=row["labels"], rng=rng)
            targets_ST = separate(clip) if separate is not None else truth_ST
            targets_ST = torch.lerp(targets_ST, truth_ST, arm.truth_fraction)
            targets_ST = arm.faults(clip) if arm.faults is not None else targets_ST
            snr += snr_db(estimate=targets_ST, reference=truth_ST).clamp(max=100.0).tolist()
            si_sdr += si_sdr_db(estimate=targets_ST, reference=truth_ST).clamp(max=100.0).tolist()
            for label, target_T in zip(row["labels"], targets_ST.numpy(), strict=True):
                path = folder / Path(row["path"]).stem / f"{label}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, target_T, self.work.rate_hz, subtype="FLOAT")
        return {"snr_db": float(np.mean(snr)), "si_sdr_db": float(np.mean(si_sdr))}

    def _teacher(self, name: str, seed: int) -> Path:
        """The student of the arm with one number less, or the seed."""
        kind, number = name.rsplit("-", 1)
        return self.work.seed if number == "1" else self.student(f"{kind}-{int(number) - 1}", seed)

    def _separator(self, teacher: Path) -> Targets:
        """The stems of a teacher, as the engine's students get them: the clip is divided among them."""
        separator = load(teacher)
        system = SeparatorSystem(separator)

        def targets(clip: Clip) -> Tensor:
            queries = [query_for(label, clip.labels, separator) for label in clip.labels]
            (stems_ST,) = system.separate([(clip.mix_T, queries)])
            if isinstance(stems_ST, Exception):
                raise stems_ST
            return share_mixture(mixture_T=clip.mix_T, stems_ST=stems_ST, sample_rate_hz=self.work.rate_hz)

        return targets

    def quality(self, name: str, seed: int) -> Quality:
        """The targets of an arm against the truth, which are written before."""
        figures = self.targets(name, seed).with_suffix(".json")
        found: Quality = pages.measured_once(figures, lambda: self.write_targets(name, seed))
        return found

    def student(self, name: str, seed: int) -> Path:
        """The student of an arm, trained in this process, once; returns its folder."""
        folder = self.out / name / f"student-{seed}"
        if (folder / "separator.json").is_file():
            return folder
        if ARMS[name].has_targets:
            self.quality(name, seed)
        number = ARMS[name].iteration
        draws = seed + 10 * (number or 0)
        config = DistilConfig(steps=self.work.size.student_steps, mix=build(MixConfig, MIX), seed=draws)
        start = self._teacher(name, seed) if number is not None else self.work.seed
        learn(self.work, folder, self._mixer(name, self.targets(name, seed), config), config, start=str(start))
        return folder

    def _mixer(self, name: str, targets: Path, config: DistilConfig) -> Mixer:
        rate_hz, seed = self.work.rate_hz, config.seed
        rows = self.rows if ARMS[name].has_targets else []
        items = {
            "clean": clean_items(self.work.sources(1), sample_rate_hz=rate_hz),
            "tracks": self._items(rows, targets, num_signals=1),
            "pairs": self._items(rows, targets, num_signals=2),
            "natural": self._clips(rows),
        }
        pools = {
            kind: Pool(some, config.mix, sample_rate_hz=rate_hz, seed=seed, rank=0, num_ranks=1, loader=Loader())
            for kind, some in items.items()
        }
        labels = load(self.work.seed).labels
        return mixer_class(config.mix)(pools, labels, config.mix, sample_rate_hz=rate_hz, seed=seed, rank=0)

    def _clips(self, rows: Sequence[ClipRow]) -> list[Item]:
        return [
            Item(
                labels=tuple(row["labels"]),
                labels_present=frozenset(row["labels"]),
                clip=row["clip_id"],
                duration_s=5.0,
                load=functools.partial(self._clip, row),
            )
            for row in rows
        ]

    def _clip(self, row: ClipRow) -> np.ndarray:
        mix_T: np.ndarray = np.sum([self.work.truth(row["path"], label) for label in row["labels"]], axis=0)
        return mix_T

    def _items(self, rows: Sequence[ClipRow], targets: Path, *, num_signals: int) -> list[Item]:
        return [
            Item(
                labels=(label,),
                labels_present=frozenset(row["labels"]),
                clip=row["clip_id"],
                duration_s=num_signals * 5.0,
                load=functools.partial(self._load, targets, row, label, num_signals),
            )
            for row in rows
            for label in row["labels"]
        ]

    def _load(self, targets: Path, row: ClipRow, label: str, num_signals: int) -> np.ndarray:
        path = targets / Path(row["path"]).stem / f"{label}.wav"
        target_T: np.ndarray = soundfile.read(path, dtype="float32")[0]
        if num_signals == 1:
            return target_T
        return np.stack([target_T, self._clip(row)])

    def figures(self, name: str, seed: int) -> Figures:
        """SDRi of a student on the validation mixtures, once."""

        def measured() -> Figures:
            student = SeparatorSystem(load(self.student(name, seed)))
            mixtures = draw_mixtures(resolve_validation(self.work.validation), sample_rate_hz=self.work.rate_hz)
            found = evaluate(student, mixtures, quick=True)
            by_label = {label: one["sdri_db"] for label, one in found["by_label"].items()}
            return {"sdri_db": found["sdri_db"], "si_sdri_db": found["si_sdri_db"], "by_label": by_label}

        figures: Figures = pages.measured_once(self.out / name / f"seed-{seed}.json", measured)
        return figures


def table(bench: Bench) -> str:
    """One row for each arm that has a student: its targets, and mean and standard deviation over seeds."""
    columns = ["targets", "their SNR dB", "their SI-SDR dB", "seeds", "SDRi dB", "SI-SDRi dB", "rain", "crying baby"]
    rows = []
    for name, arm in ARMS.items():
        seeds = [seed for seed in _SEEDS if (bench.out / name / f"seed-{seed}.json").is_file()]
        students = [bench.figures(name, seed) for seed in seeds]
        if not students:
            continue
        worth = ["", ""]
        if arm.has_targets and name != "truth" and not name.startswith("bound"):
            qualities = [bench.quality(name, seed) for seed in seeds]
            worth = [f"{np.mean([one[key] for one in qualities]):.1f}" for key in ("snr_db", "si_sdr_db")]
        sdri = [one["sdri_db"] for one in students]
        spread = f" ± {np.std(sdri, ddof=1):.2f}" if len(sdri) > 1 else ""
        labels = [np.mean([one["by_label"][label] for one in students]) for label in ("rain", "baby_cry")]
        figures = [f"{np.mean(sdri):.2f}{spread}", f"{np.mean([one['si_sdri_db'] for one in students]):.2f}"]
        rows.append([arm.about, *worth, str(len(students)), *figures, *(f"{value:.1f}" for value in labels)])
    return pages.markdown(columns, rows)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    add_parts(parser, ARMS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.from_arguments(arguments)
    size = QUICK if arguments.quick else Size(network=NetworkConfig(channels=128, num_blocks=8), num_two=320)
    out = arguments.out or Path("runs/stems-quick" if arguments.quick else "runs/stems")
    bench = Bench(dataclasses.replace(work, size=size, out=out.resolve()))
    for name, seed in own_part(arguments, [(name, seed) for name in ARMS for seed in _SEEDS]):
        figures = bench.figures(name, seed)
        pages.log(f"{name}, seed {seed}: SDRi {figures['sdri_db']:.2f}, SI-SDRi {figures['si_sdri_db']:.2f}")
    about = (
        f"Students of {size.student_steps} steps from a seed of {size.seed_steps}, network of {size.network.channels} "
        f"channels and {size.network.num_blocks} blocks; {len(bench.rows)} natural clips; {size.num_mixtures} mixtures "
        f"of fold 4; ± is the standard deviation over seeds. {pages.stamp()}"
    )
    if arguments.quick:
        print(table(bench), about, sep="\n\n")
    else:
        pages.write_page(_PAGE, "The slope: from stems to students", table(bench), about)
        pages.fill(pages.RESULTS, "slope", f"{table(bench)}\n\n{about}")


if __name__ == "__main__":
    main()
