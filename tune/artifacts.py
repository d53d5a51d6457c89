"""Where the pieces of a run lie: in a folder of its own, or shared by all runs that make them of the same inputs.

A piece is a pass, a selection of its stems, or a separator with its figures. Runs that share address each piece by the
fingerprint of all that goes into it, so what two of them have in common is made once, by whichever comes first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.storage.fingerprints import fingerprint
from engine.storage.lock import lock
from engine.storage.paths import Location


@dataclass(kw_only=True)
class Artifacts:
    """The pieces of one run."""

    out: Location
    """The run's folder, or that of all runs that share."""
    shared: bool = False
    """Whether other runs make and use the same pieces at the same time."""
    made_s: float = field(default=0.0, init=False)
    """What this run has spent on making pieces; not what it waited for others to make."""
    used: set[str] = field(default_factory=set, init=False)
    """Shared pieces of this run, as ``kind/fingerprint``."""

    def place(self, kind: str, number: int, inputs: Any) -> Location:  # noqa: ANN401 - whatever JSON can hold
        """The folder of iteration ``number``, or of the piece of a kind that is made of ``inputs``."""
        if self.shared:
            name = f"{kind}/{fingerprint(inputs)}"
            self.used.add(name)
            return self.out / name
        return self.out / "iterations" / str(number)

    @contextmanager
    def making(self, folder: Location, *, alone: str | None = None) -> Iterator[None]:
        """For the time in which a piece is made, or found: another that needs it waits, then finds it.

        Of runs that share, one at a time is in the blocks that name the same ``alone``.
        """
        if not self.shared:
            with self._counted():
                yield
            return
        with lock(folder, "maker", wait=True):
            if alone is None:
                with self._counted():
                    yield
                return
            with lock(self.out, alone, wait=True), self._counted():
                yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.made_s += time.perf_counter() - started
