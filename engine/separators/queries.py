"""Queries: a label, text or an audio example of what to separate, and of what the stem must not contain.

Shape legend: L labels, E features of an embedding, T samples.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypedDict

from engine.schema import plain_label
from engine.storage.files import read_record, sha256_file, write_bytes, write_json
from engine.storage.paths import Location

_MAX_TEXT = 2000  # characters of a query; the encoders read some 500 tokens
_AN_EXAMPLE = "an audio example"
_DESCRIPTION, _VECTORS = "embeddings.json", "embeddings.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioExample:
    """A sound as a query: the separator finds what sounds like it.

    >>> example = cs.AudioExample(samples_T=torch.randn(8000).numpy(), sample_rate_hz=8000)
    >>> len(cs.Query(["dog bark", example]).wanted)
    2
    """

    samples_T: np.ndarray
    """Float32 mono samples."""
    sample_rate_hz: int

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 1 or self.sample_rate_hz != int(self.sample_rate_hz):
            raise ValueError(
                f"sample_rate_hz of an audio example must be a whole number above 0, got {self.sample_rate_hz}; give "
                "the rate of its samples"
            )


@dataclass(frozen=True)
class QueryPart:
    """One description of a sound, with its weight among the others of the query.

    >>> query = cs.Query([cs.QueryPart("dog bark", 2.0), "a dog barks twice"])
    >>> [part.weight for part in query.wanted]
    [2.0, 1.0]
    """

    sound: str | AudioExample
    """A label, text, or an audio example."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.sound, str | AudioExample):
            raise ValueError(f"a sound must be text or an AudioExample, got {type(self.sound).__name__}; give one")
        if isinstance(self.sound, str) and not plain_label(self.sound):
            raise ValueError(f"a query must have words, got {self.sound!r}; say what to separate")
        if isinstance(self.sound, str) and len(self.sound) > _MAX_TEXT:
            raise ValueError(
                f"a query must have at most {_MAX_TEXT} characters, got {len(self.sound)}; describe it in fewer"
            )
        if isinstance(self.sound, str) and any("\ud800" <= letter <= "\udfff" for letter in self.sound):
            raise ValueError(f"a query must be text in Unicode, got {self.sound!r}; write it in UTF-8")
        if not 0.0 < self.weight < float("inf"):
            raise ValueError(f"the weight of a query must be above 0, got {self.weight}; leave the query out for 0")


Sounds = str | AudioExample | QueryPart | Sequence[str | AudioExample | QueryPart]
"""One description of a sound, or several."""


@dataclass(frozen=True)
class Query:
    """A sound to separate, described by one or several parts, and sounds that the stem must not contain.

    >>> query = cs.Query("dog bark", unwanted=["rain", "siren"])
    >>> [part.sound for part in query.unwanted]
    ['rain', 'siren']
    """

    wanted: tuple[QueryPart, ...]
    """Descriptions of the sound; their embeddings are averaged by weight."""
    unwanted: tuple[QueryPart, ...] = ()
    """Descriptions of other sounds, for separators that use them."""

    def __init__(self, wanted: Sounds, unwanted: Sounds = ()) -> None:
        object.__setattr__(self, "wanted", _parts(wanted))
        object.__setattr__(self, "unwanted", _parts(unwanted))
        if not self.wanted:
            raise ValueError("a query must have a sound to separate, got none; give a label, text or an audio example")
        both = {
            _described(one.sound) for one in self.wanted for other in self.unwanted if _same(one.sound, other.sound)
        }
        if both:
            raise ValueError(
                f"a query must not want and exclude the same sound, got {sorted(both)}; remove one of both"
            )

    @property
    def text(self) -> str:
        """The query in words, for tables and messages."""
        names = [part.sound if isinstance(part.sound, str) else _AN_EXAMPLE for part in self.wanted]
        return " + ".join(names)


def as_query(query: str | Query) -> Query:
    """A label or text as a query; a query is returned as it is."""
    return query if isinstance(query, Query) else Query(query)


def label_of_query(query: str | Query) -> str:
    """The label of a query for a separator with a closed vocabulary; ``ValueError`` if it is anything else."""
    if isinstance(query, str):
        return query
    query = as_query(query)
    if len(query.wanted) > 1:
        raise _no_label(query.text)
    return _label_of(query.wanted[0])


