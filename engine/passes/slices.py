"""Slices: shares of a pass's tasks, for several commands that work on one pass at the same time.

Each slice has a lock and marks of its own. What concerns more than a slice's own shards is done under one short lock.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from typing_extensions import TypedDict

from engine.storage.files import read_record, remove_tree, write_json
from engine.storage.lock import lock
from engine.storage.paths import Location


@dataclass(frozen=True)
class Slice:
    """A share of a pass's tasks, for one of several commands that work on the pass at the same time."""

    number: int = 1
    """From 1."""
    count: int = 1
    """Slices of the pass; the only slice of one is the whole pass."""

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, task: int) -> bool:
        """True for the slice's own tasks; neighbours belong to different slices, so that all have as much to do."""
        return task % self.count == self.number - 1

    def name(self, what: str) -> str:
        """The slice's own name for something that a pass has once."""
        return what if self.count == 1 else f"{what}-{self.number}-of-{self.count}"

    def all(self) -> list[Slice]:
        """All slices of the same count."""
        return [Slice(number, self.count) for number in range(1, self.count + 1)]


WHOLE = Slice()


SliceName = str | tuple[int, int]
"""A slice as users name it: ``"3/32"`` or ``(3, 32)``."""


def parse_slice(given: SliceName | None, *, retry_failed: bool = False) -> Slice:
    """The slice that a user means; null: the whole pass. Failed clips are retried by the whole pass alone."""
    if given is None:
        return WHOLE
    if retry_failed:
        raise ValueError(f"slice must be null for --retry-failed, got {given!r}; run it without --slice")
    text = given if isinstance(given, str) else "/".join(map(str, given))
    if (match := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)) and 1 <= int(match[1]) <= int(match[2]):
        return Slice(int(match[1]), int(match[2]))
    raise ValueError(
        f"slice must be a number and a count, from 1/4 to 4/4 for instance, got {given!r}; give such a one"
    )


class _Slices(TypedDict):
    """Contents of ``OUT/corpus/slices.json``."""

    count: int


def alone(out: Location) -> AbstractContextManager[None]:
    """Hold the lock that all slices of a pass take for what concerns more than their own shards."""
    return lock(out, "pass", wait=True)


def take(out: Location, part: Slice, held: ExitStack) -> None:
    """Hold a slice of a pass; ``InUseError`` if it, or a slice of another number of slices, is at work.

    The number of slices of the last start is kept; the whole pass is the only slice of one.
    """
    path = out / "corpus" / "slices.json"
    before = Slice(1, read_record(path, _Slices)["count"]) if path.is_file() else WHOLE
    if before.count != part.count:
        for other in before.all():
            with _held(out, other):  # it is not at work
                begin_slice(out, other)
        write_json(path, _Slices(count=part.count))
    held.enter_context(_held(out, part))


def hand_folder(out: Location, part: Slice) -> Location:
    """Folder of the marks of a slice's work in hand."""
    return out / part.name("in-hand")


@contextmanager
def _held(out: Location, part: Slice) -> Iterator[None]:
    """Hold the lock of a slice; marks of its work are there only inside the block."""
    with lock(out, part.name("stems"), what=str(out) if part == WHOLE else f"slice {part} of {out}"):
        try:
            remove_tree(hand_folder(out, part))
            yield
        finally:
            remove_tree(hand_folder(out, part))


class _DoneSlice(TypedDict):
    """Contents of ``OUT/corpus/slice-<number>-of-<count>.json``: the slice is done, and was not started again since."""

    shards: list[str]


def _done_path(out: Location, part: Slice) -> Location:
    return out / "corpus" / f"{part.name('slice')}.json"


def begin_slice(out: Location, part: Slice) -> None:
    """Forget that a slice was done."""
    _done_path(out, part).unlink(missing_ok=True)


def end_slice(out: Location, part: Slice, shards: list[str]) -> tuple[list[str], list[Slice]]:
    """Record that a slice is done, with its shards; returns those of all slices, and the slices that are not done."""
    if part == WHOLE:
        return shards, []
    write_json(_done_path(out, part), _DoneSlice(shards=shards))
    missing = [one for one in part.all() if not _done_path(out, one).is_file()]
    done = [] if missing else [read_record(_done_path(out, one), _DoneSlice)["shards"] for one in part.all()]
    return list(itertools.chain(*done)), missing
