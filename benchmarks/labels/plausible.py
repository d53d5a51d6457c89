"""Remixes that are plausible: labels that occur together in the corpus, measured against remixes of any labels.

    python -m benchmarks.labels.plausible --esc10 DIR [--out runs/plausible] [--seeds 3] [--quick]

The natural corpus has clips of two sounds that belong together: weather and sea, animals and people, machines. Students
of one seed and one selection learn from them, and are measured on mixtures within and across these groups. Writes
``plausible.md``. Run it again to resume it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from benchmarks import pages
from benchmarks.setting import QUICK, Setting, Size, prepare, train
from cluster.session import connect
from engine.cli.console import show_progress
from engine.corpus.read import read_corpus
from engine.passes.run import run_pass
from engine.selection.tracks import select_tracks
from engine.separators import NetworkConfig, find_separator
from engine.storage.factories import own_device
from engine.storage.files import atomic_path
from train.data.config import MixConfig
from train.data.strategies.plausible import Plausible
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import EvaluationMixture, draw_mixtures, resolve_validation
from tune.recipes import MIX

_PAGE = Path(__file__).with_name("plausible.md")
_GROUPS = (
    {"rain", "sea_waves", "fire_crackling"},
    {"dog_bark", "rooster", "baby_cry", "person_sneeze", "clock_tick"},
    {"chainsaw", "helicopter"},
)
_ARMS = {
    "any labels": None,
    "half plausible": Plausible(fraction=0.5),
    "all plausible": Plausible(fraction=1.0),
}


def is_plausible(labels: Iterable[str]) -> bool:
    """True for labels of one group."""
    return any(group.issuperset(labels) for group in _GROUPS)


def tracks_of(work: Setting) -> Path:
    """Tracks of the clips whose sounds belong together, once."""
    tracks, stems, manifest = (work.out / name for name in ("tracks", "pass", "corpus/plausible.csv"))
    if (tracks / "manifest.json").is_file():
        return tracks
    rows = pa_csv.read_csv(work.natural()).to_pylist()
    kept = [row for row in rows if is_plausible(row["labels"].split(";"))]
    with atomic_path(manifest) as aside:
        pa_csv.write_csv(pa.Table.from_pylist(kept), aside)
    run_pass(read_corpus(manifest), stems, separator=work.seed, tagger=str(work.tagger))
    select_tracks(stems, tracks, work.size.schedule[0], estimator=work.estimator())
    return tracks


def mixtures_of(work: Setting) -> dict[str, list[EvaluationMixture]]:
    """Mixtures of fold 4 within the groups and across them."""
    drawn = draw_mixtures(resolve_validation(work.validation), sample_rate_hz=work.rate_hz)
    within = [mixture for mixture in drawn if is_plausible(mixture.labels)]
    return {"within": within, "across": [mixture for mixture in drawn if not is_plausible(mixture.labels)]}


def figures(work: Setting, folder: Path) -> dict[str, float]:
    """SDRi of a separator on both kinds of mixtures."""
    system = SeparatorSystem(find_separator(folder).open(own_device()))
    return {kind: evaluate(system, some)["sdri_db"] for kind, some in mixtures_of(work).items()}


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the trainings")
    arguments = parser.parse_args()
    show_progress()
    work = Setting.from_arguments(arguments)
    size = QUICK if arguments.quick else Size(network=NetworkConfig(channels=128, num_blocks=8))
    size = dataclasses.replace(size, num_three=0, num_two=60 if arguments.quick else 900, num_mixtures=600)
    if arguments.quick:
        size = dataclasses.replace(size, num_mixtures=40)
    out = arguments.out or Path("runs/plausible-quick" if arguments.quick else "runs/plausible")
    work = dataclasses.replace(work, size=size, out=out.resolve())
    with connect():
        prepare(work)
        data = TrainingData(clean=work.sources(1), tracks=str(tracks_of(work)))
    seed = measured(work, "seed", work.seed)
    rows = [["seed", *(f"{seed[kind]:.2f}" for kind in ("within", "across"))]]
    for arm, plausible in _ARMS.items():
        found = []
        for number in range(1 if arguments.quick else arguments.seeds):
            name = f"{arm.replace(' ', '-')}-{number}"
            mix = MixConfig(plausible=plausible, clip_fraction=float(MIX["clip_fraction"]))
            steps = work.size.student_steps
            folder = train(work, work.out / name, data, steps=steps, mix=mix, seed=number, start=work.seed)
            found.append(measured(work, name, folder))
        rows.append([arm, *(pages.spread([one[kind] for one in found]) for kind in ("within", "across"))])
    table = pages.markdown(["remixes", "SDRi within dB", "SDRi across dB"], rows)
    about = (
        f"SDRi on two-source mixtures of fold 4 whose labels belong together and on others, mean and range of "
        f"{arguments.seeds} seeds, after {work.size.student_steps} steps from one seed separator. {pages.stamp()}"
    )
    print(table, about, sep="\n\n")
    if not arguments.quick:
        pages.write_page(_PAGE, "Plausible remixes", table, about)


def measured(work: Setting, name: str, folder: Path) -> dict[str, float]:
    """The figures of a separator, once."""
    found: dict[str, float] = pages.measured_once(work.out / "figures" / f"{name}.json", lambda: figures(work, folder))
    return found


if __name__ == "__main__":
    main()
