"""The state of a run or a pass at this moment, read from its files: by anybody who reaches them, while others work.

A search has a watch of its own (``tune/show/watch_search.py``), which is shown in the same way.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text
from typing_extensions import TypedDict

from engine.cli.console import print_result
from engine.cli.display import console, rich_table, shown
from engine.cli.tables import Table
from engine.passes.records import ShardRecord, done_names, find_record, in_threads
from engine.passes.slices import holders
from engine.passes.tasks import Tasks
from engine.storage.documents import MAX_SETTINGS_BYTES, bounded, parse_yaml
from engine.storage.files import open_binary, read_record
from engine.storage.lock import holder_of
from engine.storage.paths import Location, Name, location
from tune.run import RunSummary
from tune.steps.labels import TAGS
from tune.tables import iterations_table

DONE = "done"
"""The step of a run or a pass that has ended."""


class Activity(TypedDict):
    """The work that a run or a pass is at, as far as its files tell."""

    step: str
    """Such as ``iteration 2: separating``; ``done`` at the end."""
    done: int
    """Clips of a pass, or steps of a training up to its last saved state."""
    total: int
    """Clips or steps in all; 0: not known."""
    unit: str
    """``clips`` or ``steps``; empty for work that is not counted."""
    num_failed: int
    """Queries of the pass that failed so far."""
    audio_per_s: float | None
    """Seconds of audio that the pass did in a second since the watch began; null before anything was done."""
    holder: str | None
    """The process that works on it, and the number of further ones; null: nobody does."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a look shows."""

    value: Mapping[str, object]
    """For ``--json``."""
    text: str
    """The work in one line."""
    is_done: bool
    done: int
    total: int
    """Of the work; 0: not known."""
    tables: Sequence[Table]


class Watched(Protocol):
    """A run, a pass or a search that is watched."""

    def snapshot(self) -> Snapshot:
        """Look at it."""


@dataclass(kw_only=True)
class _Pass:
    """A pass that is watched: the records of its shards that were read, and the rate since then."""

    records: dict[str, ShardRecord] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    audio_s_before: float | None = None


class Watch:
    """Looks at a run or a pass again and again; of the records of shards it reads those that are new."""

    def __init__(self, path: Name) -> None:
        """Raises ``ValueError`` for a path that is neither a run nor a pass."""
        self.folder = location(path)
        self.is_run = (self.folder / "config.yaml").is_file()
        if not (self.is_run or (self.folder / "stems" / "pass.json").is_file()):
            raise ValueError(
                f"{path} must be a run, a pass or a search, got a path without config.yaml, stems/pass.json and "
                "search.yaml; give its folder, once it has begun"
            )
        self._passes: dict[str, _Pass] = {}

    def look(self) -> Activity:
        """The work that it is at."""
        if not self.is_run:
            return self._pass(self.folder, "separating")
        return self._run(holder_of(self.folder, "run"))

    def snapshot(self) -> Snapshot:
        """The work that it is at, with the finished iterations of a run."""
        activity, summary = self.look(), self._summary()
        table = iterations_table(summary)
        return Snapshot(
            value={**activity, **summary},
            text=activity_text(activity),
            is_done=activity["step"] == DONE,
            done=activity["done"],
            total=activity["total"],
            tables=[table] if table.rows else [],
        )

    def _summary(self) -> RunSummary:
        path = self.folder / "summary.json"
        return read_record(path, RunSummary) if self.is_run and path.is_file() else RunSummary(iterations=[])

    def _run(self, holder: str | None) -> Activity:
        settings = stored_settings(self.folder / "config.yaml", needs={"schedule", "seed_training", "distil"})
        folder = self.folder / "iterations"
        numbers = range(len(settings["schedule"]) + 1)
        open_ = (one for one in numbers if not (folder / str(one) / "iteration.json").is_file())
        number = next(open_, None)
        if number is None:
            return _activity(DONE, None)
        if number == 0:
            is_given, of_seed = settings.get("separator") is not None, settings["seed_training"]
            return _training(folder / "0", "iteration 0: training the seed", of_seed, holder, is_given=is_given)
        out, name, tags = folder / str(number), f"iteration {number}", folder / "0" / TAGS
        if number == 1 and (tags / "stems" / "pass.json").is_file() and not _is_closed(tags):
            return self._pass(tags, "iteration 0: tagging")
        if (out / "stems" / "pass.json").is_file() and not _is_closed(out):
            return self._pass(out, f"{name}: separating")
        if not (out / "tracks" / "manifest.json").is_file():
            return _activity(f"{name}: {'filtering' if _is_closed(out) else 'preparing'}", holder)
        return _training(out, f"{name}: distilling", settings["distil"], holder)

    def _pass(self, out: Location, step: str) -> Activity:
        if _is_closed(out):
            return _activity(DONE, None)
        one = self._passes.setdefault(str(out), _Pass())
        new = sorted({*done_names(out)} - one.records.keys())
        found = in_threads(functools.partial(find_record, out), new)
        one.records |= {name: record for name, record in zip(new, found, strict=True) if record is not None}
        audio_s = sum(record["audio_s"] for record in one.records.values())
        if one.audio_s_before is None:
            one.audio_s_before, one.began = audio_s, time.monotonic()
        new_s, counts = audio_s - one.audio_s_before, Tasks(out / "corpus").counts()
        done = sum(record["num_clips"] for record in one.records.values())
        first, *more = [*holders(out), None]
        return {
            **_activity(step, f"{first} and {len(more) - 1} more" if len(more) > 1 else first),
            "done": done,
            "total": max(done, counts["num_clips"]) if counts is not None else 0,  # clips that failed are tried again
            "unit": "clips",
            "num_failed": sum(record["num_failed"] for record in one.records.values()),
            "audio_per_s": new_s / (time.monotonic() - one.began) if new_s else None,
        }


