"""The loop on recordings without labels, or with wrong or missing ones, with labels that stay or move.

    python -m benchmarks.labels.labels --esc10 DIR [--out runs/labels] [--seeds 3] [--quick]

Fold 1 of ESC-10 trains seed, tagger and judges. Folds 2 and 3 become a natural corpus of clips of one to three sounds,
whose labels are hidden, changed or removed; fold 4 validates. Writes ``labels.md`` and a table of docs/results.md.
Run it again to resume it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from typing_extensions import TypedDict

from benchmarks import pages
from benchmarks.setting import QUICK, Setting, Size, prepare, train
from cluster.session import connect
from engine.cli.console import show_progress
from engine.selection.labels.events import EventRow
from engine.selection.labels.table import read_label_rows
from engine.separators import NetworkConfig, find_separator
from engine.separators.batching import BatchedSeparator
from engine.storage.factories import own_device
from engine.storage.files import atomic_path
from engine.storage.paths import Location, location
from engine.taggers import find_tagger
from engine.taggers.presence import save_presence
from train.data.config import MixConfig
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.mixtures import draw_mixtures, resolve_validation
from train.judges.calibrate import CalibrationConfig
from train.judges.presence import PresenceJudge, calibrate_presence
from train.judges.tagger import TaggerConfig, train_tagger
from tune.config import LabelConfig, RunConfig
from tune.inputs import resolve
from tune.recipes import MOVING
from tune.run import begin
from tune.steps.artifacts import Artifacts
from tune.steps.iteration import iterate, separate
from tune.steps.labels import events_of

_PAGE = Path(__file__).with_name("labels.md")
_ITERATIONS = 2
_NUMBERS = range(_ITERATIONS + 1)
_WRONG = 0.2
_GIVEN_MOVING = {"drop_label_below": 0.01, "add_label_from": 0.95}
"""Limits for labels that somebody gave: most are right, so it takes more to change one."""
_EVENT_FROM = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to go through the loop."""

    corpus: str
    """Name of its manifest."""
    moves: bool = False
    """Labels move."""
    events: bool = False
    """Single events are mined."""
    tracks: bool = True
    """Tracks are learned from, not only single-source clips and events."""

    @property
    def name(self) -> str:
        """As the tables have it."""
        events = ", single events" if self.tracks else ", single events alone"
        return f"{self.corpus}, labels {'move' if self.moves else 'stay'}{events if self.events else ''}"


_TRUE, _UNLABELLED = "true labels", "no labels"
_CORPORA = {
    _TRUE: "natural",
    _UNLABELLED: "unlabelled",
    "a fifth wrong": "wrong",
    "a fifth missing": "missing",
}
_ARMS = [Arm(corpus=corpus, moves=moves) for corpus in _CORPORA for moves in (False, True)] + [
    Arm(corpus=_UNLABELLED, moves=True, events=True),
    Arm(corpus=_UNLABELLED, moves=True, events=True, tracks=False),
]


class Row(TypedDict):
    """An iteration of one arm and seed."""

    arm: str
    seed: int
    iteration: int
    precision: float
    recall: float
    f1: float
    sdri_db: float
    num_events: int
    num_pure: int
    """Events in which their label sounds alone."""


def write_manifests(work: Setting) -> Mapping[str, Path]:
    """The natural corpus as a folder without labels, and with wrong and missing ones; returns their manifests."""
    natural = work.natural()
    rows = pa_csv.read_csv(natural).to_pylist()
    names = sorted({label for row in rows for label in row["labels"].split(";")})
    changed = {"natural": lambda labels, rng: labels, "wrong": _wrong(names), "missing": _missing}
    manifests = {"unlabelled": natural.parent / "audio"}
    for name, change in changed.items():
        manifests[name] = natural.parent / f"{name}.csv"
        rng = np.random.default_rng(0)
        labels = [";".join(change(row["labels"].split(";"), rng)) for row in rows]
        table = pa.table({"path": [row["path"] for row in rows], "labels": labels})
        with atomic_path(manifests[name]) as aside:
            pa_csv.write_csv(table, aside)
    return manifests


def _wrong(names: Sequence[str]):  # noqa: ANN202 - a rule like _missing
    def change(labels: Sequence[str], rng: np.random.Generator) -> list[str]:
        changed = list(labels)
        for place in range(len(changed)):
            if rng.random() < _WRONG:
                others = [name for name in names if name not in labels and name not in changed]
                changed[place] = others[int(rng.integers(len(others)))]
        return changed

    return change


