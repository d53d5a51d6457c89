"""Searches for a schedule on a real Ray: shared artifacts, failed and killed trials, resumed searches, the report."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import ray.tune.experiment
import ray.util
import yaml

from cluster.session import connect
from engine.corpus.sources import read_sources
from engine.settings import build
from engine.storage.lock import lock
from tests.support.chaos_victims import TRAINERS
from tune.config import RunConfig
from tune.demo import sounds as synth
from tune.demo.corpus import write_natural
from tune.search.config import SearchConfig, read_search
from tune.search.progress import PruneLosingTrials
from tune.search.ray_orphans import orphans_removed
from tune.search.report import SearchSummary
from tune.search.run import search
from tune.search.verdict import TrialRow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BASELINES = ["ClearSep 10 dB", "ClearSep 15 dB", "the run's own"]
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A search over a handful of clips with a separator that is hardly trained, in seconds a trial."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = synth.write_corpus(folder, num_per_label={1: 2, 2: 3, 3: 2}, seed=0, duration_s=2.0)
    natural = write_natural(
        read_sources(clips, folds=[2]), folder, num_clips=[(2, 8), (3, 2)], sample_rate_hz=8000, seed=0
    )
    training = {
        "steps": 10,
        "mix": {"batch_size": 4, "segment_s": 0.5},
        "validate_every_steps": 10,
        "num_workers": 0,
    }
    network = {
        **{"channels": 32, "num_blocks": 2, "num_bands": 24, "num_fft": 256, "hop_samples": 128},
        "sample_rate_hz": 8000,
    }
    run = {
        "corpus": str(natural),
        "clean": str(clips),
        "clean_folds": [1],
        "network": network,
        "seed_training": training,
        "distil": training,
        "engine": {"num_gpus_per_actor": 0},
        "schedule": [{"min_stem_level_db": -30.0}],
        "validation": {"clips": str(clips), "folds": [3], "num_mixtures": 4},
    }
    return {
        "run": "clearsep",
        "set": run,
        "iterations": 2,
        "schedule": {
            "min_stem_level_db": {"choose": [-40.0, -30.0]},
            "min_re_sdr_db": {"between": [0, 12], "step": 12, "shapes": ["free"]},
        },
        "trials": 3,
        "searcher": "random",
        "reduction_factor": 1,
        "finalists": 1,
        "repeats": 1,
        "max_concurrent": 1,
    }


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


Found = tuple[Path, SearchSummary, str]


@pytest.fixture(scope="module")
def found(ray_session: None, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The folder of a search, its summary and its log."""
    out, log = tmp_path_factory.mktemp("searches") / "search", io.StringIO()
    handler, logger = logging.StreamHandler(log), logging.getLogger("tune")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with in_folder_of_corpus(settings) as relative:  # trials run in folders of their own
        summary = search(build(SearchConfig, relative), out)
    logger.removeHandler(handler)
    return out, summary, log.getvalue()


@contextlib.contextmanager
def in_folder_of_corpus(settings: Settings) -> Iterator[Settings]:
    """Settings with relative names, while the corpus' folder is the current folder."""
    folder = Path(settings["set"]["corpus"]).parent
    with contextlib.chdir(folder):
        yield json.loads(json.dumps(settings).replace(f"{folder}/", ""))


def copied(found: Found, out: Path, *names: str) -> Path:
    """A folder for another search, with the seed and artifacts of the first, so that they are not built again."""
    for name in names or ("base", "artifacts"):
        shutil.copytree(found[0] / name, out / name)
    return out


def rows_of(values: SearchSummary, kind: str) -> list[TrialRow]:
    return [row for row in values["rows"] if row["kind"] == kind]


def test_a_search_tries_baselines_and_drawn_schedules_and_repeats_the_best(found: Found) -> None:
    _, values, log = found
    baselines, searched = rows_of(values, "baseline"), rows_of(values, "searched")
    assert sorted({row["name"] for row in baselines}) == sorted(BASELINES)
    assert len({row["trial"] for row in searched}) == 3
    assert {row["iteration"] for row in searched} == {1, 2}
    assert all(row["sdri_db"] is not None and row["cost_s"] for row in searched if row["state"] == "finished")
    names = {candidate["name"] for candidate in values["candidates"]}
    assert names >= set(BASELINES) and len(names) == 4
    assert "SDRi" in log