def stored_settings(path: Location, *, needs: Collection[str]) -> Mapping[str, Any]:
    """The settings of a run or a search; raises ``ValueError`` if they are damaged."""
    try:
        with open_binary(path) as file:
            settings = parse_yaml(bounded(file, MAX_SETTINGS_BYTES))
    except ValueError as error:
        raise ValueError(f"cannot read {path} ({error}); start the command of its folder again") from error
    if not isinstance(settings, dict) or not settings.keys() >= set(needs):
        raise ValueError(f"{path} must have settings of a run or a search, got others; give the folder of one")
    return settings


def _is_closed(out: Location) -> bool:
    return (out / "stems" / "manifest.json").is_file()


def _training(
    folder: Location, step: str, settings: Mapping[str, Any], holder: str | None, *, is_given: bool = False
) -> Activity:
    """The training of an iteration's separator, or, when that is there or was given, its evaluation."""
    if is_given or (folder / "separator" / "separator.json").is_file():
        return _activity(f"{step.partition(':')[0]}: evaluating", holder)
    states = (folder / ".separator-training").glob("*/state-*.pt")
    done = max((int(path.name.split("-")[1]) for path in states), default=0)
    return {**_activity(step, holder), "done": done, "total": int(settings["steps"]), "unit": "steps"}


def _activity(step: str, holder: str | None) -> Activity:
    return Activity(step=step, done=0, total=0, unit="", num_failed=0, audio_per_s=None, holder=holder)


def watch_until_done(watched: Watched, *, every_s: float, once: bool = False) -> None:
    """Show a run, a pass or a search until it is done, or ``once``: in place on a terminal, else a line a change."""
    screen, before = console(), ""
    with Live(console=screen, auto_refresh=False) as live:
        while True:
            seen = watched.snapshot()
            if screen.is_terminal:
                live.update(_picture(seen), refresh=True)
            elif seen.text != before:
                screen.print(seen.text, soft_wrap=True)
            if once or seen.is_done:
                break
            before = seen.text
            time.sleep(every_s)
    if not screen.is_terminal:
        print_result(lambda: seen.tables, None, False)


def _picture(seen: Snapshot) -> RenderableType:
    tables = [rich_table(table.title, table.columns, table.rows) for table in seen.tables]
    bar = [ProgressBar(total=seen.total, completed=seen.done, width=60)] if seen.total else []
    return Group(*tables, Text(shown(seen.text)), *bar)


def activity_text(activity: Activity) -> str:
    """An activity in one line."""
    if activity["step"] == DONE:
        return DONE
    parts = []
    if activity["unit"]:
        total = f" of {activity['total']:,}" if activity["total"] else ""
        parts.append(f"{activity['done']:,}{total} {activity['unit']}")
    if activity["audio_per_s"] is not None:
        parts.append(f"{activity['audio_per_s']:.0f} s of audio a second")
    if activity["num_failed"]:
        parts.append(f"{activity['num_failed']:,} queries failed")
    return ", ".join([activity["step"], *parts, holder_text(activity["holder"])])


def holder_text(holder: str | None) -> str:
    """The process that works on something; null: nobody does."""
    return "nobody works on it: start the same command to resume" if holder is None else f"by {holder}"
