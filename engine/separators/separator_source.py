"""Separators by name: a checkpoint folder, or a factory of the user's own as ``package.module:factory``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from engine.schema import plain_label
from engine.separators.base import Separator
from engine.separators.checkpoint import open_checkpoint, query_embedder, read_description, terms_of
from engine.separators.model import BUILT_IN
from engine.storage.factories import ModelSource, described, find_factory, is_dotted_name
from engine.storage.paths import Location, Name, location

SeparatorFactory = Callable[[str], Separator]
"""Takes a device, such as ``cpu`` or ``cuda``, and returns a separator that runs on it."""


@dataclass(frozen=True, kw_only=True)
class SeparatorSource(ModelSource[Separator]):
    """A separator that any process can open: described, checked and picklable."""

    sample_rate_hz: int
    """Rate of the audio that the separator takes and returns."""
    labels: tuple[str, ...]
    """Labels that the separator knows."""
    is_trainable: bool
    """The name is a folder that ``engine.separators.load`` can read: a student can continue from it."""
    reads_text: bool = False
    """Any text can be a query, because the separator has an encoder."""
    terms: tuple[str, ...] = ()
    """Licences of the released weights that the separator is or learned from."""

    @classmethod
    def from_factory(cls, factory: SeparatorFactory, *, name: str | None = None) -> SeparatorSource:
        """Describe the separator that a callable returns; the callable is called once, with ``cpu``.

        Other processes must be able to unpickle the callable: a function or class of a module can be. The fingerprint
        is the separator's own attribute ``fingerprint``, or else a hash of ``name`` and the file that defines the
        callable; a separator with weights of its own should therefore have the attribute. Raises ``ValueError`` if the
        callable returns anything but a :class:`Separator`.
        """
        members = ("sample_rate_hz", "labels", "separate")
        name, fingerprint, separator = described(factory, name, kind="Separator", members=members)
        return cls(
            name=name,
            fingerprint=fingerprint,
            sample_rate_hz=separator.sample_rate_hz,
            labels=tuple(separator.labels),
            is_trainable=False,
            factory=factory,
        )

    def with_labels(self, labels: Collection[str], store: Location) -> SeparatorSource:
        """The same separator with the embeddings of labels in the folder ``store``, where workers read them.

        They are computed here, unless they are there already, so that no worker holds an encoder. A separator with a
        closed vocabulary, or one that was trained with all these labels, is returned as it is. Raises ``ValueError`` if
        the encoder cannot be opened.
        """
        if not self.reads_text or set(map(plain_label, labels)) <= set(map(plain_label, self.labels)):
            return self
        embedder = query_embedder(self.name)
        assert embedder is not None
        kept = embedder.embed_once(labels, store)
        return replace(self, labels=kept.labels, factory=functools.partial(_open_checkpoint, self.name, str(store)))


def find_separator(name: SeparatorSource | SeparatorFactory | Name) -> SeparatorSource:
    """Find a separator: a checkpoint folder, ``package.module:factory``, or a factory itself.

    A factory is called as ``factory(device)``. Modules are found where Python finds them and in the current folder.
    Raises ``ValueError`` if there is no such folder, module or factory, or if the factory returns something else.
    """
    if isinstance(name, SeparatorSource):
        return name
    if callable(name):
        return SeparatorSource.from_factory(name)
    if is_dotted_name(name):
        return SeparatorSource.from_factory(find_factory(str(name)), name=str(name))
    description, folder = read_description(name), str(location(name))
    return SeparatorSource(
        name=folder,
        fingerprint=description["fingerprint"],
        sample_rate_hz=description["sample_rate_hz"],
        labels=tuple(description["labels"]),
        is_trainable=description["architecture"] == BUILT_IN,
        reads_text="queries" in description,
        terms=terms_of(description),
        factory=functools.partial(_open_checkpoint, folder, None),
    )


def load_separator(name: SeparatorFactory | Name, device: str = "cpu") -> Separator:
    """Open a separator on a device such as ``cpu`` or ``cuda``.

    ``name`` is a checkpoint folder (``RUN/iterations/2/separator``, also in S3), the dotted name of a factory of your
    own (``package.module:factory``), or the factory itself, which is called with the device. Raises ``ValueError`` if
    there is no such separator.

    >>> separator = cs.load_separator("separator")
    >>> separator.labels, separator.sample_rate_hz
    (('bell', 'dog'), 8000)
    """
    return find_separator(name).open(device)


def _open_checkpoint(folder: str, embeddings: str | None, device: str) -> Separator:
    return open_checkpoint(folder, device=device, embeddings=embeddings)
