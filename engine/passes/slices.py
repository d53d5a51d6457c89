"""Slices: shares of a pass's tasks, for several commands that work on one pass at the same time.

Each slice has a lock and marks of its own. What concerns more than a slice's own shards is done under one short lock.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from typing_extensions import TypedDict

from engine.corpus.table import Corpus
from engine.passes.config import PassConfig
from engine.passes.records import Totals, claim_files, read_totals, require_complete
from engine.passes.shards import PassManifest, PassSummary, read_summary, summary_of
from engine.passes.speed.progress import require_few_failures
from engine.passes.tasks import WHOLE, Slice, TaskCounts
from engine.storage.files import read_record, remove_tree, write_json
from engine.storage.fingerprints import write_sealed
from engine.storage.lock import holder_of, lock
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)
_MANY = 8  # slices, of which a message names no more
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
    before = _last(out)
    if before.count != part.count:
        for other in before.all():
            with _held(out, other):  # it is not at work
                begin_slice(out, other)
        write_json(_count_path(out), _Slices(count=part.count))
    held.enter_context(_held(out, part))


def _count_path(out: Location) -> Location:
    return out / "corpus" / "slices.json"


def _last(out: Location) -> Slice:
    """Some slice of as many as there were at the last start."""
    path = _count_path(out)
    return Slice(1, read_record(path, _Slices)["count"]) if path.is_file() else WHOLE


def holders(out: Location) -> list[str]:
    """The processes that work on a pass or on slices of it, as :func:`engine.storage.lock.holder_of` has them."""
    return [found for part in _last(out).all() if (found := holder_of(out, part.name("stems"))) is not None]


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


def _end_slice(out: Location, part: Slice, shards: list[str]) -> tuple[list[str], list[Slice]]:
    """Record that a slice is done, with its shards; returns those of all slices, and the slices that are not done."""
    if part == WHOLE:
        return shards, []
    write_json(_done_path(out, part), _DoneSlice(shards=shards))
    missing = [one for one in part.all() if not _done_path(out, one).is_file()]
    done = [] if missing else [read_record(_done_path(out, one), _DoneSlice)["shards"] for one in part.all()]
    return list(itertools.chain(*done)), missing


def claim_corpus(out: Location, corpus: Corpus, config: PassConfig, *, retry_failed: bool) -> None:
    """:func:`claim_files`, which takes minutes for a million files: slices compare them at the same time."""
    claimed = functools.partial(claim_files, out, corpus, min_labels=config.min_labels, retry_failed=retry_failed)
    with alone(out):
        if not (out / "corpus" / "contents.parquet").is_file():
            claimed()
            return
    if not claimed(keep=False):
        with alone(out):
            claimed()


def close(
    out: Location,
    corpus: Corpus,
    config: PassConfig,
    counts: TaskCounts,
    totals: Totals,
    closed: Callable[[Totals], PassManifest],
    part: Slice,
) -> PassSummary:
    """Close a pass, unless another slice has done so or is still missing."""
    if is_closed(out):
        return summarise(out)
    shards, missing = _end_slice(out, part, list(totals.sha256))
    if missing:
        some = ", ".join(map(str, missing[:_MANY])) + (", ..." if len(missing) > _MANY else "")
        _LOGGER.info(f"slice {part} is done, {len(missing)} are not ({some}); the last of them closes the pass")
        return {**summary_of(closed(totals)), "missing_slices": list(map(str, missing))}
    if part != WHOLE:
        totals = read_totals(out, shards)
        require_complete(out, totals, corpus, counts)
    manifest = closed(totals)
    require_few_failures(out, manifest["num_failed"], manifest["num_queries"], config.max_failed_fraction)
    write_sealed(out / "stems" / "manifest.json", manifest)
    return summarise(out)


def is_closed(out: Location) -> bool:
    """True if the pass has its manifest."""
    return (out / "stems" / "manifest.json").is_file()


def summarise(out: Location) -> PassSummary:
    """The summary of a closed pass, which is also written."""
    summary = read_summary(out / "stems")
    write_json(out / "summary.json", summary)
    return summary