def test_stems_of_losing_trials_are_removed_at_once_and_artifacts_that_may_be_shared_are_kept(tmp_path: Path) -> None:
    best, loser = (ray.tune.experiment.Trial("run", trial_id=name, stub=True) for name in ("best", "loser"))
    for trial, sdri_db in ((best, 5.0), (loser, 4.0)):
        artifacts = [f"{kind}/{trial.trial_id}" for kind in ("passes", "tracks", "separators")] + ["passes/first"]
        for artifact in artifacts:
            (tmp_path / artifact).mkdir(parents=True, exist_ok=True)
        report = {"iteration": 2, "sdri_db": sdri_db, "artifacts": json.dumps(artifacts)}
        trial.update_last_result(report | {"training_iteration": 2, "timestamp": 0, "time_total_s": 1.0})
        trial.set_status(trial.TERMINATED)
    pruner = PruneLosingTrials(tmp_path, ["passes/first"], 1)

    def left() -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}

    pruner.on_trial_complete(trials=[best, loser], trial=loser)
    separators = {f"{kind}/{name}" for kind in ("tracks", "separators") for name in ("best", "loser")}
    assert left() == {"passes/first", "passes/best"} | separators


def test_at_the_end_the_artifacts_of_baselines_and_finalists_are_left(found: Found) -> None:
    out, values, _ = found
    kept = {name for kind in ("baseline", "repeat") for row in rows_of(values, kind) for name in row["artifacts"]}
    folder = out / "artifacts"
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_dir()} == kept
    assert kept < {name for row in values["rows"] for name in row["artifacts"]}


def test_common_artifacts_of_trials_are_built_once(found: Found) -> None:
    out, values, _ = found
    first = {
        name
        for row in rows_of(values, "searched") + rows_of(values, "baseline")
        if row["iteration"] == 1
        for name in row["artifacts"]
        if name.startswith("passes/")
    }
    assert len(first) == 1, "every trial begins with the same pass"
    last = [row for row in values["rows"] if row["iteration"] == 2]
    assert sum(row["built_s"] or 0.0 for row in last) < sum(row["cost_s"] or 0.0 for row in last)
    assert all((out / "artifacts" / name).is_dir() for name in first)


def test_the_search_leaves_a_report_and_a_schedule_to_run(found: Found) -> None:
    out, _, _ = found
    assert {"report.md", "report.html", "best.yaml", "trials.parquet"} <= {path.name for path in out.iterdir()}
    best = build(RunConfig, yaml.safe_load((out / "best.yaml").read_text()))
    assert len(best.schedule) == 2
    assert "ClearSep 10 dB" in (out / "report.md").read_text()
    assert list(out.rglob("events.out.tfevents*")), "TensorBoard's logs come with it"


