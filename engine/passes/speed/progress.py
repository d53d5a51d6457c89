"""Progress of a pass: one display on a terminal, log lines elsewhere, and an early stop if too many queries fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.cli.display import console
from engine.errors import TooManyFailuresError
from engine.passes.records import Totals, failure_reasons, failure_rows
from engine.passes.speed.ray_metrics import record_shard
from engine.passes.transport import ShardReport
from engine.storage.paths import Location

_LOGGER = logging.getLogger(__name__)
_MIN_QUERIES = 200  # before this many, a fraction of failures says little
_LOG_EVERY_S = 30.0


class PassProgress:
    """Adds up the reports of shards, shows the sums and checks the failures."""

    def __init__(
        self, out: Location, max_failed_fraction: float, before: Totals, *, num_clips: int, doing: str
    ) -> None:
        self.out, self.max_failed_fraction, self.num_clips = out, max_failed_fraction, num_clips
        self.doing = doing
        self.clips_done, self.num_queries, self.num_failed = before.num_clips, before.num_queries, before.num_failed
        self.audio_s, self.started, self.logged_s = 0.0, time.perf_counter(), 0.0
        self.start_s = 0.0
        """Time until the first shard was done."""
        self.reported = set(before.sha256)
        """Names of the shards that are done, as their workers and the records before this start have it."""
        screen, description = console(stderr=True), TextColumn("{task.description}", markup=False)
        columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=screen, disable=not screen.is_terminal)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress while the block runs."""
        with self.progress:
            self.bar = self.progress.add_task(self.doing, total=self.num_clips)
            yield

    def add(self, report: ShardReport) -> None:
        """Add the report of a shard; raises :class:`TooManyFailuresError`."""
        self.reported.add(report.name)
        self.audio_s += report.record["audio_s"]
        self.clips_done += report.record["num_clips"]
        self.num_queries += report.record["num_queries"]
        self.num_failed += report.record["num_failed"]
        elapsed_s = time.perf_counter() - self.started
        self.start_s = self.start_s or elapsed_s
        speed = f"{self.doing}, {self.audio_s / elapsed_s:.0f} s of audio per second"
        total = max(self.num_clips, self.clips_done)
        self.progress.update(self.bar, completed=self.clips_done, total=total, description=speed)
        if self.progress.disable and elapsed_s - self.logged_s > _LOG_EVERY_S:
            self.logged_s = elapsed_s
            _LOGGER.info("%s, %d of about %d clips", speed, self.clips_done, total)
        record_shard(report, clips_waiting=total - self.clips_done)
        if self.num_queries >= _MIN_QUERIES:
            require_few_failures(self.out, self.num_failed, self.num_queries, self.max_failed_fraction)


def require_few_failures(out: Location, num_failed: int, num_queries: int, max_failed_fraction: float) -> None:
    """Raise :class:`TooManyFailuresError` with the reasons if a larger fraction of the queries failed."""
    if num_failed <= max_failed_fraction * num_queries:
        return
    reasons = failure_reasons((row for _, row in failure_rows(out)), most=3)
    causes = ", ".join("{num_queries} in {step}: {error_class} ({example})".format(**reason) for reason in reasons)
    raise TooManyFailuresError(
        f"failed queries must be at most max_failed_fraction = {max_failed_fraction:g} of all, got {num_failed} of "
        f"{num_queries} ({causes}); list them with `clearsep failures {out}`, remove the cause and start the same "
        "command with --retry-failed, or raise max_failed_fraction; finished work is kept"
    )
