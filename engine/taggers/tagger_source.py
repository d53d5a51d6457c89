"""Taggers by name, and the built-in tagger on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine.schema import plain_label
from engine.separators.clap import open_clap, read_clap
from engine.separators.clap.htsat import SAMPLE_RATE_HZ
from engine.separators.queries import Embeddings, QueryEmbedder
from engine.storage.factories import ModelSource, described, find_factory, is_dotted_name
from engine.storage.files import damaged, read_json
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Location, Name, location, resolve_name
from engine.storage.weights import Checkpoint, Description
from engine.taggers.base import Tagger, find_label
from engine.taggers.label_map import LabelMap, MappedTagger, read_tagger_file, report_unknown, require_classes
from engine.taggers.network import ARCHITECTURE, ShareTagger, TagNetworkConfig

_TEMPLATE = "The sound of {label}"
_FILES = (".yaml", ".yml", ".json")
_CHECKPOINT = Checkpoint(kind="tagger", architecture=ARCHITECTURE, config=TagNetworkConfig, make=ShareTagger)


@dataclass(frozen=True, kw_only=True)
class TaggerSource(ModelSource[Tagger]):
    """A tagger that any process can open: described, checked and picklable."""

    sample_rate_hz: int
    """Rate of the audio that it takes."""
    labels: tuple[str, ...] = ()
    """Labels that the tagger knows; none yet for one that reads text."""

    def knows(self, label: str) -> bool:
        """True for a label that gets tags."""
        return find_label(label, self.labels) is not None

    def with_labels(self, labels: Iterable[str], store: Location | None = None) -> TaggerSource:
        """The same tagger, ready for the labels of some clips; it has the same fingerprint.

        What a text encoder has to compute for them is computed here, and kept in the folder ``store``, so that no
        worker holds the encoder. Labels that the tagger does not know get no tags, which is logged with the most
        similar classes. Raises ``ValueError`` if it knows none of them.
        """
        report_unknown(_different(labels), self.labels, self.name)
        return self


@dataclass(frozen=True, kw_only=True)
class ClapTaggerSource(TaggerSource):
    """A CLAP as a tagger; any text can be a label."""

    encoder: str
    """Fingerprint of the CLAP."""

    def knows(self, label: str) -> bool:
        """True, for any text has an embedding."""
        return True

    def with_labels(self, labels: Iterable[str], store: Location | None = None) -> TaggerSource:
        """See :meth:`TaggerSource.with_labels`."""
        kept = Embeddings.load(store) if store is not None else None
        embedder = QueryEmbedder(
            template=_TEMPLATE,
            encoder=self.fingerprint,
            open_encoder=functools.partial(open_clap, self.name, fingerprint=self.encoder),
            embeddings=kept if kept is not None and kept.encoder == self.fingerprint else None,
        )
        embeddings = embedder.embed_labels(_different(labels))
        if store is not None and (kept is None or kept.labels != embeddings.labels):
            embeddings.save(store)
        factory = functools.partial(_open_clap, self.name, self.encoder, embeddings)
        return replace(self, labels=embeddings.labels, factory=factory)


@dataclass(frozen=True, kw_only=True)
class MappedTaggerSource(TaggerSource):
    """A tagger with a label map; labels that are not in the map are looked up among its classes by name."""

    model: TaggerSource
    """The tagger whose classes the labels are mapped to."""
    label_map: LabelMap = field(hash=False)

    def with_labels(self, labels: Iterable[str], store: Location | None = None) -> TaggerSource:
        """See :meth:`TaggerSource.with_labels`."""
        spelled = {plain_label(label): list(names) for label, names in self.label_map.items()}
        wanted = {label: spelled.get(plain_label(label), [label]) for label in _different(labels)}
        known = {label: names for label, names in wanted.items() if all(map(self.model.knows, names))}
        if len(known) < len(wanted):
            report_unknown(wanted, [*known, *self.model.labels], self.name)
        model = self.model.with_labels((one for names in known.values() for one in names), store)
        factory = functools.partial(_open_mapped, model.factory, known)
        return replace(self, labels=tuple(known), model=model, factory=factory)


def find_tagger(name: TaggerSource | Name) -> TaggerSource:
    """Find a tagger by name: a folder, a tagger's file, or ``package.module:factory``, called as ``factory(device)``.

    The folder holds the built-in tagger, an audio classifier of Hugging Face's format, or a CLAP (``clap.json``), which
    is opened only :meth:`~TaggerSource.with_labels`. The file has a label map (:mod:`engine.taggers.label_map`). Raises
    ``ValueError`` if there is no such folder, file, module or factory, or if the factory returns something else. A
    source is returned unchanged.
    """
    if isinstance(name, TaggerSource):
        return name
    if is_dotted_name(name):
        full_name, factory = str(name), find_factory(str(name))
    else:
        path, full_name = location(name), str(location(name))
        if isinstance(path, Path) and path.suffix in _FILES and path.is_file():
            return _find_mapped(path)
        if (path / "clap.json").is_file():
            return _find_clap(full_name)
        factory = functools.partial(_open_folder, full_name)
    members = ("sample_rate_hz", "labels", "tag")
    _, own_fingerprint, tagger = described(factory, full_name, kind="Tagger", members=members)
    return TaggerSource(
        name=full_name,
        fingerprint=own_fingerprint,
        factory=factory,
        sample_rate_hz=tagger.sample_rate_hz,
        labels=tuple(tagger.labels),
    )


def _find_mapped(path: Path) -> TaggerSource:
    name, label_map = read_tagger_file(path)
    if not is_dotted_name(name):
        name = str(resolve_name(name, folder=path.parent))
        if location(name).suffix in _FILES:
            raise ValueError(f"model of {path} must be a tagger, got the file {name}; give the tagger's folder")
    model = find_tagger(name)
    if not isinstance(model, ClapTaggerSource):
        require_classes(label_map, model.labels, model.name)
    spelled = str if isinstance(model, ClapTaggerSource) else plain_label  # an encoder reads words in their case
    choice = {plain_label(label): sorted(map(spelled, names)) for label, names in label_map.items()}
    return MappedTaggerSource(
        name=str(path),
        fingerprint=fingerprint([model.fingerprint, choice]),
        factory=functools.partial(_open_mapped, model.factory, label_map),
        sample_rate_hz=model.sample_rate_hz,
        labels=tuple(label_map),
        model=model,
        label_map=label_map,
    )


def _find_clap(folder: str) -> TaggerSource:
    described_clap = read_clap(folder)
    if not described_clap["network"]["audio_channels"]:
        raise ValueError(
            f"a CLAP that tags must have an encoder of audio, got {folder}, which has one of text alone; convert a "
            "file that has both"
        )
    encoder = described_clap["fingerprint"]
    return ClapTaggerSource(
        name=folder,
        fingerprint=fingerprint([_TEMPLATE, encoder]),
        factory=functools.partial(_open_clap, folder, encoder, None),
        sample_rate_hz=SAMPLE_RATE_HZ,
        encoder=encoder,
    )


def _different(labels: Iterable[str]) -> list[str]:
    spelled: dict[str, str] = {}
    for label in labels:
        spelled.setdefault(plain_label(label), label)
    return list(spelled.values())


def _open_mapped(factory: Callable[[str], Tagger], label_map: LabelMap, device: str) -> Tagger:
    return MappedTagger(factory(device), label_map)


def _open_clap(folder: str, encoder: str, embeddings: Embeddings | None, device: str) -> Tagger:
    from engine.taggers.adapters import ClapTagger

    if embeddings is None:
        raise ValueError(f"the CLAP in {folder} must have labels to tag, got none; open it with_labels of the clips")
    clap = open_clap(folder, fingerprint=encoder)
    clap.drop_text()
    return ClapTagger(clap.to(device), embeddings)


def _open_folder(folder: str, device: str) -> Tagger:
    path = location(folder) / "config.json"
    if not path.is_file():
        return load_tagger(folder, device=device)
    config = read_json(path, remedy="copy the folder again")
    if isinstance(config, dict) and config.get("model_type") == "clap":
        raise ValueError(
            f"a CLAP of Hugging Face must be converted to be a tagger, got {folder}; give the output of `clearsep "
            f"convert {folder} -o DIR`"
        )
    from engine.taggers.adapters import HuggingFaceTagger

    return HuggingFaceTagger(folder, device=device)


def save_tagger(tagger: ShareTagger, folder: Name, *, history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a tagger's folder, with the ``history`` of its trainings."""
    _CHECKPOINT.save(
        tagger,
        folder,
        config=tagger.config,
        labels=tagger.labels,
        more=lambda _: {"fingerprint": tagger.fingerprint},
        history=history,
    )


def read_tagger(folder: Name) -> Description:
    """The description in ``tagger.json``, checked for format and architecture."""
    return _CHECKPOINT.read(folder)


def load_tagger(folder: Name, *, device: str | torch.device = "cpu") -> ShareTagger:
    """The built-in tagger in a folder, ready to tag; ``ValueError`` if its files do not fit."""
    tagger = _CHECKPOINT.load(folder, device=device)
    if tagger.fingerprint != read_tagger(folder)["fingerprint"]:
        raise damaged(location(folder) / "tagger.json")
    return tagger