def test_the_same_search_again_builds_nothing_and_another_is_refused(
    found: Found, settings: Settings, tmp_path: Path
) -> None:
    """Also with its inputs in another folder; a file that was replaced makes it another one."""
    out, values, _ = found
    before = {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*.parquet")}
    with in_folder_of_corpus(settings) as same:
        again = search(build(SearchConfig, same), out)
        assert again["rows"] == values["rows"]
        assert {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*.parquet")} == before
        with pytest.raises(ValueError, match="another trials"):
            search(build(SearchConfig, same | {"trials": 4}), out)
        folder = Path(settings["set"]["corpus"]).parent
        shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
        moved = json.loads(json.dumps(settings).replace(str(folder), str(tmp_path / "moved")))
        assert search(build(SearchConfig, moved), out)["rows"] == values["rows"]
        assert {path: path.stat().st_mtime_ns for path in (out / "artifacts").rglob("*.parquet")} == before
        rows = (tmp_path / "moved" / Path(settings["set"]["corpus"]).name).read_text().splitlines()
        one, other = (tmp_path / "moved" / row.split(",")[0] for row in rows[1:3])
        shutil.copyfile(other, one)
        with pytest.raises(ValueError, match=f"got 1 of .* files that were .* since: '.*{one.name}'"):
            search(build(SearchConfig, moved), out)
        with lock(out, "search"), pytest.raises(ValueError, match="in use"):
            search(build(SearchConfig, same), out)


def test_a_failed_trial_is_recorded_and_the_search_continues(found: Found, settings: Settings, tmp_path: Path) -> None:
    """A schedule that keeps nothing has nothing to learn from."""
    schedule = {"min_re_sdr_db": {"choose": [10.0, 1000.0]}}
    config = build(SearchConfig, settings | {"iterations": 1, "schedule": schedule, "trials": 4, "repeats": 2})
    values = search(config, copied(found, tmp_path / "search"))
    states = {json.loads(row["schedule"])[0]["min_re_sdr_db"]: row for row in rows_of(values, "searched")}
    assert set(states) == {10.0, 1000.0}, "both were drawn"
    assert states[1000.0]["state"] == "failed"
    assert "must keep at least one stem, got none of" in (states[1000.0]["error"] or "")
    assert len({(row["name"], row["seed"]) for row in rows_of(values, "repeat")}) == (3 + 1) * 2
    assert all(len(one["choice_sdri_db"]) == len(one["confirmed_sdri_db"]) == 2 for one in values["candidates"])


def test_the_default_searcher_takes_two_objectives_and_stops_losing_trials(
    found: Found, settings: Settings, tmp_path: Path
) -> None:
    more = {"searcher": "tpe", "reduction_factor": 2, "trials": 2, "objectives": ["sdri_db", "cost_s"]}
    values = search(build(SearchConfig, settings | more), copied(found, tmp_path / "search"))
    searched = rows_of(values, "searched")
    assert len({row["trial"] for row in searched}) == 2
    assert {"finished"} <= {row["state"] for row in searched} <= {"finished", "stopped"}
    assert values["pareto"]


def test_trials_at_the_same_time_wait_for_artifacts_that_another_builds(
    found: Found, settings: Settings, tmp_path: Path
) -> None:
    out = copied(found, tmp_path / "search", "base")
    config = build(SearchConfig, settings | {"max_concurrent": 3, "iterations": 1, "trials": 2})
    values = search(config, out)
    assert {row["error"] for row in values["rows"]} == {None}, "a trial waits for a pass that another builds"
    assert {row["state"] for row in values["rows"]} == {"finished"}
    assert len(list((tmp_path / "search" / "artifacts" / "passes").iterdir())) == 1, "one pass for all"


@ray.remote(num_cpus=0)
class Trial:
    """Holds a placement group, as the trial of a training in another process does."""

    def hold(self) -> Any:
        group = ray.util.placement_group([{"CPU": 0.5}])
        ray.get(group.ready())
        return group


def test_the_placement_group_of_a_killed_actor_is_removed(ray_session: None) -> None:
    with orphans_removed():
        actor, alive = Trial.remote(), Trial.remote()
        group, other = ray.get([actor.hold.remote(), alive.hold.remote()])
        ray.kill(actor)
        until = time.monotonic() + 30
        while ray.util.placement_group_table(group)["state"] != "REMOVED":
            assert time.monotonic() < until
            time.sleep(0.1)
        assert ray.util.placement_group_table(other)["state"] == "CREATED", "its creator lives"
        ray.util.remove_placement_group(other)


COMMAND = [sys.executable, "-m", "clearsep", "tune"]


def started(space: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [*COMMAND, str(space), "-o", str(out)], stdout=file, stderr=file, start_new_session=True
        )


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.2)


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_a_killed_search_resumes_in_each_stage_and_finished_work_stays(
    found: Found, settings: Settings, tmp_path: Path
) -> None:
    """One search, killed -9 among its drawn trials, resumed, killed among its finalists and resumed to its end.

    Somebody plants pickles that run code, where Ray Tune has its own.
    """
    space, log = tmp_path / "space.yaml", tmp_path / "log"
    out = copied(found, tmp_path / "search", "base")
    space.write_text(yaml.safe_dump(settings | {"iterations": 1}))
    before: dict[Path, int] = {}
    for stage in ("search", "finalists"):
        process = started(space, out, log)
        wait_until(lambda stage=stage: f"{stage}: " in log.read_text(), process, log)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        planted = [*out.rglob("*.pkl"), out / f"tune/{stage}/tuner.pkl", out / f"tune/{stage}/trainable.pkl"]
        for path in planted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(RunsCode(str(tmp_path / "code-ran"))))
        before |= {path: path.stat().st_mtime_ns for path in out.glob("artifacts/*/*/separator/weights.safetensors")}
        assert before
    assert started(space, out, log).wait(timeout=600) == 0, log.read_text()[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()}.items() <= before.items()
    rows = read_rows(out)
    assert len({row["trial"] for row in rows if row["kind"] == "searched"}) == settings["trials"]
    assert {row["state"] for row in rows} == {"finished"}
    drawn = [row["params"] for row in rows if row["kind"] == "searched"]
    assert len(set(drawn)) == len(drawn), "a resumed search does not draw the same again"
    assert (out / "report.html").is_file()
    assert not (tmp_path / "code-ran").exists()
    with pytest.raises(FileExistsError):
        (tmp_path / "code-ran").mkdir()
        pickle.loads(planted[0].read_bytes())


