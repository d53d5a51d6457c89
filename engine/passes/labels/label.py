"""From the tags of a pass to a corpus with labels: which labels of a clip are accepted, and when they sound.

The tags are in shards (``engine/passes/labels/tag.py``), so that other thresholds open no audio.

Shape legend: W windows of a clip, L labels of the tagger, K labels that are judged.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from engine.cli.display import shown
from engine.corpus.roots import Root, resolve
from engine.corpus.table import Corpus, chunks
from engine.passes.config import PassConfig
from engine.passes.labels.tag import Tagging, tagging_config
from engine.passes.run import run_work
from engine.passes.shards import read_columns, read_manifest, stem_shards
from engine.schema import ClipRow, clip_columns, plain_label
from engine.storage.files import atomic_path, parquet_file
from engine.storage.paths import Location, Name, location, relative_name
from engine.taggers import TaggerSource, find_label
from engine.taggers.ontology import Ontology
from engine.taggers.presence import CLIP, LabelThreshold, Presence
from engine.taggers.windows import WindowTags

_LOGGER = logging.getLogger(__name__)
_CANDIDATE = 0.05  # labels of a lower probability are not stored
_ROWS_AT_ONCE = 1024
_MOST_NAMED = 5
_METADATA = b"clearsep.labels"
_SPAN = pa.struct([("start_s", pa.float64()), ("end_s", pa.float64())])
LABELLED = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.string()), nullable=False),  # those that are accepted; may be none
        pa.field("start_s", pa.float64()),  # as in a manifest
        pa.field("end_s", pa.float64()),
        pa.field(  # every label of some probability, the likeliest first, whether it is accepted or not
            "tags",
            pa.list_(
                pa.struct(
                    [
                        ("label", pa.string()),
                        ("probability", pa.float32()),
                        ("tag_db", pa.float32()),
                        ("spans", pa.list_(_SPAN)),  # in which an accepted label sounds, in seconds of the file
                    ]
                )
            ),
            nullable=False,
        ),
    ]
)
"""Columns of a labelled corpus, which is a manifest."""


class LabelCount(TypedDict):
    """A label with its clips, and the threshold by which it was accepted."""

    label: str
    num_clips: int
    probability: float
    """Lowest probability with which it is accepted."""
    precision: float
    """Precision at this threshold, measured on the clips of the calibration."""
    recall: float


class LabelSummary(TypedDict):
    """Record of how a corpus was labelled; it is in the labelled corpus itself."""

    num_clips: int
    """Clips after cutting, each labelled, without label or failed, with the rows of the list that are no clips."""
    num_labelled: int
    num_unlabelled: int
    num_failed: int
    """Listed by ``clearsep failures`` for the folder of the tags."""
    precision: float
    """Precision that every label should have."""
    tagger_fingerprint: str
    presence_fingerprint: str
    tags: str
    """Folder of the tags."""
    audio_root: str | None
    """Where the paths start from; null: the folder of the labelled corpus."""
    labels: list[LabelCount]


@dataclass(frozen=True, kw_only=True)
class ClipLabeller:
    """Decides which labels of a clip are accepted."""

    presence: Presence
    labels: Sequence[str]
    """Of the tagger, in the order of its tags."""
    places: dict[str, int]
    """Of the labels that are judged, among these."""
    thresholds: dict[str, LabelThreshold]
    """By label."""
    ontology: Ontology | None
    missed: list[tuple[float, str]] = field(default_factory=list)
    """The strongest probabilities that were not enough, with their descriptions."""

    def row(self, clip: ClipRow, tags: WindowTags) -> dict[str, object]:
        """The columns ``labels`` and ``tags`` of a clip."""
        probability, strongest = self.probabilities(tags), tags.strongest()
        accepted, found = self.accepted(probability), []
        for name in sorted(probability, key=lambda name: -probability[name]):
            place, limit = self.places[name], self.thresholds[name]
            if probability[name] < _CANDIDATE:
                break
            spans: list[dict[str, float]] = []
            if probability[name] >= limit["probability"]:
                spans = self._spans(clip["start_s"] or 0.0, tags, name, place, limit["probability"])
            else:
                near = f"{name} {probability[name]:.2f} of {limit['probability']:.2f} in {clip['path']}"
                heapq.heappush(self.missed, (probability[name], near))
                if len(self.missed) > _MOST_NAMED:
                    heapq.heappop(self.missed)
            tag_db = strongest[place]
            found.append({"label": name, "probability": probability[name], "tag_db": tag_db, "spans": spans})
        return {"labels": accepted, "tags": found}

    def probabilities(self, tags: WindowTags) -> dict[str, float]:
        """The probability that each label that is judged sounds in a clip."""
        names = [*self.places]
        values_K1 = tags.strongest()[[*self.places.values()]][:, None]
        return dict(zip(names, self.presence.model(CLIP).probabilities(names, values_K1).tolist(), strict=True))

    def accepted(self, probability: Mapping[str, float]) -> list[str]:
        """The labels that reach their thresholds, the likeliest first; with an ontology the lowest of them."""
        reached = [name for name in probability if probability[name] >= self.thresholds[name]["probability"]]
        ordered = sorted(reached, key=lambda name: -probability[name])
        return self.ontology.lowest(ordered) if self.ontology else ordered

    def _spans(self, begin_s: float, tags: WindowTags, name: str, place: int, limit: float) -> list[dict[str, float]]:
        """The parts of a file in which a label sounds: windows that follow each other are one."""
        values_W1 = tags.tags_WL[:, place][:, None]
        sounds_W = self.presence.model(CLIP).probabilities([name] * len(values_W1), values_W1) >= limit
        edges = np.flatnonzero(np.diff(np.concatenate([[False], sounds_W & tags.is_active_W, [False]]).astype(np.int8)))
        return [
            {
                "start_s": round(begin_s + float(tags.start_s_W[first]), 6),
                "end_s": round(begin_s + float(tags.end_s_W[end - 1]), 6),
            }
            for first, end in edges.reshape(-1, 2).tolist()
        ]


def tag_corpus(
    corpus: Corpus,
    out: Location,
    *,
    tagger: TaggerSource,
    labels: Sequence[str],
    config: PassConfig,
    retry_failed: bool = False,
) -> None:
    """Tag every clip of a corpus, with or without labels, into a folder; resumes as ``run_pass`` does.

    ``labels`` are what is looked for. Raises as ``run_pass`` does.
    """
    work = Tagging(tagger=tagger, labels=tuple(labels))
    run_work(corpus, out, work, tagging_config(config), retry_failed=retry_failed)


def write_labels(
    tags: Location,
    out: Location,
    *,
    root: str,
    presence: Presence,
    precision: float,
    ontology: Ontology | None = None,
) -> LabelSummary:
    """Write the labelled corpus that follows from a finished pass of tags; opens no audio.

    ``root`` is that of the corpus, ``precision`` what every label shall have. Raises ``ValueError`` if no label of any
    clip is accepted, and for a presence model or an ontology of other labels or another tagger.
    """
    manifest = read_manifest(tags / "stems", "tagger_labels", "shards", "num_clips", "num_failed")
    labeller = labeller_of(
        presence,
        tagger=manifest["separator_fingerprint"],
        labels=manifest["tagger_labels"],
        precision=precision,
        ontology=ontology,
    )
    if poor := [name for name, limit in labeller.thresholds.items() if limit["precision"] < precision]:
        _LOGGER.warning(
            f"{len(poor)} of {len(labeller.places)} labels reach no precision of {precision:g} in the calibration and "
            f"get the threshold of their highest one: {shown(', '.join(poor[:_MOST_NAMED]))}"
        )
    counts: Counter[str] = Counter()
    num_rows = num_labelled = 0
    is_inside = not relative_name(location(root), folder=out.parent).startswith(("..", "/", "s3:"))
    base = out.parent if is_inside else location(root)
    rows = (
        {**_placed(clip, root, base), **labeller.row(clip, windows)}
        for clip, windows in read_tags(tags, len(labeller.labels))
    )
    with atomic_path(out) as aside, pq.ParquetWriter(aside, LABELLED, write_page_checksum=True) as writer:
        for some in chunks(rows, _ROWS_AT_ONCE):
            writer.write_table(pa.Table.from_pylist(some, schema=LABELLED))
            labels = [cast("list[str]", row["labels"]) for row in some]
            num_rows, num_labelled = num_rows + len(some), num_labelled + sum(map(bool, labels))
            for of_clip in labels:
                counts.update(of_clip)
        if not num_labelled:
            raise _nothing(labeller, num_rows, precision)
        summary = LabelSummary(
            num_clips=manifest["num_clips"],
            num_labelled=num_labelled,
            num_unlabelled=num_rows - num_labelled,
            num_failed=manifest["num_failed"],
            precision=precision,
            tagger_fingerprint=presence.tagger,
            presence_fingerprint=presence.fingerprint,
            tags=relative_name(tags, folder=out.parent),
            audio_root=None if is_inside else str(root),
            labels=_label_counts(labeller, counts),
        )
        if num_rows + summary["num_failed"] != summary["num_clips"]:
            raise RuntimeError(
                f"cannot label {out} ({num_rows} tagged and {summary['num_failed']} failed clips are not the "
                f"{summary['num_clips']} clips of {tags}); tag them again in another folder"
            )
        writer.add_key_value_metadata({_METADATA: json.dumps(summary)})
    return summary


def read_label_summary(path: Location) -> LabelSummary | None:
    """The record in a labelled corpus; null for any other file."""
    if path.suffix != ".parquet" or not path.is_file():
        return None
    with parquet_file(path) as file:
        found = (file.metadata.metadata or {}).get(_METADATA)
    return cast(LabelSummary, json.loads(found)) if found else None


def tags_folder(out: Name) -> tuple[Location, Location]:
    """The labelled corpus and the folder of its tags, which lies next to it; ``ValueError`` for another suffix."""
    name = str(location(out))
    if not name.endswith(".parquet"):
        raise ValueError(f"a labelled corpus must be a .parquet file, got {out}; name one, such as labelled.parquet")
    return location(name), location(name.removesuffix(".parquet") + ".tags")


def read_tags(tags: Location, num_labels: int) -> Iterator[tuple[ClipRow, WindowTags]]:
    """Every tagged clip, one shard in memory at a time."""
    names = ["window_start_s", "window_end_s", "is_active", "tags_db"]
    for shard in stem_shards(tags / "stems"):
        table = read_columns(shard, ["clip_id", "path", "labels", "start_s", "end_s", *names])
        for number, clip in enumerate(table.select(["clip_id", "path", "labels", "start_s", "end_s"]).to_pylist()):
            start_s_W, end_s_W, is_active_W, tags_db = (
                table[name][number].values.to_numpy(zero_copy_only=False) for name in names
            )
            windows = WindowTags(
                tags_WL=tags_db.reshape(-1, num_labels),
                start_s_W=start_s_W,
                end_s_W=end_s_W,
                is_active_W=is_active_W.astype(bool),
            )
            yield clip_columns(clip), windows


def _placed(clip: ClipRow, root: str, base: Location) -> dict[str, object]:
    """The place of a clip, as a manifest in the folder ``base`` names it."""
    path = relative_name(location(resolve(Root(root, is_confined=False), clip["path"])), folder=base)
    return {"path": path, "start_s": clip["start_s"], "end_s": clip["end_s"]}


def labeller_of(
    presence: Presence, *, tagger: str, labels: Sequence[str], precision: float, ontology: Ontology | None
) -> ClipLabeller:
    """Decides on labels of the tagger with a fingerprint; ``ValueError`` for inputs that do not fit each other."""
    if not 0.0 < precision <= 1.0:
        raise ValueError(f"precision must be above 0 and at most 1, got {precision:g}; give one such as 0.8")
    if presence.tagger != tagger:
        raise ValueError(
            f"a presence model must be calibrated with the tagger {tagger}, got one of {presence.tagger}; give "
            "--known, with which it is calibrated"
        )
    limits = presence.thresholds(precision)
    found = sorted({place for label in limits if (place := find_label(label, labels)) is not None})
    places = {labels[place]: place for place in found}
    if not places:
        raise ValueError(
            f"a presence model must be calibrated on labels of the tagger, got {sorted(limits)[:_MOST_NAMED]}; give "
            "clips of its labels (--known)"
        )
    if ontology is not None and not ontology.labels.intersection(map(plain_label, places)):
        some = [*places][:_MOST_NAMED]
        raise ValueError(f"an ontology must have labels of the tagger, got none of {some}; give one of its labels")
    thresholds = {name: limits[plain_label(name)] for name in places}
    return ClipLabeller(presence=presence, labels=labels, places=places, thresholds=thresholds, ontology=ontology)


def _label_counts(labeller: ClipLabeller, counts: Counter[str]) -> list[LabelCount]:
    return [LabelCount(label=name, num_clips=counts[name], **limit) for name, limit in labeller.thresholds.items()]


def _nothing(labeller: ClipLabeller, num_rows: int, precision: float) -> ValueError:
    nearest = ", ".join(text for _, text in sorted(labeller.missed, reverse=True)) or "none above 0.05"
    return ValueError(
        f"thresholds must accept a label of some clip, got none of {num_rows} tagged clips (the strongest "
        f"probabilities: {shown(nearest)}); lower the precision ({precision:g})"
    )
