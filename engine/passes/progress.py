"""TODO engine/passes/progress.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.errors import TooManyFailuresError
from engine.passes.ray_metrics import record_shard
from engine.passes.records import summarise_failures, waiting_rows
from engine.storage.paths import Location

_ENOUGH_QUERIES = 200  # to judge by what fraction of them fails


class PassProgress:
    """How a pass goes: shown on standard error, and stopped where too much fails."""

    def __init__(self, out: Location, max_failed_fraction: float, before: dict[str, float], *, num_clips: int) -> None:
        self.out, self.limit, self.num_clips = out, max_failed_fraction, num_clips
        # What is to be tried again has not failed yet: else a pass that too much failed in could not be mended.
        again = sum(row["num_queries"] for row in waiting_rows(out))
        self.num_queries, self.num_failed = before["num_queries"] - again, before["num_failed"] - again
        self.clips_before = before["num_clips"]
        self.audio_s, self.clips, self.said = 0.0, 0, 0.0
        self.started = time.perf_counter()
        self.console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The progress bar (a line now and then where standard error is no terminal)."""
        with self.progress:
            self.bar = self.progress.add_task("separating clips", total=self.num_clips)
            yield

    def add(self, row: dict[str, Any]) -> None:
        """Take in what became of a part."""
        self.audio_s += row["audio_s"]
        self.clips += row["num_clips"]
        self.num_queries += row["num_queries"] + row["num_failed_before"]
        self.num_failed += row["num_failed"] + row["num_failed_before"]
        elapsed = time.perf_counter() - self.started
        speed = f"separating clips, {self.audio_s / elapsed:.0f} s of audio per second"
        clips, total = int(self.clips + self.clips_before), self.num_clips
        self.progress.update(self.bar, completed=clips, total=max(total, clips), description=speed)
        if not self.console.is_terminal and elapsed - self.said > 30:
            self.said = elapsed
            self.console.print(f"{speed}, {clips} of about {total} clips", highlight=False)
        record_shard(row, clips_waiting=total - clips)
        if self.num_queries >= _ENOUGH_QUERIES:
            require_few_failures(self.out, self.num_failed, self.num_queries, self.limit)


def require_few_failures(out: Location, num_failed: float, num_queries: float, limit: float) -> None:
    """:class:`TooManyFailuresError` with the reasons where more of the queries failed than the limit lets."""
    if num_failed <= limit * num_queries:
        return
    reasons = summarise_failures(out, most=3)["reasons"]
    told = "; ".join("{num_queries} in {step}, {error_class} ({example})".format(**entry) for entry in reasons)
    raise TooManyFailuresError(
        f"{num_failed:.0f} of {num_queries:.0f} queries failed, more than max_failed_fraction {limit:g} lets: {told}. "
        f"`clearsep failures {out}` lists them; when the cause is mended, --retry-failed tries them again; a higher "
        "max_failed_fraction does without them. What was done stays"
    )
