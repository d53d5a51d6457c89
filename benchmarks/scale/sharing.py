"""What a search costs beside as many runs by themselves, measured in one go; writes the README's table.

    python benchmarks/sharing.py [--out runs/sharing] [--runs 6]

The demo's sounds; two iterations a schedule, 16 schedules drawn on a grid of 16 and the three baselines, once
with early stopping and once without. A run by itself starts from the same seed and shares nothing; their mean is of
some of the schedules, spread over those that were drawn. The script can be stopped and started again; what was being
timed begins anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from setting import say, stamp

from cluster.session import connected
from engine.cli.tables import fill
from engine.settings import build, merged
from engine.storage.files import read_json, write_bytes, write_json
from tune.config import RunConfig
from tune.demo.corpus import write_demo_space
from tune.recipes import tree
from tune.run import begin, check, run
from tune.schedule import resolve
from tune.search.config import SearchConfig, read_search
from tune.search.run import search
from tune.search.verdict import last_rows, sharing

_HERE = Path(__file__).parent
_SCHEDULE = {
    "min_stem_level_db": -20.0,
    "label_floor_fraction": 0.3,
    "min_remix_snr_db": {"between": [0, 9], "step": 3, "shapes": ["free"]},
}


def timed(out: Path, name: str, do: Callable[[Path], Any]) -> dict[str, Any]:
    """What ``do`` returned in a folder of its own, with its wall time; not done again once it is there."""
    path = out / f"{name}.json"
    if not path.is_file():
        say(name)
        shutil.rmtree(out / name, ignore_errors=True)
        started = time.perf_counter()
        values = do(out / name)
        write_json(path, {"values": values, "wall_s": time.perf_counter() - started})
    return read_json(path)


def searched(config: SearchConfig, out: Path) -> dict[str, Any]:
    """The schedules of a search, and how far it got by their number of iterations."""
    rows = search(config, out, say=_hush)["rows"]
    last = [row for row in last_rows(rows) if row["kind"] != "repeat"]
    return {
        "schedules": [row["schedule"] for row in last],
        "num_whole": sum(row["iteration"] == config.iterations for row in last),
        "made_s": sharing(rows)["made_s"],
    }


def alone(own: RunConfig, schedule: str, out: Path) -> None:
    """A run of that schedule that shares nothing."""
    run(replace(own, schedule=resolve(json.loads(schedule))), out, say=_hush)


def _hush(text: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sharing"), help="working folder")
    parser.add_argument("--runs", type=int, default=6, help="runs by themselves to time")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    config = read_search(write_demo_space(out, say=_hush))
    own = build(RunConfig, merged(tree(config.run), config.set))
    with connected():
        say("seed")
        begin(own, check(own), out / "seed", _hush)
        own = replace(own, separator=str(out / "seed" / "iterations" / "0" / "separator"))
        config = replace(
            config,
            set=json.loads(json.dumps(asdict(own))),
            schedule=_SCHEDULE,
            trials=16,
            finalists=1,
            repeats=1,
        )
        found = {}
        runs: list[float] = []
        for part, name in enumerate(("search", "search-whole")):
            one = config if name == "search" else replace(config, reduction_factor=1.0)
            found[name] = timed(out, name, lambda folder, one=one: searched(one, folder))
            different = sorted(set(found["search"]["values"]["schedules"]))
            for number in range(part, arguments.runs, 2):  # half of them after either search: the machine is shared
                schedule = different[number * len(different) // arguments.runs]
                took = timed(out, f"run-{number}", lambda folder, schedule=schedule: alone(own, schedule, folder))
                runs.append(took["wall_s"])
    report(found, runs)


def report(found: dict[str, dict[str, Any]], runs: list[float]) -> None:
    """Write the table."""
    mean, spread = statistics.fmean(runs), statistics.stdev(runs)
    lines = [
        "| search | schedules | different | taken to the end | wall s | as many runs by themselves s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, about in (("search", "as it is by itself: early stopping"), ("search-whole", "without early stopping")):
        values, wall_s = found[name]["values"], found[name]["wall_s"]
        number, different = len(values["schedules"]), len(set(values["schedules"]))
        cells = [about, str(number), str(different), str(values["num_whole"]), f"{wall_s:.0f}", f"{number * mean:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{wall_s / (number * mean):.2f}"]) + " |")
    about = (
        f"Schedules of two iterations on the demo's sounds; all of a search is counted (the start of its trials, the "
        f"finalists), with the baselines; a run by itself takes {mean:.0f} ± {spread:.0f} s ({len(runs)} runs). "
        f"{stamp()}"
    )
    text = "\n".join(lines) + f"\n\n{about}"
    print(text)
    write_bytes(_HERE / "sharing.md", f"# What trials share\n\n{text}\n".encode())
    fill(_HERE.parent / "README.md", "sharing", text)


if __name__ == "__main__":
    main()
