"""Labels for a corpus without any, by a tagger that is calibrated on clips whose labels are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.gpu import call_on_gpu
from engine.corpus.read import read_corpus
from engine.corpus.sources import SourceClips, read_sources
from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.labels.label import LabelSummary, labeller_of, tag_corpus, tags_folder, write_labels
from engine.settings import build, deciding
from engine.storage.factories import own_device
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name
from engine.taggers import TaggerSource, find_tagger
from engine.taggers.ontology import read_ontology
from engine.taggers.presence import Presence, load_presence, save_presence
from train.judges.calibrate import CalibrationConfig
from train.judges.presence import PresenceJudge, calibrate_presence


def label_corpus(
    corpus: Corpus | Name,
    out: Name,
    *,
    tagger: TaggerSource | Name,
    known: SourceClips | Name | None = None,
    presence: Presence | Name | None = None,
    precision: float = 0.8,
    ontology: Name | None = None,
    config: PassConfig | Mapping[str, Any] | None = None,
    retry_failed: bool = False,
) -> LabelSummary:
    """Label every clip of a corpus with what a tagger detects, into the Parquet manifest ``out``.

    ``known`` are single-source clips (a CSV ``path,label`` or a folder with a subfolder per label), on whose mixtures
    the tagger is calibrated: each of their labels is accepted from the probability on that gives ``precision`` there.
    ``presence`` is a model that was calibrated before, in its place. With an ``ontology`` only the lowest labels
    remain. The tags are written next to ``out``, into a folder that ends in ``.tags``: the same call resumes, and with
    another precision it opens no audio of the corpus. Needs :func:`connect`. Raises ``ValueError`` if no label is
    accepted, and as :func:`run_pass` does.

    >>> with cs.connect():
    ...     summary = cs.label_corpus("mixed", "labelled.parquet", tagger="tagger", known="clips.csv", precision=0.5)
    >>> summary["num_clips"] == summary["num_labelled"] + summary["num_unlabelled"] + summary["num_failed"]
    True
    """
    file, tags = tags_folder(out)
    ways, tagger = read_ontology(ontology) if ontology is not None else None, find_tagger(tagger)
    corpus = corpus if isinstance(corpus, Corpus) else read_corpus(corpus, needs_labels=False)
    if (known is None) == (presence is None):
        raise ValueError(
            f"there must be clips whose labels are known or a presence model, got {'both' if known else 'none'}; give "
            "--known CLIPS, or --presence DIR of an earlier calibration"
        )
    if known is not None:
        model = _calibrated(tagger, known if isinstance(known, SourceClips) else read_sources(known), tags / "presence")
    else:
        model = presence if isinstance(presence, Presence) else load_presence(str(presence))
    labels = [label for label in model.measured if label]
    labeller_of(  # before hours of work
        model, tagger=tagger.fingerprint, labels=tagger.labels or labels, precision=precision, ontology=ways
    )
    tag_corpus(
        corpus, tags, tagger=tagger, labels=labels, config=build(PassConfig, config or {}), retry_failed=retry_failed
    )
    return write_labels(tags, file, root=corpus.root, presence=model, precision=precision, ontology=ways)


def _calibrated(tagger: TaggerSource, known: SourceClips, folder: Location) -> Presence:
    """The presence model of a tagger on clips; the one in the folder if it is that."""
    config = CalibrationConfig()
    inputs = fingerprint([tagger.fingerprint, known.fingerprint, deciding(config)])
    if (folder / "presence.json").is_file():
        before = load_presence(folder)
        if before.about.get("inputs") == inputs:
            return before
    ready = tagger.with_labels(sorted(set(known.labels)), folder / "tagger")
    presence = call_on_gpu(_calibrate, ready, known, config, inputs)
    save_presence(presence, folder)
    return presence


def _calibrate(tagger: TaggerSource, known: SourceClips, config: CalibrationConfig, inputs: str) -> Presence:
    judge = PresenceJudge(tagger=tagger.open(own_device()), clean=known)
    return calibrate_presence([judge], config, tagger=tagger.fingerprint, about={"inputs": inputs, "clean": known.root})