def test_the_next_trial_runs_after_one_was_killed_in_the_middle_of_each_step(
    found: Found, settings: Settings, tmp_path: Path
) -> None:
    """Three baselines, killed as they separate, distil and evaluate, keep no actors, training workers or locks."""
    slow = settings["set"]["distil"] | {"num_workers": 1, "use_gpu": False}
    validation = settings["set"]["validation"]
    run = settings["set"] | {"distil": slow, "validation": validation | {"num_mixtures": 60}}
    more = {"confirmation": validation, "set": run, "iterations": 1, "trials": 1, "max_concurrent": 1, "repeats": 1}
    space, log = tmp_path / "space.yaml", tmp_path / "log"
    out = copied(found, tmp_path / "search", "base")
    space.write_text(yaml.safe_dump(settings | more))
    process = started(space, out, log)
    signs = {
        "separate": lambda: any(out.glob("artifacts/passes/*/stems/pass.json")),
        "distil": lambda: bool(workers(process, TRAINERS)),
        "evaluate": lambda: any(out.glob("artifacts/separators/*/separator/separator.json")),
    }
    killed: set[int] = set()
    for sign in signs.values():

        def is_there(sign: Callable[[], bool] = sign) -> bool:
            return sign() and bool({trial.pid for trial in workers(process, "ray::ImplicitFunc")} - killed)

        wait_until(is_there, process, log)
        (trial,) = [trial for trial in workers(process, "ray::ImplicitFunc") if trial.pid not in killed]
        killed.add(trial.pid)
        trial.kill()
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    rows = read_rows(out)
    assert [row["state"] for row in rows if row["kind"] == "baseline"] == ["failed"] * len(signs)
    assert {row["state"] for row in rows if row["kind"] == "searched"} == {"finished"}


def workers(process: subprocess.Popen[bytes], title: str | tuple[str, ...]) -> list[psutil.Process]:
    """Ray's workers of a command, by the first letters of their process title."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(title):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def read_rows(out: Path) -> list[TrialRow]:
    return pq.read_table(out / "trials.parquet").to_pylist()


def test_wrong_settings_of_a_search_are_refused_with_a_remedy(settings: Settings, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(ValueError) as error:
            search(build(SearchConfig, settings | changes), tmp_path / "search")
        return str(error.value)

    assert "sdri_db" in refused(objectives=["speed"])
    assert "trials must be at least 1, got 0" in refused(trials=0)
    assert "searcher must be one of 'tpe' or 'random', got 'grid'" in refused(searcher="grid")
    assert "validation" in refused(set=settings["set"] | {"validation": None})
    assert "min_re_sdr_db" in refused(schedule={"min_re_sdr": {"between": [0, 1]}})
    with pytest.raises(ValueError, match="as YAML"):
        (tmp_path / "space.yaml").write_text("a: [")
        read_search(tmp_path / "space.yaml")
    with pytest.raises(ValueError, match="cannot read"):
        read_search(tmp_path / "none.yaml")
