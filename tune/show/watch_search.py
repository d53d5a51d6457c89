"""The state of a search at this moment, read from its files: its trials, the best so far, and the passes at work."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, cast

from typing_extensions import TypedDict

from engine.cli.tables import Table, db_text
from engine.storage.files import read_json
from engine.storage.lock import holder_of
from engine.storage.paths import Location, Name, location
from tune.show.watch import DONE, Activity, Snapshot, Watch, activity_text, holder_text, stored_settings

if TYPE_CHECKING:
    from tune.search.progress import TrialRecord  # imports Ray Tune, which takes seconds

_STAGES = ("baselines", "search", "finalists")


class TrialState(TypedDict):
    """A trial of a search."""

    stage: str
    """``baselines``, ``search`` or ``finalists``."""
    trial: str
    name: str
    """Name of a given schedule, or else the number of the trial."""
    state: Literal["running", "finished", "stopped", "failed"]
    iteration: int
    """The iteration that a running trial is at; the last one that another has reported."""
    sdri_db: float | None
    """Of its last report."""
    error: str | None


class SearchActivity(TypedDict):
    """The work that a search is at, as far as its files tell."""

    step: str
    """The stage; ``preparing`` before the first, ``done`` at the end."""
    total: int
    """Trials of the stage in all; 0: not known."""
    num_iterations: int
    """Iterations of a trial."""
    holder: str | None
    """The process that works on it; null: nobody does."""
    best: TrialState | None
    """The trial of the baselines or the search with the highest SDRi so far."""
    passes: dict[str, Activity]
    """Passes that are not finished, by the name of the artifact; trials share them."""
    trials: list[TrialState]


class SearchWatch:
    """Looks at a search again and again."""

    def __init__(self, path: Name) -> None:
        self.folder = location(path)
        self._passes: dict[str, Watch] = {}

    def look(self) -> SearchActivity:
        """The work that it is at."""
        settings = stored_settings(self.folder / "search.yaml", needs={"trials", "iterations"})
        stages = [stage for stage in _STAGES if self._records(stage).is_file()]
        trials = [_state(stage, one) for stage in stages for one in _read(self._records(stage))]
        step, holder = stages[-1] if stages else "preparing", holder_of(self.folder, "search")
        measured = [one for one in trials if one["stage"] != "finalists" and one["sdri_db"] is not None]
        is_running = holder is not None or any(one["state"] == "running" for one in trials)
        step = DONE if (self.folder / "summary.json").is_file() and not is_running else step
        return SearchActivity(
            step=step,
            total=int(settings["trials"]) if step == "search" else 0,
            num_iterations=int(settings["iterations"]),
            holder=holder,
            best=max(measured, key=lambda one: one["sdri_db"] or 0.0, default=None),
            passes=self._unfinished(),
            trials=trials,
        )

    def _records(self, stage: str) -> Location:
        return self.folder / "trials" / f"{stage}.json"

    def _unfinished(self) -> dict[str, Activity]:
        folder = self.folder / "artifacts"
        begun = [path.parent.parent for path in folder.glob("passes/*/stems/pass.json")]
        watches = {f"passes/{one.name}": self._passes.setdefault(one.name, Watch(one)) for one in sorted(begun)}
        looks = {name: watch.look() for name, watch in watches.items()}
        return {name: activity for name, activity in looks.items() if activity["step"] != DONE}

    def snapshot(self) -> Snapshot:
        """Everything that a look shows."""
        activity = self.look()
        rows = [
            [
                *(one["stage"], one["name"], one["state"], f"{one['iteration']} of {activity['num_iterations']}"),
                *(db_text(one["sdri_db"]), one["error"] or ""),
            ]
            for one in activity["trials"]
        ]
        columns = ["stage", "trial", "state", "iteration", "SDRi dB", "error"]
        at_work = [[name, activity_text(one)] for name, one in activity["passes"].items()]
        tables = [
            Table(title="Trials", columns=columns, rows=rows),
            Table(title="Passes at work", columns=["artifact", "work"], rows=at_work),
        ]
        return Snapshot(
            value=cast("dict[str, object]", activity),
            text=_text(activity),
            is_done=activity["step"] == DONE,
            done=sum(one["state"] != "running" for one in _of_stage(activity)),
            total=activity["total"],
            tables=[table for table in tables if table.rows],
        )


def _read(path: Location) -> list[TrialRecord]:
    records: list[TrialRecord] = read_json(path)
    return records


def _state(stage: str, record: TrialRecord) -> TrialState:
    given, reports = record["config"].get("given"), record["reports"]
    return TrialState(
        stage=stage,
        trial=record["trial"],
        name=given["name"] if given is not None else record["trial"],
        state=record["state"],
        iteration=(reports[-1]["iteration"] if reports else 0) + (record["state"] == "running"),
        sdri_db=reports[-1]["sdri_db"] if reports else None,
        error=record["error"],
    )


def _of_stage(activity: SearchActivity) -> list[TrialState]:
    """The trials of the current stage; at the end all."""
    return [one for one in activity["trials"] if activity["step"] in (DONE, one["stage"])]


def _text(activity: SearchActivity) -> str:
    """The work in one line."""
    best, trials, parts = activity["best"], _of_stage(activity), []
    counts = Counter(one["state"] for one in trials)
    if trials:
        total = f" of {activity['total']}" if activity["total"] else ""
        parts = [f"{len(trials) - counts['running']}{total} trials ended"]
        parts += [f"{counts[state]} {state}" for state in ("stopped", "failed", "running") if counts[state]]
    parts += [
        f"{one['name']} at iteration {one['iteration']} of {activity['num_iterations']}"
        for one in trials
        if one["state"] == "running"
    ]
    if best is not None:
        reported = best["iteration"] - (best["state"] == "running")
        parts.append(f"best SDRi {best['sdri_db']:.2f} dB ({best['name']}, iteration {reported})")
    if activity["step"] != DONE:
        parts.append(holder_text(activity["holder"]))
    return ", ".join([activity["step"], *parts])
