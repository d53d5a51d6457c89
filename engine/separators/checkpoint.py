"""Checkpoint folders of separators: ``separator.json`` and ``weights.safetensors``, one layout for every kind.

A separator that reads text has the description of its encoder in ``separator.json``; the encoder is a folder of its own
(:mod:`engine.separators.clap`), by default ``encoder`` in the separator's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, cast

import torch
from safetensors.torch import load as load_tensors
from typing_extensions import TypedDict

from engine.separators.audiosep import AudioSep, AudioSepConfig
from engine.separators.base import NetworkSeparator
from engine.separators.clapsep import ClapSep, ClapSepConfig
from engine.separators.model import BUILT_IN, QuerySeparator
from engine.separators.network import NetworkConfig
from engine.separators.queries import Embeddings, Encoder, QueryEmbedder
from engine.storage.documents import MAX_DESCRIPTION_BYTES
from engine.storage.files import damaged, read_json, require_intact
from engine.storage.fingerprints import fingerprint
from engine.storage.paths import Name, location, resolve_name
from engine.storage.weights import Checkpoint, Description

_SENTENCE = "The sound of {label}"  # ClearSep's


class QueryDescription(TypedDict):
    """The encoder of a separator's queries."""

    template: str
    """Makes a sentence of a label, such as ``The sound of {label}``."""
    encoder: str
    """Folder of the encoder; relative names start from the separator's folder."""
    encoder_fingerprint: str
    """Fingerprint of the encoder that the separator was trained with."""


class SeparatorDescription(Description):
    """The content of ``separator.json``."""

    sample_rate_hz: int
    """Rate of the audio that the separator takes and returns."""
    queries: NotRequired[QueryDescription]
    """Encoder of its queries; without it the separator has a closed vocabulary."""
    licence: NotRequired[str]
    """Licence of converted weights."""
    source: NotRequired[str]
    """Project whose weights were converted."""
    source_sha256: NotRequired[str]
    """SHA-256 of the file that was converted."""


def _checkpoint(
    architecture: str,
    config: type,
    make: Any,  # noqa: ANN401 - a class
    newer: tuple[str, ...] = (),
) -> Checkpoint[NetworkSeparator]:
    return Checkpoint(
        kind="separator",
        architecture=architecture,
        config=config,
        make=make,
        description=SeparatorDescription,
        newer=newer,
    )


_CHECKPOINTS = {
    BUILT_IN: _checkpoint(
        BUILT_IN, NetworkConfig, QuerySeparator, newer=("queries.rivals_LQ", "queries.project_rivals.weight")
    ),
    ClapSep.architecture: _checkpoint(ClapSep.architecture, ClapSepConfig, ClapSep),
    AudioSep.architecture: _checkpoint(AudioSep.architecture, AudioSepConfig, AudioSep),
}
"""Every architecture, with its config class and its network."""


def save(
    separator: NetworkSeparator,
    folder: Name,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, object] | None = None,
) -> None:
    """Write a separator's folder, with the ``history`` of its trainings.

    ``about`` has the optional fields of :class:`SeparatorDescription`, such as ``queries`` and ``licence``.
    """

    def more(description: Mapping[str, Any]) -> Mapping[str, Any]:
        values = {"sample_rate_hz": separator.sample_rate_hz, **(about or {})}
        return values | {"fingerprint": _fingerprint({**description, **values})}

    labels = separator.queries.labels if isinstance(separator, QuerySeparator) else ()
    _CHECKPOINTS[separator.architecture].save(
        separator, folder, config=separator.config, labels=labels, more=more, history=history
    )


def read_description(folder: Name) -> SeparatorDescription:
    """The description in ``separator.json``, checked for format and architecture."""
    return cast(SeparatorDescription, _checkpoint_of(folder).read(folder))


def _checkpoint_of(folder: Name) -> Checkpoint[NetworkSeparator]:
    if location(folder).is_file():
        raise ValueError(
            f"cannot open {folder} as a separator (it is a file); give the folder that `clearsep convert` makes of it"
        )
    path = location(folder) / "separator.json"
    found = read_json(path, most_bytes=MAX_DESCRIPTION_BYTES) if path.is_file() else None
    architecture = found.get("architecture") if isinstance(found, dict) else None
    return _CHECKPOINTS.get(str(architecture), _CHECKPOINTS[BUILT_IN])  # whose reader explains what is wrong


def load(folder: Name, *, device: str | torch.device = "cpu") -> QuerySeparator:
    """The built-in separator in a folder, which can be trained further; ``ValueError`` if it is another or damaged."""
    separator = open_checkpoint(folder, device=device)
    if not isinstance(separator, QuerySeparator):
        raise ValueError(
            f"a separator that is trained further must be the built-in network, got {separator.architecture} in "
            f"{folder}; train a student from scratch (--from scratch)"
        )
    return separator


