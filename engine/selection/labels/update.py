"""The labels of a corpus from one pass to the next, in a folder of their own.

``labels.parquet`` has every clip with its labels, ``changes.parquet`` every change with its evidence, and
``manifest.json``, written last, the counts: labels before = kept + dropped + relabelled, and after = kept + added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from typing_extensions import TypedDict

from engine.errors import DamagedError
from engine.passes.labels.label import ClipLabeller
from engine.schema import ClipRow
from engine.selection.labels.events import EventRow, event_row, mine
from engine.selection.labels.evidence import ClipEvidence, read_evidence, tagger_labels
from engine.selection.labels.moves import DROPPED, RELABELLED, LabelJudge, LabelRules, Moved, tentative_labels
from engine.selection.labels.table import (
    CHANGES,
    LABELS,
    AcceptedLabels,
    ChangeRow,
    LabelRow,
    label_row,
    read_label_rows,
    write_rows,
)
from engine.storage.files import read_record, sha256_file, write_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from engine.taggers.presence import Presence
from engine.taggers.windows import WindowTags

_FILES = {"labels.parquet": LABELS, "changes.parquet": CHANGES}


class LabelCounts(TypedDict):
    """Numbers of clips and of their labels at an iteration."""

    num_clips: int
    num_before: int
    """Labels before the iteration: kept, dropped and relabelled ones."""
    num_kept: int
    num_dropped: int
    num_relabelled: int
    num_added: int
    """Labels that clips did not have before, with those that others became."""
    num_after: int
    """Kept and added ones."""
    num_tentative: int
    """Labels that the next pass queries to find out whether they sound."""
    num_unlabelled: int
    """Clips without a label, which the next teacher is tried on with their likeliest one."""
    num_unjudged: int
    """Clips without a stem in the pass, whose labels stay."""
    reasons: dict[str, int]
    """Changes by kind and by the evidence that decided them."""


class LabelManifest(LabelCounts):
    """The content of ``manifest.json``."""

    inputs: str
    """Fingerprint of what the labels were made of."""
    sha256: dict[str, str]
    fingerprint: str
    """Of the labels."""


def first_labels(
    tags: Iterable[tuple[ClipRow, WindowTags]],
    out: Location,
    *,
    labeller: ClipLabeller,
    num_tentative: int,
    inputs: str,
) -> LabelManifest:
    """Write the labels of a corpus before its first pass; returns their manifest.

    A clip that has labels keeps them; any other gets those that the labeller accepts by its tags. ``inputs`` is the
    fingerprint of all that.
    """

    def rows(counted: Counter[str]) -> Iterator[tuple[LabelRow, list[ChangeRow]]]:
        for clip, windows in tags:
            probability, given = labeller.probabilities(windows), len(clip["labels"])
            labels = list(clip["labels"]) or labeller.accepted(probability)
            tentative = tentative_labels(labels, probability, most=num_tentative, ontology=labeller.ontology)
            counted.update(num_before=given, num_kept=given, num_added=len(labels) - given)
            yield label_row(clip["path"], clip["start_s"], clip["end_s"], labels=labels, tentative=tentative), []

    return _write(out, rows, inputs=inputs)


def update_labels(
    before: Location,
    stems: Location,
    out: Location,
    *,
    presence: Presence,
    rules: LabelRules,
    inputs: str,
) -> LabelManifest:
    """Move the labels in folder ``before`` by the evidence of the pass that queried them; returns the new manifest.

    Raises ``ValueError`` if the pass has no evidence.
    """

    def rows(counted: Counter[str]) -> Iterator[tuple[LabelRow, list[ChangeRow]]]:
        pending = {row["clip_id"]: row for row in read_label_rows(before / "labels.parquet")}
        for row, _, moved in _moved(pending, before, stems, LabelJudge(presence, tagger_labels(stems), rules)):
            counted.update(_counts(row, moved))
            yield moved.row, moved.changes
        for row in pending.values():
            counted.update(num_before=len(row["labels"]), num_kept=len(row["labels"]), num_unjudged=1)
            yield row, []

    return _write(out, rows, inputs=inputs)


def single_events(
    before: Location, stems: Location, *, presence: Presence, rules: LabelRules, from_purity: float
) -> Iterator[EventRow]:
    """The clips of a pass in which one label sounds alone with at least a probability, by :func:`mine`."""
    judge = LabelJudge(presence, tagger_labels(stems), rules)
    pending = {row["clip_id"]: row for row in read_label_rows(before / "labels.parquet")}
    for _, evidence, moved in _moved(pending, before, stems, judge):
        found = mine(evidence, moved.probability_L, judge.labels, min_purity_fraction=from_purity)
        if found is not None:
            yield event_row(evidence, *found)


def _moved(
    pending: dict[str, LabelRow], before: Location, stems: Location, judge: LabelJudge
) -> Iterator[tuple[LabelRow, ClipEvidence, Moved]]:
    """Every clip of a pass, which is taken out of the pending ones, with its evidence and what that moved."""
    for evidence in read_evidence(stems):
        row = pending.pop(evidence.row["clip_id"], None)
        if row is None:
            raise RuntimeError(
                f"cannot move the labels of {before} (clip {evidence.row['clip_id']} of the pass in {stems} is not "
                "among them); delete the labels of this iteration and start the same command again"
            )
        yield row, evidence, judge.move(row, evidence)


def _counts(row: LabelRow, moved: Moved) -> Mapping[str, int]:
    kinds = Counter(change["change"] for change in moved.changes)
    num_kept = len(row["labels"]) - kinds[DROPPED] - kinds[RELABELLED]
    return {
        "num_before": len(row["labels"]),
        "num_kept": num_kept,
        "num_dropped": kinds[DROPPED],
        "num_relabelled": kinds[RELABELLED],
        "num_added": len(moved.row["labels"]) - num_kept,
    }


def _write(
    out: Location, rows: Callable[[Counter[str]], Iterator[tuple[LabelRow, list[ChangeRow]]]], *, inputs: str
) -> LabelManifest:
    (out / "manifest.json").unlink(missing_ok=True)
    counted, reasons, changes = Counter[str](), Counter[str](), list[ChangeRow]()

    def labels() -> Iterator[LabelRow]:
        for row, some in rows(counted):
            changes.extend(some)
            reasons.update(f"{one['change']}: {one['reason']}" for one in some)
            counted.update(
                num_clips=1,
                num_after=len(row["labels"]),
                num_tentative=len(row["tentative"]),
                num_unlabelled=int(not row["labels"]),
            )
            yield row

    write_rows(out / "labels.parquet", labels(), LABELS)
    write_rows(out / "changes.parquet", changes, CHANGES)
    counts = cast(LabelCounts, {name: counted[name] for name in LabelCounts.__annotations__})
    counts["reasons"] = dict(sorted(reasons.items()))
    require_all(counts, out)
    sha256 = {name: sha256_file(out / name) for name in _FILES}
    identity = fingerprint(sha256["labels.parquet"])
    manifest: LabelManifest = {**counts, "inputs": inputs, "sha256": sha256, "fingerprint": identity}
    write_json(out / "manifest.json", manifest)
    return manifest


def counts_of(manifest: LabelManifest) -> LabelCounts:
    """The counts in a manifest."""
    return cast(LabelCounts, {name: manifest[name] for name in LabelCounts.__annotations__})  # type: ignore[literal-required]


def require_all(counts: LabelCounts, out: Location) -> None:
    """Raise ``RuntimeError`` unless every label is kept, dropped, relabelled or added."""
    lost = counts["num_before"] - counts["num_kept"] - counts["num_dropped"] - counts["num_relabelled"]
    new = counts["num_after"] - counts["num_kept"] - counts["num_added"]
    if lost or new:
        raise RuntimeError(
            f"cannot close the labels in {out} ({counts['num_before']} before are not {counts['num_kept']} kept, "
            f"{counts['num_dropped']} dropped and {counts['num_relabelled']} relabelled, or {counts['num_after']} "
            f"after are not those kept and {counts['num_added']} added); delete it and start the same command again"
        )


def read_labels(folder: Location) -> LabelManifest:
    """The manifest of labels in a folder, whose files are checked.

    Raises ``ValueError`` if it is missing and ``DamagedError`` if a file is damaged.
    """
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"there are no finished labels in {folder}; start the command that makes them again")
    manifest = read_record(folder / "manifest.json", LabelManifest)
    for name in _FILES:
        if not (folder / name).is_file() or sha256_file(folder / name) != manifest["sha256"].get(name):
            raise DamagedError(f"{folder / name} must have the checksum in its manifest, got another; delete {folder}")
    return manifest


def accepted_labels(before: Location, after: Location) -> AcceptedLabels:
    """The labels that clips have after an iteration, by their ids in the iteration's pass."""

    def key(row: LabelRow) -> tuple[str, float | None, float | None]:
        return row["path"], row["start_s"], row["end_s"]

    identities = {key(row): row["clip_id"] for row in read_label_rows(before / "labels.parquet")}
    rows = ((identities[key(row)], row["labels"]) for row in read_label_rows(after / "labels.parquet"))
    return AcceptedLabels(rows, read_labels(after)["fingerprint"])