def _missing(labels: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [label for label in labels if rng.random() >= _WRONG]


class Bench:
    """Folders and settings of this benchmark."""

    def __init__(self, work: Setting) -> None:
        self.work, self.out = work, location(work.out)
        self.manifests = write_manifests(work)
        rows = pa_csv.read_csv(self.manifests["natural"]).to_pylist()
        self.truth = {Path(row["path"]).name: set(row["labels"].split(";")) for row in rows}

    def presence(self) -> Path:
        """The presence model of the tagger, calibrated on halves of fold 1; once."""
        folder, clean = self.work.out / "presence", self.work.sources(1)
        if (folder / "presence.json").is_file():
            return folder
        judges = []
        for part in range(2):
            tagger = self.work.out / f"tagger-without-{part}"
            settings = TaggerConfig(steps=self.work.size.tagger_steps)
            train_tagger(tagger, clean=clean.without(part, 2), config=settings, sample_rate_hz=self.work.rate_hz)
            separator = find_separator(self.work.out / f"without-{part}").open(own_device())
            judges.append(
                PresenceJudge(
                    tagger=find_tagger(tagger).open(own_device()),
                    separator=BatchedSeparator(separator=separator, device=own_device()),
                    clean=clean.part(part, 2),
                )
            )
        fingerprint = find_tagger(self.work.tagger).fingerprint
        save_presence(calibrate_presence(judges, CalibrationConfig(), tagger=fingerprint, about={}), folder)
        return folder

    def config(self, arm: Arm) -> RunConfig:
        """The run of an arm."""
        config = self.work.config(_ITERATIONS)
        is_given = arm.corpus != _UNLABELLED
        labels = LabelConfig(presence=str(self.presence()), num_tentative=2 if arm.moves else 0)
        limits: dict[str, Any] = {}
        if arm.moves:
            limits = {**(_GIVEN_MOVING if is_given else MOVING), "event_from": _EVENT_FROM if arm.events else None}
        schedule = tuple(dataclasses.replace(one, **limits) for one in config.schedule)
        distil = config.distil
        if not arm.tracks:
            distil = dataclasses.replace(distil, mix=MixConfig(clean_fraction=1.0))
        return dataclasses.replace(
            config,
            corpus=str(self.manifests[_CORPORA[arm.corpus]]),
            schedule=schedule,
            engine=dataclasses.replace(config.engine, min_labels=1),
            labels=labels,
            distil=distil,
        )

    def rows(self, arm: Arm, seed: int) -> Iterator[Row]:
        """Take an arm through its iterations; arms and seeds share what they have in common."""
        config = self.config(arm)
        base = begin(config, resolve(config), self.out / "base" / arm.name.replace(", ", "-").replace(" ", "-"))
        distil = dataclasses.replace(config.distil, seed=seed)
        work = dataclasses.replace(
            base,
            config=dataclasses.replace(config, distil=distil),
            artifacts=Artifacts(out=self.out / "artifacts", shared=True),
            contents="",
        )
        teacher = work.seed
        assert work.labels is not None, "config"
        yield self._row(arm, seed, 0, work.labels, self.figure("seed", self.work.seed), [])
        for number, thresholds in enumerate(work.config.schedule, 1):
            stems, before = separate(work, number, teacher)[0], work.labels
            record, teacher = iterate(work, number, thresholds, teacher)
            validation = record["validation"]
            assert validation is not None, "config"
            events = list(events_of(work, thresholds, before, stems) or [])
            yield self._row(arm, seed, number, work.labels, validation["sdri_db"], events)

    def _row(
        self, arm: Arm, seed: int, number: int, labels: Location, sdri_db: float, events: Sequence[EventRow]
    ) -> Row:
        precision, recall = self.score(labels)
        return Row(
            arm=arm.name,
            seed=seed,
            iteration=number,
            precision=precision,
            recall=recall,
            f1=2.0 * precision * recall / max(1e-9, precision + recall),
            sdri_db=sdri_db,
            num_events=len(events),
            num_pure=sum(self.truth[Path(event["path"]).name] == {event["label"]} for event in events),
        )

    def score(self, labels: Location) -> tuple[float, float]:
        """Precision and recall of labels against the truth, over all pairs of a clip and a label."""
        num_right = num_labels = 0
        for row in read_label_rows(labels / "labels.parquet"):
            truth = self.truth[Path(row["path"]).name]
            num_right += len(truth.intersection(row["labels"]))
            num_labels += len(row["labels"])
        return num_right / max(1, num_labels), num_right / sum(map(len, self.truth.values()))

    def control(self, seed: int) -> float:
        """SDRi of the seed trained further on its own clips, for as many steps as all iterations."""
        steps = _ITERATIONS * self.work.size.student_steps
        data = TrainingData(clean=self.work.sources(1))
        folder = train(self.work, self.work.out / f"control-{seed}", data, steps=steps, seed=seed, start=self.work.seed)
        return self.figure(f"control-{seed}", folder)

    def figure(self, name: str, folder: Path) -> float:
        """SDRi of a separator on the validation mixtures."""

        def measured() -> float:
            mixtures = draw_mixtures(resolve_validation(self.work.validation), sample_rate_hz=self.work.rate_hz)
            return evaluate(SeparatorSystem(find_separator(folder).open(own_device())), mixtures)["sdri_db"]

        return float(pages.measured_once(self.work.out / "figures" / f"{name}.json", measured))


def table(rows: Sequence[Row], controls: Sequence[float], seed_db: float) -> str:
    """The main table, in Markdown: means over seeds, and the part of the gain with true labels that stay."""
    last = [row for row in rows if row["iteration"] == _ITERATIONS]
    reference = [row["sdri_db"] for row in last if row["arm"] == _ARMS[0].name] or [np.nan]
    full = float(np.mean(reference)) - seed_db

    def gain(sdri: Sequence[float]) -> list[str]:
        return [pages.spread(sdri), f"{(np.mean(sdri) - seed_db) / full:.0%}"]

    lines = []
    for arm in _ARMS:
        of_arm = [row for row in rows if row["arm"] == arm.name]
        if of_arm:
            labels = [_labels([row for row in of_arm if row["iteration"] == number]) for number in _NUMBERS]
            ends = [row for row in of_arm if row["iteration"] == _ITERATIONS]
            lines.append([arm.name, *labels, *gain([row["sdri_db"] for row in ends]), _events(ends)])
    lines.append(["control: no natural clips", *[""] * len(_NUMBERS), *gain(controls), ""])
    names = [f"after iteration {number}" if number else "precision / recall / F1 before" for number in _NUMBERS]
    return pages.markdown(["loop", *names, "SDRi dB", "part of the gain", "events, pure"], lines)


def _events(rows: Sequence[Row]) -> str:
    """Single events of the last iteration, and the part of them in which their label sounds alone."""
    num_events = sum(row["num_events"] for row in rows)
    if not num_events:
        return ""
    return f"{num_events / len(rows):.0f}, {sum(row['num_pure'] for row in rows) / num_events:.0%}"


def _labels(rows: Sequence[Row]) -> str:
    """Mean precision, recall and F1 of the labels."""
    columns = ([row["precision"] for row in rows], [row["recall"] for row in rows], [row["f1"] for row in rows])
    return " / ".join(f"{np.mean(column):.3f}" for column in columns)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the trainings of every arm")
    parser.add_argument("--arms", help="numbers of some of the arms, separated by commas")
    arguments = parser.parse_args()
    show_progress()
    work = Setting.from_arguments(arguments)
    size = QUICK if arguments.quick else Size(network=NetworkConfig(channels=128, num_blocks=8))
    size = dataclasses.replace(size, num_one=4 if arguments.quick else 80, num_two=16 if arguments.quick else 320)
    out = arguments.out or Path("runs/labels-quick" if arguments.quick else "runs/labels")
    bench = Bench(dataclasses.replace(work, size=size, out=out.resolve()))
    seeds = range(1 if arguments.quick else arguments.seeds)
    arms = [_ARMS[int(number)] for number in arguments.arms.split(",")] if arguments.arms else _ARMS
    rows: list[Row] = []
    with connect():
        prepare(bench.work)
        for seed, arm in itertools.product(seeds, arms):
            pages.log(f"{arm.name}, seed {seed}")
            rows += bench.rows(arm, seed)
            pages.log(str(rows[-1]))
        controls = [bench.control(seed) for seed in seeds]
    seed_db = bench.figure("seed", bench.work.seed)
    tables = [table(rows, controls, seed_db), _about(bench, len(seeds), seed_db)]
    print(*tables, sep="\n\n")
    if not arguments.quick and not arguments.arms:
        pages.write_page(_PAGE, "Labels that are missing, wrong or not there", *tables)
        pages.fill(pages.RESULTS, "labels", "\n\n".join(tables))


def _about(bench: Bench, num_seeds: int, seed_db: float) -> str:
    size = bench.work.size
    return (
        f"SDRi on {size.num_mixtures} two-source mixtures of fold 4, mean and range of {num_seeds} seeds; the seed "
        f"separator has {seed_db:.2f} dB. Corpus of {size.num_one} clips of one, {size.num_two} of two and "
        f"{size.num_three} of three sounds of folds 2 and 3; network of {size.network.channels} channels and "
        f"{size.network.num_blocks} blocks, {size.student_steps} steps an iteration. {pages.stamp()}"
    )


if __name__ == "__main__":
    main()
