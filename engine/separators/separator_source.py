"""Separators by name: a checkpoint folder, or a factory of the user's own as ``package.module:factory``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from engine.separators.base import Separator
from engine.separators.checkpoint import load, read_description
from engine.storage.factories import ModelSource, described, find_factory, is_dotted_name
from engine.storage.paths import Name, location

SeparatorFactory = Callable[[str], Separator]
"""Takes a device, such as ``cpu`` or ``cuda``, and returns a separator that runs on it."""


@dataclass(frozen=True, kw_only=True)
class SeparatorSource(ModelSource[Separator]):
    """A separator that any process can open: described, checked and picklable."""

    sample_rate_hz: int
    """Rate of the audio that the separator takes and returns."""
    labels: tuple[str, ...]
    """Labels that the separator knows."""
    is_checkpoint: bool
    """The name is a folder that ``engine.separators.load`` can read."""

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
            is_checkpoint=False,
            factory=factory,
        )


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
        is_checkpoint=True,
        factory=functools.partial(_open_checkpoint, folder),
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


def _open_checkpoint(folder: str, device: str) -> Separator:
    return load(folder, device=device)