def open_checkpoint(
    folder: Name, *, device: str | torch.device = "cpu", embeddings: Name | None = None
) -> NetworkSeparator:
    """The separator in a folder, of whatever kind, ready to separate; ``ValueError`` if its files do not fit.

    ``embeddings`` is a folder that :meth:`Embeddings.save` wrote, so that known labels need no encoder.
    """
    separator = _checkpoint_of(folder).load(folder, device=device)
    require_fingerprint(folder)
    known = Embeddings.load(location(embeddings)) if embeddings is not None else None
    separator.embedder = query_embedder(folder, known)
    return separator


def query_embedder(folder: Name, known: Embeddings | None = None) -> QueryEmbedder | None:
    """The embedder of queries for the separator in a folder; None for a closed vocabulary.

    Labels that the built-in separator was trained with are known: their embeddings are in its weights.
    """
    description, described = read_description(folder), find_encoder(folder)
    if described is None:
        return None
    embedder = make_embedder(described, known)
    if description["architecture"] == BUILT_IN:
        vectors_LE = load_tensors((location(folder) / "weights.safetensors").read_bytes())["queries.vectors_LE"]
        own = Embeddings(labels=tuple(description["labels"]), vectors_LE=vectors_LE, encoder=embedder.encoder)
        embedder.know(own)
    return embedder


def find_encoder(folder: Name) -> QueryDescription | None:
    """The encoder of a folder, by its absolute name: a separator's, or None for a closed vocabulary; or a CLAP itself.

    A CLAP reads ClearSep's sentence for each label. Raises ``ValueError`` if the folder is neither.
    """
    if (location(folder) / "clap.json").is_file():
        from engine.separators.clap import read_clap

        about = read_clap(folder)
        return {
            "template": _SENTENCE,
            "encoder": str(location(folder)),
            "encoder_fingerprint": about["fingerprint"],
        }
    if location(folder).is_dir() and not (location(folder) / "separator.json").is_file():
        raise ValueError(
            f"there is no encoder in {folder} (neither clap.json nor separator.json); give a folder that `clearsep "
            "convert` made of a CLAP, or of a separator that reads text"
        )
    described = read_description(folder).get("queries")
    if described is None:
        return None
    return {**described, "encoder": str(resolve_name(described["encoder"], folder=location(folder)))}


def make_embedder(described: QueryDescription, known: Embeddings | None = None) -> QueryEmbedder:
    """The embedder of queries with a described encoder, which is opened when a query needs it."""
    encoder = described["encoder"]

    def open_encoder() -> Encoder:
        from engine.separators.clap import open_clap

        if not location(encoder).is_dir():
            raise ValueError(
                f"there is no encoder in {encoder}, which new words need; copy the encoder there, or query a label "
                "that the separator was trained with"
            )
        return open_clap(encoder, fingerprint=described["encoder_fingerprint"])

    return QueryEmbedder(
        template=described["template"], encoder=identity_of(described), open_encoder=open_encoder, embeddings=known
    )


def identity_of(described: QueryDescription) -> str:
    """Fingerprint of an encoder and the template of its sentences: equal ones give equal embeddings."""
    return fingerprint([described["template"], described["encoder_fingerprint"]])


def terms_of(description: SeparatorDescription) -> tuple[str, ...]:
    """Licences of the released weights that a separator is or learned from, each with its project."""
    own = f"{description.get('source', '')}: {description['licence']}" if description.get("licence") else None
    learned = [term for entry in description["history"] for term in entry.get("data", {}).get("teacher_terms", ())]
    return tuple(dict.fromkeys([*([own] if own else []), *learned]))


def _fingerprint(description: Mapping[str, Any]) -> str:
    """Fingerprint of all that decides a separator's outputs: not of its history, nor of where its encoder lies."""
    values = {key: value for key, value in description.items() if key not in ("fingerprint", "history")}
    if "queries" in values:
        values["queries"] = {key: value for key, value in values["queries"].items() if key != "encoder"}
    return fingerprint(values)


def require_fingerprint(folder: Name) -> None:
    """Raise ``DamagedError`` if the weights or the description of a separator are not those that were saved."""
    description = read_description(folder)
    weights = location(folder) / "weights.safetensors"
    if not weights.is_file():
        raise damaged(weights)
    require_intact(weights, description["weights_sha256"])
    if description.get("fingerprint") != _fingerprint(description):
        raise damaged(location(folder) / "separator.json")
