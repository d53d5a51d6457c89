"""Folders of a run's artifacts: of one run alone, or shared by all runs that build the same from the same inputs.

An artifact is a pass, a selection of its stems, or a separator with its figures. Shared artifacts are named by the
fingerprint of all their inputs, so what several runs have in common is built once, by whichever run needs it first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from engine.storage.fingerprints import fingerprint
from engine.storage.lock import lock
from engine.storage.paths import Location

Kind = Literal["passes", "labels", "tracks", "separators"]


@dataclass(kw_only=True)
class Artifacts:
    """The artifacts of one run."""

    out: Location
    """Folder of the run, or of all runs that share artifacts."""
    shared: bool = False
    """Other runs build and use the same artifacts at the same time."""
    built_s: float = field(default=0.0, init=False)
    """Time that this run has spent on building artifacts, without the time it waited for other runs."""
    used: set[str] = field(default_factory=set, init=False)
    """Shared artifacts of this run, as ``kind/fingerprint``."""

    def path_for(self, kind: Kind, number: int, inputs: object) -> Location:
        """Folder of iteration ``number``; if artifacts are shared, of the one of ``kind`` that is built of ``inputs``.

        ``inputs`` is any JSON-like value that decides what the artifact is.
        """
        if not self.shared:
            return self.out / "iterations" / str(number)
        name = f"{kind}/{fingerprint(inputs)}"
        self.used.add(name)
        return self.out / name

    @contextmanager
    def building(self, folder: Location, *, one_at_a_time: str | None = None) -> Iterator[None]:
        """Hold the artifact in ``folder`` while it is built; another run that needs it waits, then finds it finished.

        Of the runs that share artifacts, only one at a time builds those with the same ``one_at_a_time``.
        """
        with ExitStack() as locks:
            if self.shared:
                locks.enter_context(lock(folder, "build", wait=True))
                if one_at_a_time is not None:
                    locks.enter_context(lock(self.out, one_at_a_time, wait=True))
            started = time.perf_counter()
            try:
                yield
            finally:
                self.built_s += time.perf_counter() - started
