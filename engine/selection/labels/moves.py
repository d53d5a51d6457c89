"""The rules by which labels move: from the evidence of a pass to the labels of the next one.

Shape suffixes: L labels of the tagger, N pairs of a clip and a label, F values of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.schema import plain_label
from engine.selection.labels.table import ChangeRow, LabelRow, label_row
from engine.taggers.presence import EVIDENCE, REST, STEM, Presence

if TYPE_CHECKING:
    from engine.selection.labels.evidence import ClipEvidence
    from engine.taggers.ontology import Ontology

DROPPED, ADDED, RELABELLED = "dropped", "added", "relabelled"
_TENTATIVE_PROBABILITY = 0.05  # a less likely label is only queried in a clip that has no other


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Limits of an iteration by which labels move."""

    drop_below: float
    """A label is dropped from a clip if the probability that it sounds is lower."""
    add_from: float
    """A label is added if the probability is at least this."""
    num_tentative: int
    """Labels of a clip, at most, that the next pass queries to find out whether they sound."""
    ontology: Ontology | None = None
    """A label is not added to a clip that has a kind of it."""


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A label of the tagger in a clip, as the evidence has it."""

    label: str
    probability: float
    kind: str
    values: Sequence[float]

    def reason(self, presence: Presence, *, is_for: bool) -> str:
        """The value of evidence that says most for the label, or most against it."""
        part_F = presence.model(self.kind).contributions(np.array([self.values]))[0]
        return EVIDENCE[self.kind][int(part_F.argmax() if is_for else part_F.argmin())]

    def evidence(self) -> list[tuple[str, float]]:
        """The values by name."""
        return list(zip(EVIDENCE[self.kind], map(float, self.values), strict=True))


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A clip after its labels have moved."""

    row: LabelRow
    changes: list[ChangeRow]
    probability_L: np.ndarray
    """Of every label of the tagger; 0 for one that the presence model does not know."""


class LabelJudge:
    """Moves the labels of one clip after another; labels that the presence model does not know stay."""

    def __init__(self, presence: Presence, tagger_labels: Sequence[str], rules: LabelRules) -> None:
        self.presence, self.labels, self.rules = presence, list(tagger_labels), rules
        places = {plain_label(label): place for place, label in enumerate(self.labels)}
        self._places = {label: place for label, place in places.items() if label in presence.measured}

    def move(self, before: LabelRow, evidence: ClipEvidence) -> Moved:
        """Move the labels of a clip whose stems are there; a label without a stem, or without a tag, stays."""
        judged = self._judged(evidence)
        stems = {plain_label(label): number for number, label in enumerate(evidence.stem_labels)}
        kept: list[str] = []
        changes: list[ChangeRow] = []
        for label in before["labels"]:
            one = judged.get(plain_label(label))
            if one is None or one.kind != STEM or one.probability >= self.rules.drop_below:
                kept.append(label)
                continue
            other = self._relabelled(evidence, stems[plain_label(label)], {*map(plain_label, before["labels"])})
            changes.append(self._dropped(before, label, one, other))
        accepted = {*map(plain_label, kept)}
        barred = _plain(before["labels"]) | _above(before["labels"], self.rules.ontology)
        added = {plain_label(str(change["new_label"])) for change in changes if change["new_label"]} - accepted
        changes += [
            self._change(before, one.label, ADDED, one, limit=self.rules.add_from)
            for name, one in judged.items()
            if one.probability >= self.rules.add_from and name not in accepted | added | barred
        ]
        new = dict.fromkeys(change["new_label"] or change["label"] for change in changes if change["change"] != DROPPED)
        labels = [*kept, *(label for label in new if plain_label(label) not in accepted)]
        return Moved(
            row=label_row(
                before["path"],
                before["start_s"],
                before["end_s"],
                labels=labels,
                tentative=self.tentative(labels, {one.label: one.probability for one in judged.values()}),
            ),
            changes=changes,
            probability_L=np.array(
                [judged[name].probability if (name := plain_label(label)) in judged else 0.0 for label in self.labels]
            ),
        )

    def tentative(self, labels: Sequence[str], probability: Mapping[str, float]) -> list[str]:
        """The likeliest labels that a clip does not have; at least one if it has none."""
        return tentative_labels(labels, probability, most=self.rules.num_tentative, ontology=self.rules.ontology)

    def _judged(self, evidence: ClipEvidence) -> dict[str, _Judged]:
        """Every label that is known, in plain spelling, by its stem if it has one, else by the residual."""
        found: dict[str, tuple[str, Sequence[float]]] = {}
        for number, label in enumerate(evidence.stem_labels):
            if (place := self._places.get(plain_label(label))) is not None:
                found[plain_label(label)] = (STEM, evidence.values(number, place))
        for name, place in self._places.items():
            if name not in found:
                found[name] = (REST, [float(evidence.clip_tags_L[place]), float(evidence.residual_tags_L[place])])
        judged: dict[str, _Judged] = {}
        for kind in (STEM, REST):
            names = [name for name, (of, _) in found.items() if of == kind]
            if names:
                values_NF = np.array([found[name][1] for name in names])
                probability_N = self.presence.model(kind).probabilities(names, values_NF)
                for name, probability in zip(names, probability_N.tolist(), strict=True):
                    label, values = self.labels[self._places[name]], found[name][1]
                    judged[name] = _Judged(label=label, probability=probability, kind=kind, values=values)
        return judged

    def _relabelled(self, evidence: ClipEvidence, number: int, present: set[str]) -> str | None:
        """The other label that sounds in a stem, if it is known and likely enough."""
        tags_L = evidence.stem_tags_SL[number]
        others = [place for name, place in self._places.items() if name not in present]
        if not others:
            return None
        place = max(others, key=lambda one: float(tags_L[one]))
        values_NF = np.array([evidence.values(number, place)])
        label = self.labels[place]
        probability = float(self.presence.model(STEM).probabilities([label], values_NF)[0])
        return label if probability >= self.rules.add_from else None

    def _dropped(self, row: LabelRow, label: str, one: _Judged, other: str | None) -> ChangeRow:
        change = RELABELLED if other is not None else DROPPED
        return self._change(row, label, change, one, limit=self.rules.drop_below, new_label=other)

    def _change(
        self, row: LabelRow, label: str, change: str, one: _Judged, *, limit: float, new_label: str | None = None
    ) -> ChangeRow:
        return ChangeRow(
            path=row["path"],
            start_s=row["start_s"],
            end_s=row["end_s"],
            label=label,
            change=change,
            new_label=new_label,
            reason=one.reason(self.presence, is_for=change == ADDED),
            probability=one.probability,
            limit=limit,
            evidence=one.evidence(),
        )


def tentative_labels(
    labels: Sequence[str], probability: Mapping[str, float], *, most: int, ontology: Ontology | None = None
) -> list[str]:
    """The likeliest labels that a clip does not have, ``most`` at the most; at least one if it has none.

    With an ontology none of which it has a kind.
    """
    accepted = _plain(labels) | _above(labels, ontology)
    others = sorted(
        (name for name in probability if plain_label(name) not in accepted), key=lambda name: -probability[name]
    )
    likely = [name for name in others if probability[name] >= _TENTATIVE_PROBABILITY][:most]
    return likely or ([] if labels else others[:1])


def _above(labels: Sequence[str], ontology: Ontology | None) -> set[str]:
    return set[str]().union(*map(ontology.above, labels)) if ontology is not None else set()


def _plain(labels: Sequence[str]) -> set[str]:
    return {plain_label(label) for label in labels}