def unwanted_labels(query: str | Query) -> list[str]:
    """The labels that a query excludes, for a separator with a closed vocabulary; ``ValueError`` if one is no label."""
    return [] if isinstance(query, str) else [_label_of(part) for part in query.unwanted]


def _label_of(part: QueryPart) -> str:
    if not isinstance(part.sound, str):
        raise _no_label(_AN_EXAMPLE)
    return part.sound


def _no_label(got: str) -> ValueError:
    return ValueError(
        f"a query of a separator with a closed vocabulary must be one label, got {got!r}; give one of its labels, or "
        "take a separator with a text encoder"
    )


def query_for(label: str, labels_present: Sequence[str], separator: object) -> str | Query:
    """The query for a label of a mixture: the other labels are unwanted, if the separator uses that."""
    others = [other for other in labels_present if plain_label(other) != plain_label(label)]
    return Query(label, unwanted=others) if others and getattr(separator, "uses_unwanted", False) else label


def _parts(sounds: Sounds) -> tuple[QueryPart, ...]:
    several = [sounds] if isinstance(sounds, str | AudioExample | QueryPart) else sounds
    return tuple(one if isinstance(one, QueryPart) else QueryPart(one) for one in several)


def _described(sound: str | AudioExample) -> str:
    return plain_label(sound) if isinstance(sound, str) else _AN_EXAMPLE


def _same(one: str | AudioExample, other: str | AudioExample) -> bool:
    """True for two spellings of a label, and for two examples of the same samples."""
    if isinstance(one, AudioExample) and isinstance(other, AudioExample):
        return one.sample_rate_hz == other.sample_rate_hz and np.array_equal(one.samples_T, other.samples_T)
    return isinstance(one, str) and isinstance(other, str) and plain_label(one) == plain_label(other)


class Encoder(Protocol):
    """Maps text and audio to the same space; what a CLAP does."""

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[N, E]`` of unit length, on the CPU."""

    def embed_audio(self, samples_T: np.ndarray, *, sample_rate_hz: int) -> Tensor:
        """Embedding ``[E]`` of unit length of a sound, on the CPU; ``ValueError`` for an encoder of text alone."""


class EmbeddingsRecord(TypedDict):
    """The content of ``embeddings.json``."""

    labels: list[str]
    encoder: str
    """Fingerprint of the encoder and of the template."""
    sha256: str
    """Of the file with the vectors."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Labels with their embeddings, computed once, so that no worker has to hold a text encoder."""

    labels: tuple[str, ...] = ()
    vectors_LE: Tensor
    """Float32, of unit length."""
    encoder: str
    """Fingerprint of the encoder and of the template."""

    def of(self, labels: Sequence[str]) -> Tensor:
        """The embeddings ``[L, E]`` of some of the labels, in order."""
        rows = {plain_label(label): row for row, label in enumerate(self.labels)}
        return self.vectors_LE[[rows[plain_label(label)] for label in labels]]

    def save(self, folder: Location) -> None:
        """Write ``embeddings.safetensors`` and ``embeddings.json``, the latter last."""
        write_bytes(folder / _VECTORS, save({"vectors_LE": self.vectors_LE.float().contiguous()}))
        sha256 = sha256_file(folder / _VECTORS)
        write_json(folder / _DESCRIPTION, {"labels": list(self.labels), "encoder": self.encoder, "sha256": sha256})

    @classmethod
    def load(cls, folder: Location) -> Embeddings | None:
        """Read what :meth:`save` wrote; None if there is nothing, or not the same."""
        if not ((folder / _DESCRIPTION).is_file() and (folder / _VECTORS).is_file()):
            return None
        record = read_record(folder / _DESCRIPTION, EmbeddingsRecord, needs=["labels", "encoder", "sha256"])
        if sha256_file(folder / _VECTORS) != record["sha256"]:
            return None
        vectors_LE = load((folder / _VECTORS).read_bytes())["vectors_LE"]
        return cls(labels=tuple(record["labels"]), vectors_LE=vectors_LE, encoder=record["encoder"])


