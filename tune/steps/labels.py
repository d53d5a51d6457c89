"""Labels of a run's corpus: those before the first pass, and those that every pass moves."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from engine.passes.labels.label import labeller_of, read_tags, tag_corpus
from engine.passes.shards import read_manifest
from engine.selection.labels.events import EventRow
from engine.selection.labels.moves import LabelRules
from engine.selection.labels.update import (
    LabelCounts,
    LabelManifest,
    counts_of,
    first_labels,
    read_labels,
    single_events,
    update_labels,
)
from engine.selection.thresholds import Thresholds
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location
from tune.inputs import pass_config
from tune.steps.work import Work

TAGS = "tags"
"""Folder of the corpus' tags in that of iteration 0."""
_LOGGER = logging.getLogger(__name__)


def label_first(work: Work, folder: Location) -> tuple[Location, LabelCounts]:
    """Tag the corpus of a run and write the labels of its first pass; returns their folder and counts."""
    settings, presence, tagger = work.config.labels, work.judges.presence, work.judges.tagger
    assert settings is not None and presence is not None and tagger is not None, "prepare_judges"
    tags, labels = folder / TAGS, folder / "labels"
    sought = work.inputs.clean.labels if work.inputs.clean is not None else tagger.labels
    config = pass_config(work.config)
    tag_corpus(work.inputs.corpus, tags, tagger=tagger, labels=sorted(set(sought)), config=config)
    made = read_manifest(tags / "stems", "fingerprint", "tagger_labels")
    names = made["tagger_labels"]
    ontology = work.inputs.ontology
    labeller = labeller_of(
        presence, tagger=tagger.fingerprint, labels=names, precision=settings.precision, ontology=ontology
    )
    decided = [settings.precision, settings.num_tentative, ontology and ontology.fingerprint]
    inputs = fingerprint([made["fingerprint"], presence.fingerprint, *decided])
    if not (labels / "manifest.json").is_file() or read_labels(labels)["inputs"] != inputs:
        manifest = first_labels(
            read_tags(tags, len(names)),
            labels,
            labeller=labeller,
            num_tentative=settings.num_tentative,
            inputs=inputs,
        )
        _LOGGER.info(
            f"iteration 0: {manifest['num_kept']} given labels and {manifest['num_added']} of the tagger for "
            f"{manifest['num_clips']} clips, {manifest['num_unlabelled']} without any"
        )
    return labels, counts_of(read_labels(labels))


def move_labels(
    work: Work, number: int, thresholds: Thresholds, before: Location, stems: Location, pass_fingerprint: str
) -> tuple[Location, LabelManifest]:
    """Move the labels of an iteration by the evidence of its pass; returns their folder and manifest."""
    presence = work.judges.presence
    assert presence is not None, "prepare_judges"
    rules = _rules(work, thresholds)
    decided = [rules.drop_below, rules.add_from, rules.num_tentative, rules.ontology and rules.ontology.fingerprint]
    inputs = fingerprint([read_labels(before)["fingerprint"], pass_fingerprint, presence.fingerprint, *decided])
    folder = work.artifacts.path_for("labels", number, inputs) / "labels"
    with work.artifacts.building(folder.parent):
        if (folder / "manifest.json").is_file() and (manifest := read_labels(folder))["inputs"] == inputs:
            return folder, manifest
        manifest = update_labels(before, stems / "stems", folder, presence=presence, rules=rules, inputs=inputs)
    _LOGGER.info(
        f"iteration {number}: {manifest['num_kept']} labels kept, {manifest['num_dropped']} dropped, "
        f"{manifest['num_relabelled']} relabelled, {manifest['num_added']} added"
    )
    return folder, manifest


def events_of(work: Work, thresholds: Thresholds, before: Location, stems: Location) -> Iterator[EventRow] | None:
    """The single events of an iteration's pass, which queried the labels ``before``; null if none are wanted."""
    if thresholds.event_from is None:
        return None
    presence, rules = work.judges.presence, _rules(work, thresholds)
    assert presence is not None, "prepare_judges"
    return single_events(before, stems / "stems", presence=presence, rules=rules, from_purity=thresholds.event_from)


def _rules(work: Work, thresholds: Thresholds) -> LabelRules:
    assert work.config.labels is not None, "prepare_judges"
    return LabelRules(
        drop_below=thresholds.drop_label_below or 0.0,
        add_from=2.0 if thresholds.add_label_from is None else thresholds.add_label_from,
        num_tentative=work.config.labels.num_tentative,
        ontology=work.inputs.ontology,
    )