class QueryEmbedder:
    """Embeddings of queries: labels from a table, everything else from the encoder, which is opened when needed.

    The table's labels may be spelled in any case, as everywhere; the encoder reads other texts as they are, in their
    case, so that an embedding does not depend on what was embedded before.
    """

    def __init__(
        self,
        *,
        template: str,
        encoder: str,
        open_encoder: Callable[[], Encoder],
        embeddings: Embeddings | None = None,
    ) -> None:
        """``template`` makes a sentence of a label; ``encoder`` is the fingerprint of both."""
        self.template, self.encoder = template, encoder
        self._open_encoder = open_encoder
        self._opened: Encoder | None = None
        self._known: dict[str, Tensor] = {}  # by plain label
        self._read: dict[str, Tensor] = {}  # by sentence
        self._examples: WeakKeyDictionary[AudioExample, Tensor] = WeakKeyDictionary()
        self.labels: tuple[str, ...] = ()
        if embeddings is not None:
            self.know(embeddings)

    def know(self, embeddings: Embeddings) -> None:
        """Add labels whose embeddings are known; ``ValueError`` if these are of another encoder."""
        if embeddings.encoder != self.encoder:
            raise ValueError(
                f"embeddings of labels must be of the encoder {self.encoder}, got those of {embeddings.encoder}; "
                "give another output folder"
            )
        new = [label for label in embeddings.labels if plain_label(label) not in self._known]
        self.labels += tuple(new)
        for label, vector_E in zip(embeddings.labels, embeddings.vectors_LE, strict=True):
            self._known.setdefault(plain_label(label), vector_E)

    def embed_once(self, labels: Iterable[str], store: Location) -> Embeddings:
        """The embeddings of labels and of those that it knows, kept in the folder ``store`` for the next time."""
        kept = Embeddings.load(store)
        if kept is not None and kept.encoder == self.encoder:
            self.know(kept)
        spelled = {plain_label(label): label for label in (*self.labels, *labels)}
        if kept is None or kept.encoder != self.encoder or set(map(plain_label, kept.labels)) != set(spelled):
            kept = self.embed_labels([*spelled.values()])
            kept.save(store)
            self.know(kept)
        return kept

    def embed_labels(self, labels: Sequence[str]) -> Embeddings:
        """The embeddings of labels, in order; those that are not in the table are computed."""
        others = dict.fromkeys(self.sentence(label) for label in labels if plain_label(label) not in self._known)
        new = [text for text in others if text not in self._read]
        for first in range(0, len(new), 64):
            texts = new[first : first + 64]
            self._read.update(zip(texts, self._open().embed_text(texts), strict=True))
        vectors = [
            self._known[plain] if (plain := plain_label(label)) in self._known else self._read[self.sentence(label)]
            for label in labels
        ]
        vectors_LE = torch.stack(vectors) if vectors else torch.zeros(0, 0)
        return Embeddings(labels=tuple(labels), vectors_LE=vectors_LE, encoder=self.encoder)

    def sentence(self, label: str) -> str:
        """The text of a label that the encoder reads; ClearSep's sentence is taken for its label."""
        words = " ".join(unicodedata.normalize("NFC", label).replace("_", " ").split())
        if words.lower().startswith("the sound of ") and "{label}" in self.template:
            words = words[len("the sound of ") :]
        return self.template.format(label=words)

    def wanted(self, query: str | Query) -> Tensor:
        """The embedding ``[E]``, of unit length, of the sound that a query wants."""
        return self._mean(as_query(query).wanted)

    def unwanted(self, query: str | Query) -> Tensor | None:
        """The embedding ``[E]``, of unit length, of the sounds that a query excludes; None if there are none."""
        parts = as_query(query).unwanted
        return self._mean(parts) if parts else None

    def release(self) -> None:
        """Free the memory of the encoder; embeddings that it made stay, and a new query opens it again."""
        self._opened = None

    def _mean(self, parts: Sequence[QueryPart]) -> Tensor:
        largest = max(part.weight for part in parts)
        vectors = [part.weight / largest * self._embed(part.sound) for part in parts]
        return torch.nn.functional.normalize(torch.stack(vectors).sum(0), dim=0)

    def _embed(self, sound: str | AudioExample) -> Tensor:
        if isinstance(sound, str):
            return self.embed_labels([sound]).vectors_LE[0]
        if sound not in self._examples:  # the same example is a query for every chunk of a long recording
            self._examples[sound] = self._open().embed_audio(sound.samples_T, sample_rate_hz=sound.sample_rate_hz)
        return self._examples[sound]

    def _open(self) -> Encoder:
        if self._opened is None:
            self._opened = self._open_encoder()
        return self._opened
